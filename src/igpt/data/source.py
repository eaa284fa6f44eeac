"""The interface of datasets: protocols of sources, splits and streams of labelled images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from igpt.data.shard_reader import ReaderState, ShardReader

SPLITS = ("train", "val", "test")


class Pixels(NamedTuple):
    """A batch of images: pixels (B, R, R, 3) uint8 and labels (B,) int64."""

    pixels: np.ndarray
    labels: np.ndarray


class Split(Protocol):
    """One split of a source, read by position."""

    def __len__(self) -> int: ...

    @property
    def labels(self) -> np.ndarray:
        """The labels of all images, (N,) int64, without reading an image."""
        ...

    @property
    def pixel_changes(self) -> str:
        """What sets the pixels apart from stored lossless 8-bit RGB, as `JPEG files; resized from 32×32`; "": nothing.

        Found from some of the images.
        """
        ...

    def prepare(self) -> None:
        """Builds caches that make reads fast. Optional: `read` returns the same without it."""
        ...

    def read(self, index: Sequence[int], rng_keys: Sequence[int]) -> Pixels:
        """The images at `index`. Random crops and flips depend on `rng_keys` alone."""
        ...


@runtime_checkable
class Stream(Protocol):
    """Training images with sequential access only and without a length.

    A record has a `digest`, an integer hash of its content.
    """

    num_readers: int | None  # number of readers; None: one per reader

    @property
    def contents(self) -> dict[str, int]:
        """Shards per part; a saved position is valid only for an identical mapping."""
        ...

    def make_reader(self, index: int, count: int, seed: int) -> ShardReader:
        """Reader `index` of `count`, in a seeded order. All readers together yield every image once per pass."""
        ...

    def initial_state(self) -> ReaderState:
        """The initial position of a reader."""
        ...

    def read(self, records: Sequence[Any], rng_keys: Sequence[int]) -> Pixels:
        """The images of records. Random crops and flips depend on `rng_keys` alone."""
        ...


class Source(Protocol):
    """Labelled images with splits train, val and test. Grey images have three equal channels."""

    name: str
    resolution: int  # R, pixels a side
    n_class: int | None  # None: labels are optional, -1 for an unlabelled image
    class_names: tuple[str, ...] | None  # by label, n_class of them; None if unknown
    labels_per_class: int | None  # size of the balanced training subset; None: all images

    def split(self, name: str) -> Split:
        """The split `name`, without augmentation.

        Raises:
            ValueError: no split of that name.
        """
        ...

    def training(self, *, with_val: bool = False) -> Split | Stream:
        """The training images with the configured augmentation; `with_val`: followed by those of val.

        Raises:
            ValueError: `with_val` of a stream.
        """
        ...


def plain_pixels(split: Split, rows: Sequence[int]) -> np.ndarray:
    """The images at `rows` of a split without augmentation: → (B, R, R, 3) uint8."""
    return split.read(rows, [0] * len(rows)).pixels


@dataclass(frozen=True)
class ArraySplit:
    """A split in memory: pixels (N, R, R, 3) uint8, labels (N,) int64. Reads are deterministic."""

    pixels: np.ndarray
    labels: np.ndarray
    pixel_changes: str = ""

    def __len__(self) -> int:
        return len(self.pixels)

    def prepare(self) -> None: ...

    def read(self, index: Sequence[int], rng_keys: Sequence[int]) -> Pixels:
        rows = np.asarray(index, dtype=np.int64)
        return Pixels(self.pixels[rows], self.labels[rows])


@dataclass(frozen=True)
class VariedSplit:
    """A split with augmentation, keyed by image."""

    plain: Split
    vary: Callable[[np.ndarray, Sequence[int]], np.ndarray]  # (B, R, R, 3), keys → the same shape

    def __len__(self) -> int:
        return len(self.plain)

    @property
    def labels(self) -> np.ndarray:
        return self.plain.labels

    @property
    def pixel_changes(self) -> str:
        return self.plain.pixel_changes

    def prepare(self) -> None:
        self.plain.prepare()

    def read(self, index: Sequence[int], rng_keys: Sequence[int]) -> Pixels:
        pixels, labels = self.plain.read(index, rng_keys)
        return Pixels(self.vary(pixels, rng_keys), labels)


@dataclass(frozen=True)
class JoinedSplit:
    """The images of one split, followed by those of another."""

    first: Split
    second: Split

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    @property
    def labels(self) -> np.ndarray:
        return np.concatenate([self.first.labels, self.second.labels])

    @property
    def pixel_changes(self) -> str:
        return self.first.pixel_changes

    def prepare(self) -> None:
        self.first.prepare()
        self.second.prepare()

    def read(self, index: Sequence[int], rng_keys: Sequence[int]) -> Pixels:
        rows, keys = np.asarray(index, dtype=np.int64), np.asarray(rng_keys, dtype=np.int64)
        is_first = rows < len(self.first)
        parts = [(self.first, is_first, 0), (self.second, ~is_first, len(self.first))]
        read = [part.read((rows[mine] - start).tolist(), keys[mine].tolist()) for part, mine, start in parts]
        order = np.argsort(np.argsort(~is_first, kind="stable"), kind="stable")  # place of each row in what was read
        return Pixels(*(np.concatenate(arrays)[order] for arrays in zip(*read, strict=True)))


def check_split_name(name: str) -> None:
    """Raises ValueError unless `name` is train, val or test."""
    if name not in SPLITS:
        raise ValueError(f"got split {name!r}, expected one of {', '.join(SPLITS)}")
