"""The GPUs of a run's ranks, compared before the ranks connect."""

from collections.abc import Sequence
from typing import Any

import torch

from igpt.distributed.rank import Rank


def gpu_index(rank: Rank) -> int:
    """The index, among the GPUs this process sees, of its own.

    The only one, if a starter shows each process its own (`srun --gpus-per-task=1`); else that of the local rank.
    """
    return 0 if torch.cuda.device_count() == 1 else rank.local


def describe_gpu(device: torch.device) -> dict[str, Any] | None:
    """UUID, name and memory (GB) of a GPU; None for a CPU. Raises ValueError if it cannot be used."""
    if device.type != "cuda":
        return None
    try:
        properties = torch.cuda.get_device_properties(device)
    except RuntimeError as error:  # of CUDA: in use by another process alone, or broken
        reason = str(error).splitlines()[0]
        raise ValueError(f"{device} cannot be used ({reason}): look at nvidia-smi") from error
    return {
        "uuid": str(properties.uuid),
        "name": properties.name,
        "memory": f"{properties.total_memory / 1e9:.0f} GB",
    }


def check_gpus(records: Sequence[dict[str, Any]]) -> str | None:
    """A warning if the ranks' GPUs are not all of one kind; else None. `records`: {host, gpu} in rank order.

    Raises:
        ValueError: two ranks on one GPU, or only some ranks on a GPU.
    """
    places = [f"rank {index} on {record['host']}" for index, record in enumerate(records)]
    with_gpu = [record["gpu"] is not None for record in records]
    if not any(with_gpu):
        return None
    if not all(with_gpu):
        raise ValueError(
            f"{places[with_gpu.index(True)]} computes on a GPU, {places[with_gpu.index(False)]} sees none: give every "
            "process one (nvidia-smi, CUDA_VISIBLE_DEVICES), or choose trainer.accelerator=cpu"
        )
    owners: dict[str, int] = {}
    for index, record in enumerate(records):
        gpu = record["gpu"]
        if (other := owners.setdefault(gpu["uuid"], index)) != index:
            raise ValueError(
                f"{places[other]} and {places[index]} have the same GPU, {gpu['name']} {gpu['uuid']}: start as many "
                "processes as there are GPUs, each with one of its own (trainer.devices, srun --gpus-per-task=1)"
            )
    kinds = [f"{record['gpu']['name']}, {record['gpu']['memory']}" for record in records]
    if len(set(kinds)) == 1:
        return None
    first = [f"{kind} ({places[kinds.index(kind)]})" for kind in dict.fromkeys(kinds)]
    return f"the GPUs differ: {'; '.join(first)}: every step waits for the slowest, and the smallest memory must do"
