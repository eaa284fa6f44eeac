"""How the cost of a training step grows with the length of the sequence and with the width: counted and measured.

    python benchmarks/cost.py --rounds 3 --out cost.json

Tokens per second of forward, backward and Adam in float32 at about 4,096 tokens a batch; expected is what the counted
operations say, from the first row of each table on.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import torch
from train_step import make_step

from igpt.metric.throughput import train_flops_per_image
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.training.hardware import disable_malloc_trim

LENGTHS = [256, 512, 1024, 2048, 4096]
WIDTHS = [128, 256, 512, 1024]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=4096, help="of a batch")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="at width 256")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="at 1,024 tokens")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    disable_malloc_trim()
    limits = machine.limits(device)
    label = machine.training(device)
    print(f"{machine.about()}\n{limits}; rows are {label}")
    report: dict[str, Any] = {"limits": limits}
    for title, shapes in (
        ("length at width 256", [(n, 256) for n in args.lengths]),
        ("width at 1,024 tokens", [(1024, n) for n in args.widths]),
    ):
        rows: dict[str, machine.Run] = {}
        flops: dict[str, float] = {}
        counts: dict[str, int] = {}
        for n_ctx, width in shapes:
            batch = max(1, args.tokens // n_ctx)
            sizes = {
                "n_layer": args.layers,
                "n_embd": width,
                "n_head": width // 32,
                "n_ctx": n_ctx,
                "n_vocab": 512,
                "causal": True,
            }
            net = GPT(GPTConfig(**sizes)).to(device)
            net.init_weights(0)
            tokens = torch.randint(512, (batch, n_ctx), device=device)
            name = f"{n_ctx} tokens, width {width}"
            rows[name], counts[name] = make_step(net, tokens, label), batch * n_ctx
            flops[name] = train_flops_per_image(GPTConfig(**sizes)) / n_ctx
        times = machine.time_in_turns(rows, args.rounds)
        first = next(iter(rows))
        base = times[first].median / counts[first]
        print(f"\n{title}\n| | tokens/s | min – max | expected | of the peak |\n|---|---|---|---|---|")
        report[title] = {}
        for name, row in times.items():
            n = counts[name]
            expected = flops[first] / flops[name] / base
            share = flops[name] * n / row.median / 1e9 / limits.gflops[label]
            speeds = f"{n / row.median:,.0f} | {n / max(row.seconds):,.0f} – {n / min(row.seconds):,.0f}"
            print(f"| {name} | {speeds} | {expected:,.0f} | {share:.2f} |", flush=True)
            report[title][name] = {"seconds": row.seconds, "tokens": n, "flops_a_token": flops[name], "of_peak": share}
    machine.write(args.out, report)
    return report


if __name__ == "__main__":
    main()
