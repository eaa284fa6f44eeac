"""OpenAI's released token arrays (`imagenet_trX.npy` and others) as a source of images.

The arrays hold centre crops at 32×32 for evaluation. Tokens are decoded to pixels; encoding them with the same palette
returns the same tokens, which is checked for every colour.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from igpt.data.classes import CIFAR10, imagenet_names
from igpt.data.errors import DataError
from igpt.data.listing import ListFiles
from igpt.data.source import JoinedSplit, Pixels, Split, check_split_name
from igpt.tokens.palette import Palette, read_npy

FILES = {"train": "tr", "val": "va", "test": "te"}  # split → name in the released files
_ROWS = 8192  # label rows per read


class OpenAITokens:
    """The arrays `<name>_{tr,va,te}{X,Y}.npy` of a folder as a `Source`, memory-mapped.

    Only the splits that a task reads must exist. Training has no augmentation.

    Raises:
        ValueError: a missing or damaged file, wrong shapes or dtypes, or a palette with two equal colours.
    """

    labels_per_class: int | None = None

    def __init__(
        self,
        *,
        cache: Path | None = None,
        list_files: ListFiles | None = None,  # unused: the file names are fixed
        name: str,
        resolution: int,
        path: str | None,
        clusters: str | None,
    ) -> None:
        if path is None or clusters is None:
            raise ValueError(
                "data=openai_npy needs OpenAI's files: data.path=FOLDER, with imagenet_vaX.npy and the like, and "
                "data.clusters=PATH/kmeans_centers.npy, the colours of their tokens"
            )
        self.name, self.resolution = name, resolution
        folder = Path(path)
        self.palette = palette = Palette.load(Path(clusters))
        again = palette.encode(torch.from_numpy(palette.colours)).numpy()
        if len(wrong := np.flatnonzero(again != np.arange(palette.k))):
            i = int(wrong[0])
            raise ValueError(
                f"{clusters}: colours {i} and {again[i]} are one pixel, {palette.colours[i].tolist()}: tokens of this "
                "palette cannot be told apart"
            )
        self._splits = {split: TokenSplit(folder / f"{name}_{short}", resolution, palette)
                        for split, short in FILES.items()}  # fmt: skip
        first = next((split for split in self._splits.values() if split.is_present), None)
        if first is None:
            raise ValueError(f"{folder} has no {name}_vaX.npy, no trX and no teX: set data.path and data.name")

        self.n_class: int | None = first.one_hot.shape[1]
        self.class_names = _class_names(name, self.n_class)

    def split(self, name: str) -> "TokenSplit":
        check_split_name(name)
        return self._splits[name]

    def training(self, *, with_val: bool = False) -> Split:
        train, val = self._splits["train"], self._splits["val"]
        return JoinedSplit(train, val) if with_val else train


class TokenSplit:
    """One pair of arrays as a `Split`: tokens (N, R²) and one-hot labels (N, K)."""

    pixel_changes = "colours of a palette"

    def __init__(self, stem: Path, side: int, palette: Palette) -> None:
        self.stem, self.side, self.palette = stem, side, palette

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_present(self) -> bool:
        return self._path("X").is_file()

    @cached_property
    def tokens(self) -> np.ndarray:
        """(N, R²) integers, memory-mapped."""
        tokens = _open_mapped(self._path("X"))
        if tokens.ndim != 2 or tokens.shape[1] != self.side**2 or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"{self._path('X')}: {tokens.dtype} {tokens.shape}, expected whole numbers (images, {self.side**2})"
            )
        return tokens

    @cached_property
    def one_hot(self) -> np.ndarray:
        """(N, K), memory-mapped."""
        one_hot = _open_mapped(self._path("Y"))
        if one_hot.ndim != 2 or len(one_hot) != len(self) or not one_hot.shape[1]:
            raise ValueError(
                f"{self._path('Y')}: {one_hot.dtype} {one_hot.shape}, expected one-hot labels ({len(self)}, classes)"
            )
        return one_hot

    @cached_property
    def labels(self) -> np.ndarray:
        """The labels of all images, (N,) int64."""
        labels = np.empty(len(self), dtype=np.int64)
        for start in range(0, len(self), _ROWS):
            rows = np.asarray(self.one_hot[start : start + _ROWS])
            labels[start : start + _ROWS] = rows.argmax(1)
            if len(bad := np.flatnonzero(((rows != 0).sum(1) != 1) | (rows.sum(1) != 1))):
                raise DataError(f"{self._path('Y')}: row {start + bad[0]} is not one-hot")
        return labels

    def prepare(self) -> None: ...

    def read(self, index: Sequence[int], rng_keys: Sequence[int]) -> Pixels:
        """The images at `index`. Raises DataError, naming the image, on a token outside the palette."""
        rows = np.asarray(index, dtype=np.int64)
        tokens = np.asarray(self.tokens[rows]).astype(np.int64)
        if len(bad := np.flatnonzero(((tokens < 0) | (tokens >= self.palette.k)).any(1))):
            row = tokens[bad[0]]
            raise DataError(
                f"{self._path('X')}: image {rows[bad[0]]} has tokens {row.min()} to {row.max()}, the palette has 0 … "
                f"{self.palette.k - 1}"
            )
        return Pixels(self.palette.colours[tokens].reshape(-1, self.side, self.side, 3), self.labels[rows])

    def _path(self, kind: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}{kind}.npy")


def _class_names(name: str, n_class: int | None) -> tuple[str, ...] | None:
    """Class names of the datasets that OpenAI released, in the usual order; None for others. The files hold none."""
    if (name, n_class) == ("imagenet", 1000):
        return imagenet_names()
    return CIFAR10 if (name, n_class) == ("cifar10", len(CIFAR10)) else None


def _open_mapped(path: Path) -> np.ndarray:
    """The memory-mapped array of a `.npy` file, without pickle. Raises ValueError on a missing or invalid file."""
    if not path.is_file():
        raise ValueError(f"{path} is not there: download it, too")
    return read_npy(path)
