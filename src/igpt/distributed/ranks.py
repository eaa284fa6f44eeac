"""Ranks, the processes of one run: this process's rank and collective operations between ranks.

With one process no operation communicates.
"""

import hashlib
import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from torch import Tensor, nn
from torch._C._distributed_c10d import Store

from igpt.distributed.gpus import check_gpus, describe_gpu
from igpt.distributed.rank import Rank as Rank
from igpt.distributed.rank import this_rank as this_rank
from igpt.distributed.rendezvous import check_addresses, find_own_address, meet

log = logging.getLogger(__name__)

T = TypeVar("T")
RANK_TIMEOUT = timedelta(days=1)  # the longest that a rank may hash, copy, fit or draw while the others wait for it


@contextmanager
def process_group(device: torch.device) -> Iterator[Rank]:
    """Context manager: the process group of the run's ranks.

    Backends: NCCL for tensors on a GPU, gloo for all else.

    Raises:
        ValueError: ranks that do not come, share a GPU or cannot connect.
    """
    rank = this_rank()
    if rank.count == 1 or dist.is_initialized():
        yield rank
        return
    store, records = meet(rank, {"address": find_own_address(), "gpu": describe_gpu(device)})
    check_addresses(records)
    if (warning := check_gpus(records)) is not None and rank.is_first:
        log.warning("%s", warning)
    _connect(rank, store, device)
    yield rank
    dist.destroy_process_group()  # not after an error: other ranks may be gone


def _connect(rank: Rank, store: Store, device: torch.device) -> None:
    on_gpu = device.type == "cuda"
    try:
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=rank.index,
            world_size=rank.count,
            device_id=device if on_gpu else None,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).partition("Exception raised from")[0].split())[:400]  # without a stack trace
        raise ValueError(
            f"rank {rank.index} on {socket.gethostname()} cannot connect to the other ranks "
            f"({reason}): NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME choose the network interface, NCCL_DEBUG=WARN "
            "tells more"
        ) from error


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sums of a tensor's entries over all ranks, on every rank and the tensor's device; a GPU is not waited for."""
    if not dist.is_initialized():
        return values
    sums = values.clone()
    dist.all_reduce(sums)
    return sums


@cache
def _long_timeout_group(world: Any) -> Any:
    """A gloo group of the ranks of `world`, for waits while one of them works alone.

    Its time-out is `RANK_TIMEOUT`; PyTorch's ends a run after 10 minutes (NCCL) or 30 (gloo). A rank that dies is not
    waited for: its connections close, which is an error on the others at once.
    """
    return dist.new_group(backend="gloo", timeout=RANK_TIMEOUT)


def barrier() -> None:
    """Waits until every rank has called it."""
    all_gather_object(None)


def all_gather_object(value: T) -> list[T]:
    """The values of all ranks, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_long_timeout_group(dist.group.WORLD))
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
    dist.broadcast_object_list(received, src=0, group=_long_timeout_group(dist.group.WORLD))
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
        group = _long_timeout_group(dist.group.WORLD)
        self._asked = reduced, dist.all_reduce(reduced, dist.ReduceOp.MAX, group=group, async_op=True)
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
    """Lightning's cluster environment, from `this_rank`; Lightning starts no processes and opens no connection.

    To Lightning each rank is a machine of one device: it needs to know neither how many ranks share a machine nor which
    of its GPUs a rank sees.
    """

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
        return 0

    def node_rank(self) -> int:
        return this_rank().index

    def set_world_size(self, size: int) -> None:
        assert size == self.world_size(), (size, self.world_size())

    def set_global_rank(self, rank: int) -> None:
        assert rank == self.global_rank(), (rank, self.global_rank())
