"""Finds the finished runs of some paths."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

from igpt.report.identity import DEBUG
from igpt.report.runs import RunRecord, try_read_run
from igpt.utils import files

OF_RUNS = ("compare", "isoflop", "advise")  # tasks whose results, numbers of several runs, are never compared
DEEPEST = 4  # maximal depth of a run directory below a given one


@dataclass
class FoundRuns:
    """The readable runs of some paths, and the reasons for the unreadable ones."""

    runs: list[RunRecord] = field(default_factory=list)
    problems: dict[Path, str] = field(default_factory=dict)  # directory → reason

    @property
    def input_hashes(self) -> dict[str, str | None]:
        """Directory → SHA-256 of its result.json, or its problem; with stages and the runs in the weights' history."""
        hashes: dict[str, str | None] = {str(path): why for path, why in self.problems.items()}
        waiting = list(self.runs)
        while waiting:
            run = waiting.pop()
            if str(run.folder) in hashes:  # also a pipeline that names itself as a stage
                continue
            for part in (run, *run.init_history.runs):
                hashes[str(part.folder)] = files.sha256(part.folder / "result.json")
            hashes[f"init of {run.folder}"] = run.init_history.unknown
            hashes |= {str(stage.folder): stage.problem for stage in run.stages if stage.run is None}
            waiting += [stage.run for stage in run.stages if stage.run is not None]
        return hashes


def read_runs(folders: Sequence[Path]) -> FoundRuns:
    """The finished runs in some directories, and the reasons for the unreadable ones."""
    read = {folder: try_read_run(folder) for folder in folders}
    problems = {folder: problem for folder, (run, problem) in read.items() if run is None}
    return FoundRuns([run for run, _ in read.values() if run is not None], problems)


def find_runs(folders: Sequence[str]) -> FoundRuns:
    """Every finished run of some paths, each once. A path: a run directory, a glob, or a directory that contains runs.

    Unreadable runs go into `problems`. Results of tasks that read runs (OF_RUNS) are skipped.

    Raises:
        ValueError: a path that matches nothing.
    """
    here: dict[Path, Path] = {}
    for place in folders:
        pattern = str(Path(place).expanduser())
        named = [Path(pattern)] if os.path.exists(pattern) else [Path(path) for path in sorted(glob(pattern))]
        if not named:
            raise ValueError(f"there is nothing at {place}: give run folders, a glob, or a folder that holds them")
        for path in named:
            top = path.parent if path.name == "result.json" else path
            here |= {folder.resolve(): folder for folder in _run_folders(top)}
    every = read_runs(list(here.values()))
    return FoundRuns([run for run in every.runs if run.task not in OF_RUNS], every.problems)


def _run_folders(folder: Path, depth: int = 0) -> Iterator[Path]:
    """Yields the run directories at or below a path; directories inside a run are not searched."""
    if any((folder / name).is_file() for name in ("run.json", "result.json")):
        if not folder.name.startswith(tuple(f"{task}-" for task in OF_RUNS)) or (folder / "result.json").is_file():
            yield folder
    elif folder.is_dir() and depth < DEEPEST:
        for inside in sorted(folder.iterdir()):
            if inside.is_dir() and not inside.name.startswith(".") and inside.name != DEBUG:
                yield from _run_folders(inside, depth + 1)
