"""Finite scalar quantisation: the codes are a fixed grid, each dimension is rounded to one of a few levels.

Source: Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple", §3. Nothing is learnt, so nothing
collapses or is updated. The shift is atanh, by which 0 lies on a level, not the tan of the paper's listing.
"""

import math

import torch
from torch import Tensor

from igpt.tokens.code_search import UNIT, Nearest
from igpt.tokens.quantizer import Quantized, Quantizer

EPSILON = 1e-3  # by which the bound exceeds the outermost levels, as in the paper's listing
# Mentzer et al. 2023, table 1; powers of two are split as evenly as 4 and 8 allow
PAPER = {240: (8, 6, 5), 1000: (8, 5, 5, 5), 4375: (7, 5, 5, 5, 5), 15360: (8, 8, 8, 6, 5), 64000: (8, 8, 8, 5, 5, 5)}
MOST_BITS = 16


def choose_levels(codes: int) -> tuple[int, ...]:
    """Levels of each dimension whose product is `codes`: 4096 → (8, 8, 8, 8).

    Raises:
        ValueError: neither a power of two nor a product in the paper's table.
    """
    if codes in PAPER:
        return PAPER[codes]
    powers = [1 << bits for bits in range(2, MOST_BITS + 1)]
    if codes in powers:
        bits = int(math.log2(codes))
        n_wide = bits - 2 * (n := -(-bits // 3))  # of 3 bits, the others of 2
        return (8,) * n_wide + (4,) * (n - n_wide)
    known = sorted([*powers, *PAPER])
    nearest = [*known[: sum(k < codes for k in known)][-1:], *[k for k in known if k > codes][:1]]
    raise ValueError(
        f"tokens.quantizer=fsq has no levels for tokens.codes={codes:,}: take {' or '.join(f'{k:,}' for k in nearest)}"
    )


class FSQ(Quantizer):
    """K codes on a grid in [-1, 1], of as many dimensions as `choose_levels` gives."""

    levels: Tensor
    weights: Tensor

    def __init__(self, codes: int) -> None:
        levels = choose_levels(codes)
        super().__init__(codes, len(levels))
        weights = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)  # (D,)
        self.register_buffer("weights", torch.tensor(weights), persistent=False)  # (D,) of the digits of a token

    def _bound(self, vectors: Tensor) -> Tensor:
        """Vectors on a scale of which the levels are the whole numbers -⌊L/2⌋ … ⌈L/2⌉ - 1: (…, D) → (…, D)."""
        levels = self.levels.to(vectors.dtype)
        half, offset = (levels - 1) * (1 + EPSILON) / 2, (1 - levels % 2) / 2
        return torch.tanh(vectors + torch.atanh(offset / half)) * half - offset

    def _index(self, rounded: Tensor) -> Tensor:
        """Tokens from levels, of which the first dimension counts fastest: (…, D) → (…) int64."""
        digits = (rounded + self.levels // 2).nan_to_num().long()
        return (digits * self.weights).sum(-1)

    def lookup(self, tokens: Tensor) -> Tensor:
        digits = tokens[..., None] // self.weights % self.levels  # (…, D)
        half = self.levels // 2
        return (digits - half).float() / half

    def forward(self, vectors: Tensor, keys: Tensor) -> Quantized:
        bounded = self._bound(vectors.flatten(0, 1))
        rounded = bounded.detach().round()
        straight_through = bounded + (rounded - bounded).detach()
        return Quantized(straight_through / (self.levels // 2), self._index(rounded), bounded.new_zeros(()))

    def nearest(self, vectors: Tensor, distances: Tensor) -> Nearest:
        bounded = self._bound(vectors)
        rounded = bounded.round()
        to_border = 0.5 - (bounded - rounded).abs() - 32 * UNIT * self.levels  # less the rounding of `_bound`
        margins = (to_border / (self.levels / 2)).amin(-1)  # tanh' ≤ 1
        return Nearest(self._index(rounded), margins > distances)

    def nearest_in_float64(self, vectors: Tensor) -> Tensor:
        return self._index(self._bound(vectors).round())
