"""Context managers that change process-wide state and restore it: precision, threads, environment, signal handlers."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import TypeVar

from igpt.distributed.cores import count_physical_cores

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

T = TypeVar("T")


@contextmanager
def _setting(read: Callable[[], T], write: Callable[[T], None], value: T) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def float32_matmul_precision(precision: str) -> AbstractContextManager[None]:
    """Sets the float32 matmul precision (highest, high, medium) in the block."""
    import torch  # slow, and not needed by a process that only starts others

    return _setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, precision)


def cudnn_tf32(allowed: bool) -> AbstractContextManager[None]:
    """Sets whether float32 convolutions on a GPU may round to TF32 in the block."""
    import torch

    cudnn = torch.backends.cudnn
    return _setting(lambda: cudnn.allow_tf32, lambda value: setattr(cudnn, "allow_tf32", value), allowed)


def num_threads(count: int) -> AbstractContextManager[None]:
    """Sets the number of PyTorch's intra-op threads in the block."""
    import torch

    return _setting(torch.get_num_threads, torch.set_num_threads, count)


@contextmanager
def one_thread_per_core() -> Iterator[None]:
    """Lowers the number of PyTorch's threads, and so of the C code's, to `count_physical_cores` in the block.

    PyTorch itself knows no CPU quota and, without MKL, no hardware threads. No effect if `OMP_NUM_THREADS` or
    `MKL_NUM_THREADS` is set, or if PyTorch has no more threads than that.
    """
    import torch

    cores = count_physical_cores()
    if any(name in os.environ for name in THREAD_VARIABLES) or torch.get_num_threads() <= cores:
        yield
        return
    with num_threads(cores):
        yield


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Sets environment variables in the block."""
    with restore_environment(*variables):
        os.environ.update(variables)
        yield


@contextmanager
def restore_environment(*names: str) -> Iterator[None]:
    """Restores environment variables that the block may change."""
    before = {name: os.environ[name] for name in names if name in os.environ}
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextmanager
def signal_handler(
    numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Installs one handler for several signals in the block.

    No effect outside the main thread, which alone can install handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, answer in before.items():
            if answer is not None:  # None: not set by Python, which cannot put it back
                signal.signal(number, answer)
