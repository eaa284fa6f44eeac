"""Milliseconds of one training step (forward, backward, Adam) of this network, a plain rewrite and Hugging Face's.

    python benchmarks/train_step.py --size a --rounds 5 --out a.json

Every row sees the same token ids, batch, loss over all positions and fused Adam. Rows take turns, round by round, so
a machine that speeds up or slows down does so for all; the first round is a warm-up for all and is not counted.
`medium` is `torch.set_float32_matmul_precision("medium")`, which users of any side can set. Freed memory
is kept by the process (`hold_memory`), as our training does; the other rows profit as well.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import machine
import torch
import torch.nn.functional as F
from plain import PlainGPT
from torch import Tensor, nn

from igpt.model.gpt import ATTENTION_PATHS, GPT
from igpt.task.fit import hold_memory

SIZES = {  # n_layer, n_embd, n_head, n_ctx, n_vocab, batch
    "a": (12, 256, 8, 1024, 512, 4),
    "b": (24, 512, 8, 1024, 512, 2),
    "c": (8, 64, 4, 64, 16, 128),
}


def our_net(size: str, compiled: bool, attention: str = "auto") -> nn.Module:
    n_layer, n_embd, n_head, n_ctx, n_vocab, _ = SIZES[size]
    net = GPT(n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_ctx=n_ctx, n_vocab=n_vocab, causal=True)
    net.init_weights(0)
    for block in net.blocks:
        block.attn.path = attention
    if compiled:
        for block in net.h:
            block.compile()
    return net


def plain_net(size: str, compiled: bool) -> nn.Module:
    n_ctx = SIZES[size][3]
    net = PlainGPT(*SIZES[size][:5], bmm=n_ctx <= 128 and not torch.cuda.is_available())
    if compiled:
        for block in net.h:
            block.compile()
    return net


class HuggingFace(nn.Module):
    """The peer as shipped (eager attention is all it has), dropout off, fed [sos, x_0 … x_{n-2}]."""

    def __init__(self, size: str) -> None:
        super().__init__()
        from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

        n_layer, n_embd, n_head, n_ctx, n_vocab, _ = SIZES[size]
        config = ImageGPTConfig(
            vocab_size=n_vocab + 1, n_positions=n_ctx, n_embd=n_embd, n_layer=n_layer, n_head=n_head,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False,
        )  # fmt: skip
        self.net, self.sos = ImageGPTForCausalImageModeling(config), n_vocab

    def forward(self, tokens: Tensor) -> Tensor:
        shifted = F.pad(tokens[:, :-1], (1, 0), value=self.sos)
        return self.net(input_ids=shifted).logits


def step_of(net: nn.Module, tokens: Tensor, bf16: bool, matmul: str) -> Callable[[], float]:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    device = tokens.device.type

    def step() -> float:
        torch.set_float32_matmul_precision(matmul)
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(net(tokens).flatten(0, 1).float(), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        return (time.perf_counter() - start) * 1e3

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="c")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["fp32", "bf16"], nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--no-peer", action="store_true", help="leave Hugging Face out")
    parser.add_argument("--no-plain", action="store_true", help="leave the plain rewrite out")
    parser.add_argument("--attention", choices=ATTENTION_PATHS, default="auto", help="of our rows")
    parser.add_argument("--return-memory", action="store_true", help="give freed memory back, as the C library does")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if not args.return_memory:
        hold_memory()  # for every row: it is a setting of the process
    n_layer, n_embd, _, n_ctx, n_vocab, batch = SIZES[args.size]
    tokens = torch.randint(n_vocab, (batch, n_ctx), device=device)
    matmul_flops = 12 * n_layer * n_embd**2 + n_embd * n_vocab
    flops = batch * n_ctx * (6 * matmul_flops + 6 * n_layer * n_ctx * n_embd)  # causal attention counted half

    rows: dict[str, Callable[[], float]] = {}
    for precision in args.precision:
        for matmul in ("highest", "medium") if precision == "fp32" else ("highest",):
            label = f"{precision}{'+medium' if matmul == 'medium' else ''}"
            for compiled in (False, True):
                net = our_net(args.size, compiled, args.attention).to(device)
                name = f"igpt{' compiled' if compiled else ''} {label}"
                rows[name] = step_of(net, tokens, precision == "bf16", matmul)
                if not args.no_plain:
                    rows[f"plain{' compiled' if compiled else ''} {label}"] = step_of(
                        plain_net(args.size, compiled).to(device), tokens, precision == "bf16", matmul
                    )
            if not args.no_peer:
                rows[f"hf {label}"] = step_of(HuggingFace(args.size).to(device), tokens, precision == "bf16", matmul)

    times: dict[str, list[float]] = {name: [] for name in rows}
    for i in range(args.rounds + 1):
        for name, step in rows.items():
            step()  # the step before the timed one brings this row's data back into the caches
            ms = step()
            if i:
                times[name].append(ms)

    peaks = {
        "fp32": machine.peak_gflops(torch.float32, "highest", device),
        "fp32+medium": machine.peak_gflops(torch.float32, "medium", device),
        "bf16": machine.peak_gflops(torch.bfloat16, "highest", device),
    }
    report = {"size": args.size, "peaks": peaks}
    lines = [
        "| row | median ms | min – max | images/s | of this machine's matrix-product peak | against hf |",
        "|---|---|---|---|---|---|",
    ]
    report["rows"] = {}
    for name, ms in times.items():
        median, label = statistics.median(ms), name.split()[-1]
        share = flops / median / 1e6 / peaks[label]
        report["rows"][name] = {"median_ms": median, "min_ms": min(ms), "max_ms": max(ms), "share_of_peak": share}
        against = "" if args.no_peer else f"{statistics.median(times[f'hf {label}']) / median:.2f}×"
        lines.append(
            f"| {name} | {median:.1f} | {min(ms):.1f} – {max(ms):.1f} | {1e3 * batch / median:.1f} | {share:.2f} | "
            f"{against} |"
        )
    print(f"size {args.size}: {SIZES[args.size]}, {flops / 1e9:.1f} GFLOP a step, {device}; peaks {peaks}")
    print("\n".join(lines))
    if args.out:
        machine.write(args.out, report)


if __name__ == "__main__":
    main()
