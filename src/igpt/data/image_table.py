"""The table protocol: encoded images of one split by row, with all labels in memory; reading of image cells."""

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from igpt.data.image_decoding import BadImageError, read_image_file

# {bytes, path}; bytes; an untrusted path from a file; a listed file; the reason for a missing image
Cell = Mapping[str, Any] | bytes | str | Path | BadImageError | None
WHOLE_NUMBER = re.compile(r"-?\d{1,18}")  # fits into int64
BINARY = ("binary", "large_binary")


class Table(Protocol):
    """Encoded images by row, with labels (N,) int64 (-1: no label)."""

    @property
    def labels(self) -> np.ndarray: ...

    @property
    def names(self) -> tuple[str, ...] | None:
        """Class names by label; None if labels are plain numbers or missing."""
        ...

    @property
    def where(self) -> str:
        """The name of the table in messages."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash that changes with the source files."""
        ...

    def __len__(self) -> int: ...

    def read_encoded(self, rows: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        """Yields the name and the encoded image of each row. Raises BadImageError on an unreadable file."""
        ...


@dataclass(frozen=True)
class Columns:
    """Candidate names of the image and the label column, in order of preference: copies of a dataset differ."""

    image: Sequence[str]
    label: Sequence[str]

    def find(self, features: Mapping[str, Any], where: str) -> tuple[str, str | None]:
        """The names of the image column and of the label column (or None): the first candidates that are present.

        Raises:
            ValueError: no image column, or columns of unsuitable types.
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
    """Raises ValueError unless the columns have types of images and of classes."""
    import datasets  # slow to import, and local image files do not need it

    column = features[image]
    plain = getattr(column, "dtype", None) in (*BINARY, "string")
    within = isinstance(column, dict) and getattr(column.get("bytes"), "dtype", None) in (*BINARY, "null")
    if not (isinstance(column, datasets.Image) or plain or within):
        raise ValueError(f"{where}: column {image!r} holds {column}, expected images (data.image_column)")
    if label is None:
        return
    is_integer = str(getattr(features[label], "dtype", "")).startswith(("int", "uint"))
    if not (isinstance(features[label], datasets.ClassLabel) or is_integer):
        raise ValueError(
            f"{where}: column {label!r} holds {features[label]}, expected whole numbers or class names "
            "(data.label_column; [] reads none)"
        )


def class_names(feature: Any) -> tuple[str, ...] | None:
    """The class names of a `ClassLabel` column; None for other columns."""
    import datasets

    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def split_cell(cell: Any) -> tuple[bytes | None, str | None]:
    """The bytes and the path in a cell of an image column; None where missing."""
    if isinstance(cell, Mapping):
        return cell.get("bytes"), cell.get("path")
    return (None, cell) if isinstance(cell, str) else (cell, None)


def read_cell(cell: Cell, where: str, root: Path | None, *, unpacked: Sequence[Path] = ()) -> tuple[str, bytes]:
    """The name and the bytes of the image in one cell of an image column.

    Paths in cells are untrusted. A relative path is followed to a regular file below `root`, an absolute one to a
    regular file below one of `unpacked`, folders written by a library.

    Raises:
        BadImageError: no image in the cell, or a path outside these folders.
    """
    if isinstance(cell, BadImageError):
        raise cell
    if isinstance(cell, Path):
        return str(cell), read_image_file(cell)
    data, path = split_cell(cell)
    if data is not None:
        return where, data
    if path is None:
        raise BadImageError(f"{where}: there is no image")
    candidates = [find_below(root, str(path)), *(find_below(folder, str(path), absolute=True) for folder in unpacked)]
    file = next((file for file in candidates if file is not None), None)
    if file is None:
        raise BadImageError(f"{where}: it names the file {str(path)!r}, which is no file below {root}: not followed")
    return str(file), read_image_file(file)


def find_below(root: Path | None, name: str, *, absolute: bool = False) -> Path | None:
    """The regular file of an untrusted name if it lies below `root` after resolving links; else None."""
    if root is None or "\0" in name or (os.path.isabs(name) and not absolute):
        return None
    top, file = os.path.realpath(root), os.path.realpath(os.path.join(root, name))
    try:
        regular = stat.S_ISREG(os.stat(file).st_mode)
    except OSError:
        return None
    return Path(file) if regular and os.path.commonpath([top, file]) == top else None
