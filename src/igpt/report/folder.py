"""The run directory: its lock, `run.json` and `result.json`."""

import os
import platform
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

import igpt
from igpt.metric.result import Curve, Number, Result
from igpt.report.bystanders import Bystander, describe_error
from igpt.report.confusion_figure import matrix_figure
from igpt.report.figures import bars_figure, curves_figure, lines_figure
from igpt.report.grid_pictures import grid_picture, palette_picture
from igpt.report.scatter import scatter_figure
from igpt.settings.older_configs import VERSION, read_record
from igpt.utils import files
from igpt.utils.program import find_commit, typed_command

RECORDS = {"run.json", "log.txt", ".lock", "hparams.yaml"}  # of a run that has done nothing yet
OF_LOGGERS = {"wandb", "tensorboard"}  # their folders
LOCK_SECONDS = 10  # DataLoader workers of a killed run hold its lock for up to five
PACKAGES = ("torch", "lightning", "hydra-core", "numpy", "scikit-learn", "safetensors")


@dataclass(frozen=True)
class RunFolder:
    """A run directory: `run.json` is written at the start, `result.json` at a successful end."""

    path: Path

    @property
    def is_finished(self) -> bool:
        return (self.path / "result.json").is_file()

    @property
    def is_started(self) -> bool:
        return (self.path / "run.json").is_file()

    def check_links(self) -> None:
        """Raises ValueError for a link that leads out of the directory, and for what is neither file nor folder.

        A directory that was sent may hold them; logs and checkpoints would be written there. W&B's files are its own.
        """
        for top, folders, names in os.walk(self.path):
            for path in (Path(top, name) for name in (*folders, *names)):
                inside = files.resolve_below(self.path, path.relative_to(self.path)) is not None
                if not inside or not (path.is_file() or path.is_dir() or path.is_symlink()):
                    kind = "no file" if inside else f"a link to {os.readlink(path)}, outside of the run folder"
                    raise ValueError(f"{path} is {kind}: nothing is written there; put a file or folder in its place")
            folders[:] = [name for name in folders if name != "wandb"]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the directory's file lock for the block; a dead process holds none.

        Raises:
            ValueError: another process holds it, or the directory cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout as error:
            raise ValueError(
                f"{self.path} is in use by another process that is running: wait for its end, or stop it"
            ) from error
        except OSError as error:
            raise ValueError(
                f"{self.path} cannot be written ({error.strerror}): choose another with paths.runs=FOLDER"
            ) from error
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def remove_if_refused(self) -> Iterator[None]:
        """Removes the directory at a ValueError of the block, if the block made it and left only records in it.

        So a run that is refused before its work starts leaves nothing; one that had been begun is left as it is. Files
        of W&B and TensorBoard count as records.
        """
        is_new = not self.is_started
        try:
            yield
        except ValueError:
            written = [path.relative_to(self.path) for path in self.path.rglob("*") if path.is_file()]
            if is_new and all(path.name in RECORDS or OF_LOGGERS & set(path.parts) for path in written):
                files.remove(self.path)
            raise

    def start(
        self,
        config: dict[str, Any],
        overrides: list[str] | None,
        files_sha256: dict[str, str | None],
        of: dict[str, str] | None = None,
        search_path: Sequence[str] = (),
        *,
        precision: str | None = None,
    ) -> None:
        """Writes `run.json` unless it exists. `overrides`: None for a stage of a pipeline.

        `precision`: what `trainer.precision=auto` in `config` is on this device.
        `of`: names of model, data and objective, for the page. `search_path`: arguments that name config folders.
        """
        if not self.is_started:
            record = {
                "version": VERSION,
                "id": uuid.uuid4().hex[:8],  # distinguishes repetitions of a run in loggers
                "overrides": overrides,
                "search_path": list(search_path),
                "working_directory": os.getcwd(),
                "config": config,
                **({} if precision is None else {"precision": precision}),
                "files_sha256": files_sha256,
                **({} if of is None else {"of": of}),
                **environment(),
            }
            files.write_json(self.path / "run.json", record)

    def read_run(self) -> dict[str, Any]:
        """The content of `run.json`, with current setting names.

        Raises:
            ValueError: no run directory, or one of a later release.
        """
        if not self.is_started:
            raise ValueError(f"{self.path} is no run folder: it has no run.json")
        record = read_record(self.path / "run.json")
        if missing := {"config", "files_sha256"} - record.keys():
            raise ValueError(f"{self.path}/run.json is damaged (no {missing.pop()}): restore it, or start the run anew")
        return record

    def read_result(self) -> dict[str, Any]:
        """The content of `result.json`, with current setting names. Raises ValueError on another version."""
        return read_record(self.path / "result.json", oldest=1)

    def finish(self, task: str, result: Result, *, seconds: float) -> None:
        """Writes pictures and arrays, then `result.json`, which names those that could not be written as such."""
        not_written: dict[str, str] = {}

        def write(name: str, suffix: str, writer: Callable[..., None], *content: Any) -> None:
            file = Path(f"{name}{suffix}")
            with Bystander(self.path / file) as bystander:
                writer(self.path / file, *content)
                result.files[name] = file
            if bystander.error is not None:
                not_written[str(file)] = describe_error(bystander.error)

        for name, grid in result.grids.items():
            write(name, ".png", grid_picture, grid)
        for name, colours in result.palettes.items():
            write(f"{name}_colours", ".png", palette_picture, colours)
        for name, array in result.arrays.items():
            write(f"{name}_tokens", ".npy", _write_array, array)
        for name, matrix in result.matrices.items():
            write(f"{name}_counts", ".npy", _write_array, matrix)
            write(name, ".png", matrix_figure, matrix, result.class_names.get(name))
        for name, bars in result.bars.items():
            write(name, ".png", bars_figure, bars)
        for name, lines in result.lines.items():
            write(name, ".png", lines_figure, lines)
        for name, curves in result.charts.items():
            write(name, ".png", curves_figure, curves)
        for name, scatter in result.scatters.items():
            write(name, ".png", scatter_figure, scatter)
        if result.curves:
            write("curves", ".png", curves_figure, result.curves)
        record = {
            "version": VERSION,
            "task": task,
            "numbers": {key: asdict(number) for key, number in result.numbers.items()},
            "curves": {key: asdict(curve) for key, curve in result.curves.items()},
            "files": {key: str(path) for key, path in result.files.items()},
            "class_names": {key: list(names) for key, names in result.class_names.items()},
            **({"not_written": not_written} if not_written else {}),
            "provenance": result.provenance,
            "config": self.read_run()["config"],
            "seconds": seconds,
            **environment(),
        }
        files.write_json(self.path / "result.json", record)


def _write_array(path: Path, array: np.ndarray) -> None:
    with files.atomic_write(path) as file:
        np.save(file, array, allow_pickle=False)


def parse_result(record: dict[str, Any]) -> Result:
    """The task's `Result` read back from a `result.json`: numbers, curves, files, class names, provenance."""
    return Result(
        numbers={key: Number(**_with_interval(number, "interval")) for key, number in record["numbers"].items()},
        curves={key: _read_curve(curve) for key, curve in record["curves"].items()},
        files={key: Path(path) for key, path in record["files"].items()},
        class_names={key: _names(names) for key, names in record.get("class_names", {}).items()},
        provenance=record["provenance"],
    )


def _names(written: Any) -> tuple[str, ...]:
    if not isinstance(written, list) or not all(isinstance(name, str) for name in written):
        raise ValueError("class_names holds something else than names")
    return tuple(written)


def _read_curve(fields: dict[str, Any]) -> Curve:
    of_points = {
        key: [(low, high) for low, high in fields[key]] for key in ("x_intervals", "y_intervals") if fields.get(key)
    }
    return Curve(**_with_interval(fields, "best") | of_points)


def _with_interval(fields: dict[str, Any], key: str) -> dict[str, Any]:
    """The fields with the list at `key` as a pair; None if it is missing."""
    ends = fields.get(key)
    return {**fields, key: None if ends is None else (ends[0], ends[1])}


def environment() -> dict[str, Any]:
    """Git commit, package versions and command line of this process; the first two as they were at the first call."""
    commit, versions = find_code()
    return {"commit": commit, "versions": dict(versions), "command": typed_command()}


@cache
def find_code() -> tuple[str, dict[str, str]]:
    """The commit and the versions of the code of this process, asked for at the start and the end of every stage."""
    libraries = {name: version(name) for name in PACKAGES}
    return find_commit(), {"igpt": igpt.__version__, **libraries, "python": platform.python_version()}
