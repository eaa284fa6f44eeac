"""Checkpoint callback: saves periodically, at the best validation, on a signal or error; never non-finite weights."""

import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.tensor import DTensor

from igpt.checkpoint.resume import AtomicCheckpointIO, checkpoint_path, is_intact, mark_best, mark_latest, read_best
from igpt.checkpoint.tensors import first_line
from igpt.distributed import ranks
from igpt.distributed.signals import StoppedError, StopRequest
from igpt.metric.result import Number
from igpt.report.bystanders import describe_error
from igpt.settings.training import TrainingSettings
from igpt.tokens.batches import StreamState
from igpt.training.lightning_callbacks import is_observer
from igpt.training.nan_guard import FiniteGuard, NonFiniteLossError

log = logging.getLogger(__name__)

PATIENCE = "task.patience"


class FinishedStepMarker(L.Callback):
    """Tells `saving` of every finished optimiser step, before an error of another callback can hide it."""

    def __init__(self, saving: "Checkpoints") -> None:
        self.saving = saving

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.saving.mark_finished(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.saving.mark_finished(trainer)


class Checkpoints(L.Callback):
    """Saves every `checkpoint_every` steps, at the best validation and at the end; keeps the best and `keep` newest.

    The steps `cooled_at`, at which the learning rate has fallen to zero, are saved as well, and always kept.
    Best is the highest or lowest of the module's `numbers[monitor]`. Training ends after `patience` validations without
    an improvement. After a stop signal, the current optimiser step and its validation are finished, then the state is
    saved. Before an exception ends the run, the last finished step is saved.

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
        cooled_at: Sequence[int] = (),
    ) -> None:
        self.cooled_at = frozenset(cooled_at)
        self.finite = finite  # require finite weights; False where heads of too high a rate may diverge
        self.monitor, self.sign, self.patience = monitor, -1.0 if highest else 1.0, patience
        self.guard, self.stop = guard, StopRequest()
        self.folder, self.every, self.keep, self.val_every = folder, settings.checkpoint_every, keep, val_every
        self.stopping = ranks.AsyncMax()
        self.marker = FinishedStepMarker(self)  # the Trainer's first callback; after this one come only observers
        self.stopped_by: str | None = None  # who ended the training before its last step; saved in checkpoints
        self._saved: tuple[int, str | None] = -1, None  # step and `stopped_by` of the last checkpoint
        self._validated = -1  # last step that was validated
        self._finished: tuple[int, int] | None = None  # (last optimiser step, micro-batches) that is complete
        self._stream: StreamState | None = None  # position in the stream after it

    def state_dict(self) -> dict[str, Any]:
        return {} if self.stopped_by is None else {"stopped_by": self.stopped_by}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.stopped_by = str(state_dict["stopped_by"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.restore_best(pl_module, trainer.global_step)
        points = getattr(pl_module, "history", {}).get(self.monitor, [])
        if points and self._is_out_of_patience(points[-1][0]):
            self.stopped_by = self.stopped_by or PATIENCE
        self._saved = trainer.global_step, self.stopped_by  # this step is already saved
        if self.stopped_by is not None:
            trainer.should_stop = True  # the training had ended early before it was resumed
        # else Lightning would take each later resume for one in the middle of a validation
        trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset_on_restart()

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
        self._validated = trainer.global_step
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

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Saves the last finished step, if that takes no other rank; logs whether it did."""
        if self._finished is None or self._finished[0] == self._saved[0] or isinstance(exception, NonFiniteLossError):
            return
        step, what = self._finished[0], describe_error(exception)
        try:
            if trainer.is_global_zero:
                self._save_finished(trainer, pl_module)
                log.warning("%s: step %d, the last that was finished, is saved", what, step)
        except Exception as error:  # the run ends with the exception that is handled here
            why = "refused again" if str(error) == str(exception) else first_line(error)
            log.error("%s: step %d, the last that was finished, is not saved: %s", what, step, why)
            log.debug("traceback", exc_info=True)

    def mark_finished(self, trainer: L.Trainer) -> None:
        """Remembers that weights, optimiser and schedule are those after this step."""
        self._finished = trainer.global_step, trainer.fit_loop.batch_idx + 1
        stream: StreamState | None = getattr(getattr(trainer, "datamodule", None), "stream", None)
        self._stream = None if stream is None else stream.copy()

    def _save_finished(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Writes the checkpoint of the last finished step as it was at its end, without any other rank.

        Raises:
            ValueError: this cannot be done; the message says why.
        """
        assert self._finished is not None
        step, n_batch = self._finished
        is_validated = not self.val_every or step % self.val_every > 0 or self._validated == step
        if trainer.world_size > 1 and (type(trainer.strategy) is not DDPStrategy or self._stream is not None):
            raise ValueError("parts of it are in other processes")
        if trainer.global_step != step or getattr(module, "updated_to", step) > step:
            raise ValueError("the weights were already changed by the step after it")
        if not is_validated and step >= trainer.max_steps:
            raise ValueError("its validation, the last one, did not end")
        self.guard.check()
        if self.finite and not _is_finite(module):
            raise ValueError("its weights are not finite")
        if self._stream is not None:
            data: Any = getattr(trainer, "datamodule", None)
            data.stream = self._stream
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        rewind(checkpoint, step, n_batch=n_batch, is_validated=is_validated)
        path, written = checkpoint_path(self.folder, step), trainer.strategy.checkpoint_io
        assert isinstance(written, AtomicCheckpointIO)
        if not is_intact(path):  # the error may have come just after it was written
            trainer.strategy.save_checkpoint(checkpoint, path)
            if written.write_error is not None:
                raise written.write_error
        mark_latest(path, keep=self.keep, kept=self.cooled_at)
        self._saved = step, self.stopped_by

    def _record_early_stop(self, trainer: L.Trainer) -> None:
        """Sets `stopped_by` where another callback has ended the training before its last step."""
        if not trainer.should_stop or self.stopped_by is not None or trainer.global_step >= trainer.max_steps:
            return
        own = (self, self.marker)
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning does not declare it
        others = [each for each in callbacks if each not in own and not is_observer(each)]
        self.stopped_by = " or ".join(type(each).__name__ for each in others) or "the Trainer"

    def _is_out_of_patience(self, step: int) -> bool:
        """Whether `patience` validations have passed without an improvement."""
        waited = (step - self._best_step) // self.val_every if self.val_every else 0
        return self.patience is not None and waited >= self.patience

    def _finish_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        stop = self.stopping.update(self.stop.number)
        is_cooled = trainer.global_step in self.cooled_at
        if trainer.global_step % self.every == 0 or is_cooled or stop:
            self._save(trainer, module, needed=is_cooled or stop > 0)
        if stop and trainer.global_step < trainer.max_steps:
            raise StoppedError(signal.Signals(stop), trainer.global_step)

    def _save(
        self, trainer: L.Trainer, module: L.LightningModule, *, best: float | None = None, needed: bool = False
    ) -> bool:
        """Saves this step unless it is saved. Returns False on a disk error, which is raised only if `needed`."""
        step = trainer.global_step
        path = checkpoint_path(self.folder, step)
        if self._saved == (step, self.stopped_by) and best is None:
            return True
        trained: Any = module  # a TrainedModule
        trained.agree()
        if self.finite and not all(ranks.all_gather_object(_is_finite(module))):
            raise NonFiniteLossError(
                f"the weights after step {step} are not finite: nothing was saved, lower task.learning_rate"
            )
        written = trainer.strategy.checkpoint_io
        assert isinstance(written, AtomicCheckpointIO)
        if self._saved != (
            step,
            self.stopped_by,
        ):  # else `on_exception` saved it, before the validation that finds it the best
            # on every rank, as sharded strategies gather the state from all; `trainer.save_checkpoint` would then have
            # the others wait in a barrier of NCCL, which gives up after ten minutes, while the first writes and hashes
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            trainer.strategy.save_checkpoint(checkpoint, path)
        if trainer.is_global_zero and written.write_error is None:
            try:
                if best is not None:
                    mark_best(path, name=self.monitor, value=best)
                mark_latest(path, keep=self.keep, kept=self.cooled_at)
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


def _is_finite(module: L.LightningModule) -> bool:
    """Whether all weights here (of a sharded network those of this rank) are finite."""
    parts = [getattr(p, "ds_tensor", p) for p in module.parameters()]  # ZeRO 3: the local shard
    here = [(p.to_local() if isinstance(p, DTensor) else p).detach() for p in parts]
    return bool(torch.stack([part.isfinite().all() for part in here]).all())


def rewind(checkpoint: dict[str, Any], step: int, *, n_batch: int, is_validated: bool) -> None:
    """Sets counters and curves of a checkpoint back to the end of `step`, which is micro-batch `n_batch`.

    Without `is_validated`, they are set to the start of this step's validation, with which Lightning then resumes.
    """
    loop = checkpoint["loops"]["fit_loop"]
    batches, validation = (loop[f"epoch_loop.{name}batch_progress"] for name in ("", "val_loop."))
    n_later = batches["current"]["ready"] - n_batch
    for counts in (batches["current"], batches["total"]):
        counts.update(dict.fromkeys(counts, counts["ready"] - n_later))
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step
    if not is_validated:
        for counts in (validation["current"], validation["total"]):
            counts.update({"ready": 1, "started": 1, "processed": 0, "completed": 0})
    checkpoint["history"] = {
        name: [point for point in points if point[0] < step or is_validated or name.startswith("train/")]
        for name, points in checkpoint["history"].items()
    }
