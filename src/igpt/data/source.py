"""A source of labelled images: file → pixels. What every dataset looks like to the rest of the house."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

SPLITS = ("train", "val", "test")


class Pixels(NamedTuple):
    """Some images of a split: pixels (B, R, R, 3) uint8 and labels (B,) int64."""

    pixels: np.ndarray
    labels: np.ndarray


class Split(Protocol):
    """One split of a source, read by position."""

    def __len__(self) -> int: ...

    def read(self, index: Sequence[int], keys: Sequence[int]) -> Pixels:
        """The images at `index`; what is random about them (a crop, a flip) is a function of `keys` alone."""
        ...


class Source(Protocol):
    """Images with labels, cut into train, val and test. Grey images have three equal channels."""

    name: str
    resolution: int  # R, pixels a side
    n_class: int

    def split(self, name: str, *, augment: bool = False) -> Split:
        """The split called `name`; with `augment`, as its config says images are varied for training.

        Raises:
            ValueError: no split of that name.
        """
        ...


@dataclass(frozen=True)
class ArraySplit:
    """A split held in memory: pixels (N, R, R, 3) uint8, labels (N,) int64. Nothing about it is random."""

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: Sequence[int], keys: Sequence[int]) -> Pixels:
        rows = np.asarray(index, dtype=np.int64)
        return Pixels(self.pixels[rows], self.labels[rows])


def check_split_name(name: str) -> None:
    """Raises ValueError unless `name` is a split every source has."""
    if name not in SPLITS:
        raise ValueError(f"got split {name!r}, expected one of {', '.join(SPLITS)}")
