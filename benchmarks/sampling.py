"""Unconditional sampling of whole images: this project's decoders against Hugging Face's `generate`, all cached.

    python benchmarks/sampling.py --batch 4 16 64 --rounds 3 --out sampling.json

The same network and weights, temperature 1 from the full distribution, all tokens of every image; rows take turns, each
side in a process of its own (on a GPU one at a time, Hugging Face's with `--peer-batch` images; then images/s are
compared). All draw greedily, too: every row must give the same tokens, or there are no figures. `--ways` adds this
project's slower ways to the one it takes by itself; `reduce-overhead` compiles and records its GPU step by
torch.compile, `single-graph` records it by hand, both once for all positions.
"""

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import machine
import torch
from networks import SIZES, hugging_face, our_net
from torch import Tensor

from igpt.model import decode, dispatch
from igpt.model.config import SIZES as SUPPORTED
from igpt.model.config import GPTConfig
from igpt.model.generate import Sampling, generate
from igpt.model.gpt import GPT
from igpt.model.graphs import RecordedStep
from igpt.utils import keyed

GREEDY = 64  # tokens that are compared, of the first two images


def igpt_samples(net: GPT, batch: int, way: str, *, greedy: bool = False) -> Callable[[], Tensor]:
    rng_keys = keyed.per_example_keys(keyed.key(0, "sample"), torch.arange(batch))
    uniforms = keyed.uniform(rng_keys, net.n_ctx).to(net.wte.device)
    sampling = Sampling(1.0, 1 if greedy else None, None)

    def run() -> Tensor:
        with refuse_fallbacks():
            return generate(net, uniforms, sampling, backend=way)

    return run


class _Refuse(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise SystemExit(f"{record.getMessage()}: no figures")


@contextmanager
def refuse_fallbacks() -> Iterator[None]:
    """Context manager: ends the benchmark where the decoder takes another way than the one asked for, and warns."""
    log, handler = logging.getLogger("igpt.model"), _Refuse(logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def peer_samples(net: Any, size: str, batch: int, *, greedy: bool = False) -> Callable[[], Tensor]:
    """Their `generate` with its key/value cache, as its documentation calls it."""
    n_ctx, n_vocab = SIZES[size][3:5]
    length = min(n_ctx, GREEDY) if greedy else n_ctx
    start = torch.full((batch, 1), n_vocab, device=net.device)
    drawing: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0}

    @torch.inference_mode()
    def run() -> Tensor:
        images = net.generate(
            input_ids=start, max_length=length + 1, attention_mask=torch.ones_like(start), pad_token_id=n_vocab,
            suppress_tokens=[n_vocab], use_cache=True, **drawing,
        )  # fmt: skip
        return images[:, 1:]

    return run


class CompiledStep(RecordedStep):
    """The step of `RecordedStep` as torch.compile(mode="reduce-overhead") records it, for all positions at once."""

    def _record(self) -> None:
        held = (self.tokens, self.position, self.mask, self.table, self.head, *self.keys, *self.values)
        for tensor in (*held, *(weight for weights in self.weights for weight in weights)):
            torch._dynamo.mark_static_address(tensor)  # is written in place, or read without a copy of it
        self._end = self.net.n_ctx
        step = torch.compile(self._step, mode="reduce-overhead", fullgraph=True, dynamic=False)

        def replay() -> None:
            torch.compiler.cudagraph_mark_step_begin()
            with torch.compiler.set_stance("default"):  # `generate` forces eager
                step()

        self._replay = replay


class SingleGraph(RecordedStep):
    """The step of `RecordedStep` with one graph for all positions, as `CompiledStep`."""

    def _record(self) -> None:
        self._end = self.net.n_ctx
        super()._record()


STEPS: dict[str, type[RecordedStep]] = {"reduce-overhead": CompiledStep, "single-graph": SingleGraph}


def add_backends() -> None:
    """Makes the steps above known to `generate(backend=)`."""
    decode.BACKENDS.update({name: decode.DecodeBackend(step, SUPPORTED) for name, step in STEPS.items()})


def build_side(
    who: str, size: str, batches: Sequence[int], ways: Sequence[str], precision: str
) -> dict[str, machine.Run]:
    """Rows of `who`, igpt in each of `ways` or hf: first `greedy`, float32, then one for each batch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: dict[str, machine.Run] = {}
    if who == "hf":
        peer = hugging_face(size, use_cache=True).to(device).eval()
        rows["greedy hf"] = run_cut(peer_samples(peer, size, 2, greedy=True))
        for batch in batches:
            rows[f"{batch} hf"] = run_at(precision, device, peer_samples(peer, size, batch))
        return rows
    add_backends()
    net = our_net(size).to(device).eval()
    for way in ways:
        rows[f"greedy {name_way(net, way)}"] = run_cut(igpt_samples(net, 2, way, greedy=True))
        for batch in batches:
            rows[f"{batch} {name_way(net, way)}"] = run_at(precision, device, igpt_samples(net, batch, way))
    return rows


def name_way(net: GPT, way: str) -> str:
    if way != "auto":
        return f"igpt {way}"
    return f"igpt ({dispatch.decode_backend(net.wte, n_embd=net.n_embd, n_head=net.n_head)})"


def run_cut(samples: Callable[[], Tensor]) -> machine.Run:
    return machine.with_timer(lambda: samples()[:, :GREEDY].cpu())


def run_at(precision: str, device: str, samples: Callable[[], Tensor]) -> machine.Run:
    """Draws at a precision; the result is the shape of what was drawn."""

    def run() -> tuple[int, ...]:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            return tuple(samples().shape)

    return machine.with_timer(run)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="a")
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--peer-batch", type=int, nargs="+", help="of Hugging Face's, where not the same, one each")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: both under autocast")
    parser.add_argument("--rounds", type=int, default=3)
    ways = [*dispatch.DECODING, *STEPS]
    parser.add_argument("--ways", nargs="+", choices=ways, default=[], help="ours in these ways, too")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    peer_batches = args.peer_batch or args.batch
    if len(peer_batches) != len(args.batch):
        raise SystemExit(f"--peer-batch has {len(peer_batches)} numbers, --batch {len(args.batch)}: give one for each")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    n_layer, n_embd, n_head, n_ctx, n_vocab, _ = SIZES[args.size]
    with torch.device("meta"):
        net = GPT(GPTConfig(n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_ctx=n_ctx, n_vocab=n_vocab, causal=True))
    n_weight = sum(p.numel() for p in net.parameters()) - n_vocab * n_embd - n_ctx * n_embd  # tables are looked up
    limits = machine.limits(device)
    usual = dispatch.decode_backend(torch.empty(0, device=device), n_embd=n_embd, n_head=n_head)
    sides = [(build_side, "igpt", args.size, args.batch, [way], args.precision) for way in
             ("auto", *(way for way in args.ways if way != usual))]  # fmt: skip
    sides.append((build_side, "hf", args.size, peer_batches, [], args.precision))
    times = machine.take_turns(sides, args.rounds, warm_up=0)  # a thousand steps warm up by themselves
    greedy = {name.partition(" ")[2]: row.result for name, row in times.items() if name.startswith("greedy ")}
    for name, tokens in greedy.items():
        if not torch.equal(tokens, greedy["hf"]):
            raise SystemExit(f"greedy tokens of {name} and of Hugging Face differ: no figures")
    print(f"{machine.about()}\n{limits}; the first {GREEDY} greedy tokens of all rows are the same")
    report: dict[str, Any] = {"size": args.size, "precision": args.precision, "limits": limits, "batches": {}}
    width = {"fp32": 4, "bf16": 2}[args.precision]
    for batch, few in zip(args.batch, peer_batches, strict=True):
        rows = {name: times[f"{few if name == 'hf' else batch} {name}"] for name in greedy}
        # GiB a step: all weights, half of a full cache
        read = width * (n_weight + batch * n_layer * n_ctx * n_embd) / 2**30
        floor = read / limits.gib_per_s
        print(f"\nbatch {batch}, {n_ctx} tokens; reading weights and cache takes {1e3 * floor:.2f} ms a step")
        print("| row | images | s | min – max | tokens/s | ms a step | of the bandwidth | images/s against hf |")
        print("|---|---|---|---|---|---|---|---|")
        for name, row in rows.items():
            images, s = few if name == "hf" else batch, row.median
            share = "" if name == "hf" and few != batch else f"{floor * n_ctx / s:.2f}"
            ratio = (images / s) / (few / rows["hf"].median)
            print(
                f"| {name} | {images} | {s:.2f} | {min(row.seconds):.2f} – {max(row.seconds):.2f} | "
                f"{images * n_ctx / s:,.0f} | {1e3 * s / n_ctx:.2f} | {share} | {ratio:.2f}× |",
                flush=True,
            )
        report["batches"][batch] = {"rows": rows, "peer_batch": few, "floor_ms": 1e3 * floor}
    machine.write(args.out, report)
    return report


if __name__ == "__main__":
    main()
