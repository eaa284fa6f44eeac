"""Seconds a row of a completion takes as `task=demo` draws it: igpt_mini at 32×32, the upper half given, one thread.

    python benchmarks/demo_rows.py

Weights are drawn at random: training does not change the time.
"""

import argparse
import time
from collections.abc import Sequence

import torch

from igpt.distributed.process_state import num_threads
from igpt.model.config import GPTConfig
from igpt.model.generate import Sampling, generate_stream
from igpt.model.gpt import GPT
from igpt.utils import keyed

SIDE, GIVEN = 32, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with num_threads(args.threads):
        compare(args.completions)


def compare(completions: Sequence[int]) -> None:
    """Prints a row of seconds for each number of completions that are drawn at once."""
    net = GPT(GPTConfig(n_layer=12, n_embd=256, n_head=8, n_ctx=SIDE**2, n_vocab=512, causal=True)).eval()
    net.init_weights(0)
    known = torch.arange(SIDE**2) < GIVEN * SIDE
    print("| completions at once | first row | the others, mean | the longest of them |\n|---|---|---|---|")
    for n in completions:
        uniforms = keyed.uniform(keyed.per_example_keys(keyed.key(0, "sample"), torch.arange(n)), SIDE**2)
        given = torch.randint(512, (1, SIDE**2)).expand(n, -1)
        rows, since = [], time.perf_counter()
        for _, settled in generate_stream(net, uniforms, Sampling(1.0, None, None), prompts=given, known=known):
            if settled > GIVEN * SIDE and settled % SIDE == 0:
                rows.append(time.perf_counter() - since)
                since = time.perf_counter()
        first, *others = rows
        print(f"| {n} | {first:.2f} | {sum(others) / len(others):.2f} | {max(others):.2f} |")


if __name__ == "__main__":
    main()
