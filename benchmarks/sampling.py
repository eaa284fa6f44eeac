"""Unconditional sampling of whole images: this project's decoders against Hugging Face's `generate`, all cached.

    python benchmarks/sampling.py --batch 4 16 64 --rounds 3 --out sampling.json

The same network and weights, temperature 1 from the full distribution, all tokens of every image; rows take turns.
Before, all draw greedily: every row must give the same tokens, or there are no figures. `--ways` adds this project's
slower ways to the one it takes by itself.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import machine
import torch
from networks import SIZES, hugging_face, our_net
from torch import Tensor

from igpt.model import dispatch
from igpt.model.generate import Sampling, generate
from igpt.model.gpt import GPT
from igpt.utils import keyed

GREEDY = 64  # tokens that are compared, of the first two images


def igpt_samples(net: GPT, batch: int, way: str, *, greedy: bool = False) -> Callable[[], Tensor]:
    rng_keys = keyed.per_example_keys(keyed.key(0, "sample"), torch.arange(batch))
    uniforms = keyed.uniform(rng_keys, net.n_ctx).to(net.wte.device)
    sampling = Sampling(1.0, 1 if greedy else None, None)
    return lambda: generate(net, uniforms, sampling, backend=way)


def peer_samples(net: Any, size: str, batch: int, *, greedy: bool = False) -> Callable[[], Tensor]:
    """Their `generate` with its key/value cache, as its documentation calls it."""
    n_ctx, n_vocab = SIZES[size][3:5]
    start = torch.full((batch, 1), n_vocab, device=net.device)
    drawing: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0}

    @torch.inference_mode()
    def run() -> Tensor:
        images = net.generate(
            input_ids=start, max_length=n_ctx + 1, attention_mask=torch.ones_like(start), pad_token_id=n_vocab,
            suppress_tokens=[n_vocab], use_cache=True, **drawing,
        )  # fmt: skip
        return images[:, 1:]

    return run


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="a")
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=dispatch.DECODING, default=[], help="ours in these ways, too")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    net, peer = our_net(args.size).to(device).eval(), hugging_face(args.size, use_cache=True).to(device).eval()
    n_layer, n_embd, _, n_ctx, n_vocab, _ = SIZES[args.size]
    n_weight = sum(p.numel() for p in net.parameters()) - n_vocab * n_embd - n_ctx * n_embd  # tables are looked up
    limits = machine.limits(device)
    usual = dispatch.decode_backend(net.wte, n_embd=net.n_embd, n_head=net.n_head)
    ways = {"auto": f"igpt ({usual})"} | {way: f"igpt {way}" for way in args.ways if way != usual}

    same = peer_samples(peer, args.size, 2, greedy=True)()[:, :GREEDY]
    for way in ways:
        if not torch.equal(igpt_samples(net, 2, way, greedy=True)()[:, :GREEDY], same):
            raise SystemExit(f"greedy tokens of {way} and of Hugging Face differ: no figures")
    print(f"{machine.about()}\n{limits}; the first {GREEDY} greedy tokens of all rows are the same")
    report: dict[str, Any] = {"size": args.size, "limits": limits, "batches": {}}
    for batch in args.batch:
        rows = {name: machine.timed(igpt_samples(net, batch, way)) for way, name in ways.items()}
        rows["hf"] = machine.timed(peer_samples(peer, args.size, batch))
        times = machine.interleaved(rows, args.rounds, warm_up=0)  # a thousand steps warm up by themselves
        # GiB a step: all weights, half of a full cache
        read = 4 * (n_weight + batch * n_layer * n_ctx * n_embd) / 2**30
        floor = read / limits.gib_per_s
        print(f"\nbatch {batch}, {n_ctx} tokens; reading weights and cache takes {1e3 * floor:.2f} ms a step")
        lines = machine.table(
            times,
            unit=lambda s, b=batch, f=floor: (
                f"{b * n_ctx / s:,.0f} tokens/s, {1e3 * s / n_ctx:.2f} ms a step, {f * n_ctx / s:.2f} of the bandwidth"
            ),
            against="hf",
        )
        print("\n".join(lines), flush=True)
        report["batches"][batch] = {"rows": times, "floor_ms": 1e3 * floor}
    machine.write(args.out, report)
    return report


if __name__ == "__main__":
    main()
