"""Part `train` of `gpu.py`: training steps of networks alone on the card, with a batch that fills it, and what bounds
them.
"""

import argparse
import bisect
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import machine
import torch
import torch.nn.functional as F
import train_step
from gpu_units import Unit
from networks import SIZES
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from igpt.metric.throughput import train_flops_per_image
from igpt.model import dispatch
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.training import cost_estimate
from igpt.training.optimizers import make_adam

WAYS = ["blocks", "eager", "trunk"]  # what is compiled
if hasattr(GPT, "set_residual"):
    WAYS.append("residual")  # blocks, with a residual stream in bfloat16
FULL = 0.92  # share of the free memory that a batch may be expected to take
MOST = 4096  # images
KINDS = {  # of kernels, by parts of their names; the first that fits
    "optimiser": ("adam", "multi_tensor"),
    "attention": ("flash", "fmha", "attention", "sdpa", "attend"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "::mm", "addmm", "bmm", "linear"),
    "copies": ("memcpy", "memset"),
}
REST = "elementwise"


def describe_network(size: str) -> GPTConfig:
    n_layer, n_embd, n_head, n_ctx, n_vocab, _ = SIZES[size]
    return GPTConfig(n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_ctx=n_ctx, n_vocab=n_vocab, causal=True)


def plan_memory(
    network: GPTConfig, images: int, *, precision: str = "bf16-mixed", recompute: bool = False, device: str,
    way: str = "eager",
) -> float:  # fmt: skip
    """Bytes that the plan (`trainer.plan=true`) expects a step of so many images to take on one device."""
    dtype = torch.float32 if precision == "32-true" else torch.bfloat16
    backend = dispatch.unfused_attention_backend(torch.device(device), dtype, t=network.n_ctx, causal=network.causal)
    return cost_estimate.estimate_cost(
        network, batch_size=images, micro_batch=images, steps=1, devices=1, strategy="ddp", precision=precision,
        recompute=recompute, backends=[backend] * network.n_layer, on_gpu=device == "cuda",
        residual="bfloat16" if way == "residual" else "float32", is_compiled=way != "eager",
    ).memory  # fmt: skip


def choose_batch(network: GPTConfig, room: float, *, device: str, way: str = "eager") -> int:
    """The most images whose step is expected to fit into `room` bytes; above 16 a multiple of 8; at least one."""
    sizes = [*range(1, 16), *range(16, MOST + 1, 8)]
    most = bisect.bisect_right(sizes, room, key=lambda n: plan_memory(network, n, device=device, way=way))
    return sizes[max(0, most - 1)]


class TrainingStep:
    """A network with every weight drawn on its device, fused Adam, and the step that trains it on fixed tokens."""

    def __init__(
        self, network: GPTConfig, device: str, *, way: str = "eager", precision: str = "bf16-mixed",
        recompute: bool = False,
    ) -> None:  # fmt: skip
        self.device, self.network, self.way, self.mixed = device, network, way, precision == "bf16-mixed"
        with torch.device(device):
            self.net = GPT(network)
        if precision == "bf16-true":
            self.net.to(torch.bfloat16)
        with torch.no_grad():
            for weight in self.net.parameters():
                weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(0, 0.02)
        self.net.checkpointing = recompute
        if way == "residual":
            self.net.set_residual(torch.bfloat16)
        if way in ("blocks", "residual"):
            for block in self.net.blocks:
                block.compile()
        elif way == "trunk":
            trunk: Any = torch.compile(self.net.trunk)
            self.net.trunk = trunk  # type: ignore[method-assign]  # of this network only
        self.optimizer = make_adam(self.net.parameters(), learning_rate=1e-4, beta1=0.9, beta2=0.95, weight_decay=0.0)

    def __call__(self, tokens: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.mixed):
            loss = F.cross_entropy(self.net(tokens).flatten(0, 1).float(), tokens.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def draw_tokens(self, images: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.network.n_vocab, (images, self.network.n_ctx), generator=generator).to(self.device)


def measure_peak(seconds: float, device: str) -> dict[str, Any]:
    """TFLOP/s of large bfloat16 products, and the data sheet's."""
    name = torch.cuda.get_device_name(0) if device == "cuda" else ""
    return {
        "products_tflops": machine.peak_gflops(torch.bfloat16, "highest", device) / 1e3,
        "data_sheet_tflops": machine.data_sheet_tflops(name),
    }


def find_room(device: str) -> float:
    """Bytes that are free on the card; of a CPU enough for a few images of the tiny network."""
    return FULL * torch.cuda.mem_get_info()[0] if device == "cuda" else 4e6


def fill_card(step: TrainingStep, warm_up: int) -> tuple[Tensor, list[int]]:
    """Tokens of the largest batch that runs, after `warm_up` steps of it, and the batches that ran out of memory.

    Begins with what the plan expects to fit beside what is taken already; each failure takes a quarter off.
    """
    taken = torch.cuda.memory_allocated() if step.device == "cuda" else 0
    room, failed = find_room(step.device) + taken, list[int]()
    images = choose_batch(step.network, room, device=step.device, way=step.way)
    while True:
        tokens = step.draw_tokens(images)
        try:
            for _ in range(warm_up):
                step(tokens)
            return tokens, failed
        except torch.OutOfMemoryError:
            if images == 1:
                raise
        failed.append(images)
        images = max(1, images * 3 // 4)
        step.optimizer.zero_grad(set_to_none=True)
        torch.compiler.reset()  # else the compiler takes the batch to vary from here on: slower kernels
        torch.cuda.empty_cache()


def measure_step(
    seconds: float, size: str, way: str, device: str, *, rounds: int = 5, in_row: int = 4
) -> dict[str, Any]:
    """Images/s and TFLOP/s of `rounds` times `in_row` steps without a pause, and the memory they take."""
    network = describe_network(size)
    step = TrainingStep(network, device, way=way)
    tokens, failed = fill_card(step, 3)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run = machine.with_timer(lambda: [step(tokens) for _ in range(in_row)][-1].item())
    times = [run()[0] / in_row for _ in range(rounds)]
    images, median = len(tokens), statistics.median(times)
    return {
        "images": images, "out_of_memory": failed, "ms": [1e3 * t for t in times], "images_per_s": images / median,
        "tflops": images * train_flops_per_image(network) / median / 1e12,
        "planned_bytes": plan_memory(network, images, device=device, way=way),
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }  # fmt: skip


def classify(kernel: str) -> str:
    """The kind of a kernel, or of a CPU's operator, by its name: a key of `KINDS`, else `REST`."""
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), REST)


def select_times(events: Iterable[Any], device: str) -> dict[str, float]:
    """Microseconds of each kernel (of a CPU: operator) itself, by name, of a profiler's averages.

    On a GPU not those of regions that the code names, as an optimiser's step: they last while their kernels run.
    """
    on_gpu = device == "cuda"
    return {
        event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in events
        if (event.device_type.name == "CUDA") == on_gpu and not (on_gpu and event.is_user_annotation)
    }


def profile_step(seconds: float, size: str, way: str, device: str, folder: Path, *, steps: int = 3) -> dict[str, Any]:
    """Shares of the steps' time by kind of kernel, idle included; the longest kernels go to FOLDER/profile_SIZE.txt."""
    step = TrainingStep(describe_network(size), device, way=way)
    tokens, _ = fill_card(step, 3)
    activities = [ProfilerActivity.CPU] if device == "cpu" else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        seconds_taken, _ = machine.with_timer(lambda: [step(tokens) for _ in range(steps)][-1].item())()
    times = select_times(profiler.key_averages(), device)
    shares = dict.fromkeys((*KINDS, REST), 0.0)
    for name, microseconds in times.items():
        shares[classify(name)] += microseconds / 1e6 / seconds_taken
    shares["idle"] = max(0.0, 1 - sum(shares.values()))
    longest = sorted(times.items(), key=lambda item: -item[1])[:40]
    lines = [f"{t / 1e3 / steps:9.3f} ms a step  {classify(name):12} {name}" for name, t in longest]
    head = f"size {size}, {len(tokens)} images, {way}: {1e3 * seconds_taken / steps:.1f} ms a step under the profiler"
    (folder / f"profile_{size}.txt").write_text("\n".join([head, *lines]) + "\n")
    return {"images": len(tokens), "way": way, "ms": 1e3 * seconds_taken / steps, "shares": shares}


def compare_with_peer(seconds: float, size: str, batch: int, peer_batch: int, *few: str) -> dict[str, Any]:
    """`train_step.py` with Hugging Face's network, one side alive at a time: its rows."""
    sizes = ["--size", size, "--batch", str(batch), "--peer-batch", str(peer_batch)]
    rows: dict[str, Any] = train_step.main([*sizes, "--precision", "bf16", *few])["rows"]
    return rows


def list_units(args: argparse.Namespace) -> list[Unit]:
    if args.tiny:
        units = [Unit("train", "peak", 1, measure_peak, (args.device,))]
        units += [Unit("train", f"tiny {way}", 1, measure_step, ("tiny", way, args.device)) for way in WAYS]
        units.append(Unit("train", "tiny profile", 1, profile_step, ("tiny", "eager", args.device, args.out)))
        peer = ("tiny", 4, 2, "--rounds", "1", "--no-compiled")
        return [*units, Unit("train", "tiny beside Hugging Face", 1, compare_with_peer, peer)]
    estimates = {"s": 60, "m": 75, "l": 90, "xl": 75}  # seconds; compiled ways take twice as long
    units = [Unit("train", "peak", 30, measure_peak, (args.device,))]
    for way in WAYS:
        slow = 1 if way == "eager" else 2
        units += [
            Unit("train", f"{size} {way}", slow * seconds, measure_step, (size, way, args.device))
            for size, seconds in estimates.items()
        ]
    units += [
        Unit("train", f"{size} profile", 2 * seconds, profile_step, (size, "blocks", args.device, args.out))
        for size, seconds in estimates.items()
    ]
    return [*units, Unit("train", "s beside Hugging Face", 180, compare_with_peer, ("s", 64, 8, "--rounds", "5"))]


def make_table(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Rows of steps, then what bounds them, then the comparison."""
    results = {name: entry["result"] for name, entry in figures.items() if "result" in entry}
    if not results:
        return []
    peak = results.get("peak", {})
    sheet, products = peak.get("data_sheet_tflops"), peak.get("products_tflops")
    known = [f"{products:,.0f} TFLOP/s in bfloat16 products of 8192³" if products else "products not measured"]
    known += [f"{sheet:,.0f} by the data sheet"] if sheet else []
    lines = [f"This card: {', '.join(known)}.", ""]
    steps = {name: r for name, r in results.items() if "tflops" in r}
    if steps:
        lines += ["| network, compiled | images | ms a step | images/s | TFLOP/s | of data sheet | of products |"]
        lines += ["|---|---|---|---|---|---|---|"]
    for name, r in steps.items():
        shares = [f"{r['tflops'] / peak_tflops:.2f}" if peak_tflops else "–" for peak_tflops in (sheet, products)]
        ms = f"{statistics.median(r['ms']):.1f} ({min(r['ms']):.1f} – {max(r['ms']):.1f})"
        numbers = f"{r['images']} | {ms} | {r['images_per_s']:.1f} | {r['tflops']:.1f}"
        lines.append(f"| {name} | {numbers} | {' | '.join(shares)} |")
    profiles = {name: r for name, r in results.items() if "shares" in r}
    if profiles:
        kinds = list(next(iter(profiles.values()))["shares"])
        lines += ["", f"| share of a step | images | {' | '.join(kinds)} | most |", "|" + "---|" * (len(kinds) + 3)]
    for name, r in profiles.items():
        shares = [f"{share:.0%}" for share in r["shares"].values()]
        lines.append(f"| {name} | {r['images']} | {' | '.join(shares)} | {max(r['shares'], key=r['shares'].get)} |")
    peers = {name: r for name, r in results.items() if name.endswith("Hugging Face")}
    for rows in peers.values():
        lines += ["", "| training step | images | ms | images/s against Hugging Face |", "|---|---|---|---|"]
        for row, r in rows.items():
            ms = 1e3 * statistics.median(r["seconds"])
            lines.append(f"| {row} | {r['images']} | {ms:.1f} | {r['against_hf']:.2f}× |")
    return lines
