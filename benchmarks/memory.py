"""Peak memory of training steps at size (b), each row in a process of its own: ours and Hugging Face's, plain and
with recomputed activations.

    python benchmarks/memory.py --out memory.json

Two steps (forward, backward, Adam) of 2 images of 1,024 tokens in float32; the peak is that of the whole process
(`ru_maxrss`, libraries included), on a GPU PyTorch's `max_memory_allocated`.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import machine
import torch
import torch.nn.functional as F
from train_step import SIZES, HuggingFace, our_net

ROWS = ("hf", "hf recomputed", "igpt", "igpt compiled", "igpt recomputed")


def one(row: str, size: str, bf16: bool) -> None:
    """Runs two steps and prints the peak in GiB."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if row.startswith("hf"):
        net = HuggingFace(size)
        if "recomputed" in row:
            net.net.gradient_checkpointing_enable()
    else:
        net = our_net(size, "compiled" in row)
        net.checkpointing = "recomputed" in row
    net = net.to(device).train()
    _, _, _, n_ctx, n_vocab, batch = SIZES[size]
    tokens = torch.randint(n_vocab, (batch, n_ctx), device=device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)
    torch.set_float32_matmul_precision("medium" if device == "cpu" else "highest")
    for _ in range(2):
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(net(tokens).flatten(0, 1).float(), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    peak = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    print(json.dumps({"peak_gib": peak / 2**30, "loss": float(loss)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="b")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--row", choices=ROWS, help="one row, in this process")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    if args.row:
        one(args.row, args.size, args.precision == "bf16")
        return
    found = {}
    for row in ROWS:
        command = [sys.executable, __file__, "--size", args.size, "--precision", args.precision, "--row", row]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[row] = json.loads(done.stdout.splitlines()[-1])
    print(machine.about())
    print(
        f"size {args.size}, {args.precision}\n| row | peak GiB | of hf | loss of the second step |\n|---|---|---|---|"
    )
    for row, figures in found.items():
        base = found["hf recomputed" if "recomputed" in row else "hf"]["peak_gib"]
        print(f"| {row} | {figures['peak_gib']:.2f} | {figures['peak_gib'] / base:.2f} | {figures['loss']:.4f} |")
    machine.write(args.out, {"size": args.size, "rows": found})


if __name__ == "__main__":
    main()
