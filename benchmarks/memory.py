"""Peak memory of training steps at size (b), each row in a process of its own: ours and Hugging Face's, plain and
with recomputed activations.

    python benchmarks/memory.py --out memory.json

Two steps (forward, backward, Adam) of 2 images of 1,024 tokens in float32, from the same weights; the peak is that of
the whole process (`ru_maxrss`, libraries included), on a GPU PyTorch's `max_memory_allocated`. Rows must agree in the
losses of both steps.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import torch
from networks import SIZES, HuggingFace, our_net, token_ids
from train_step import EXACT, TOLERANCE, make_step

from igpt.model.cpu import inductor_cache

ROWS = ("hf", "hf recomputed", "igpt", "igpt compiled", "igpt recomputed")


def one(row: str, size: str, precision: str) -> dict[str, Any]:
    """The peak, in GiB, and the losses of two steps in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net: Any
    if row.startswith("hf"):
        net = HuggingFace(size)
        if "recomputed" in row:
            net.net.gradient_checkpointing_enable()
    else:
        net = our_net(size, compiled="compiled" in row)
        net.checkpointing = "recomputed" in row
    label = "bf16" if precision == "bf16" else machine.training(device)
    with inductor_cache():
        _, losses = make_step(net.to(device).train(), token_ids(size, device), label)()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else used
    return {"peak_gib": peak / 2**30, "losses": losses}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="b")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--row", choices=ROWS, help="one row, in this process")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    if args.row:
        alone = one(args.row, args.size, args.precision)
        print(json.dumps(alone))
        return alone
    rows: dict[str, Any] = {}
    for row in ROWS:
        command = [sys.executable, __file__, "--size", args.size, "--precision", args.precision, "--row", row]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows[row] = json.loads(done.stdout.splitlines()[-1])
    losses = {row: machine.Timed(result=figures["losses"]) for row, figures in rows.items()}
    machine.agree("the loss", losses, lambda _: TOLERANCE.get(args.precision, EXACT))
    print(f"{machine.about()}\nsize {args.size}, {args.precision}\n| row | peak GiB | of hf's alike |\n|---|---|---|")
    for row, figures in rows.items():
        figures["of_hf"] = figures["peak_gib"] / rows["hf recomputed" if "recomputed" in row else "hf"]["peak_gib"]
        print(f"| {row} | {figures['peak_gib']:.2f} | {figures['of_hf']:.2f} |")
    machine.write(args.out, {"size": args.size, "rows": rows})
    return rows


if __name__ == "__main__":
    main()
