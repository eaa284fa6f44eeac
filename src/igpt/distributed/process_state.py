"""Settings of the whole process that are changed while a block lasts, and are afterwards what they were before."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def float32_matmul_precision(precision: str) -> Iterator[None]:
    """float32 matrix products at `precision` (highest, high, medium), while the block lasts."""
    import torch  # takes seconds, and a process that starts others does without

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """So many threads for PyTorch's operators, while the block lasts."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Environment variables, while the block lasts."""
    with kept_environment(*variables):
        os.environ.update(variables)
        yield


@contextmanager
def kept_environment(*names: str) -> Iterator[None]:
    """Environment variables that the block may change, and that are afterwards what they were."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def signal_handler(
    numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """One answer to some signals, while the block lasts."""
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, answer in before.items():
            if answer is not None:  # None: not set by Python, which cannot put it back
                signal.signal(number, answer)
