"""A source of labelled images: file → pixels. What every dataset looks like to the rest of the house."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from igpt.data.shard_reader import Lane, Place

SPLITS = ("train", "val", "test")


class Pixels(NamedTuple):
    """Some images of a split: pixels (B, R, R, 3) uint8 and labels (B,) int64."""

    pixels: np.ndarray
    labels: np.ndarray


class Split(Protocol):
    """One split of a source, read by position."""

    def __len__(self) -> int: ...

    @property
    def labels(self) -> np.ndarray:
        """Of every image, (N,) int64, known without reading one."""
        ...

    def prepare(self) -> None:
        """Makes many reads fast (decodes once, to disk). Nothing else depends on it: `read` gives the same without."""
        ...

    def read(self, index: Sequence[int], keys: Sequence[int]) -> Pixels:
        """The images at `index`; what is random about them (a crop, a flip) is a function of `keys` alone."""
        ...


@runtime_checkable
class Stream(Protocol):
    """Training images that come one after another, without a length and without positions to read at.

    A record has a `digest`, a number that its content decides.
    """

    lanes: int | None  # into how many shares it is to be cut; None: one a reader

    @property
    def contents(self) -> dict[str, int]:
        """What a place in it is meant by: where this differs, places differ."""
        ...

    def lane(self, index: int, count: int, seed: int) -> Lane:
        """One of `count` shares, in an order that the seed decides; together they are every image once a pass."""
        ...

    def start(self) -> Place:
        """The place where a lane begins."""
        ...

    def read(self, records: Sequence[Any], keys: Sequence[int]) -> Pixels:
        """The images of some records; what is random about them is a function of `keys` alone."""
        ...


class Source(Protocol):
    """Images with labels, cut into train, val and test. Grey images have three equal channels."""

    name: str
    resolution: int  # R, pixels a side
    n_class: int | None  # None: the images have no labels, -1 stands for them
    class_names: tuple[str, ...] | None  # by label, n_class of them; None where they are not known
    labels_per_class: int | None  # what the training images were cut down to; None: they were not

    def split(self, name: str) -> Split:
        """The split called `name`, each image in one way.

        Raises:
            ValueError: no split of that name.
        """
        ...

    def training(self) -> Split | Stream:
        """The training images as their config says they are varied for training."""
        ...


def plain_pixels(split: Split, rows: Sequence[int]) -> np.ndarray:
    """Some images of a split in which nothing is random: → (B, R, R, 3) uint8."""
    return split.read(rows, [0] * len(rows)).pixels


@dataclass(frozen=True)
class ArraySplit:
    """A split held in memory: pixels (N, R, R, 3) uint8, labels (N,) int64. Nothing about it is random."""

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def prepare(self) -> None: ...

    def read(self, index: Sequence[int], keys: Sequence[int]) -> Pixels:
        rows = np.asarray(index, dtype=np.int64)
        return Pixels(self.pixels[rows], self.labels[rows])


@dataclass(frozen=True)
class VariedSplit:
    """A split whose images are changed for training, each by its key."""

    plain: Split
    vary: Callable[[np.ndarray, Sequence[int]], np.ndarray]  # (B, R, R, 3), keys → the same shape

    def __len__(self) -> int:
        return len(self.plain)

    @property
    def labels(self) -> np.ndarray:
        return self.plain.labels

    def prepare(self) -> None:
        self.plain.prepare()

    def read(self, index: Sequence[int], keys: Sequence[int]) -> Pixels:
        pixels, labels = self.plain.read(index, keys)
        return Pixels(self.vary(pixels, keys), labels)


def check_split_name(name: str) -> None:
    """Raises ValueError unless `name` is a split every source has."""
    if name not in SPLITS:
        raise ValueError(f"got split {name!r}, expected one of {', '.join(SPLITS)}")
