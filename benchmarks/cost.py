"""How the cost of a training step grows with the length of the sequence and with the width: counted and measured.

    python benchmarks/cost.py --rounds 3 --out cost.json

Tokens per second of forward, backward and Adam in float32 at about 4,096 tokens a batch; expected is what the counted
operations say, from the first row of each table on.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import machine
import torch
from train_step import step_of

from igpt.metric.throughput import train_flops_per_image
from igpt.model.gpt import GPT
from igpt.task.machine import hold_memory

LENGTHS = (256, 512, 1024, 2048, 4096)
WIDTHS = (128, 256, 512, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=4096, help="of a batch")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hold_memory()
    print(machine.about())
    report = {}
    for title, shapes in (
        ("length at width 256", [(n, 256) for n in LENGTHS]),
        ("width at 1,024 tokens", [(1024, n) for n in WIDTHS]),
    ):
        rows: dict[str, Callable[[], float]] = {}
        flops: dict[str, float] = {}
        for n_ctx, width in shapes:
            batch = max(1, args.tokens // n_ctx)
            sizes = {"n_layer": args.layers, "n_embd": width, "n_ctx": n_ctx, "n_vocab": 512, "causal": True}
            net = GPT(n_head=width // 32, **sizes).to(device)
            net.init_weights(0)
            tokens = torch.randint(512, (batch, n_ctx), device=device)
            name = f"{n_ctx} tokens, width {width}"
            step = step_of(net, tokens, False, "medium" if device == "cpu" else "highest")
            rows[name] = lambda step=step, n=batch * n_ctx: step() / 1e3 / n  # seconds a token
            flops[name] = train_flops_per_image(**sizes) / n_ctx
        times = machine.interleaved(rows, args.rounds)
        first = next(iter(rows))
        base = statistics.median(times[first])
        print(f"\n{title}\n| | tokens/s | min – max | expected | GFLOP a token |\n|---|---|---|---|---|")
        for name, seconds in times.items():
            median = statistics.median(seconds)
            expected = flops[first] / flops[name] / base
            low, high = 1 / max(seconds), 1 / min(seconds)
            print(
                f"| {name} | {1 / median:,.0f} | {low:,.0f} – {high:,.0f} | {expected:,.0f} | {flops[name] / 1e9:.3f} |"
            )
        report[title] = {name: {"seconds_a_token": s, "flops_a_token": flops[name]} for name, s in times.items()}
    machine.write(args.out, report)


if __name__ == "__main__":
    main()
