"""Resolves the directory of a run: `paths.runs`/NAME, or that of `resume=`."""

import glob
import logging
import os
import re
from collections.abc import Iterator, Sequence
from itertools import chain, count
from pathlib import Path

from igpt.checkpoint.resume import has_checkpoint
from igpt.distributed import launcher
from igpt.report.folder import RunFolder
from igpt.report.identity import DEBUG, changes, deciding_callbacks, identity
from igpt.run.run_config import RunConfig
from igpt.run.saved_overrides import NOT_RECORDED, is_plain
from igpt.utils import files
from igpt.utils.overrides import format_text, train_command

log = logging.getLogger(__name__)


def resolve_run_dir(run: RunConfig) -> tuple[RunFolder, bool]:
    """Resolves the run directory; writes its path to `$IGPT_TELL` for the parent. Returns (folder, finished).

    Raises:
        ValueError: as `find_run_dir`; also for links in it that lead elsewhere.
    """
    folder = find_run_dir(run)
    folder.check_links()
    tell = os.environ.get(launcher.RUN_DIR_FILE)
    if tell is not None:
        with files.atomic_write(Path(tell)) as file:
            file.write(os.fsencode(folder.path.absolute()))
    return folder, folder.is_finished


def find_run_dir(run: RunConfig) -> RunFolder:
    """The directory of a run: that of `resume=`, or `paths.runs`/NAME; with `rerun=true`, a new NAME-2, NAME-3 ….

    Raises:
        ValueError: an unfinished run of this name with checkpoints, or a `resume=` of another config or input files.
    """
    cfg = run.cfg
    name = run.name
    if cfg.resume is not None and cfg.rerun:
        raise ValueError("resume= continues a run, rerun=true repeats one: choose one of them")
    if cfg.resume not in (None, "auto"):
        folder = RunFolder(Path(cfg.resume))
        saved = folder.read_run()
        differs, harmless = changes(saved["config"], run.config)
        now = run.input_hashes
        differs += [
            f"the file of {key} has changed" for key, sha in saved["files_sha256"].items() if sha != now.get(key)
        ]
        if differs:
            raise ValueError(
                f"resume={cfg.resume}: this is another run than the one that was begun: {'; '.join(differs)}"
            )
        if not has_checkpoint(folder.path):
            log.info("%s has no checkpoint yet: it starts from the first step", folder.path)
        if harmless:
            log.info("resuming with other settings, which do not change what is learned: %s", "; ".join(harmless))
        return folder
    named = chain([name], (f"{name}-{n}" for n in count(2)))
    runs = Path(cfg.paths.runs, *([DEBUG] if DEBUG in run.config else []))  # never beside runs that count
    folders = (RunFolder(runs / each) for each in named)
    if cfg.rerun:
        return next(each for each in folders if not each.is_started)
    folder = next(each for each in folders if not has_other_callbacks(each, run))
    if not folder.is_started:
        folder = next(find_older_runs(run), folder)
    if cfg.resume is None and folder.is_started and not folder.is_finished and has_checkpoint(folder.path):
        raise ValueError(
            f"{folder.path} was begun and is not finished: continue it with "
            f"`{resume_command(folder.path, run.search_path)}`, or repeat it in a new folder with rerun=true"
        )
    return folder


def resume_command(folder: Path, search_path: Sequence[str], overrides: Sequence[str] = ()) -> str:
    """The command that continues a run, with those of its `overrides` that `resume=` takes from no file.

    `search_path`: the arguments that name its additional config folders.
    """
    missing = [text for text in overrides if not (text.startswith(NOT_RECORDED) or is_plain(text, ()))]
    return train_command(*search_path, *missing, f"resume={format_text(str(folder))}")


def has_other_callbacks(folder: RunFolder, run: RunConfig) -> bool:
    """Whether a directory of this name is another run's: older releases named runs without regard to callbacks."""
    try:
        return folder.is_started and deciding_callbacks(folder.read_run()["config"]) != deciding_callbacks(run.config)
    except (ValueError, KeyError, TypeError, AttributeError):  # a damaged run.json
        return False


def find_older_runs(run: RunConfig) -> Iterator[RunFolder]:
    """Yields directories of the same run that an older release named otherwise.

    Finished runs first, then those with a checkpoint to resume from.
    """
    name, runs = run.name, Path(run.cfg.paths.runs)
    prefixes = dict.fromkeys(each.rpartition("-")[0] for each in (name, *run.older_names))
    beside = [RunFolder(path) for prefix in prefixes for path in sorted(runs.glob(f"{glob.escape(prefix)}-*"))]
    for other in sorted(beside, key=lambda other: not other.is_finished):
        if not other.is_started or not (other.is_finished or has_checkpoint(other.path)):
            continue
        if re.fullmatch(rf"{re.escape(name)}(-\d+)?", other.path.name):  # of this release
            continue
        try:
            saved = other.read_run()
            same = identity(saved["config"], saved["files_sha256"])
        except (ValueError, KeyError, TypeError, AttributeError):  # a damaged run.json
            continue
        if same == identity(run.config, run.input_hashes):
            log.info("%s is this run, %s by an older release", other.path, "made" if other.is_finished else "begun")
            yield other
