"""Class names and label indices, checked before any image is read."""

import csv
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np

from igpt.data.errors import DataError

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LISTED = 12  # most names in one log line
_JOINERS = "\u200c\u200d"  # zero-width (non-)joiner: parts of some scripts and of emoji
_WNID = re.compile(r"n\d{8}")


@cache
def imagenet_classes() -> dict[str, tuple[int, str]]:
    """The 1,000 classes of ILSVRC 2012: wnid → (index, name). Two names occur twice (crane, maillot), no wnid does."""
    with resources.files("igpt.data").joinpath("imagenet_classes.csv").open() as file:
        return {row["wnid"]: (int(row["index"]), row["name"]) for row in csv.DictReader(file)}


@cache
def imagenet_names() -> tuple[str, ...]:
    """WordNet's names of the 1,000 classes, by index. The two duplicate names have their wnid in brackets."""
    classes = sorted((index, name, wnid) for wnid, (index, name) in imagenet_classes().items())
    count = Counter(name for _, name, _ in classes)
    return tuple(name if count[name] == 1 else f"{name} ({wnid})" for _, name, wnid in classes)


@dataclass(frozen=True)
class Classes:
    """Maps the labels of each split to the project's: by class name, or to ILSVRC 2012 indices (`scheme="imagenet"`).

    A label is the index of its class in the training split. Splits and files may number classes differently, so
    labels are matched by name if names are known.
    """

    scheme: str | None
    n_class: int | None  # None: labels are optional and unchecked
    by_label: tuple[str, ...] | None = None  # class names; None: labels are plain numbers

    @staticmethod
    def from_split_names(scheme: str | None, n_class: int | None, names: Sequence[tuple[str, ...] | None]) -> "Classes":
        """The mapping for splits with these class names, the training split first.

        With `n_class`, the training split defines all classes; without, classes of other splits are appended.

        Raises:
            ValueError: two class names differ only in case or surrounding blanks.
        """
        if scheme == "imagenet":
            return Classes(scheme, n_class)
        first, *others = names
        if first is None:
            return Classes(scheme, n_class)
        if n_class is not None:
            check_names(first, "the training images")
            return Classes(scheme, n_class, first)
        more = sorted({name for of_split in others for name in of_split or ()} - set(first))
        return Classes(scheme, n_class, (*first, *more))

    def __call__(self, labels: np.ndarray, names: Sequence[str] | None, where: str) -> np.ndarray:
        """Maps the labels of one split to the project's indices: (N,) int64 → (N,) int64.

        `names`: the class names that `labels` index; None if they are plain numbers.

        Raises:
            DataError: an unknown class name, a label outside 0 … n_class - 1, or no labels at all.
        """
        if self.n_class is not None and len(labels) and (labels == -1).all():
            raise DataError(f"{where}: there are no labels (data.label_column, or a folder for each class); "
                             "data.n_class=null reads images without")  # fmt: skip
        if self.scheme == "imagenet" and self.n_class is not None and names is not None:
            index = _index_of_wnid(tuple(names), where)
            check_labels(labels, len(names), where)
            labels = index[labels]
        elif self.scheme != "imagenet":
            labels = self._map_by_name(labels, names, where)
        if self.n_class is not None:
            check_labels(labels, self.n_class, where)
        return labels

    def _map_by_name(self, labels: np.ndarray, names: Sequence[str] | None, where: str) -> np.ndarray:
        if names is None or self.by_label is None:
            if self.n_class is not None and (names is None) != (self.by_label is None) and (labels >= 0).any():
                split, train = ("names", "numbers") if self.by_label is None else ("numbers", "names")
                raise DataError(
                    f"{where}: its classes are {split}, those of the training images are {train}: no label can be told "
                    "from another; give both names, or data.splits reads other splits"
                )
            return labels
        number = {name: label for label, name in enumerate(self.by_label)}
        to = np.array([number.get(name, -1) for name in names], dtype=np.int64)
        inside = (labels >= 0) & (labels < len(names))
        unknown = [names[label] for label in np.unique(labels[inside]).tolist() if to[label] < 0]
        if unknown:
            raise DataError(
                f"{where}: no training image is of the class {unknown[0]!r} ({len(unknown)} classes are not): the "
                f"training images have {describe_classes(self.by_label)}"
            )
        labels = labels.copy()
        labels[inside] = to[labels[inside]]
        return labels

    @property
    def names(self) -> tuple[str, ...] | None:
        """The class names by label; None if any is unknown."""
        if self.scheme == "imagenet":
            return imagenet_names() if self.n_class == len(imagenet_names()) else None
        named = self.by_label
        return named if named is not None and self.n_class in (None, len(named)) else None


@cache
def _index_of_wnid(names: tuple[str, ...], where: str) -> np.ndarray:
    """The ILSVRC index of every class: (n,) int64. Raises DataError on a name that is not a wnid."""
    classes = imagenet_classes()
    if len(names) == len(classes) and not any(_WNID.fullmatch(name) for name in names):
        return np.arange(len(names))  # the Hub's copy has names in words, in ILSVRC order
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise DataError(
            f"{where}: class {unknown[0]!r} is no wnid of ILSVRC 2012 ({len(unknown)} of {len(names)} are not): "
            "its folders are named as n01440764; other classes are read with data=folder"
        )
    return np.array([classes[name][0] for name in names], dtype=np.int64)


def check_labels(labels: np.ndarray, n_class: int, where: str) -> None:
    """Raises DataError, naming a row, unless every label lies in 0 … n_class - 1."""
    outside = np.flatnonzero((labels < 0) | (labels >= n_class))
    if len(outside) and labels[outside[0]] == -1:
        raise DataError(f"{where}: row {outside[0]} has no label: leave it out, or data.n_class=null reads without")
    if len(outside):
        raise DataError(
            f"{where}: row {outside[0]} has label {labels[outside[0]]}, data.n_class={n_class} allows 0 … "
            f"{n_class - 1} ({len(outside)} of {len(labels)} labels are outside)"
        )


def check_names(names: Sequence[str], where: str) -> None:
    """Raises ValueError if two class names differ only in case or surrounding blanks."""
    twice = [name for name, count in Counter(name.strip().lower() for name in names).items() if count > 1]
    if twice:
        same = [name for name in names if name.strip().lower() == twice[0]]
        raise ValueError(f"{where}: two classes have one name ({', '.join(map(repr, same))}): rename one of them")


def format_class_name(name: str, *, most: int = 40) -> str:
    """A class name as one printable line of at most `most` characters.

    Runs of whitespace become one blank; control, format (text direction) and surrogate characters become U+FFFD; a
    truncated name ends in "…"; an empty name becomes ''.
    """
    start = " ".join(name[: 4 * most].split())
    plain = "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in _JOINERS else c
        for c in start
    )
    cut = len(plain) > most or len(name) > 4 * most
    return (plain[: most - 1].rstrip() + "…" if cut else plain) or "''"


def label_classes(k: int, names: Sequence[str] | None) -> list[str]:
    """Unique labels of K classes to show: their names, numbered where two are equal; `class 3` without names."""
    if names is None:
        return [f"class {i}" for i in range(k)]
    shown = [format_class_name(name) for name in names]
    count = Counter(shown)
    return [name if count[name] == 1 else f"{name} ({i})" for i, name in enumerate(shown)]


def describe_classes(names: Sequence[str]) -> str:
    """The number of classes and the first names: `10 classes: airplane, automobile, bird, …`."""
    listed = [format_class_name(name) for name in names[:LISTED]]
    if more := len(names) - len(listed):
        listed.append(f"… and {more:,} more")
    return f"{len(names):,} {'class' if len(names) == 1 else 'classes'}: {', '.join(listed)}"
