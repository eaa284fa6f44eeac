"""Image files as a table or as shards. Classes are folder names, or labels in a metadata.csv or .jsonl."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from igpt.data.classes import describe_classes
from igpt.data.image_decoding import read_image_file
from igpt.data.image_metadata import number_labels, read_metadata, resolve_name
from igpt.data.image_table import Cell
from igpt.data.layout import class_folder, is_nested
from igpt.data.listing import METADATA, Listing
from igpt.data.packed_strings import pack_strings

log = logging.getLogger(__name__)

_MOST_SHARDS = 4096  # most shards; with more files, several form one shard


@dataclass(frozen=True)
class ImageFiles:
    """Image files below a folder as a `Table`, sorted by name."""

    root: Path
    paths: pa.Array  # relative paths as bytes, in one buffer that forked workers share
    labels: np.ndarray  # (N,) int64
    names: tuple[str, ...] | None
    where: str
    fingerprint: str

    @staticmethod
    def from_listing(listing: Listing, labels: np.ndarray, names: tuple[str, ...] | None, where: str) -> "ImageFiles":
        """The table of the files in a listing."""
        paths = pack_strings(map(os.fsencode, listing.names), pa.large_binary())
        return ImageFiles(listing.root, paths, labels, names, where, listing.fingerprint)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, row: int) -> Path:
        return self.root / os.fsdecode(self.paths[row].as_py())

    def read_encoded(self, rows: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        for row in rows:
            path = self.path(row)
            yield str(path), read_image_file(path)


class ImageShards:
    """Image files as `Shards`: each shard is a run of consecutive files."""

    def __init__(self, files: ImageFiles) -> None:
        self.files, self.names, self.where, self.root = files, files.names, files.where, files.root

    def __len__(self) -> int:
        return min(len(self.files), _MOST_SHARDS)

    def name(self, number: int) -> str:
        rows = self._rows(number)
        return str(self.files.path(rows[0])) if len(rows) == 1 else f"shard {number} of {self.where}"

    def read(self, number: int, start: int) -> Iterator[tuple[int, Cell, int | None]]:
        for i, row in enumerate(self._rows(number)):
            if i >= start:
                yield i, self.files.path(row), int(self.files.labels[row])

    def _rows(self, number: int) -> range:
        return range(*(len(self.files) * edge // len(self) for edge in (number, number + 1)))


def open_image_files(
    listing: Listing,
    index: Sequence[int],
    *,
    depth: int,
    label_columns: Sequence[str],
    n_class: int | None,
    where: str,
) -> ImageFiles:
    """The table of the image files at `index` in a listing, with their labels.

    `depth`: number of leading folders before the class folder. Labels come from metadata.csv or .jsonl files with a
    label column, else from the first folder below `depth`.

    Raises:
        ValueError: metadata that names a missing image, or labels only part of the images in class folders; with
            `n_class`, an unlabelled image, or nested folders whose number does not match it.
    """
    files = listing.select(index)
    folders = [class_folder(name, depth) for name in files.names]
    classes = sorted({folder for folder in folders if folder is not None})
    texts = _read_labels(listing, files, label_columns)
    if texts and len(classes) > 1 and len(texts) < len(files):
        raise ValueError(
            f"{where}: the images lie in class folders ({', '.join(classes[:3])}, …) and a metadata file gives labels, "
            "too: remove one, or data.label_column=[] to take the folders"
        )
    if texts:
        labels, names = number_labels(texts, len(files), where)
        _check_all_labelled(files, labels, n_class, where, "has no line in the metadata")
        return ImageFiles.from_listing(files, labels, names, where)
    nested = next((name for name in files.names if is_nested(name, depth)), None)
    if nested is not None and n_class is not None and len(classes) != n_class:
        raise ValueError(
            f"{where}: images lie in folders below others, as {nested}: the first folders would be "
            f"{describe_classes(classes)}; data.n_class={n_class}: give the folder that holds those of the classes as "
            "data.path, or move them up"
        )
    if nested is not None:
        log.warning(
            "data: %s: images lie in folders below others, as %s: the first folders are %s",
            where, nested, describe_classes(classes),
        )  # fmt: skip
    number = {name: label for label, name in enumerate(classes)}
    labels = np.fromiter((-1 if folder is None else number[folder] for folder in folders), np.int64, len(folders))
    _check_all_labelled(files, labels, n_class, where, "lies in no class folder")
    return ImageFiles.from_listing(files, labels, tuple(classes) or None, where)


def _check_all_labelled(files: Listing, labels: np.ndarray, n_class: int | None, where: str, why: str) -> None:
    """Raises ValueError, naming a file, if only some of the images have labels."""
    lacking = np.flatnonzero(labels < 0)
    if n_class is not None and 0 < len(lacking) < len(labels):
        raise ValueError(
            f"{where}: {files.names[lacking[0]]} {why} ({len(lacking)} of {len(labels)} images): move it away, or "
            "data.n_class=null reads images without classes"
        )


def _read_labels(listing: Listing, files: Listing, label_columns: Sequence[str]) -> dict[int, str]:
    """Row in `files` → label text, from all metadata files with a label column; empty if there are none."""
    labelled = [name for name in listing.names if name.rpartition("/")[2] in METADATA]
    if not labelled or not label_columns:
        return {}
    row_of = {name: row for row, name in enumerate(files.names)}
    others = set(listing.names)
    texts: dict[int, str] = {}
    for metadata in labelled:
        lines = read_metadata(listing.root / metadata, label_columns)
        if lines is None:
            log.warning("data: %s has no labels of images: it is not read", listing.root / metadata)
            continue
        for line in lines:
            name = resolve_name(metadata.rpartition("/")[0], line.file_name)
            row = row_of.get(name)
            if row is None and name not in others:
                raise ValueError(
                    f"{listing.root / metadata}, line {line.number}: {line.file_name!r} is no image below "
                    f"{listing.root}: correct it, or remove the line"
                )
            if row is None or line.label is None:
                continue
            if texts.setdefault(row, line.label) != line.label:
                raise ValueError(
                    f"{listing.root / metadata}, line {line.number}: {line.file_name!r} is {line.label!r:.40} here and "
                    f"{texts[row]!r:.40} elsewhere: remove one of the lines"
                )
    return texts
