"""Patches as tokens: an image is cut into p × p patches; a token is the index of the nearest k-means centre.

At p = 2 a sequence is a quarter as long as with one token per pixel.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from igpt.data.cache import read_or_make
from igpt.data.source import Source
from igpt.settings.data import Resolution
from igpt.settings.fields import Count, Seed, Settings
from igpt.tokens.kmeans import dark_to_light, sample_images, weighted_kmeans
from igpt.tokens.pixel_order import PixelOrder
from igpt.tokens.tokenizer import GridTokenizer, TokenGrid
from igpt.utils import files

log = logging.getLogger(__name__)

K_MAX = 4096
_CHUNK = 1 << 22  # most distances per step
_DOUBT = 1e-9  # closer distances are recomputed exactly: far above the rounding of float64 products near 1


@dataclass(frozen=True, eq=False)
class PatchTokenizer(GridTokenizer):
    """One token per patch. `centres` (k, 3 p²) float32 in [-1, 1]: each patch row by row.

    Raises:
        ValueError: wrong shape, dtype or range, or NaN.
    """

    centres: np.ndarray
    patch: int  # p, pixels a side
    order: PixelOrder  # of the patches
    kind = "patches"

    def __post_init__(self) -> None:
        k, width = self.centres.shape if self.centres.ndim == 2 else (0, 0)
        if not 2 <= k <= K_MAX or self.patch < 1 or width != 3 * self.patch**2 or self.centres.dtype != np.float32:
            raise ValueError(
                f"patches of {self.patch} pixels a side are float32 (2 … {K_MAX}, {3 * self.patch**2}), got "
                f"{self.centres.dtype} {self.centres.shape}"
            )
        if not np.isfinite(self.centres).all() or np.abs(self.centres).max() > 1:
            raise ValueError("patches hold finite numbers in [-1, 1]")

    @property
    def n_vocab(self) -> int:
        return len(self.centres)

    @property
    def cell(self) -> int:
        return self.patch

    @cached_property
    def hash(self) -> str:
        digest = hashlib.sha256(json.dumps(["patches", self.patch, self.order.permutation]).encode())
        digest.update(self.centres.astype("<f4").tobytes())
        return digest.hexdigest()[:12]

    def encode(self, pixels: Tensor) -> Tensor:
        """Exact: the smallest squared distance in float64, the lowest index on a tie."""
        points = cut_patches(pixels, self.patch).double() / 127.5 - 1  # (B, T, 3 p²)
        centres = torch.from_numpy(self.centres).double().to(pixels.device)  # (k, 3 p²)
        norms = centres.square().sum(1)
        nearest = []
        for some in torch.split(points.flatten(0, 1), max(1, _CHUNK // len(centres))):
            distances = norms - 2 * (some @ centres.T)  # without the square of the patch, a constant
            two, index = distances.topk(2, largest=False)
            best = index[:, 0]
            (doubtful,) = (two[:, 1] - two[:, 0] < _DOUBT).nonzero(as_tuple=True)
            step = max(1, _CHUNK // centres.numel())
            for rows in torch.split(doubtful, step) if len(doubtful) else ():  # a matrix product may round differently
                exact = (some[rows, None] - centres).square().sum(2)  # (N, k)
                best[rows] = (exact == exact.amin(1, keepdim=True)).int().argmax(1)
            nearest.append(best)
        return self.order.flatten(torch.cat(nearest).view(len(pixels), self.order.side, self.order.side))

    def decode(self, tokens: Tensor) -> np.ndarray:
        grid = self.order.unflatten(tokens.cpu()).numpy()  # (B, R/p, R/p)
        if grid.size and (grid.min() < 0 or grid.max() >= self.n_vocab):
            raise ValueError(f"tokens lie in 0 … {self.n_vocab - 1}, got {grid.min()} to {grid.max()}")
        levels = np.rint(127.5 * (self.centres.astype(np.float64) + 1)).astype(np.uint8)  # (k, 3 p²)
        b, n, p = len(grid), self.order.side, self.patch
        patches: np.ndarray = levels[grid].reshape(b, n, n, p, p, 3)
        return patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, n * p, n * p, 3)

    def describe(self) -> str:
        return f"{self.n_vocab} patches of {self.patch}×{self.patch} pixels"

    def to_dict(self) -> dict[str, Any]:
        return {
            "patch": self.patch,
            "centres": self.centres.tolist(),
            "permutation": list(self.order.permutation),
            "hash": self.hash,
        }

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> "PatchTokenizer":
        """The inverse of `to_dict`. Raises ValueError on invalid patches or a wrong hash."""
        order = PixelOrder.from_list(saved["permutation"])
        if type(saved["patch"]) is not int:
            raise ValueError("the patch's size is no whole number")
        tokenizer = PatchTokenizer(np.asarray(saved["centres"], dtype=np.float32), saved["patch"], order)
        if tokenizer.hash != saved["hash"]:
            raise ValueError(f"the patches' hash is {tokenizer.hash}, not the {saved['hash']!r:.60} that is stated")
        return tokenizer


def cut_patches(pixels: Tensor, patch: int) -> Tensor:
    """The p × p patches of images, row by row: (B, R, R, 3) → (B, (R/p)², 3 p²)."""
    b, side = pixels.shape[:2]
    n = side // patch
    cut = pixels.reshape(b, n, patch, n, patch, 3).permute(0, 1, 3, 2, 4, 5)  # (B, n, n, p, p, 3)
    return cut.reshape(b, n * n, 3 * patch**2)


class PatchSettings(Settings):
    """The settings of `tokens=patches`: k-means on patches of training images."""

    patch: Resolution  # p, pixels a side
    k: Annotated[int, Field(ge=2, le=K_MAX)]
    n_patches: Count
    iterations: Count
    order: str
    seed: Seed

    def sizes(self, resolution: int) -> tuple[TokenGrid, int]:
        if resolution % self.patch:
            raise ValueError(
                f"tokens.patch={self.patch} does not divide data.resolution={resolution}: take a divisor of it"
            )
        return TokenGrid(resolution // self.patch, resolution // self.patch), self.k

    def build(self, source: Source, cache: Path) -> PatchTokenizer:
        """The tokenizer fitted to a source's training images once, then read from `cache`.

        Fewer than k distinct patches are the tokens themselves, with a warning.
        """
        self.sizes(source.resolution)
        split = source.split("train")
        if not len(split):
            raise ValueError("there is no training image to fit patches to")
        per_image = (source.resolution // self.patch) ** 2
        chunks = sample_images(split, self.n_patches // per_image, seed=self.seed, stream="patches")
        cut = (cut_patches(torch.from_numpy(chunk), self.patch) for chunk in chunks)
        points = np.concatenate([patches.flatten(0, 1).numpy() for patches in cut])  # (N, 3 p²) uint8
        made_of = [self.patch, self.k, self.iterations, self.seed, hashlib.sha256(points.tobytes()).hexdigest()]
        name = f"{source.name}{source.resolution}-p{self.patch}-k{self.k}-{files.hash_json(made_of)[:12]}.npy"
        path = cache / "patches" / name

        def fit(file: IO[bytes]) -> None:
            np.save(file, self._fit(points), allow_pickle=False)
            log.info("patches: fitted to %d patches, saved as %s", len(points), path)

        centres = read_or_make(path, partial(np.load, path, allow_pickle=False), fit)
        return PatchTokenizer(centres, self.patch, PixelOrder.from_name(source.resolution // self.patch, self.order))

    def _fit(self, points: np.ndarray) -> np.ndarray:
        """k-means of patches, weighted by count: (N, 3 p²) uint8 → (k, 3 p²) float32, from dark to light."""
        distinct, counts = np.unique(points, axis=0, return_counts=True)
        if len(distinct) < 2:
            raise ValueError("all patches of the training images are the same: there is nothing to tell apart")
        if len(distinct) < self.k:
            log.warning(
                "patches: the images hold %d distinct ones, tokens.k=%d: they are the tokens", len(distinct), self.k
            )
        how = {"k": self.k, "iterations": self.iterations, "restarts": 1, "seed": self.seed}
        return dark_to_light(weighted_kmeans(distinct, counts, **how))
