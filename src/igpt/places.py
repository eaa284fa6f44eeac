"""Where a run goes: its folder, fixed before anything starts, by its name or by what it goes on with."""

import glob
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from igpt import files, processes
from igpt.build import Build
from igpt.older_configs import VERSION
from igpt.report.folder import RunFolder, changes, identity

log = logging.getLogger(__name__)


def chosen_folder(build: Build) -> tuple[RunFolder, bool]:
    """Where this run goes, told to the process that started this one if that asked; and whether it is finished."""
    folder = open_folder(build)
    tell = os.environ.get(processes.TELL)
    if tell is not None:
        with files.atomic_write(Path(tell)) as file:
            file.write(os.fsencode(folder.path.absolute()))
    return folder, folder.finished


def open_folder(build: Build) -> RunFolder:
    """The folder of this run, fixed before anything starts.

    Raises:
        ValueError: an unfinished run of this name that has checkpoints, or a `resume=` that is another run.
    """
    cfg = build.cfg
    name = build.name
    if cfg.resume is not None and cfg.force:
        raise ValueError("resume= continues a run, force=true repeats one: choose one of them")
    if cfg.resume not in (None, "auto"):
        folder = RunFolder(Path(cfg.resume))
        saved = folder.read_run()
        differs, harmless = changes(saved["config"], build.config)
        now = build.files_sha256
        differs += [
            f"the file of {key} has changed" for key, sha in saved["files_sha256"].items() if sha != now.get(key)
        ]
        if differs:
            raise ValueError(
                f"resume={cfg.resume}: this is another run than the one that was begun: {'; '.join(differs)}"
            )
        if not any(folder.path.rglob("latest")):
            log.info("%s has no checkpoint yet: it starts from the first step", folder.path)
        if harmless:
            log.info("resuming with other settings, which do not change what is learned: %s", "; ".join(harmless))
        return folder
    folder = RunFolder(Path(cfg.paths.runs) / name)
    if not folder.started and not cfg.force:
        folder = next(of_older_release(build, folder), folder)
    if cfg.force:
        repeat = 2
        while folder.started:
            folder = RunFolder(Path(cfg.paths.runs) / f"{name}-{repeat}")
            repeat += 1
    elif cfg.resume is None and folder.started and not folder.finished and any(folder.path.rglob("latest")):
        raise ValueError(
            f"{folder.path} was begun and is not finished: continue it with `python train.py resume={folder.path}`, "
            f"or repeat it in a new folder with force=true"
        )
    return folder


def of_older_release(build: Build, folder: RunFolder) -> Iterator[RunFolder]:
    """Runs beside a run's folder that are the same run, whose name an older release made otherwise.

    Those that are finished first, then those that have a checkpoint to go on from.
    """
    prefix = folder.path.name.rpartition("-")[0]
    beside = [RunFolder(path) for path in sorted(folder.path.parent.glob(f"{glob.escape(prefix)}-*"))]
    for other in sorted(beside, key=lambda other: not other.finished):
        if not other.started or not (other.finished or any(other.path.rglob("latest"))):
            continue
        try:
            saved = other.read_run()
            same = saved["version"] < VERSION and identity(saved["config"], saved["files_sha256"])
        except (ValueError, KeyError, TypeError, AttributeError):  # what is no record of a run
            continue
        if same == identity(build.config, build.files_sha256):
            log.info("%s is this run, %s by an older release", other.path, "made" if other.finished else "begun")
            yield other
