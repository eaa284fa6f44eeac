"""Settings that are paths, by their dotted keys; and their absolute form."""

import glob
import os
import re
from pathlib import Path
from typing import Any

READ = re.compile(  # settings that are paths to read
    r"init|resume|tokens(\.palette)?\.path|(task\.probe_)?data(\.streams\.\w+)?\.(path|clusters)|"
    r"task\.(palette|runs|compare_with|encoder|baselines|study|head)|"
    r"task\.stages\.\w+\.(init|run|palette|compare_with|encoder|baselines|head|(probe_)?data\.path)"
)
HUB = re.compile(  # also accept a name on the Hub
    r"(task\.stages\.\w+\.)?init|(task\.probe_)?data(\.streams\.\w+)?\.path|"
    r"task\.stages\.\w+\.(probe_)?data\.path|task\.runs"
)
LISTS = re.compile(r"task\.(stages\.\w+\.)?(runs|compare_with|baselines)")  # also accept a list
ENCODER = re.compile(r"task\.(stages\.\w+\.)?(encoder|baselines)")  # a path only if something is there
NO_PATHS = ("lite0", "pixels", "untrained", "tokenized")  # of encoders and baselines, whatever lies in the directory
WRITTEN = re.compile(r"paths\.(runs|cache)")


def is_path(key: str) -> bool:
    """Whether a setting is a path, or a list of paths."""
    return bool(READ.fullmatch(key) or WRITTEN.fullmatch(key))


def is_local_path(path: str, folder: Path | None = None) -> bool:
    """Whether a path, relative to `folder`, names something on this machine: a file, a prefix of one, or a pattern.

    Prefixes are those of OpenAI's checkpoints (`model.ckpt-1000000.*`), patterns those of shards (`web-{00..31}.tar`).
    """
    if "://" in path:
        return False
    local = (folder or Path()) / path
    is_prefix = next(local.parent.glob(f"{glob.escape(local.name)}.*"), None) is not None
    return local.exists() or is_prefix or re.search(r"[*?{]", path) is not None


def absolute_path(key: str, value: Any, folder: Path | None = None) -> Any:
    """The value of setting `key` with its paths to read made absolute, relative to `folder` (the working directory).

    Unchanged: other settings, URLs, and names that may be on the Hub and do not exist on this machine.
    """
    if not READ.fullmatch(key) or key == "resume":
        return value
    if isinstance(value, list):
        return [absolute_path(key, each, folder) for each in value]
    if ENCODER.fullmatch(key) and (value in NO_PATHS or not ((folder or Path()) / str(value)).exists()):
        return value
    if not isinstance(value, str) or "://" in value or (HUB.fullmatch(key) and not is_local_path(value, folder)):
        return value
    return str(((folder or Path()) / value).absolute())


def is_same_place(key: str, one: Any, other: Any) -> bool:
    """Whether two values of setting `key` are paths to the same place, links followed."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same_place, [key] * len(one), one, other))
    if not (READ.fullmatch(key) and isinstance(one, str) and isinstance(other, str)):
        return False
    return os.path.isabs(one) and os.path.isabs(other) and os.path.realpath(one) == os.path.realpath(other)


def resolve_nearest(folder: Path, path: str) -> Path | None:
    """Resolves a path from a run's config relative to the working directory, else to a parent of the run directory.

    None if neither exists, or if it lies neither below the working directory nor beside the run (a stage: beside its
    pipeline): the config of a run folder that was sent names whatever it likes.
    """
    outer = folder.absolute().parent
    outer = outer.parent if (outer / "run.json").is_file() else outer
    try:
        place = Path(path).expanduser()
        tried = [place, *(around / place for around in folder.absolute().parents)]
        found = next((candidate for candidate in tried if candidate.exists()), None)
        inside = found is not None and any(found.resolve().is_relative_to(top.resolve()) for top in (Path.cwd(), outer))
    except (OSError, RuntimeError, ValueError):  # a name that no file can have
        return None
    return found if inside else None
