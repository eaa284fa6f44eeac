"""Image files as a table or as shards: classes are the folders they lie in, or stand in a metadata.csv beside them."""

import csv
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa

from igpt.data.classes import describe_classes
from igpt.data.decode import read_image_file
from igpt.data.layout import class_of, is_nested
from igpt.data.listing import METADATA, Listing
from igpt.data.tables import Cell

log = logging.getLogger(__name__)

MOST_METADATA_BYTES = 1 << 30
_MOST_SHARDS = 4096  # of more files, several are one


@dataclass(frozen=True)
class ImageFiles:
    """Image files below a folder, in the order of their names: a `Table`, and as a stream `Shards`."""

    listing: Listing
    labels: np.ndarray  # (N,) int64
    names: tuple[str, ...] | None
    where: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def root(self) -> Path:
        return self.listing.root

    @cached_property
    def fingerprint(self) -> str:
        return self.listing.fingerprint

    @cached_property
    def _paths(self) -> pa.Array:  # in one piece, which processes that are forked share
        return pa.array(map(os.fsencode, self.listing.names), pa.large_binary())

    def path(self, row: int) -> Path:
        return self.root / os.fsdecode(self._paths[row].as_py())

    def encoded(self, rows: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        for row in rows:
            path = self.path(row)
            yield str(path), read_image_file(path)


@dataclass(frozen=True)
class ImageShards:
    """The same files as a stream: so many consecutive ones are a shard."""

    files: ImageFiles

    def __len__(self) -> int:
        return min(len(self.files), _MOST_SHARDS)

    @property
    def names(self) -> tuple[str, ...] | None:
        return self.files.names

    @property
    def where(self) -> str:
        return self.files.where

    @property
    def root(self) -> Path:
        return self.files.root

    def name(self, number: int) -> str:
        rows = self._rows(number)
        return str(self.files.path(rows[0])) if len(rows) == 1 else f"shard {number} of {self.where}"

    def read(self, number: int, start: int) -> Iterator[tuple[int, Cell, int | None]]:
        for i, row in enumerate(self._rows(number)):
            if i >= start:
                yield i, self.files.path(row), int(self.files.labels[row])

    def _rows(self, number: int) -> range:
        edges = [len(self.files) * edge // len(self) for edge in (number, number + 1)]
        return range(*edges)


def open_image_files(
    listing: Listing,
    index: Sequence[int],
    *,
    depth: int,
    label_columns: Sequence[str],
    n_class: int | None,
    where: str,
) -> ImageFiles:
    """Some image files of a listing, with their classes.

    `depth`: leading folders of a name that are not those of a class. A metadata.csv or .jsonl that has a column of
    labels gives those of the files it names; else the first folder below `depth` is the class.

    Raises:
        ValueError: metadata that names no image, or some of those in class folders; where `n_class` asks for labels, an
            image that has none, or folders below those of classes which leave it unclear what the classes are.
    """
    files = listing.select(index)
    folders = [class_of(name, depth) for name in files.names]
    known = sorted({folder for folder in folders if folder is not None})
    given = _metadata(listing, files, label_columns)
    if given and len(known) > 1 and len(given) < len(files):
        raise ValueError(
            f"{where}: the images lie in class folders ({', '.join(known[:3])}, …) and a metadata file gives labels, "
            "too: remove one, or data.label_column=[] to take the folders"
        )
    if given:
        labels, names = _from_metadata(given, len(files), where)
        _check_all_labelled(files, labels, n_class, where, "has no line in the metadata")
        return ImageFiles(files, labels, names, where)
    nested = next((name for name in files.names if is_nested(name, depth)), None)
    if nested is not None and n_class is not None and len(known) != n_class:
        raise ValueError(
            f"{where}: images lie in folders below others, as {nested}: the first folders would be "
            f"{describe_classes(known)}; data.n_class={n_class}: give the folder that holds those of the classes as "
            "data.path, or move them up"
        )
    if nested is not None:
        log.warning(
            "data: %s: images lie in folders below others, as %s: the first folders are %s",
            where, nested, describe_classes(known),
        )  # fmt: skip
    number = {name: label for label, name in enumerate(known)}
    labels = np.fromiter((-1 if folder is None else number[folder] for folder in folders), np.int64, len(folders))
    _check_all_labelled(files, labels, n_class, where, "lies in no class folder")
    return ImageFiles(files, labels, tuple(known) or None, where)


def _check_all_labelled(files: Listing, labels: np.ndarray, n_class: int | None, where: str, why: str) -> None:
    """Raises ValueError, naming a file, where some images have labels and others do not."""
    lacking = np.flatnonzero(labels < 0)
    if n_class is not None and 0 < len(lacking) < len(labels):
        raise ValueError(
            f"{where}: {files.names[lacking[0]]} {why} ({len(lacking)} of {len(labels)} images): move it away, or "
            "data.n_class=null reads images without classes"
        )


def _metadata(listing: Listing, files: Listing, label_columns: Sequence[str]) -> dict[int, str | int]:
    """Row → label, by the metadata files that have labels; nothing where there is none."""
    found = [name for name in listing.names if name.rpartition("/")[2] in METADATA]
    if not found:
        return {}
    row_of = {name: row for row, name in enumerate(files.names)}
    others = set(listing.names)
    given: dict[int, str | int] = {}
    for metadata in found:
        folder = metadata.rpartition("/")[0]
        column, lines = _read_metadata(listing.root / metadata, label_columns)
        if column is None:
            log.warning("data: %s has no labels of images: it is not read", listing.root / metadata)
            continue
        for number, line in lines:
            name = os.path.normpath(PurePosixPath(folder, str(line["file_name"])).as_posix())
            if name in row_of:
                label = line[column]
                if label not in (None, ""):
                    given[row_of[name]] = label if isinstance(label, int) else str(label)
            elif name not in others:
                raise ValueError(
                    f"{listing.root / metadata}, line {number}: {line['file_name']!r} is no image below "
                    f"{listing.root}: correct it, or remove the line"
                )
    return given


def _read_metadata(
    path: Path, label_columns: Sequence[str]
) -> tuple[str | None, list[tuple[int, Mapping[str, str | int | None]]]]:
    """The column of labels, and every line with its number. None: the file does not say what is in which image."""
    if path.stat().st_size > MOST_METADATA_BYTES:
        raise ValueError(f"{path} has more than {MOST_METADATA_BYTES:,} bytes, too many to be read: remove it")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                table = csv.DictReader(file)
                lines = [(table.line_num, line) for line in table]
            else:
                lines = [(number, json.loads(line)) for number, line in enumerate(file, 1) if line.strip()]
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}): correct it, or remove it") from error
    if not lines or not all(isinstance(line, dict) and line.get("file_name") for _, line in lines):
        return None, []
    column = next((name for name in label_columns if any(name in line for _, line in lines)), None)
    return column, [
        (number, {"file_name": line["file_name"], column or "": line.get(column)}) for number, line in lines
    ]


def _from_metadata(given: Mapping[int, str | int], n: int, where: str) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Labels (N,) and the names of the classes: whole numbers are labels, words are names, numbered as sorted."""
    labels = np.full(n, -1, dtype=np.int64)
    numbers = {label for label in given.values() if isinstance(label, int) or label.isdecimal()}
    names = None
    if len(numbers) == len(set(given.values())):
        of = {label: int(label) for label in numbers}
    elif numbers or any(_is_number(str(label)) for label in given.values()):
        odd = next(label for label in given.values() if label not in numbers or _is_number(str(label)))
        raise ValueError(
            f"{where}: the metadata's label {odd!r} is neither a whole number nor a name as the others are"
        )
    else:
        names = tuple(sorted({str(label) for label in given.values()}))
        of = {name: label for label, name in enumerate(names)}
    for row, label in given.items():
        labels[row] = of[label]
    return labels, names


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
