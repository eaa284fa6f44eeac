"""Readers of metadata.csv and metadata.jsonl beside images: a `file_name` and a label column."""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import numpy as np

from igpt.data.image_table import WHOLE_NUMBER

MOST_BYTES = 128 << 20  # of one metadata file: three times the size of one for ILSVRC
MOST_LINE = 1 << 16  # characters


class Line(NamedTuple):
    """One line of a metadata file: the image's name relative to the metadata's folder, and its label."""

    number: int
    file_name: str
    label: str | None


def read_metadata(path: Path, label_columns: Sequence[str]) -> list[Line] | None:
    """The lines of a metadata file; None if it has no image names or no label column.

    Raises:
        ValueError: a damaged file, or one larger than MOST_BYTES.
    """
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has more than {MOST_BYTES:,} bytes, too many to be read: remove it")
    lines = []
    column = None
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, record in _read_csv(file) if path.suffix == ".csv" else _read_json(file):
                if column is None:
                    column = next((name for name in label_columns if name in record), None)
                name = record.get("file_name")
                if column is None or not isinstance(name, str) or not name:
                    return None
                label = record.get(column)
                lines.append(Line(number, name, None if label is None or label == "" else _label_text(label)))
    except (OSError, ValueError, csv.Error, RecursionError) as error:  # ValueError: not UTF-8, not JSON
        raise ValueError(f"{path} cannot be read ({error}): correct it, or remove it") from error
    return lines or None


def _read_csv(file: IO[str]) -> Iterator[tuple[int, Mapping[str, object]]]:
    table = csv.DictReader(file)
    for record in table:
        yield table.line_num, {str(key): value for key, value in record.items()}


def _read_json(file: IO[str]) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, line in enumerate(iter(lambda: file.readline(MOST_LINE), ""), 1):
        if len(line) == MOST_LINE:
            raise ValueError(f"line {number} has more than {MOST_LINE:,} characters")
        if line.strip():
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"line {number} holds {line[:40]!r}, expected names and values")
            yield number, record


def _label_text(label: object) -> str:
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise ValueError(f"a label is {label!r:.40}, expected a whole number or a name")
    return str(label)


def resolve_name(folder: str, name: str) -> str:
    """A file name in the metadata of `folder`, as a normalised path relative to the data root."""
    return os.path.normpath(PurePosixPath(folder, name).as_posix())


def number_labels(label_texts: Mapping[int, str], n: int, where: str) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Labels (N,) and class names from label texts: integers are labels; names are numbered in sorted order.

    Raises:
        ValueError: a mixture of integers and names, or numbers that are not integers.
    """
    values = set(label_texts.values())
    numbers = {value for value in values if WHOLE_NUMBER.fullmatch(value)}
    odd = sorted(value for value in values - numbers if numbers or _is_number(value))
    if odd:
        raise ValueError(
            f"{where}: the metadata's label {odd[0]!r:.60} is neither a whole number nor a name as the others are"
        )
    names = None if numbers else tuple(sorted(values))
    index = {value: int(value) for value in numbers} if names is None else {name: i for i, name in enumerate(names)}
    labels = np.full(n, -1, dtype=np.int64)
    labels[list(label_texts)] = [index[value] for value in label_texts.values()]
    return labels, names


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
