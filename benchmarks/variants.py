"""Milliseconds of a training step of every network of `conf/variant/`, beside the paper's: forward, backward, Adam.

    OMP_NUM_THREADS=1 python benchmarks/variants.py --out variants.json

igpt_nano at 16×16, 128 colours, 32 images, as experiment=priors. Networks take turns.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from igpt.distributed.process_state import float32_matmul_precision
from igpt.metric.throughput import train_flops_per_image
from igpt.model import dispatch
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.training.hardware import disable_malloc_trim
from igpt.training.optimizers import make_adam

CONF = Path(__file__).parents[1] / "conf"
PAPER = "paper"


def read_networks(side: int, n_vocab: int) -> dict[str, GPTConfig]:
    """The network of every variant that changes it, the paper's first."""
    networks = {}
    for path in sorted((CONF / "variant").glob("*.yaml"), key=lambda path: (path.stem != PAPER, path.stem)):
        settings: Any = OmegaConf.to_container(OmegaConf.load(path)) or {}
        if settings.get("pretraining") is None and ("model" in settings or path.stem == PAPER):
            networks[path.stem] = GPTConfig(
                n_layer=8, n_embd=64, n_head=4, n_ctx=side * side, n_vocab=n_vocab, causal=True, grid=(side, side, 1),
                **settings.get("model", {}),
            )  # fmt: skip
    return networks


def make_step(network: GPTConfig, tokens: torch.Tensor, *, half: bool, compiled: bool) -> machine.Run:
    """A training step of a network on these tokens (B, T)."""
    net = GPT(network).to(tokens.device)
    net.init_weights(0)
    optimizer = make_adam(net.parameters(), learning_rate=3e-3, beta1=0.9, beta2=0.95, weight_decay=0.0)
    if compiled:
        torch._dynamo.config.recompile_limit = 200  # of all networks in this process
        for block in net.blocks:
            block.compile()

    def step() -> torch.Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=half):
            loss = F.cross_entropy(net(tokens).flatten(0, 1).float(), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return machine.with_timer(step)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=16, help="tokens a side")
    parser.add_argument("--batch", type=int, default=32, help="images")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--float32", action="store_true", help="instead of bfloat16 products")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--variants", nargs="+", help="only these")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    disable_malloc_trim()
    networks = read_networks(args.side, 128)
    networks = {name: net for name, net in networks.items() if not args.variants or name in (PAPER, *args.variants)}
    tokens = torch.randint(128, (args.batch, args.side**2), generator=torch.Generator().manual_seed(0)).to(device)
    with float32_matmul_precision(dispatch.matmul_precision(device)):
        rows = {
            name: make_step(network, tokens, half=not args.float32, compiled=not args.eager)
            for name, network in networks.items()
        }
        times = machine.time_in_turns(rows, args.rounds, warm_up=3)
    print(f"{machine.about()}\n| variant | ms a step (least – most) | of the paper's | its operations |")
    print("|---|---|---|---|")
    of_paper = train_flops_per_image(networks[PAPER])
    for name, row in times.items():
        share, operations = row.median / times[PAPER].median, train_flops_per_image(networks[name]) / of_paper
        print(f"| {name} | {1e3 * row.median:.0f} ({row.spread}) | {share:.2f} | {operations:.2f} |")
    report = {"variants": {name: {"rows": row} for name, row in times.items()}}
    machine.write(args.out, report)
    return report


if __name__ == "__main__":
    main()
