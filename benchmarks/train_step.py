"""Milliseconds of one training step (forward, backward, Adam) of this network, a plain rewrite and Hugging Face's.

    python benchmarks/train_step.py --size a --rounds 5 --out a.json

Every row sees the same token ids, batch, loss over all positions and fused Adam. Rows take turns, round by round, so
a machine that speeds up or slows down does so for all; the first round is a warm-up for all and is not counted. Each
side is a process of its own: ours keeps freed memory (`hold_memory`), as our training does, Hugging Face's is as it
ships (`--hold-peer`: with our setting, too). `medium` is `torch.set_float32_matmul_precision("medium")`, which users of
any side can set.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
import torch.nn.functional as F
from plain import PlainGPT
from torch import Tensor, nn

from igpt.model import choice
from igpt.model.gpt import GPT
from igpt.task.machine import hold_memory

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


def labels(precision: str) -> dict[str, str]:
    """The rows of one precision: its label, and the setting of float32 products."""
    return {"fp32": "highest", "fp32+medium": "medium"} if precision == "fp32" else {"bf16": "highest"}


def seconds_of(step: Callable[[], float]) -> Callable[[], float]:
    def run() -> float:
        step()  # the step before the timed one brings this row's data back into the caches
        return step() / 1e3

    return run


def our_rows(size: str, precisions: list[str], attention: str, plain: bool, hold: bool) -> dict[str, Any]:
    """This project's rows, eager and compiled, as its training runs; with `plain` the plain rewrite's too."""
    if hold:
        hold_memory()
    tokens = token_ids(size)
    rows = {}
    for precision in precisions:
        for label, matmul in labels(precision).items():
            for compiled in (False, True):
                net = our_net(size, compiled, attention).to(tokens.device)
                how = " compiled" if compiled else ""
                rows[f"igpt{how} {label}"] = seconds_of(step_of(net, tokens, precision == "bf16", matmul))
                if plain:
                    net = plain_net(size, compiled).to(tokens.device)
                    rows[f"plain{how} {label}"] = seconds_of(step_of(net, tokens, precision == "bf16", matmul))
    return rows


def peer_rows(size: str, precisions: list[str], hold: bool) -> dict[str, Any]:
    """Hugging Face's rows; `hold`: with freed memory kept by the process, as ours."""
    if hold:
        hold_memory()
    tokens = token_ids(size)
    net = HuggingFace(size).to(tokens.device)
    return {
        f"hf{' held' if hold else ''} {label}": seconds_of(step_of(net, tokens, precision == "bf16", matmul))
        for precision in precisions
        for label, matmul in labels(precision).items()
    }


def token_ids(size: str) -> Tensor:
    torch.manual_seed(0)
    n_ctx, n_vocab, batch = SIZES[size][3:]
    return torch.randint(n_vocab, (batch, n_ctx)).to("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="c")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["fp32", "bf16"], nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--no-peer", action="store_true", help="leave Hugging Face out")
    parser.add_argument("--no-plain", action="store_true", help="leave the plain rewrite out")
    parser.add_argument("--hold-peer", action="store_true", help="Hugging Face also with our setting of memory")
    parser.add_argument("--attention", choices=choice.ATTENTION, default="auto", help="of our rows")
    parser.add_argument("--return-memory", action="store_true", help="give freed memory back, as the C library does")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    n_layer, n_embd, _, n_ctx, n_vocab, batch = SIZES[args.size]
    matmul_flops = 12 * n_layer * n_embd**2 + n_embd * n_vocab
    flops = batch * n_ctx * (6 * matmul_flops + 6 * n_layer * n_ctx * n_embd)  # causal attention counted half
    hold = not args.return_memory
    sides = [machine.Side(our_rows, args.size, args.precision, args.attention, not args.no_plain, hold)]
    if not args.no_peer:
        sides.append(machine.Side(peer_rows, args.size, args.precision, False))
    if args.hold_peer:
        sides.append(machine.Side(peer_rows, args.size, args.precision, True))
    times = machine.interleaved({name: run for side in sides for name, run in side.rows().items()}, args.rounds)
    for side in sides:
        side.close()
    peaks = {
        "fp32": machine.peak_gflops(torch.float32, "highest", device),
        "fp32+medium": machine.peak_gflops(torch.float32, "medium", device),
        "bf16": machine.peak_gflops(torch.bfloat16, "highest", device),
    }
    print(f"size {args.size}: {SIZES[args.size]}, {flops / 1e9:.1f} GFLOP a step, {device}; peaks {peaks}")
    print("| row | median ms | min – max | images/s | of this machine's matrix-product peak | against hf | hf fp32 |")
    print("|---|---|---|---|---|---|---|")
    report: dict[str, Any] = {"size": args.size, "peaks": peaks, "rows": {}}
    for name, seconds in times.items():
        median, label = statistics.median(seconds), name.split()[-1]
        share = flops / median / 1e9 / peaks[label]
        report["rows"][name] = {"seconds": seconds, "share_of_peak": share}
        bases = [] if args.no_peer else [times[f"hf {label}"], times[f"hf {args.precision[0]}"]]
        against = [f"{statistics.median(base) / median:.2f}×" for base in bases] or ["", ""]
        low, high = 1e3 * min(seconds), 1e3 * max(seconds)
        print(
            f"| {name} | {1e3 * median:.1f} | {low:.1f} – {high:.1f} | {batch / median:.1f} | {share:.2f} | "
            f"{' | '.join(against)} |"
        )
    machine.write(args.out, report)


if __name__ == "__main__":
    main()
