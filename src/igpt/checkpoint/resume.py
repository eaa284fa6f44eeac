"""Checkpoints to resume from: `checkpoints/step_0001000.ckpt`, each with its checksum, and which is newest and best."""

import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from igpt.utils import files

log = logging.getLogger(__name__)

LATEST = "latest"  # the name of the newest
BEST = "best.json"  # the name of the one with the best validation, its step and what makes it the best


class AtomicCheckpointIO(CheckpointIO):
    """Writes a checkpoint and its checksum whole or not at all; reads it without executing anything that is in it.

    A disk that refuses is noted in `refused`, not raised: the other processes of the run, which do not write, are to
    hear of it first.
    """

    refused: OSError | None = None  # of the last save

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.refused = None
        try:
            self.write(checkpoint, Path(path))
        except OSError as error:
            self.refused = error

    def write(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Raises OSError when the disk refuses; then there is neither."""
        try:
            with files.atomic_path(path) as temporary:
                torch.save(checkpoint, temporary)
                checksum = files.sha256(temporary)
            with files.atomic_write(checksum_path(path)) as file:
                file.write(f"{checksum}\n".encode())
        except RuntimeError as error:  # how PyTorch's writer says that the disk refused
            raise OSError(
                f"{path} could not be written ({error}): is the disk full? Older ones are untouched"
            ) from error

    def replace(self, unfinished: Path, path: Path) -> None:
        """Gives a folder that was written whole its name, with its checksum; a disk that refuses is noted."""
        try:
            for file in unfinished.iterdir():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            with files.atomic_write(checksum_path(path)) as checksum:
                checksum.write(f"{files.sha256(unfinished)}\n".encode())
            files.remove(path)
            os.replace(unfinished, path)
        except OSError as error:
            self.refused = error

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if Path(path).is_dir():
            raise ValueError(
                f"{path} is in pieces, as trainer=fsdp writes it: resume with that, or take its weights, init={path}"
            )
        try:
            checkpoint: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except (EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} cannot be read ({error}): it is damaged or no checkpoint") from error
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        files.remove(Path(path))
        checksum_path(Path(path)).unlink(missing_ok=True)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is kept: `folder/checkpoints/step_0001000.ckpt`."""
    return folder / "checkpoints" / f"step_{step:07d}.ckpt"


def checksum_path(path: Path) -> Path:
    """Where a checkpoint's SHA-256 is kept: beside it."""
    return path.with_suffix(".sha256")


def step_of(path: Path) -> int:
    """The optimiser step that a checkpoint is of."""
    return int(path.stem.removeprefix("step_"))


def mark_latest(path: Path, *, keep: int) -> None:
    """Makes `path` the one to resume from, then removes all but the newest `keep` of its folder and the best."""
    with files.atomic_write(path.parent / LATEST) as file:
        file.write(f"{path.name}\n".encode())
    best = read_best(path.parent.parent)
    for old in sorted(path.parent.glob("step_*.ckpt"))[:-keep]:
        if old != path and (best is None or old.name != best["checkpoint"]):
            AtomicCheckpointIO().remove_checkpoint(old)


def mark_best(path: Path, *, name: str, value: float) -> None:
    """Notes that `path` has the best validation so far, by its number called `name`, which keeps it."""
    best = {"checkpoint": path.name, "step": step_of(path), "name": name, "value": value}
    files.write_json(path.parent / BEST, best)


def read_best(folder: Path) -> dict[str, Any] | None:
    """What `mark_best` noted last in a run folder, or None."""
    path = folder / "checkpoints" / BEST
    try:
        best: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None  # of no use when it is damaged: the next validation writes it anew
    return best


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest good checkpoint of a run folder, or None when it has none yet.

    Good is one whose content has the checksum beside it. A newer one that has not, half written or damaged since, is
    passed over, and that is said.

    Raises:
        ValueError: there are checkpoints, and none is good.
    """
    pointer = folder / "checkpoints" / LATEST
    if not pointer.is_file():
        return None
    if not (named := pointer.parent / pointer.read_text().strip()).exists():
        log.warning("%s is gone: an older one is looked for", named)
    newest_first = sorted((folder / "checkpoints").glob("step_*.ckpt"), reverse=True)
    for path in newest_first:
        checksum = checksum_path(path)
        if checksum.is_file() and checksum.read_text().strip() == files.sha256(path):
            return path
        log.warning("%s is damaged or was not written to its end: it is passed over", path)
    raise ValueError(
        f"{pointer.parent} holds no checkpoint that is whole ({len(newest_first)} are damaged): restore one with its "
        ".sha256, or repeat the run with force=true"
    )
