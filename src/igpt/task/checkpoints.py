"""Saving while training: every so many steps, at the best validation, when asked to stop; never a broken state."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch

from igpt.checkpoint.resume import checkpoint_path, mark_best, mark_latest, read_best
from igpt.stopping import StoppedError, StopRequest
from igpt.task.guard import FiniteGuard, NonFiniteLossError

log = logging.getLogger(__name__)


class Checkpoints(L.Callback):
    """Saves every `every` steps, at the lowest validation loss and at the end; keeps the newest `keep` and the best.

    When a signal has asked to stop, the state is saved after the optimiser step that is going on (and its validation).

    Raises:
        StoppedError: then.
    """

    def __init__(
        self, folder: Path, guard: FiniteGuard, *, every: int, keep: int, val_every: int, stop: StopRequest
    ) -> None:
        self.guard, self.stop = guard, stop
        self.folder, self.every, self.keep, self.val_every = folder, every, keep, val_every
        self._saved = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved = trainer.global_step  # nothing new yet
        best = read_best(self.folder)
        whole = best is not None and best["step"] <= trainer.global_step  # not one of a future that was lost
        self._best = float(best["val/loss_gen"]) if best is not None and whole else float("inf")
        self.stop.take_over()  # Lightning has its own answer to SIGTERM, which saves amid accumulation

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if not (self.val_every and trainer.global_step % self.val_every == 0):
            self._step_ends(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        loss = float(trainer.callback_metrics["val/loss_gen"])
        if loss < self._best and self._save(trainer, pl_module, best=loss):
            self._best = loss
        self._step_ends(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer, pl_module)

    def _step_ends(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step % self.every == 0 or self.stop.name is not None:
            self._save(trainer, module)
        if self.stop.name is not None and trainer.global_step < trainer.max_steps:
            raise StoppedError(self.stop.name, trainer.global_step)

    def _save(self, trainer: L.Trainer, module: L.LightningModule, best: float | None = None) -> bool:
        """Saves, unless this step's state is; True when there is one. A disk that refuses does not end the run."""
        step = trainer.global_step
        path = checkpoint_path(self.folder, step)
        if step == self._saved:
            return path.is_file()
        self.guard.check()
        finite = torch.stack([p.detach().isfinite().all() for p in module.parameters()]).all()
        if not finite:
            raise NonFiniteLossError(
                f"the weights after step {step} are not finite: nothing was saved, lower task.learning_rate"
            )
        try:
            trainer.save_checkpoint(path)
            if trainer.is_global_zero:
                if best is not None:
                    mark_best(path, loss=best)
                mark_latest(path, keep=self.keep)
        except OSError as error:
            if step >= trainer.max_steps or self.stop.name is not None:
                raise
            log.error("step %d is not saved, the run goes on: %s", step, error)
            return False
        self._saved = step
        return True
