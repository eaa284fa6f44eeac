"""The order of the cells of a square grid, grid ↔ sequence: raster order or any other fixed permutation."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt.utils import keyed

ORDERS = ("raster", "random")


@dataclass(frozen=True, eq=False)
class PixelOrder:
    """Position i of the sequence is pixel `permutation[i]`, pixels counted row by row from the top left.

    Source: Chen et al. 2020, §2.1 (any fixed permutation π, the same for every image; theirs is the identity).

    Raises:
        ValueError: not a permutation of 0 … side² - 1.
    """

    side: int  # R, pixels a side
    permutation: tuple[int, ...]

    def __post_init__(self) -> None:
        if not np.array_equal(np.sort(np.asarray(self.permutation)), np.arange(self.side**2)):
            raise ValueError(f"the permutation of {self.side}×{self.side} pixels must hold 0 … {self.side**2 - 1} once")

    @staticmethod
    def from_name(side: int, order: str) -> "PixelOrder":
        """From a setting. `raster`: row by row; `random` or `random:SEED`: a seeded permutation, equal everywhere."""
        name, _, seed = order.partition(":")
        if name not in ORDERS or (seed and (name == "raster" or not seed.isdigit())):
            raise ValueError(f"tokens.order must be raster, random or random:SEED, got {order!r}")
        if name == "raster":
            return PixelOrder(side, tuple(range(side**2)))
        return PixelOrder(side, tuple(keyed.generator(int(seed or 0), "raster").permutation(side**2).tolist()))

    @staticmethod
    def from_list(permutation: Any) -> "PixelOrder":
        """From the permutation in a file. Raises ValueError if it is none."""
        if not isinstance(permutation, list) or not all(type(i) is int for i in permutation):
            raise ValueError("the permutation holds no whole numbers")
        return PixelOrder(round(len(permutation) ** 0.5), tuple(permutation))

    @cached_property
    def is_raster(self) -> bool:
        return self.permutation == tuple(range(self.side**2))

    def flatten(self, grid: Tensor) -> Tensor:
        """Grid to sequence: (B, R, R, …) → (B, R², …)."""
        sequence = grid.flatten(1, 2)
        return sequence if self.is_raster else sequence[:, self._index(grid.device)]

    def unflatten(self, sequence: Tensor) -> Tensor:
        """Sequence to grid, the inverse of `flatten`: (B, R², …) → (B, R, R, …)."""
        if not self.is_raster:
            sequence = sequence[:, self._index(sequence.device).argsort()]
        return sequence.view(-1, self.side, self.side, *sequence.shape[2:])

    def known_positions(self, rows: int) -> Tensor:
        """Mask of the positions in the top `rows` rows of the image: (T,) bool.

        Raises:
            ValueError: `rows` outside 0 … side.
        """
        check_rows(rows, self.side)
        return torch.as_tensor(np.asarray(self.permutation) < rows * self.side)

    def _index(self, device: torch.device) -> Tensor:
        """The permutation on a device, copied once: a GPU is waited for."""
        if device not in self._indices:
            with torch.inference_mode(False):
                self._indices[device] = torch.tensor(self.permutation, device=device)
        return self._indices[device]

    @cached_property
    def _indices(self) -> dict[torch.device, Tensor]:
        return {}


def check_rows(rows: int, side: int) -> None:
    """Raises ValueError unless 0 ≤ rows ≤ side."""
    if not 0 <= rows <= side:
        raise ValueError(f"a prompt has 0 to {side} rows, the image's height; got {rows}")
