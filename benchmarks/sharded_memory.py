"""Does any process ever hold a sharded network whole? Two blocks as wide as iGPT-XL's, made and trained for one step.

    python benchmarks/sharded_memory.py [--width 3072] [--processes 2]

Prints, for the first process, the growth of its peak resident memory while its part of the network is made, and after a
step, beside the bytes of the whole.
"""

import argparse
import os
import sys
from functools import partial

import torch
from torch.distributed.device_mesh import init_device_mesh

from igpt.distributed import ranks
from igpt.distributed.launcher import is_rank, run_ranks
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.training.hardware import HardwareConfig
from igpt.training.optimizers import make_adam

GB = 1e9


def peak() -> int:
    """Bytes of resident memory, at most so far (Linux)."""
    with open("/proc/self/status") as status:
        return int(status.read().split("VmHWM:")[1].split()[0]) * 1024


def work(rank: ranks.Rank, width: int) -> None:
    sizes = {"n_layer": 2, "n_embd": width, "n_head": 24, "n_ctx": 256, "n_vocab": 512, "causal": True}
    mesh = init_device_mesh("cpu", (rank.count, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    machine = HardwareConfig(
        accelerator="cpu", devices="auto", nodes=1, strategy="fsdp", sharded_checkpoint="auto", precision="32-true",
        micro_batch=None, compile=False, activation_checkpointing=False, attention_backend="auto",
        matmul_precision="auto",
        num_workers=0, peak_tflops=None,
    )  # fmt: skip
    with torch.device("meta"):
        total = sum(weight.numel() * 4 for weight in GPT(GPTConfig(**sizes)).parameters())
    before = peak()
    net = machine.build_model(partial(GPT, **sizes), lambda net: net.init_weights(0), mesh)
    built = peak() - before
    optimizer = make_adam(net.parameters(), learning_rate=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.0)
    net(torch.randint(512, (1, 256))).logsumexp(-1).mean().backward()
    optimizer.step()
    stepped = peak() - before
    print(
        f"rank {rank.index}: {total / GB:.2f} GB of weights in all; {built / GB:.2f} GB at most while its "
        f"part is made ({built / total:.2f}), {stepped / GB:.2f} GB after a step ({stepped / total / 4:.2f} of "
        "weights, gradients and Adam together)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    if not is_rank():
        sys.exit(run_ranks([sys.executable, *sys.argv], args.processes))
    with ranks.process_group(torch.device("cpu")) as rank:
        work(rank, args.width)
    os._exit(0)


if __name__ == "__main__":
    main()
