"""Sees on a CPU where a GPU would be waited for: what is read of weights, a batch and all that is computed of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# their results, or the sizes of these, are numbers of the host
READING = {
    aten._local_scalar_dense, aten._unique2, aten.bincount, aten.equal, aten.is_nonzero, aten.masked_select,
    aten.nonzero, aten.unique_consecutive, aten.unique_dim,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_}  # by a list of the host, which is copied; by a mask, counted
TO_HOST = ("cpu", "numpy", "tolist")  # they read a CPU's memory without an operation


class DeviceWatch(TorchDispatchMode):
    """Collects the operations that would wait, in `waits`, while it is active.

    Taken to be on the device: the storages of `mark`, and those of all results of operations on one of them, or with a
    device of their own.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies = 0  # tensors made of numbers of Python
        self.active = False
        self._storages: dict[int, Any] = {}  # kept, so that no other takes its place
        for name in TO_HOST:
            patch.setattr(Tensor, name, self._read_by(name, getattr(Tensor, name)))

    def mark(self, *tensors: Tensor) -> None:
        self._storages |= {(storage := tensor.untyped_storage())._cdata: storage for tensor in tensors}

    def is_on_device(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._storages

    def _read_by(self, name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
            if self.active and self.is_on_device(tensor):
                self.waits.append(name)
            return read(tensor, *arguments, **named)

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        there = [self.is_on_device(each) for each in tensors]
        operation = func.overloadpacket
        if any(there) and (
            operation in READING
            or (
                operation in INDEXING
                and (not all(there) or any(each.dtype == torch.bool for each in args[1] if each is not None))
            )
            or (operation is aten.repeat_interleave and func is not aten.repeat_interleave.self_int)
        ):
            self.waits.append(str(func))
        self.copies += operation is aten.lift_fresh
        result = func(*args, **kwargs)
        if any(there) or kwargs.get("device") is not None:
            self.mark(*(each for each in tree_leaves(result) if isinstance(each, Tensor)))
        return result

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.active = True
        with self:
            yield
        self.active = False


class Watch(L.Callback):
    """Watches the micro-batches of these steps, from their start to the end of all that Lightning does with them."""

    def __init__(self, patch: pytest.MonkeyPatch, steps: range) -> None:
        self.device, self.steps = DeviceWatch(patch), steps
        self.watched = 0  # micro-batches
        self.logged: list[Any] = []  # what was logged by `self.log`
        log = L.LightningModule.log

        def note(module: L.LightningModule, name: str, value: Any, *arguments: Any, **named: Any) -> None:
            self.logged.append(value)
            log(module, name, value, *arguments, **named)

        patch.setattr(L.LightningModule, "log", note)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step + 1 not in self.steps:
            return
        self.device.mark(*pl_module.parameters(), *pl_module.buffers(), *batch)
        self.watched += 1
        connector, context = trainer._logger_connector, self.device.watching()
        last = connector.update_train_step_metrics

        def end() -> None:
            last()
            context.__exit__(None, None, None)
            connector.update_train_step_metrics = last

        connector.update_train_step_metrics = end
        context.__enter__()
