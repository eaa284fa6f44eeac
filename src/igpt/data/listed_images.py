"""Images of one split of a source, or of all of it, in the order of its listing, each with its name."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from igpt.data.image_decoding import BadImageError
from igpt.data.image_files import ImageFiles
from igpt.data.image_splits import find_table
from igpt.data.source import SPLITS, Pixels, Source, Split, Stream
from igpt.data.tar_files import TarTable

UNREADABLE = -2  # label of an image that cannot be read, whose pixels are black
ALL = "all"


@dataclass(frozen=True)
class ListedImages:
    """Images as a `Split`; an image that cannot be read is black and has the label UNREADABLE, instead of an error.

    They are decoded at every read: no pixel cache is made of images that are read once.
    """

    resolution: int  # R
    splits: tuple[tuple[str, Split], ...]  # by name
    places: np.ndarray  # (N, 2): position of the image's split, and in it

    def __len__(self) -> int:
        return len(self.places)

    @property
    def labels(self) -> np.ndarray:
        """The labels of all images, as the source numbers them: (N,) int64, -1 without one."""
        every = [np.asarray(split.labels, dtype=np.int64) for _, split in self.splits]
        starts = np.cumsum([0, *map(len, every)])
        labels: np.ndarray = np.concatenate(every)[starts[self.places[:, 0]] + self.places[:, 1]]
        return labels

    @property
    def pixel_changes(self) -> str:
        return self.splits[0][1].pixel_changes

    def prepare(self) -> None: ...

    def read(self, index: Sequence[int], rng_keys: Sequence[int]) -> Pixels:
        none = Pixels(np.empty((0, self.resolution, self.resolution, 3), np.uint8), np.empty(0, np.int64))
        parts = [none, *(self._read_one(i, key) for i, key in zip(index, rng_keys, strict=True))]
        return Pixels(np.concatenate([pixels for pixels, _ in parts]), np.concatenate([labels for _, labels in parts]))

    def _read_one(self, i: int, key: int) -> Pixels:
        number, position = self.places[i].tolist()
        try:
            return Pixels(*self.splits[number][1].read([position], [key]))
        except BadImageError:
            return Pixels(np.zeros((1, self.resolution, self.resolution, 3), np.uint8), np.array([UNREADABLE]))

    def find_problem(self, i: int) -> str:
        """Why an image cannot be read, "" if it can."""
        number, position = self.places[i].tolist()
        try:
            self.splits[number][1].read([position], [0])
        except BadImageError as error:
            return str(error).removesuffix("; data.on_corrupt=skip leaves such images out")
        return ""

    def name(self, i: int) -> str:
        """The file's path below `data.path`; of images without files of their own split and row, `test/12`."""
        number, position = self.places[i].tolist()
        name, split = self.splits[number]
        return name_image(name, split, position)


def name_image(name: str, split: Split, position: int) -> str:
    """As `ListedImages.name`, of an image of the split of that name."""
    table, rows = find_table(split)
    row = position if rows is None else int(rows[position])
    if isinstance(table, ImageFiles):
        return os.fsdecode(table.paths[row].as_py())
    if isinstance(table, TarTable):
        return f"{os.path.basename(table.files[table.file_index[row]])}/{table.members[row]}"
    return f"{name}/{row}"


def list_images(source: Source, split: str) -> ListedImages:
    """The images of a split; of `all`: of every split, those of one table in its order.

    Raises:
        ValueError: no images, or all of a stream, which has no order.
    """
    if split == ALL and isinstance(source.training(), Stream):
        raise ValueError(f"data={source.name} is a stream, which is read in no order: data.streaming=false")
    named = [(name, source.split(name)) for name in (SPLITS if split == ALL else (split,))]
    named = [(name, images) for name, images in named if len(images)]
    if not named:
        way_out = "" if split == ALL else ": task.split=all reads every image"
        raise ValueError(f"data={source.name} has no images{'' if split == ALL else f' in its {split} split'}{way_out}")
    tables: dict[int, int] = {}  # identity of a table → its number, in the order of their first images' names
    places, keys = [], []
    for number, (_, images) in enumerate(named):
        table, rows = find_table(images)
        order = tables.setdefault(id(images if table is None else table), len(tables))
        positions = np.arange(len(images))
        places.append(np.stack([np.full(len(images), number), positions], axis=1))
        keys.append(np.stack([np.full(len(images), order), positions if rows is None else rows], axis=1))
    joined, of_table = np.concatenate(places), np.concatenate(keys)
    return ListedImages(source.resolution, tuple(named), joined[np.lexsort((of_table[:, 1], of_table[:, 0]))])
