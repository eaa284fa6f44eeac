"""Where metrics go while a run goes on: a CSV file, Weights & Biases."""

from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger


def csv(folder: Path, first_step: int) -> Logger:
    """`metrics/from_0000000/metrics.csv`: a file for each stretch of a run, so that resuming overwrites nothing."""
    return CSVLogger(folder, name="metrics", version=f"from_{first_step:07d}")


def wandb(folder: Path, first_step: int, *, project: str, offline: bool) -> Logger:
    """A W&B run named after the run folder, continued when the folder's run is resumed."""
    return WandbLogger(
        name=folder.name, project=project, offline=offline, save_dir=folder, id=folder.name, resume="allow"
    )
