"""Shards: the files of a stream (parquet, WebDataset tar, images), readable by number from any row."""

import errno
import glob
import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import IO, Any, Protocol

from igpt.data.errors import DataError
from igpt.data.image_table import Cell
from igpt.data.listing import SHARD_EXTENSIONS

log = logging.getLogger(__name__)

_BRACES = re.compile(r"\{([^{}]*)\}")
_REMOTE = re.compile(r"[a-z0-9+.-]+://")
_ASKED_AT_ONCE = 16  # remote files checked concurrently


class BadShardError(DataError):
    """A shard that cannot be read; the message names it."""


class Shards(Protocol):
    """One split of a stream: numbered shards of rows with encoded images."""

    @property
    def names(self) -> tuple[str, ...] | None:
        """Class names by label; None if labels are plain numbers or missing."""
        ...

    @property
    def where(self) -> str:
        """The name of the split in messages."""
        ...

    @property
    def root(self) -> Path | None:
        """The folder that relative paths in cells must lie below; None: no path is followed."""
        ...

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """The file name of a shard, or a description if it is not a single file."""
        ...

    def read(self, number: int, start: int) -> Iterator[tuple[int, Cell, int | None]]:
        """Yields (row, encoded image, label) of one shard from row `start` on.

        Raises:
            BadShardError: a missing file, or one damaged from some row on.
        """
        ...


@dataclass(frozen=True)
class FileShards:
    """The base of `Shards` in which every shard is a file."""

    files: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, number: int) -> str:
        return self.files[number]


def is_remote(file: str) -> bool:
    """Whether a file name is a URL, as https://…"""
    return _REMOTE.match(file) is not None


def open_shard(file: str) -> IO[bytes]:
    """Opens a local or remote shard for reading and seeking. Failed remote reads are retried."""
    if is_remote(file):
        from datasets.utils.file_utils import xopen  # slow to import, and not needed for local files

        remote: IO[bytes] = xopen(file, "rb")
        return remote
    if not stat.S_ISREG(os.stat(file).st_mode):  # opening a pipe would block
        raise OSError(errno.EINVAL, "it is no regular file")
    return open(file, "rb")


def expand_shard_path(path: str) -> list[str] | None:
    """The shard files of a path pattern; None if the path has no shard extension.

    Braces expand (`web-{000..099}.tar`, `{a,b}.parquet`); `*` and `?` match local files. Special characters in
    existing parent folders are literal.
    """
    if Path(path).suffix not in SHARD_EXTENSIONS:
        return None
    if is_remote(path):
        return _expand_braces(path)
    local = Path(path)
    if local.is_file():
        return [str(local)]
    around = next(folder for folder in (*local.parents, Path()) if folder.is_dir())
    patterns = _expand_braces(str(local.relative_to(around)))
    files: list[str] = []
    for pattern in patterns:
        literal = pattern.replace("[", "[[]")
        there = sorted(glob.glob(literal, root_dir=around)) if re.search(r"[*?]", pattern) else [pattern]
        files += [str(around / name) for name in there]
    return files


def _expand_braces(path: str) -> list[str]:
    """All paths of a pattern with braces: {a..b} counts with zero padding, commas list alternatives."""
    choices = []
    for inside in _BRACES.findall(path):
        counted = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
        if counted:
            first, last = counted.groups()
            choices.append([f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)])
        else:
            choices.append(inside.split(","))
    plain = _BRACES.split(path)[::2]
    return [
        "".join([part for pair in zip(plain, [*chosen, ""], strict=True) for part in pair])
        for chosen in product(*choices)
    ]


def find_readable_files(files: Sequence[str], path: str, *, check: Any, skip: bool) -> list[str]:
    """The files that pass `check`, which raises BadShardError. Without `skip`, the first failure is raised.

    Raises:
        BadShardError: an unreadable file, without `skip`.
        ValueError: all files are unreadable.
    """
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        errors = pool.map(partial(_find_read_error, check), files)
    reasons = {file: error for file, error in zip(files, errors, strict=True) if error is not None}
    if not reasons:
        return [*files]
    first = next(iter(reasons.values()))
    if not skip:
        more = f" ({len(reasons)} of {len(files)} shards)" if len(reasons) > 1 else ""
        raise BadShardError(f"{first}{more}: make it anew; data.on_corrupt=skip leaves such shards out") from first
    if len(reasons) == len(files):
        raise ValueError(f"data.path={path}: none of its {len(files)} shards can be read ({first})")
    log.warning(
        "data: %d of %d shards of %s cannot be read and are left out, as %s", len(reasons), len(files), path, first
    )
    return [file for file in files if file not in reasons]


def _find_read_error(check: Any, file: str) -> BadShardError | None:
    try:
        check(file)
    except BadShardError as error:
        return error
    return None


def format_reason(error: BaseException) -> str:
    """The first line of an error's message, or its type if there is none."""
    message = getattr(error, "strerror", None) or str(error)
    if isinstance(error, FileNotFoundError) and not error.strerror:  # fsspec: the message repeats the name
        message = "there is no such file"
    return (message.splitlines() or [type(error).__name__])[0]
