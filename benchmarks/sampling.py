"""Unconditional sampling of whole images: this project's decoder against Hugging Face's `generate`, both cached.

    python benchmarks/sampling.py --batch 4 16 64 --rounds 3 --out sampling.json

The same network (its weights are copied), temperature 1 from the full distribution, all 1,024 tokens. Rows take turns.
`--plain` adds this project's own layer-by-layer step, which the decoder replaces on a CPU.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import machine
import torch

from igpt import keyed
from igpt.model.generate import Sampling, generate
from igpt.model.gpt import GPT

SIZES = {  # n_layer, n_embd, n_head, n_ctx, n_vocab
    "a": (12, 256, 8, 1024, 512),
    "b": (24, 512, 8, 1024, 512),
    "c": (8, 64, 4, 64, 16),
}


def our_net(size: str) -> GPT:
    n_layer, n_embd, n_head, n_ctx, n_vocab = SIZES[size]
    net = GPT(n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_ctx=n_ctx, n_vocab=n_vocab, causal=True)
    net.init_weights(0)
    return net.eval()


def sampled(net: GPT, batch: int, *, columns: bool = True) -> Callable[[], float]:
    keys = keyed.item_keys(keyed.key(0, "sample"), torch.arange(batch))
    uniforms = keyed.uniform(keys, net.n_ctx).to(net.wte.device)

    def run() -> float:
        start = time.perf_counter()
        generate(net, uniforms, Sampling(1.0, None, None), columns=None if columns else False)
        return time.perf_counter() - start

    return run


def peer(size: str, batch: int, device: str) -> Callable[[], float]:
    """Hugging Face's model and `generate`, with its key/value cache, as its documentation calls it."""
    from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

    n_layer, n_embd, n_head, n_ctx, n_vocab = SIZES[size]
    config = ImageGPTConfig(
        vocab_size=n_vocab + 1, n_positions=n_ctx, n_embd=n_embd, n_layer=n_layer, n_head=n_head,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=True,
    )  # fmt: skip
    net = ImageGPTForCausalImageModeling(config).eval().to(device)
    start_tokens = torch.full((batch, 1), n_vocab, device=device)

    def run() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            net.generate(
                input_ids=start_tokens, max_length=n_ctx + 1, temperature=1.0, do_sample=True, top_k=0,
                attention_mask=torch.ones_like(start_tokens), pad_token_id=n_vocab,
            )  # fmt: skip
        return time.perf_counter() - start

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="a")
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="our layer-by-layer step, too")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = our_net(args.size).to(device)
    n_layer, n_embd, _, n_ctx, _ = SIZES[args.size]
    n_weight = sum(p.numel() for p in net.parameters())
    read = machine.bandwidth_gib(device)
    report = {"size": args.size, "bandwidth_gib": read, "batches": {}}
    print(f"{machine.about()}\nread bandwidth {read:.1f} GiB/s")
    for batch in args.batch:
        rows = {"igpt": sampled(net, batch), "hf": peer(args.size, batch, device)}
        if args.plain:
            rows["igpt layer by layer"] = sampled(net, batch, columns=False)
        times = machine.interleaved(rows, args.rounds, warm_up=0)  # a thousand steps warm up by themselves
        floor = 4 * (n_weight + batch * n_layer * n_ctx * n_embd) / 2**30 / read  # all weights, half of a full cache
        print(f"\nbatch {batch}: {n_ctx} tokens; reading weights and cache alone takes {1e3 * floor:.2f} ms a step")
        lines = machine.table(
            times,
            unit=lambda s, b=batch, f=floor: (
                f"{b * n_ctx / s:,.0f} tokens/s, {1e3 * s / n_ctx:.2f} ms a step, {f * n_ctx / s:.2f} of the bandwidth"
            ),
            against="hf",
        )
        print("\n".join(lines))
        report["batches"][batch] = {"seconds": times, "floor_ms": 1e3 * floor}
    machine.write(args.out, report)


if __name__ == "__main__":
    main()
