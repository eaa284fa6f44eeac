"""Checks of the hardware that settings ask for against the processes that were started and the GPUs they see."""

import os

import torch

from igpt.distributed.gpus import gpu_index
from igpt.distributed.launcher import RENDEZVOUS_FILE
from igpt.distributed.rank import Rank
from igpt.settings.devices import HardwareSettings
from igpt.utils.program import program_name

VISIBLE = "CUDA_VISIBLE_DEVICES"


def check_processes(settings: HardwareSettings, rank: Rank, device: torch.device) -> None:
    """Raises ValueError for a GPU that is not there, or another number of processes or GPUs than the settings' one."""
    if settings.accelerator == "gpu" and not torch.cuda.is_available():
        hidden = f", as {VISIBLE}={os.environ[VISIBLE]!r:.40} says" if VISIBLE in os.environ else ""
        asked, other = f"trainer={settings.strategy}", "fsdp"  # which runs on a CPU, too
        if settings.strategy == "ddp":
            asked, other = "trainer=gpu", "cpu"
        raise ValueError(
            f"{asked}, but PyTorch sees no GPU here{hidden}: choose trainer={other}, or install a CUDA build"
        )
    n_local = settings.devices
    if n_local == "auto":
        n_local = rank.n_local or rank.count // settings.nodes
    if n_local * settings.nodes != rank.count:
        raise ValueError(
            f"trainer.devices={settings.devices} × trainer.nodes={settings.nodes} asks for {n_local * settings.nodes} "
            f"process(es), started: {rank.count}. On one machine `{program_name()}` starts them itself, on "
            "several torchrun or srun does, as many as the settings say, equally many on each (--ntasks-per-node)"
        )
    if device.type != "cuda":
        return
    n_gpu = torch.cuda.device_count()
    sees_all = RENDEZVOUS_FILE in os.environ  # the processes of this package see the same GPUs
    if gpu_index(rank) >= n_gpu or (sees_all and (rank.n_local or 1) > n_gpu):
        raise ValueError(
            f"{rank.n_local or rank.count} processes on this machine need as many GPUs, there are {n_gpu}: lower "
            "trainer.devices, or choose trainer.accelerator=cpu"
        )


def check_small_network(settings: HardwareSettings) -> None:
    """Raises ValueError for settings that large networks need, and a tokenizer's network does not have."""
    if settings.is_sharded:
        which = f"trainer={settings.strategy}"
    elif settings.precision == "bf16-true":
        which = "trainer.precision=bf16-true"
    elif settings.activation_checkpointing:
        which = "trainer.activation_checkpointing=true"
    else:
        return
    raise ValueError(
        f"{which} is for large networks, a tokenizer is small: trainer=ddp, with 32-true or bf16-mixed, trains it"
    )
