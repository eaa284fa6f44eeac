"""Milliseconds of both attention paths, forward and backward, over sequence length: what `choice.attention` rests on.

python benchmarks/attention.py
"""

import argparse
import statistics
import time

import torch

from igpt.model.attention import attend
from igpt.task.machine import hold_memory


def milliseconds(path: str, t: int, d: int, dtype: torch.dtype, device: str, rounds: int) -> float:
    """Median over rounds; the batch shrinks as T grows, so that all lengths have 8,192 positions of 4 heads."""
    shape = (max(1, 8192 // t), 4, t, d)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    times = []
    for i in range(rounds + 2):
        start = time.perf_counter()
        attend(q, k, v, causal=True, path=path).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= 2:
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hold_memory()
    print(f"{device}, torch {torch.__version__}; sdpa / bmm in ms")
    print("| T | " + " | ".join(f"{p} D={d}" for p in ("fp32", "fp32+medium", "bf16") for d in (16, 32, 64)) + " |")
    print("|---" * 10 + "|")
    for t in (32, 64, 128, 256, 512, 1024):
        cells = []
        for precision in ("fp32", "fp32+medium", "bf16"):
            torch.set_float32_matmul_precision("medium" if "medium" in precision else "highest")
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            for d in (16, 32, 64):
                ms = [milliseconds(path, t, d, dtype, device, args.rounds) for path in ("sdpa", "bmm")]
                cells.append(f"{ms[0]:.1f} / {ms[1]:.1f}")
        print(f"| {t} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
