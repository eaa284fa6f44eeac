"""Milliseconds of every way of attention, forward and backward, over sequence length: what `dispatch.py` rests on.

    python benchmarks/attention.py --out attention.json

Causal, 4 heads of D, 8,192 positions at every length. Ways take turns; outputs must agree.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import torch

from igpt.distributed.process_state import float32_matmul_precision
from igpt.model import c_library
from igpt.model.attention import self_attention
from igpt.training.hardware import disable_malloc_trim

WAYS = ("native", "sdpa", "blocks", "bmm")
N_HEAD = 4
# of the outputs
WITHIN = {"fp32": 1e-4, "fp32+medium": 1e-4, "tf32-products": 5e-3, "bf16-products": 5e-2, "bf16": 5e-2}


def ways(device: str) -> tuple[str, ...]:
    return WAYS if device == "cpu" and c_library.is_available() else WAYS[1:]


def rows(t: int, d: int, precision: str, device: str) -> dict[str, machine.Run]:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    shape = (max(1, 8192 // t), t, N_HEAD * d)
    qkv = torch.randn(*shape[:2], 3 * shape[2], dtype=dtype, device=device, generator=generator, requires_grad=True)
    along = torch.randn(shape, dtype=dtype, device=device, generator=generator)

    def both(way: str) -> torch.Tensor:
        qkv.grad = None
        out = self_attention(qkv, N_HEAD, causal=True, backend=way)
        out.backward(along)
        return out.detach().float()

    return {way: machine.timed(lambda way=way: both(way)) for way in ways(device)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--heads", type=int, nargs="+", default=[16, 32, 64], help="sizes of a head")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    disable_malloc_trim()
    print(f"{machine.about()}\n{' / '.join(ways(device))} in ms")
    precisions = ("fp32", machine.medium(device), "bf16")
    print("| T | " + " | ".join(f"{p} D={d}" for p in precisions for d in args.heads) + " |")
    print("|---" * (1 + len(precisions) * len(args.heads)) + "|")
    report: dict[str, Any] = {"shapes": []}
    for t in args.lengths:
        cells = []
        for precision in precisions:
            products = "medium" if precision == machine.medium(device) else "highest"
            for d in args.heads:
                with float32_matmul_precision(products):
                    times = machine.interleaved(rows(t, d, precision, device), args.rounds, warm_up=2)
                machine.agree("the output", times, lambda _, p=precision: WITHIN[p])
                cells.append(" / ".join(f"{1e3 * row.median:.1f}" for row in times.values()))
                report["shapes"].append({"t": t, "d": d, "precision": precision, "rows": times})
        print(f"| {t} | " + " | ".join(cells) + " |", flush=True)
    machine.write(args.out, report)
    return report


if __name__ == "__main__":
    main()
