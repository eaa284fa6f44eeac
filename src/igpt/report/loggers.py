"""Where metrics go while a run goes on: a CSV file, Weights & Biases."""

import sys
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger


def csv(folder: Path, *, run_id: str, first_step: int) -> Logger:
    """`metrics/from_0000000/metrics.csv`: one file for each step a run went on from, written row by row."""
    return CSVLogger(folder, name="metrics", version=f"from_{first_step:07d}", flush_logs_every_n_steps=1)


def wandb(folder: Path, *, run_id: str, first_step: int, project: str, offline: bool) -> Logger:
    """A W&B run of the run's own id, so that a resumed run goes on in it and a repeated one does not."""
    return WandbLogger(name=run_id, id=run_id, project=project, offline=offline, save_dir=folder, resume="allow")


def close(failed: bool) -> None:
    """Ends the W&B run of this process, if there is one, so that the next one starts its own."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish(exit_code=int(failed))
