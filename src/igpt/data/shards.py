"""Shards: the files a stream is read from (parquet, WebDataset tar, images), each by its number and from any row."""

import glob
import logging
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import datasets

from igpt.data.tables import Columns, class_names

log = logging.getLogger(__name__)

FORMATS = {".tar": "webdataset", ".parquet": "parquet"}  # ending → what `datasets` calls it
_MOST = 4096  # shards a stream is cut into; of more files, several are one
_BRACES = re.compile(r"\{([^{}]*)\}")
_REMOTE = re.compile(r"[a-z0-9+.-]+://")


class BadShardError(ValueError):
    """A shard that cannot be read; the message names it."""


@dataclass(frozen=True)
class Shards:
    """One split of a stream, as numbered shards of rows whose images are left encoded."""

    rows: datasets.IterableDataset
    image: str  # its column
    label: str | None
    names: tuple[str, ...] | None  # of the classes, by label
    where: str  # what to call it in messages

    @staticmethod
    def of(rows: datasets.IterableDataset, columns: Columns, where: str) -> "Shards":
        """Raises ValueError when no column can hold an image."""
        rows = rows if rows.features is not None else rows._resolve_features()
        image, label = columns.find(rows.features, where)
        names = class_names(rows.features[label]) if label else None
        return Shards(rows, image, label, names, where)

    def __len__(self) -> int:
        return min(int(self.rows.num_shards), _MOST)

    def name(self, number: int) -> str:
        """The file of one shard, where there is one."""
        held = getattr(self.rows.shard(len(self), number)._ex_iterable, "kwargs", {})
        for value in held.values():
            if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
                return str(value[0])
        return f"shard {number} of {self.where}"

    def read(self, number: int, start: int) -> Iterator[tuple[int, Mapping[str, Any] | None, int | None]]:
        """The rows of one shard from row `start` on: each with its number, its encoded image and its label.

        Raises:
            BadShardError: the file is missing, or damaged from some row on.
        """
        shard = self.rows.shard(len(self), number).cast_column(self.image, datasets.Image(decode=False))
        row = -1
        try:
            # by `iter`: in a worker of a loader, iterating itself would skip what other workers are to read. One at a
            # time: of a damaged shard, what comes before the damage is kept
            for row, one in enumerate(shard.iter(1)):
                if row >= start:
                    yield row, one[self.image][0], one[self.label][0] if self.label else None
        except Exception as error:  # tarfile, pyarrow, fsspec and every network have their own
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadShardError(f"{self.name(number)} cannot be read after {row + 1} images: {reason}") from error


def named_files(path: str) -> list[str] | None:
    """The shard files that a path with an ending of `FORMATS` stands for, or None where it is no such path.

    `web-{000..099}.tar` and `{a,b}.parquet` are so many files, `*` and `?` (on this machine) those that are there.
    """
    if Path(path).suffix not in FORMATS:
        return None
    names = _unfolded(path)
    if _REMOTE.match(path):
        return names
    local = [str(Path(name).expanduser()) for name in names]
    return [file for name in local for file in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]


def _unfolded(path: str) -> list[str]:
    """A path with its braces written out: a..b counts in numbers of equal width, commas list."""
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


def open_shards(path: str, *, cache: Path, skip: bool) -> dict[str, datasets.IterableDataset] | None:
    """The splits of a set of shards: those of a folder by their names, else all as train. None where it is none.

    Shards on this machine are looked at first: one that is missing or of another kind ends the run by its name, or is
    left out with `skip`.

    Raises:
        ValueError: no shard, or one that cannot be read.
    """
    place = Path(path).expanduser()
    files = named_files(path)
    if files is not None:
        if not files:
            raise ValueError(f"data.path={path}: there is no such file")
        kind, splits = FORMATS[Path(path).suffix], {"train": files}
    elif place.is_dir() and (ending := _ending(place)):
        found = datasets.load_dataset_builder(str(place), cache_dir=str(cache / "datasets")).config.data_files
        of_all = {str(name): [str(path) for path in paths] for name, paths in found.items()}
        if not all(path.endswith(ending) for paths in of_all.values() for path in paths):
            return None  # images, with some such file among them
        kind, splits = FORMATS[ending], of_all
    else:
        return None
    good = {name: _readable(paths, path, skip=skip) for name, paths in splits.items()}
    features = _features(kind, good, cache)
    while True:
        try:
            return dict(_loaded(kind, good, cache, features=features))
        except FileNotFoundError as error:  # elsewhere: `datasets` asks for every one
            gone = next((file for files in good.values() for file in files if f"'{file}'" in str(error)), None)
            if gone is None or not skip:
                raise BadShardError(f"{error}; data.on_corrupt=skip leaves such shards out") from error
            log.warning("data: %s is not there and is left out", gone)
            good = {name: [file for file in files if file != gone] for name, files in good.items()}


def _loaded(kind: str, files: Any, cache: Path, **more: Any) -> Any:
    return datasets.load_dataset(kind, data_files=files, streaming=True, cache_dir=str(cache / "datasets"), **more)


def _ending(folder: Path) -> str | None:
    """That of the shards in a folder. Raises ValueError where there are two kinds of them."""
    there = [ending for ending in FORMATS if any(folder.rglob(f"*{ending}"))]
    if len(there) > 1:
        raise ValueError(
            f"data.path={folder} holds {' and '.join(there)} files: name one kind, data.path={folder}/*.tar"
        )
    return there[0] if there else None


def _readable(files: Sequence[str], path: str, *, skip: bool) -> list[str]:
    """Those that begin and end as they should, and all that are elsewhere."""
    reasons = {file: _damage(Path(file)) for file in files if not _REMOTE.match(file)}
    bad = {file: reason for file, reason in reasons.items() if reason}
    if bad and not skip:
        file, reason = next(iter(bad.items()))
        more = f" ({len(bad)} of {len(files)} shards)" if len(bad) > 1 else ""
        raise BadShardError(f"{file} {reason}{more}: make it anew; data.on_corrupt=skip leaves such shards out")
    if len(bad) == len(files):
        raise ValueError(f"data.path={path}: none of its {len(files)} shards can be read ({next(iter(bad.values()))})")
    if bad:
        log.warning(
            "data: %d of %d shards of %s cannot be read and are left out, as %s",
            len(bad), len(files), path, next(iter(bad)),
        )  # fmt: skip
    return [file for file in files if file not in bad]


def _damage(file: Path) -> str | None:
    """Why a shard cannot be read, as far as its first and last bytes show."""
    try:
        with file.open("rb") as opened:
            if file.suffix == ".tar":
                tarfile.TarInfo.frombuf(opened.read(tarfile.BLOCKSIZE), tarfile.ENCODING, "surrogateescape")
                return None
            head = opened.read(4)
            opened.seek(-min(4, file.stat().st_size), 2)
            return None if head == opened.read(4) == b"PAR1" else "is no parquet file, or is cut short"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except tarfile.HeaderError as error:
        return f"is no tar file, or is empty ({error})"


def _features(kind: str, splits: Mapping[str, Sequence[str]], cache: Path) -> Any:
    """The columns of a set of tar shards, read off one of them: `datasets` would take the first of each split."""
    if kind != "webdataset":
        return None
    reasons = []
    for file in (file for files in splits.values() for file in files):
        try:
            return _loaded(kind, [file], cache)["train"].features
        except Exception as error:  # as in `Shards.read`
            reasons.append(f"{file}: {(str(error).splitlines() or [type(error).__name__])[0]}")
    raise BadShardError(reasons[0])
