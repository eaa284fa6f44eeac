"""Accuracy of each class, from a confusion matrix: the worst and the best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from igpt.data.classes import label_classes
from igpt.metric.result import Number, Result
from igpt.metric.share import share_number
from igpt.utils.files import resolve_below

COUNTS = "confusion_counts"  # the end of the name of a result's file of counts
MOST_CLASSES = 2000  # of a matrix that is read
SHOWN = 5  # classes at either end


@dataclass(frozen=True)
class ClassRow:
    """A class: the share of its images that are taken for it, and what most of the others are taken for."""

    name: str
    accuracy: Number
    mistaken_for: str  # "" if for nothing


def rank_classes(counts: np.ndarray, names: Sequence[str] | None) -> list[ClassRow]:
    """The classes of counts (K, K), row: true class, from the worst to the best; those without images are left out."""
    labels, rows = label_classes(len(counts), names), []
    for i, row in enumerate(counts):
        if n := int(row.sum()):
            others = np.where(np.arange(len(row)) == i, 0, row)
            mistaken_for = labels[int(others.argmax())] if others.any() else ""
            rows.append(ClassRow(labels[i], share_number(int(row[i]) / n, n), mistaken_for))
    return sorted(rows, key=lambda each: each.accuracy.value)


def read_counts(path: Path) -> np.ndarray:
    """The counts of a confusion matrix (K, K) in a .npy file, memory-mapped.

    Raises:
        ValueError: no readable file, or one of something else.
    """
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
        k = len(matrix)
    except (OSError, ValueError, EOFError, TypeError, AttributeError, OverflowError, BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__})") from error
    if not isinstance(matrix, np.memmap) or matrix.dtype.kind not in "iu" or matrix.shape != (k, k):
        raise ValueError(f"{path} holds no counts")
    if not 1 <= k <= MOST_CLASSES:
        raise ValueError(f"{k:,} classes are too many to be told apart")
    return matrix


def describe_classes(result: Result, folder: Path) -> list[str]:
    """A line for each confusion matrix of a run: its worst and best class; none for files that cannot be read."""
    lines = []
    for key, (matrix, names) in find_matrices(result.files, result.class_names, folder).items():
        rows = rank_classes(matrix, names)
        if len(rows) < 3 or rows[0].accuracy.value == rows[-1].accuracy.value:
            continue
        worst, best = rows[0], rows[-1]
        stage = key.removesuffix("confusion").rstrip("/")
        mistaken = f", mostly taken for {worst.mistaken_for}" if worst.mistaken_for else ""
        lines.append(
            f"{f'{stage}: ' if stage else ''}worst class: {worst.name} ({100 * worst.accuracy.value:.1f} %{mistaken}), "
            f"best: {best.name} ({100 * best.accuracy.value:.1f} %)"
        )
    return lines


def find_matrices(
    paths: Mapping[str, Path], class_names: Mapping[str, Sequence[str]], folder: Path
) -> dict[str, tuple[np.ndarray, Sequence[str] | None]]:
    """Name of a confusion matrix → (counts, class names) of those whose files lie in `folder` and can be read."""
    found: dict[str, tuple[np.ndarray, Sequence[str] | None]] = {}
    for name, path in paths.items():
        inside = resolve_below(folder, path) if name.endswith(COUNTS) else None
        if inside is not None and inside.is_file():
            try:
                matrix = read_counts(inside)
            except ValueError:
                continue  # shown without what it says of classes, as pages are
            key = name.removesuffix("_counts")
            names = class_names.get(key)
            found[key] = matrix, names if names is not None and len(names) == len(matrix) else None
    return found
