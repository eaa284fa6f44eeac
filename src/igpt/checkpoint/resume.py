"""Training checkpoints: `checkpoints/step_0001000.ckpt`, each with a checksum; pointers to the newest and the best."""

import logging
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from igpt.checkpoint import torch_files
from igpt.utils import files

log = logging.getLogger(__name__)

LATEST = "latest"  # file with the name of the newest checkpoint
BEST = "best.json"  # file with name, step and metric of the checkpoint with the best validation


class AtomicCheckpointIO(CheckpointIO):
    """Writes a checkpoint and its checksum atomically; reads it without executing code from it.

    A failed write is stored in `write_error` instead of raised, so that all ranks can be told before the run ends.
    """

    write_error: OSError | None = None  # error of the last save

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.write_error = None
        try:
            self.write(checkpoint, Path(path))
        except OSError as error:
            self.write_error = error

    def write(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Writes checkpoint and checksum. Raises OSError if the disk refuses."""
        try:
            with files.atomic_path(path) as temporary:
                torch.save(checkpoint, temporary)
                checksum = files.sha256(temporary)
            with files.atomic_write(checksum_path(path)) as file:
                file.write(f"{checksum}\n".encode())
        except RuntimeError as error:  # PyTorch's writer raises it when the disk refuses
            raise OSError(
                f"{path} could not be written ({error}): is the disk full? Older ones are untouched"
            ) from error

    def replace(self, unfinished: Path, path: Path, sha256: str) -> None:
        """Renames a completely written folder to `path`, with its checksum; stores a disk error in `write_error`."""
        try:
            with files.atomic_write(checksum_path(path)) as checksum:
                checksum.write(f"{sha256}\n".encode())
            files.remove(path)
            files.move_into_place(unfinished, path)
        except OSError as error:
            self.write_error = error

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if Path(path).is_dir():
            from igpt.checkpoint.training_state import read_as_one_file  # which imports this module

            return read_as_one_file(Path(path))
        try:
            torch_files.check_torch_file(Path(path))
            checkpoint: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except torch_files.DAMAGE as error:
            raise ValueError(f"{path} cannot be read ({error}): it is damaged or no checkpoint") from error
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        files.remove(Path(path))
        checksum_path(Path(path)).unlink(missing_ok=True)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Path of the checkpoint of a step: `folder/checkpoints/step_0001000.ckpt`."""
    return folder / "checkpoints" / f"step_{step:07d}.ckpt"


def checksum_path(path: Path) -> Path:
    """Path of a checkpoint's SHA-256: beside it."""
    return path.with_suffix(".sha256")


def matches_checksum(path: Path, sha256: str) -> bool:
    """Whether the SHA-256 beside a checkpoint is this one."""
    with checksum_path(path).open("rb") as file:
        return file.read(len(sha256) + 2).strip() == sha256.encode()


def is_intact(path: Path) -> bool:
    """Whether a checkpoint is there and has the checksum beside it."""
    return path.exists() and checksum_path(path).is_file() and matches_checksum(path, files.sha256(path))


def parse_step(path: Path) -> int:
    """The optimiser step in a checkpoint's file name."""
    return int(path.stem.removeprefix("step_"))


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run directory, by step: names as text are not in order from step 10,000,000 on."""
    named = [path for path in (folder / "checkpoints").glob("step_*.ckpt") if re.fullmatch(r"step_\d+", path.stem)]
    return sorted(named, key=parse_step)


def kept_path(folder: Path, step: int, *, average: bool = False) -> Path:
    """Folder of the weights of a step that are kept for good (`task.keep_steps`), or of their average."""
    return folder / f"model{'_ema' if average else ''}_step_{step:07d}"


def find_kept(folder: Path) -> dict[int, Path]:
    """Step → folder of the weights that a run directory keeps for good, the earliest first; without averages."""
    named = {path: re.fullmatch(r"model_step_(\d+)", path.name) for path in folder.glob("model_step_*")}
    return dict(sorted((int(match[1]), path) for path, match in named.items() if match and path.is_dir()))


def mark_latest(path: Path, *, keep: int, kept: Collection[int] = ()) -> None:
    """Makes `path` the checkpoint to resume from; deletes all in its folder but the newest `keep` and the best.

    `kept`: steps whose checkpoints are not deleted either.
    """
    with files.atomic_write(path.parent / LATEST) as file:
        file.write(f"{path.name}\n".encode())
    best = read_best(path.parent.parent)
    for old in find_checkpoints(path.parent.parent)[:-keep]:
        is_best = best is not None and old.name == best["checkpoint"]
        if old != path and not is_best and parse_step(old) not in kept:
            AtomicCheckpointIO().remove_checkpoint(old)


def mark_best(path: Path, *, name: str, value: float) -> None:
    """Marks `path` as the checkpoint with the best validation so far, by the metric `name`; it is not deleted."""
    best = {"checkpoint": path.name, "step": parse_step(path), "name": name, "value": value}
    files.write_json(path.parent / BEST, best)


def read_best(folder: Path) -> dict[str, Any] | None:
    """The last record of `mark_best` in a run directory; None if missing, damaged, or not the name of a checkpoint."""
    path = folder / "checkpoints" / BEST
    try:
        best: dict[str, Any] = files.read_json(path)
        if parse_step(Path(check_name(best["checkpoint"]))) != best["step"] or not math.isfinite(best["value"]):
            return None
    except (OSError, ValueError, LookupError, TypeError):
        return None  # the next validation writes it again
    return best


def read_latest(checkpoints: Path) -> Path | None:
    """The newest checkpoint by the pointer beside it; None without a pointer, or if it is no checkpoint's name."""
    if not (checkpoints / LATEST).is_file():
        return None
    try:
        with (checkpoints / LATEST).open() as pointer:
            return checkpoints / check_name(pointer.read(100).strip())
    except (OSError, ValueError):
        return None


def check_name(name: Any) -> str:
    """A checkpoint's plain file name; a pointer that was sent may name any path. Raises ValueError for others."""
    if not isinstance(name, str) or not re.fullmatch(r"step_\d+\.ckpt", name):
        raise ValueError(f"{name!r} is no checkpoint's name, as step_0001000.ckpt is")
    return name


def has_checkpoint(folder: Path) -> bool:
    """Whether a run directory, or a stage in it, has a checkpoint that was written to its end."""
    checksums = folder.rglob("checkpoints/step_*.sha256")
    return any(path.with_suffix(".ckpt").exists() for path in checksums) or any(folder.rglob(f"checkpoints/{LATEST}"))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run directory with a correct checksum; None if there are no checkpoints yet.

    Newer ones with a wrong or missing checksum (half written, or damaged) are skipped with a warning.

    Raises:
        ValueError: there are checkpoints, all damaged.
    """
    pointer = folder / "checkpoints" / LATEST
    named = read_latest(pointer.parent)
    if pointer.is_file() and (named is None or not named.exists()):
        log.warning("%s is gone: an older one is looked for", named or f"the checkpoint that {pointer} names")
    newest_first = find_checkpoints(folder)[::-1]
    for path in newest_first:
        if is_intact(path):
            return path
        log.warning("%s is damaged or was not written to its end: it is passed over", path)
    if not pointer.is_file():  # killed while it wrote the first
        return None
    raise ValueError(
        f"{pointer.parent} holds no checkpoint that is whole ({len(newest_first)} are damaged): restore one with its "
        ".sha256, or repeat the run with rerun=true"
    )
