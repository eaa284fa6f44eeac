"""Ranks, the processes of one run: this process's rank and collective operations between ranks.

With one process no operation communicates.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch import Tensor, nn

from igpt.distributed.launcher import RENDEZVOUS_FILE
from igpt.distributed.process_state import environment

T = TypeVar("T")


@dataclass(frozen=True)
class Rank:
    """The rank of this process in its run."""

    index: int  # over all machines
    local: int  # on this machine; also the index of its GPU
    count: int  # processes of the run
    n_local: int  # on this machine

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes."""
        return self.index == 0


def this_rank() -> Rank:
    """The rank from the environment: of this package or torchrun (RANK, …), else srun (SLURM_…), else one process."""
    env = os.environ
    if "RANK" in env:
        return Rank(int(env["RANK"]), int(env["LOCAL_RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_WORLD_SIZE"]))
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        n_node = int(env.get("SLURM_STEP_NUM_NODES", "1"))
        count = int(env["SLURM_STEP_NUM_TASKS"])
        return Rank(int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), count, count // n_node)
    return Rank(0, 0, 1, 1)


@contextmanager
def process_group(device: torch.device) -> Iterator[Rank]:
    """Context manager: the process group of the run's ranks.

    Backends: NCCL for tensors on a GPU, gloo for all else.
    """
    rank = this_rank()
    if rank.count == 1 or dist.is_initialized():
        yield rank
        return
    address: dict[str, str] = {}
    meeting = os.environ.get(RENDEZVOUS_FILE)  # a file if one parent started all ranks: no port can be in use
    if meeting is None and "MASTER_ADDR" not in os.environ:
        first_node = SLURMEnvironment.resolve_root_node_address(os.environ["SLURM_NODELIST"])
        port = 15000 + int(os.environ["SLURM_JOB_ID"]) % 10000  # equal on every node, different for every job
        address = {"MASTER_ADDR": first_node, "MASTER_PORT": str(port)}
    on_gpu = device.type == "cuda"
    with environment(**address):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            init_method=None if meeting is None else f"file://{meeting}",
            rank=rank.index,
            world_size=rank.count,
            device_id=device if on_gpu else None,
        )
        yield rank
    dist.destroy_process_group()  # not after an error: other ranks may be gone


def barrier() -> None:
    """Waits until every rank has called it."""
    if dist.is_initialized():
        all_gather_object(None)


def all_gather_object(value: T) -> list[T]:
    """The values of all ranks, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_gather_results(make: Callable[[], T]) -> list[T]:
    """Calls `make`, in which no rank waits for another, on every rank; returns the values of all, in rank order.

    Raises:
        RuntimeError: on every rank, if `make` raised an Exception on one; there from that.
    """
    if not dist.is_initialized():
        return [make()]
    result, cause = None, None
    try:
        result = make()
    except Exception as error:  # whatever it is, the others wait for this rank
        cause = error
    gathered = all_gather_object((result, None if cause is None else f"{type(cause).__name__}: {cause}"))
    for index, (_, problem) in enumerate(gathered):
        if problem is not None:
            raise RuntimeError(f"rank {index}: {problem}") from cause
    return [value for value, _ in gathered if value is not None]


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """Calls `make` on rank 0 and returns its value on every rank.

    Raises:
        ValueError: on every rank, if `make` raised one on rank 0.
    """
    if not dist.is_initialized():
        return make()
    received: list[Any] = [None]
    if this_rank().is_first:
        try:
            received = [(make(), None)]
        except ValueError as error:
            received = [(None, str(error))]
    dist.broadcast_object_list(received, src=0)
    result, reason = received[0]
    if reason is not None:
        raise ValueError(reason)
    value: T = result
    return value


def check_agree(what: str, values: Mapping[str, Any]) -> None:
    """Raises ValueError on every rank, naming the differences, unless all ranks have the same values."""
    first, *others = all_gather_object(dict(values))
    for index, other in enumerate(others, start=1):
        pairs = {key: (first.get(key), other.get(key)) for key in first | other}
        if differs := [f"{key} {a} ≠ {b}" for key, (a, b) in pairs.items() if a != b]:
            raise ValueError(
                f"rank 0 and rank {index} do not agree on the {what}: {'; '.join(differs)}; give every machine the "
                "same code, settings and files"
            )


def hash_module(module: nn.Module) -> str:
    """A hash of a module's weights, 16 hexadecimal digits, to compare them between ranks."""
    sums = [f"{name} {float(weight.detach().double().sum()).hex()}" for name, weight in module.named_parameters()]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()[:16]


class AsyncMax:
    """Asynchronous all-reduce MAX of an integer per step; every rank gets the same value.

    The value is that of one step earlier; with one process of this step.
    """

    def __init__(self) -> None:
        self._asked: tuple[Tensor, Any] | None = None

    def update(self, number: int) -> int:
        """Submits this rank's number; returns the maximum of the previous step. Every rank calls it at every step."""
        if not dist.is_initialized():
            return number
        before = self.close()
        reduced = torch.tensor([number])
        self._asked = reduced, dist.all_reduce(reduced, dist.ReduceOp.MAX, async_op=True)
        return before

    def close(self) -> int:
        """Waits for the pending all-reduce and returns its value; 0 without one."""
        if self._asked is None:
            return 0
        reduced, work = self._asked
        work.wait()
        self._asked = None
        return int(reduced)


class Ranks(ClusterEnvironment):
    """Lightning's cluster environment, from `this_rank`; Lightning starts no processes and opens no connection."""

    creates_processes_externally = True
    main_address, main_port = "127.0.0.1", 0  # never used: the process group exists already

    @staticmethod
    def detect() -> bool:
        return this_rank().count > 1

    def world_size(self) -> int:
        return this_rank().count

    def global_rank(self) -> int:
        return this_rank().index

    def local_rank(self) -> int:
        return this_rank().local

    def node_rank(self) -> int:
        rank = this_rank()
        return rank.index // rank.n_local

    def set_world_size(self, size: int) -> None:
        assert size == self.world_size(), (size, self.world_size())

    def set_global_rank(self, rank: int) -> None:
        assert rank == self.global_rank(), (rank, self.global_rank())
