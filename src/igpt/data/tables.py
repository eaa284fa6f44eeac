"""What Hugging Face `datasets` opens (a Hub name, parquet, an image folder, a stream), as tables of encoded images."""

import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from igpt.data.classes import check_names
from igpt.data.decode import BadImageError

log = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Columns:
    """Names that the columns of image and label may have: copies of one dataset differ in them."""

    image: Sequence[str]
    label: Sequence[str]

    def find(self, features: Mapping[str, Any], where: str) -> tuple[str, str | None]:
        """The image column and, when there is one, the label column: the first of each that is present."""
        images = [name for name in self.image if name in features]
        labels = [name for name in self.label if name in features]
        if not images:
            raise ValueError(
                f"{where}: none of the columns {', '.join(self.image)} is there (data.image_column); "
                f"it has {', '.join(features)}"
            )
        return images[0], labels[0] if labels else None


@dataclass(frozen=True)
class Table:
    """One split, read by row: encoded images, and labels (N,) int64 (-1 where there are none)."""

    rows: datasets.Dataset
    image: str  # its column
    labels: np.ndarray
    names: tuple[str, ...] | None  # of the classes, by label
    where: str  # what to call it in messages

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """Changes when the files it was read from do."""
        return str(self.rows._fingerprint)

    def encoded(self, rows: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        """The name and the encoded image of every row asked for. Raises BadImageError when a file cannot be read."""
        for row, cell in zip(rows, self.rows[list(rows)][self.image], strict=True):
            yield unpacked(cell, f"row {row} of {self.where}")


def unpacked(cell: Mapping[str, Any] | None, place: str) -> tuple[str, bytes]:
    """The name and the bytes of one cell of an image column. Raises BadImageError when there are none."""
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise BadImageError(f"{place}: there is no image")
    if cell["bytes"] is not None:
        return place, cell["bytes"]
    try:
        return str(cell["path"]), Path(cell["path"]).read_bytes()
    except OSError as error:
        raise BadImageError(f"{cell['path']}: {error.strerror}") from error


def open_tables(path: str, *, name: str, labelled: bool, streaming: bool, cache: Path) -> dict[str, Any]:
    """Every split of what is at `path`: name → `datasets.Dataset`, or `IterableDataset` of a stream.

    `path` is a Hub name, or on this machine a folder of images or of parquet files, or one parquet file. Class
    folders give labels; when `labelled`, even a single one does.

    Raises:
        ValueError: nothing there, no image in it, no network, or no right to read it; with what to do instead.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    local = Path(path).exists()
    if not local and (not _HUB_NAME.fullmatch(path) or path.startswith(".")):
        raise ValueError(f"data.path={path}: there is no such file or folder, and it is no Hub name either")
    options: dict[str, Any] = {"streaming": streaming, "cache_dir": str(cache / "datasets") if local else None}
    try:
        if not local:
            log.info("data: looking for %s on the Hugging Face Hub", path)
            return dict(datasets.load_dataset(path, **options))
        if Path(path).is_file():
            return dict(datasets.load_dataset("parquet", data_files=path, **options))
        if (Path(path) / "dataset_dict.json").is_file() and not streaming:
            return dict(datasets.load_from_disk(path))
        found = dict(datasets.load_dataset(path, **options))
        features = next(iter(found.values())).features or {}
        if labelled and "image" in features and "label" not in features:  # one class folder alone gives no label
            found = dict(datasets.load_dataset("imagefolder", data_dir=path, drop_labels=False, **options))
        return found
    except DatasetNotFoundError as error:
        if "gated" in str(error):
            raise ValueError(
                f"data.path={path} is gated: accept its terms at https://huggingface.co/datasets/{path}, then "
                f"`hf auth login` or set HF_TOKEN; or give a copy with data.path=FOLDER"
            ) from error
        raise ValueError(_unreachable(path, name, str(error))) from error
    except ConnectionError as error:
        raise ValueError(_unreachable(path, name, str(error))) from error
    except (FileNotFoundError, DatasetsError, ValueError) as error:
        cause = error.__cause__ or error
        if local:
            raise ValueError(
                f"data.path={path} does not open: {str(cause).splitlines()[0]} (expected a folder of images, "
                "of class folders or of parquet files, or one parquet file)"
            ) from error
        raise ValueError(_unreachable(path, name, str(cause))) from error


def _unreachable(path: str, name: str, reason: str) -> str:
    return (
        f"data.path={path} cannot be had from the Hugging Face Hub: {reason.splitlines()[0].rstrip('.')}. "
        f"Give a copy on this machine: data.path=FOLDER, with the parquet files of {name} or with its images as "
        "train/<class>/, val/<class>/, test/<class>/ (data.image_column and data.label_column name other columns); or data=digits"
    )


def table(rows: datasets.Dataset, columns: Columns, where: str) -> Table:
    """A split with its images left encoded and its labels read.

    Raises:
        ValueError: no image column, labels that are no numbers, or two classes of one name.
    """
    image, label = columns.find(rows.features, where)
    rows = rows.select_columns([name for name in (image, label) if name]).cast_column(
        image, datasets.Image(decode=False)
    )
    if label is None:
        return Table(rows, image, np.full(len(rows), -1, dtype=np.int64), None, where)
    names = class_names(rows.features[label])
    check_names(names or (), where)
    _check_folders(rows, image, where)
    column = rows.data.column(label)
    if rows._indices is not None:
        column = column.take(rows._indices.column(0))
    try:
        labels = pc.fill_null(column, -1).to_numpy().astype(np.int64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: column {label!r} holds {rows.features[label]}, expected whole numbers") from error
    return Table(rows, image, labels, names, where)


def class_names(feature: Any) -> tuple[str, ...] | None:
    """The names of the classes that a label column knows, or None."""
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _check_folders(rows: datasets.Dataset, image: str, where: str) -> None:
    """Raises ValueError when two class folders of one split have the same name: their images would be one class."""
    paths = pc.struct_field(rows.data.column(image), "path")
    if paths.null_count:
        return
    folders: dict[str, set[Path]] = {}
    for folder in {Path(path).parent for path in paths.to_pylist()}:
        folders.setdefault(folder.name, set()).add(folder)
    for name, same in folders.items():
        if len(same) > 1:
            places = " and ".join(sorted(map(str, same))[:2])
            raise ValueError(f"{where}: two classes have one name, {name!r}: {places}; rename one of them")
