"""Tables: one split of a dataset, read by row; its images encoded as they lie in their files, its labels known."""

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np

from igpt.data.image_decoding import BadImageError, read_image_file

# {bytes, path}, bytes, a path that a file names, a listed file, the reason why there is none
Cell = Mapping[str, Any] | bytes | str | Path | BadImageError | None
WHOLE_NUMBER = re.compile(r"-?\d{1,18}")  # fits into 64 bits
BINARY = ("binary", "large_binary")


class Table(Protocol):
    """Encoded images by row, with labels (N,) int64 (-1 where there are none)."""

    @property
    def labels(self) -> np.ndarray: ...

    @property
    def names(self) -> tuple[str, ...] | None:
        """Of the classes, by label; None where labels are numbers alone, or there are none."""
        ...

    @property
    def where(self) -> str:
        """The name of the table in messages."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when the files it is read from do."""
        ...

    def __len__(self) -> int: ...

    def encoded(self, rows: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        """The name and the encoded image of every row asked for. Raises BadImageError when a file cannot be read."""
        ...


@dataclass(frozen=True)
class Columns:
    """Names that the columns of image and label may have: copies of one dataset differ in them."""

    image: Sequence[str]
    label: Sequence[str]

    def find(self, features: Mapping[str, Any], where: str) -> tuple[str, str | None]:
        """The image column and, when there is one, the label column: the first of each that is present.

        Raises:
            ValueError: no image column, or columns that cannot hold images and classes.
        """
        image = next((name for name in self.image if name in features), None)
        label = next((name for name in self.label if name in features), None)
        if image is None:
            raise ValueError(
                f"{where}: none of the columns {', '.join(self.image)} is there (data.image_column); "
                f"it has {', '.join(features)}"
            )
        _check_types(features, image, label, where)
        return image, label


def _check_types(features: Mapping[str, Any], image: str, label: str | None, where: str) -> None:
    """Raises ValueError unless these columns can hold images and classes."""
    held = features[image]
    plain = getattr(held, "dtype", None) in (*BINARY, "string")
    within = isinstance(held, dict) and getattr(held.get("bytes"), "dtype", None) in (*BINARY, "null")
    if not (isinstance(held, datasets.Image) or plain or within):
        raise ValueError(f"{where}: column {image!r} holds {held}, expected images (data.image_column)")
    if label is None:
        return
    whole = str(getattr(features[label], "dtype", "")).startswith(("int", "uint"))
    if not (isinstance(features[label], datasets.ClassLabel) or whole):
        raise ValueError(
            f"{where}: column {label!r} holds {features[label]}, expected whole numbers or class names "
            "(data.label_column; [] reads none)"
        )


def class_names(feature: Any) -> tuple[str, ...] | None:
    """The names of the classes that a label column knows, or None."""
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def split_cell(cell: Any) -> tuple[bytes | None, str | None]:
    """The bytes and the path of a cell of an image column, where it has them."""
    if isinstance(cell, Mapping):
        return cell.get("bytes"), cell.get("path")
    return (None, cell) if isinstance(cell, str) else (cell, None)


def read_cell(cell: Cell, place: str, root: Path | None, *, unpacked: Sequence[Path] = ()) -> tuple[str, bytes]:
    """The name and the bytes of one cell of an image column.

    A path in a cell was written by whoever made the file: it is followed only to a regular file below `root`, and only
    when it is relative, or when it leads below one of `unpacked`, folders that a library filled itself.

    Raises:
        BadImageError: no image in the cell, or a path that is not followed, by its name.
    """
    if isinstance(cell, BadImageError):
        raise cell
    if isinstance(cell, Path):
        return str(cell), read_image_file(cell)
    data, path = split_cell(cell)
    if data is not None:
        return place, data
    if path is None:
        raise BadImageError(f"{place}: there is no image")
    found = [file_below(root, str(path)), *(file_below(folder, str(path), absolute=True) for folder in unpacked)]
    file = next((file for file in found if file is not None), None)
    if file is None:
        raise BadImageError(f"{place}: it names the file {str(path)!r}, which is no file below {root}: not followed")
    return str(file), read_image_file(file)


def file_below(root: Path | None, name: str, *, absolute: bool = False) -> Path | None:
    """The regular file of a name that something untrusted gave, if it lies below `root`, links resolved; else None."""
    if root is None or "\0" in name or (os.path.isabs(name) and not absolute):
        return None
    top, file = os.path.realpath(root), os.path.realpath(os.path.join(root, name))
    try:
        regular = stat.S_ISREG(os.stat(file).st_mode)
    except OSError:
        return None
    return Path(file) if regular and os.path.commonpath([top, file]) == top else None
