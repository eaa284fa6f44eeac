"""Saving while training: every so many steps, after that step's validation, never a broken state."""

from pathlib import Path
from typing import Any

import lightning as L
import torch

from igpt.checkpoint.resume import checkpoint_path, mark_latest
from igpt.task.guard import FiniteGuard, NonFiniteLossError


class Checkpoints(L.Callback):
    """Saves every `every` steps and at the end, and keeps the newest `keep`."""

    def __init__(self, folder: Path, guard: FiniteGuard, *, every: int, keep: int, val_every: int) -> None:
        self.guard = guard
        self.folder, self.every, self.keep, self.val_every = folder, every, keep, val_every
        self._saved = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved = trainer.global_step  # nothing new yet

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if not (self.val_every and trainer.global_step % self.val_every == 0):
            self._save_if_due(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._save_if_due(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer, pl_module)

    def _save_if_due(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step % self.every == 0:
            self._save(trainer, module)

    def _save(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        if step == self._saved:
            return
        self.guard.check()
        finite = torch.stack([p.detach().isfinite().all() for p in module.parameters()]).all()
        if not finite:
            raise NonFiniteLossError(
                f"the weights after step {step} are not finite: nothing was saved, lower task.learning_rate"
            )
        path = checkpoint_path(self.folder, step)
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            mark_latest(path, keep=self.keep)
        self._saved = step
