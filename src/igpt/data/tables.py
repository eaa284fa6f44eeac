"""What Hugging Face `datasets` opens (a Hub name, parquet, an image folder, a stream), as tables of encoded images."""

import errno
import logging
import os
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
from PIL import Image

from igpt.data.classes import check_names
from igpt.data.decode import BadImageError

log = logging.getLogger(__name__)

IMAGES = tuple(Image.registered_extensions())
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
        _check_types(features, images[0], labels[0] if labels else None, where)
        return images[0], labels[0] if labels else None


def _check_types(features: Mapping[str, Any], image: str, label: str | None, where: str) -> None:
    """Raises ValueError unless these columns can hold images and classes."""
    held = features[image]
    plain = getattr(held, "dtype", None) in ("binary", "large_binary", "string")
    if not (isinstance(held, datasets.Image) or plain or (isinstance(held, dict) and "bytes" in held)):
        raise ValueError(f"{where}: column {image!r} holds {held}, expected images (data.image_column)")
    if label is None:
        return
    whole = str(getattr(features[label], "dtype", "")).startswith(("int", "uint"))
    if not (isinstance(features[label], datasets.ClassLabel) or whole):
        raise ValueError(
            f"{where}: column {label!r} holds {features[label]}, expected whole numbers or class names "
            "(data.label_column; [] reads none)"
        )


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


def open_tables(path: str, *, name: str, labels: Sequence[str] | None, streaming: bool, cache: Path) -> dict[str, Any]:
    """Every split of what is at `path`: name → `datasets.Dataset`, or `IterableDataset` of a stream.

    `path` is a Hub name, or on this machine a folder of images or of parquet files, or one parquet file. Class
    folders give labels; when `labels` says what their column may be called, even a single folder does.

    Raises:
        ValueError: nothing there, no image in it, no network, or no right to read it; with what to do instead.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    place = Path(path).expanduser()
    if not place.exists():
        if not _HUB_NAME.fullmatch(path) or path.startswith("."):
            raise ValueError(f"data.path={path}: there is no such file or folder, and it is no Hub name either")
        log.info("data: looking for %s on the Hugging Face Hub", path)
        return _from_hub(path, name=name, streaming=streaming)
    try:
        return _from_disk(place, labels=labels, streaming=streaming, cache=cache)
    except (OSError, DatasetsError, ValueError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise ValueError(
                f"{cause}: `datasets` keeps a copy of data.path={path} in {cache / 'datasets'}; make room, or keep the "
                "cache elsewhere, paths.cache=FOLDER; data.streaming=true keeps none"
            ) from error
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise ValueError(
            f"data.path={path} does not open: {reason} (expected a folder of images, of class folders or of parquet "
            "files, or one parquet file)"
        ) from error


def _from_hub(path: str, *, name: str, streaming: bool) -> dict[str, Any]:
    try:
        return dict(datasets.load_dataset(path, streaming=streaming))
    except DatasetNotFoundError as error:
        if "gated" in str(error):
            raise ValueError(
                f"data.path={path} is gated: accept its terms at https://huggingface.co/datasets/{path}, then "
                f"`hf auth login` or set HF_TOKEN; or give a copy with data.path=FOLDER"
            ) from error
        raise ValueError(_unreachable(path, name, str(error))) from error
    except Exception as error:  # whatever a network can do: the way out is the same
        raise ValueError(_unreachable(path, name, str(error.__cause__ or error))) from error


def _from_disk(place: Path, *, labels: Sequence[str] | None, streaming: bool, cache: Path) -> dict[str, Any]:
    options: dict[str, Any] = {"streaming": streaming, "cache_dir": str(cache / "datasets")}
    if place.is_file():
        return dict(datasets.load_dataset("parquet", data_files=str(place), **options))
    if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():  # by save_to_disk
        if streaming:
            raise ValueError("a dataset that was saved to disk is no stream: data.streaming=false")
        saved = datasets.load_from_disk(str(place))
        return dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    found = dict(datasets.load_dataset(str(place), **options))
    if any(place.rglob("*.parquet")):
        return found
    features = next(iter(found.values())).features or {}
    if labels is not None and not set(labels) & set(features):  # one class folder alone gives no label
        found = dict(datasets.load_dataset("imagefolder", data_dir=str(place), drop_labels=False, **options))
    if not streaming:
        _check_all_read(place, sum(len(rows) for rows in found.values()))
    return found


def _check_all_read(place: Path, n_row: int) -> None:
    """Raises ValueError when image files were passed over, since a folder or a file looked like the name of a split."""
    n_file = sum(
        Path(name).suffix.lower() in IMAGES and not name.startswith(".")
        for folder, _, names in os.walk(place)
        if not any(part.startswith((".", "__")) for part in Path(folder).relative_to(place).parts)
        for name in names
    )
    if n_row < n_file:
        raise ValueError(
            f"{n_file} image files are there, of which {n_row} were read: a folder or file called train, val or test "
            "(or test_1.jpg) is taken for a split; put all images below train/, val/ and test/"
        )


def _unreachable(path: str, name: str, reason: str) -> str:
    return (
        f"data.path={path} cannot be had from the Hugging Face Hub: {reason.splitlines()[0].rstrip('.')}. "
        f"Give a copy on this machine: data.path=FOLDER, with the parquet files of {name} or with its images as "
        "train/<class>/, val/<class>/, test/<class>/ (data.image_column and data.label_column name other columns); "
        "or data=digits"
    )


def table(rows: datasets.Dataset, columns: Columns, where: str, *, labelled: bool) -> Table:
    """A split with its images left encoded and its labels read.

    Raises:
        ValueError: no image column, labels that are no whole numbers, or (when needed) two classes of one name.
    """
    image, label = columns.find(rows.features, where)
    rows = rows.select_columns([name for name in (image, label) if name])
    rows = rows.cast_column(image, datasets.Image(decode=False))
    if label is None:
        return Table(rows, image, np.full(len(rows), -1, dtype=np.int64), None, where)
    names = class_names(rows.features[label])
    if labelled:
        check_names(names or (), where)
        _check_folders(rows, image, where)
    column = rows.data.column(label)
    if rows._indices is not None:
        column = column.take(rows._indices.column(0))
    labels = pc.fill_null(column, -1).to_numpy().astype(np.int64)
    return Table(rows, image, labels, names, where)


def class_names(feature: Any) -> tuple[str, ...] | None:
    """The names of the classes that a label column knows, or None."""
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _check_folders(rows: datasets.Dataset, image: str, where: str) -> None:
    """Raises ValueError when two class folders of one split have the same name: their images would be one class."""
    paths = pc.struct_field(rows.data.column(image), "path")
    parents = pc.unique(pc.replace_substring_regex(paths, pattern=r"/[^/]*$", replacement="")).to_pylist()
    folders: dict[str, list[str]] = {}
    for folder in sorted(filter(None, parents)):
        if "/" in folder:  # inside parquet files, a name alone says nothing
            folders.setdefault(folder.rpartition("/")[2], []).append(folder)
    for name, same in folders.items():
        if len(same) > 1:
            raise ValueError(
                f"{where}: two classes have one name, {name!r}: {same[0]} and {same[1]}; rename one of them, or read "
                "the images without classes, data.n_class=null"
            )
