"""What two ranks do for `test_ranks_step.py`, beside `ranks_work.py`."""

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist

from igpt.checkpoint.resume import latest_checkpoint, parse_step
from igpt.distributed import ranks
from igpt.distributed.signals import StoppedError
from igpt.training.nan_guard import NonFiniteLossError
from igpt.training.step_means import MINIMISED
from tests.task.conftest import Lab
from tests.task.test_stopping import Send

SELDOM: dict[str, Any] = {"steps": 20, "val_every": 20, "log_every": 10, "checkpoint_every": 20}
COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "barrier", "broadcast",
    "broadcast_object_list", "gather", "gather_object", "monitored_barrier", "reduce", "reduce_scatter",
    "scatter_object_list",
)  # fmt: skip


class Count(L.Callback):
    """Names the collectives called in Python during each step before the last: `calls[step]`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: dict[int, list[str]] = {}
        self.step: int | None = None
        for name in COLLECTIVES:
            patch.setattr(dist, name, self.counted(name, getattr(dist, name)))

    def counted(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if self.step is not None:
                self.calls[self.step].append(f"{name}, asynchronous" if named.get("async_op") else name)
            return collective(*arguments, **named)

        return call

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.step = trainer.global_step + 1
        if self.step == trainer.max_steps:  # a validation and a checkpoint follow
            self.step = None
        else:
            self.calls.setdefault(self.step, [])


class Overflow(L.Callback):
    """Makes the loss of one step infinite on this rank, not the gradient."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 4:
            pl_module._step[MINIMISED] = torch.tensor(torch.inf)


def measure_patience() -> list[float]:
    """Seconds that a barrier and a broadcast of this package wait for a rank, by the options of their groups."""
    waited: list[float] = []

    def call(collective: Callable[..., None], *given: Any, group: Any, **named: Any) -> None:
        waited.append(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
        collective(*given, group=group, **named)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather_object", "broadcast_object_list"):
            patch.setattr(dist, name, partial(call, getattr(dist, name)))
        ranks.barrier()
        ranks.broadcast_from_rank0(lambda: None)
    return waited


def work(lab: Lab, place: Path, rank: ranks.Rank) -> dict[str, Any]:
    from tests.task.ranks_work import on_all, raised

    answers: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp"):
        parts = {"on": on_all(micro_batch=25, strategy=strategy), **SELDOM}
        with pytest.MonkeyPatch.context() as patch:
            count = Count(patch)
            full = lab.pretrain(place / f"seldom {strategy}", callbacks=(count,), **parts)
        answers[f"calls {strategy}"] = count.calls
        answers[f"seldom {strategy}"] = {name: curve.y for name, curve in full.curves.items()}
        term = (Send(signal.SIGTERM, step=13),) if rank.index == 1 else ()
        stopped = place / f"seldom {strategy} stopped"
        answers[f"seldom {strategy} stopped"] = raised(StoppedError, lab.pretrain, stopped, callbacks=term, **parts)
        resumed = lab.pretrain(stopped, **parts)
        answers[f"seldom {strategy} resumed"] = {name: curve.y for name, curve in resumed.curves.items()}
    overflow = (Overflow(),) if rank.index == 1 else ()
    parts = {"on": on_all(), **SELDOM, "checkpoint_every": 4, "steps": 9, "val_every": 0}
    answers["overflow"] = raised(NonFiniteLossError, lab.pretrain, place / "overflow", callbacks=overflow, **parts)
    newest = latest_checkpoint(place / "overflow")
    answers["saved before overflow"] = None if newest is None else parse_step(newest)
    answers["patience"] = measure_patience()
    return answers
