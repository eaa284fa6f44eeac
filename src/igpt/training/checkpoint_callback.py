"""Checkpoint callback: saves periodically, at the best validation and on a stop signal; never non-finite weights."""

import logging
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.distributed.tensor import DTensor

from igpt.checkpoint.resume import AtomicCheckpointIO, checkpoint_path, mark_best, mark_latest, read_best
from igpt.distributed import ranks
from igpt.distributed.signals import StoppedError, StopRequest
from igpt.metric.result import Number
from igpt.settings.training import TrainingSettings
from igpt.training.nan_guard import FiniteGuard, NonFiniteLossError

log = logging.getLogger(__name__)

PATIENCE = "task.patience"


def is_observer(callback: L.Callback) -> bool:
    """Whether a callback declares that it changes nothing in training."""
    return bool(getattr(callback, "is_observer", False))


class Checkpoints(L.Callback):
    """Saves every `checkpoint_every` steps, at the best validation and at the end; keeps the best and `keep` newest.

    Best is the highest or lowest of the module's `numbers[monitor]`. Training ends after `patience` validations without
    an improvement. After a stop signal, the current optimiser step and its validation are finished, then the state is
    saved.

    Raises:
        StoppedError: the run was stopped by a signal.
    """

    def __init__(
        self,
        folder: Path,
        settings: TrainingSettings,
        guard: FiniteGuard,
        *,
        keep: int,
        val_every: int,
        monitor: str = "val/loss_gen",
        highest: bool = False,
        patience: int | None = None,
        finite: bool = True,
    ) -> None:
        self.finite = finite  # require finite weights; False where heads of too high a rate may diverge
        self.monitor, self.sign, self.patience = monitor, -1.0 if highest else 1.0, patience
        self.guard, self.stop = guard, StopRequest()
        self.folder, self.every, self.keep, self.val_every = folder, settings.checkpoint_every, keep, val_every
        self.stopping = ranks.AsyncMax()
        self.stopped_by: str | None = None  # who ended the training before its last step; saved in checkpoints
        self._saved: tuple[int, str | None] = -1, None  # step and `stopped_by` of the last checkpoint

    def state_dict(self) -> dict[str, Any]:
        return {} if self.stopped_by is None else {"stopped_by": self.stopped_by}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.stopped_by = str(state_dict["stopped_by"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.restore_best(pl_module, trainer.global_step)
        if self._is_out_of_patience(trainer.global_step) and trainer.global_step > 0:
            self.stopped_by = self.stopped_by or PATIENCE
        self._saved = trainer.global_step, self.stopped_by  # this step is already saved
        if self.stopped_by is not None:
            trainer.should_stop = True  # the training had ended early before it was resumed

    def restore_best(self, module: L.LightningModule, step: int) -> None:
        """Restores the best value at `step` from the best marker; marks a checkpoint that a kill left unmarked."""
        best = ranks.broadcast_from_rank0(lambda: read_best(self.folder))
        is_complete = best is not None and best["step"] <= step  # ignore a best of later steps, which were lost
        self._best = self.sign * float(best["value"]) if best is not None and is_complete else float("inf")
        self._best_step = best["step"] if best is not None and is_complete else 0
        points = getattr(module, "history", {}).get(self.monitor, [])
        if not points or points[-1][0] != step or self.sign * points[-1][1] >= self._best:
            return
        self._best, self._best_step = self.sign * points[-1][1], step
        path = checkpoint_path(self.folder, step)
        if ranks.this_rank().is_first and path.exists():
            mark_best(path, name=self.monitor, value=points[-1][1])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._record_early_stop(trainer)
        if not (self.val_every and trainer.global_step % self.val_every == 0):
            self._finish_step(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        self._record_early_stop(trainer)
        module: Any = pl_module  # a TrainedModule or similar
        numbers: dict[str, Number] = module.numbers  # of the last validation
        value = numbers[self.monitor].value
        if self.sign * value < self._best and self._save(trainer, pl_module, best=value):
            self._best, self._best_step = self.sign * value, trainer.global_step
        if self._is_out_of_patience(trainer.global_step):
            log.info(
                "no better %s in %d validations: step %d stays the best", self.monitor, self.patience, self._best_step
            )
            self.stopped_by = self.stopped_by or PATIENCE
            self._save(trainer, pl_module, needed=True)
            trainer.should_stop = True
        self._finish_step(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stopping.close()
        self._record_early_stop(trainer)
        self._save(trainer, pl_module, needed=True)

    def _record_early_stop(self, trainer: L.Trainer) -> None:
        """Sets `stopped_by` where another callback has ended the training before its last step."""
        if not trainer.should_stop or self.stopped_by is not None or trainer.global_step >= trainer.max_steps:
            return
        others = [each for each in trainer.callbacks if each is not self and not is_observer(each)]  # type: ignore[attr-defined]
        self.stopped_by = " or ".join(type(each).__name__ for each in others) or "the Trainer"

    def _is_out_of_patience(self, step: int) -> bool:
        """Whether `patience` validations have passed without an improvement."""
        waited = (step - self._best_step) // self.val_every if self.val_every else 0
        return self.patience is not None and waited >= self.patience

    def _finish_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        stop = self.stopping.update(self.stop.number)
        if trainer.global_step % self.every == 0 or stop:
            self._save(trainer, module, needed=stop > 0)
        if stop and trainer.global_step < trainer.max_steps:
            raise StoppedError(signal.Signals(stop), trainer.global_step)

    def _save(
        self, trainer: L.Trainer, module: L.LightningModule, *, best: float | None = None, needed: bool = False
    ) -> bool:
        """Saves this step unless it is saved. Returns False on a disk error, which is raised only if `needed`."""
        step = trainer.global_step
        path = checkpoint_path(self.folder, step)
        if self._saved == (step, self.stopped_by):
            return True
        self.guard.check()
        parts = [getattr(p, "ds_tensor", p) for p in module.parameters()]  # ZeRO 3: the local shard
        here = [(p.to_local() if isinstance(p, DTensor) else p).detach() for p in parts]
        finite = bool(torch.stack([part.isfinite().all() for part in here]).all())
        if self.finite and not all(ranks.all_gather_object(finite)):
            raise NonFiniteLossError(
                f"the weights after step {step} are not finite: nothing was saved, lower task.learning_rate"
            )
        written = trainer.strategy.checkpoint_io
        assert isinstance(written, AtomicCheckpointIO)
        trainer.save_checkpoint(path)  # on every rank: sharded strategies gather the state from all
        if trainer.is_global_zero and written.write_error is None:
            try:
                if best is not None:
                    mark_best(path, name=self.monitor, value=best)
                mark_latest(path, keep=self.keep)
            except OSError as error:
                written.write_error = error
        refused = ranks.broadcast_from_rank0(lambda: None if written.write_error is None else str(written.write_error))
        if refused is not None:
            if step >= trainer.max_steps or needed:
                raise OSError(refused)
            log.error("step %d is not saved, the run goes on: %s", step, refused)
            return False
        self._saved = step, self.stopped_by
        return True
