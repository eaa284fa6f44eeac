"""Checkpoints to resume from: `checkpoints/step_0001000.ckpt`, and `latest`, which names the newest good one."""

import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from igpt import files

LATEST = "latest"


class AtomicCheckpointIO(CheckpointIO):
    """Writes a checkpoint whole or not at all; reads it without executing anything that is in it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        try:
            with files.atomic_path(Path(path)) as temporary:
                torch.save(checkpoint, temporary)
        except RuntimeError as error:  # how PyTorch's writer says that the disk refused
            raise OSError(
                f"{path} could not be written ({error}): is the disk full? Older ones are untouched"
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        try:
            checkpoint: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except (EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} cannot be read ({error}): it is damaged or no checkpoint") from error
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is kept: `folder/checkpoints/step_0001000.ckpt`."""
    return folder / "checkpoints" / f"step_{step:07d}.ckpt"


def mark_latest(path: Path, *, keep: int) -> None:
    """Makes `path` the one to resume from, then removes all but the newest `keep` of its folder."""
    with files.atomic_write(path.parent / LATEST) as file:
        file.write(f"{path.name}\n".encode())
    for old in sorted(path.parent.glob("step_*.ckpt"))[:-keep]:
        if old != path:
            old.unlink()


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest good checkpoint of a run folder, or None when it has none yet.

    Raises:
        ValueError: `latest` names a file that is gone.
    """
    pointer = folder / "checkpoints" / LATEST
    if not pointer.is_file():
        return None
    path = pointer.parent / pointer.read_text().strip()
    if not path.is_file():
        raise ValueError(
            f"{pointer} names {path.name}, which is not there: write the name of another step_*.ckpt into it"
        )
    return path
