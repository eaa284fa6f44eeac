"""One training step (forward, backward, Adam) of this network, a plain rewrite and Hugging Face's.

    python benchmarks/train_step.py --size a --rounds 3 --out a.json

Every row has the same weights to begin with, token ids, batch, loss over all positions and fused Adam; all must have
the same losses in the first two steps, or there are no figures. Rows take turns, round by round, so that a machine that
speeds up or slows down does so for all; the first round is a warm-up for all and is not counted. Each side is a process
of its own, on a GPU one at a time; ours keeps freed memory (`disable_malloc_trim`), as our training does, Hugging
Face's is as it ships (`--hold-peer`: with our setting, too). With `--peer-batch` sides are compared by images/s, their
losses by rows of ours with that batch. `fp32+medium` is `torch.set_float32_matmul_precision("medium")`, which users of
any side can set; where that rounds what is multiplied, rows are called `bf16-products` (CPUs with AMX) or
`tf32-products` (GPUs).
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import torch
import torch.nn.functional as F
from networks import SIZES, HuggingFace, our_net, plain_net, step_flops, token_ids
from torch import Tensor, nn

from igpt.distributed.process_state import float32_matmul_precision
from igpt.model import dispatch
from igpt.training.hardware import disable_malloc_trim

ROUNDED = (1e-2, 3e-2)  # nats, of the losses of the first two steps
TOLERANCE = {"bf16": ROUNDED, "bf16-products": ROUNDED}  # of the others:
EXACT = (1e-4, 5e-3)  # one step of Adam turns the sign of a gradient's rounding into a step


def make_step(net: nn.Module, tokens: Tensor, label: str) -> machine.Run:
    """What trains one step, at the precision of a label; its result is the losses of the very first two."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    device, bf16 = tokens.device.type, label == "bf16"
    first: list[float] = []

    def step() -> float:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(net(tokens).flatten(0, 1).float(), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if len(first) < 2:
            first.append(loss.item())
        return loss.item()

    def run() -> tuple[float, Any]:
        with float32_matmul_precision("medium" if label == machine.medium(device) else "highest"):
            step()  # the step before the timed one brings this row's data back into the caches
            seconds, _ = machine.with_timer(step)()
        return seconds, first

    return run


def labels(precisions: Sequence[str], device: str) -> list[str]:
    """The rows of each precision: float32 products as PyTorch ships them and as its fastest, bfloat16."""
    return [label for p in precisions for label in (("fp32", machine.medium(device)) if p == "fp32" else ("bf16",))]


def our_rows(size: str, precisions: list[str], options: dict[str, Any]) -> dict[str, machine.Run]:
    """This project's rows, eager and compiled, as its training runs; with `plain` the plain rewrite's too."""
    if options["hold"]:
        disable_malloc_trim()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, rows = token_ids(size, device, options["batch"]), {}
    for label in labels(precisions, device):
        for compiled in options["compiled"]:
            how = " compiled" if compiled else ""
            net = our_net(size, compiled=compiled, attention=options["attention"]).to(device)
            rows[f"igpt{how}{options['of']} {label}"] = make_step(net, tokens, label)
            if options["plain"]:
                rows[f"plain{how} {label}"] = make_step(plain_net(size, compiled=compiled).to(device), tokens, label)
    return rows


def peer_rows(size: str, precisions: list[str], options: dict[str, Any], hold: bool) -> dict[str, machine.Run]:
    """Hugging Face's rows; `hold`: with freed memory kept by the process, as ours."""
    if hold:
        disable_malloc_trim()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = token_ids(size, device, options["batch"])
    return {
        f"hf{' held' if hold else ''} {label}": make_step(HuggingFace(size).to(device), tokens, label)
        for label in labels(precisions, device)
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="c")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, help="images of a step, where not the size's own")
    parser.add_argument("--peer-batch", type=int, help="images of a step of Hugging Face's, where not the same")
    parser.add_argument("--precision", choices=["fp32", "bf16"], nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--no-peer", action="store_true", help="leave Hugging Face out")
    parser.add_argument("--no-compiled", action="store_true", help="leave compiled rows out")
    parser.add_argument("--plain", action="store_true", help="the plain rewrite, too")
    parser.add_argument("--hold-peer", action="store_true", help="Hugging Face also with our setting of memory")
    parser.add_argument("--attention", choices=dispatch.ATTENTION, default="auto", help="of our rows")
    parser.add_argument("--return-memory", action="store_true", help="give freed memory back, as the C library does")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)

    options = {
        "hold": not args.return_memory, "plain": args.plain, "attention": args.attention, "of": "",
        "compiled": (False,) if args.no_compiled else (False, True), "batch": args.batch or SIZES[args.size][-1],
    }  # fmt: skip
    few = options | {"batch": args.peer_batch or options["batch"]}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    limits = machine.limits(device)
    sides: list[tuple[Any, ...]] = [(our_rows, args.size, args.precision, options)]
    if device == "cuda":  # one network at a time
        kinds = itertools.product(args.precision, options["compiled"])
        sides = [(our_rows, args.size, [p], options | {"compiled": (compiled,)}) for p, compiled in kinds]
    if few["batch"] != options["batch"]:  # ours with theirs, to compare losses
        own = {"compiled": (False,), "plain": False, "of": f" of {few['batch']}"}
        sides.append((our_rows, args.size, args.precision, few | own))
    for hold in [False] * (not args.no_peer) + [True] * args.hold_peer:
        sides.append((peer_rows, args.size, args.precision, few, hold))
    times = machine.take_turns(sides, args.rounds)
    batches = {name: (few if name.startswith("hf") or " of " in name else options)["batch"] for name in times}
    for batch in dict.fromkeys(batches.values()):
        alike = {name: row for name, row in times.items() if batches[name] == batch}
        machine.agree("the loss", alike, lambda name: TOLERANCE.get(name.split()[-1], EXACT))

    flops = step_flops(args.size, 1)
    print(f"{machine.about()}\n{limits}\nsize {args.size}: {SIZES[args.size]}, {flops / 1e9:.1f} GFLOP an image")
    rates = {name: batches[name] / row.median for name, row in times.items()}  # images/s
    shipped = None if args.no_peer else rates[f"hf {labels(args.precision, device)[0]}"]
    print(
        "| row | images | median ms | min – max | images/s | of the matrix-product peak | against hf | against hf as "
        "shipped |"
    )
    print("|---|---|---|---|---|---|---|---|")
    report: dict[str, Any] = {"size": args.size, "limits": limits, "rows": {}}
    for name, row in times.items():
        label, rate = name.split()[-1], rates[name]
        share = flops * rate / 1e9 / limits.gflops[label]
        ratio = None if args.no_peer else rate / rates[f"hf {label}"]
        best = None if shipped is None else rate / shipped
        report["rows"][name] = {
            "seconds": row.seconds, "images": batches[name], "of_peak": share, "against_hf": ratio,
            "against_shipped": best,
        }  # fmt: skip
        ratios = " | ".join("" if each is None else f"{each:.2f}×" for each in (ratio, best))
        speed = f"{batches[name]} | {1e3 * row.median:.1f} | {row.spread} | {rate:.1f}"
        print(f"| {name} | {speed} | {share:.2f} | {ratios} |")
    machine.write(args.out, report)
    return report


if __name__ == "__main__":
    main()
