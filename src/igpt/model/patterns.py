"""Which earlier tokens a position sees: the token grid, and one rule per attention pattern over its coordinates.

Position i predicts token i, so a query has token i's coordinates. Under causal attention key j carries token j - 1 (key
0: the start vector), so a key has the coordinates of the token that it carries; under BERT's it carries token j.
Dense mask, C's and FlexAttention's block masks and the mask of decoding all come from `Pattern.is_visible`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ALTERNATING = ("strided", "fixed", "axial")  # two patterns, in turn over the layers that have one of these
SPARSE = ("local", *ALTERNATING)
ATTENTION = ("full", *SPARSE, "linear")


class Cells(NamedTuple):
    """Coordinates of tokens, int64 tensors of one shape: place in the sequence, row and token column of the grid."""

    place: Tensor
    row: Tensor
    column: Tensor


@dataclass(frozen=True)
class TokenLayout:
    """Where the tokens of an image lie. Position i is channel i % channels of cell `permutation[i // channels]`.

    Cells are counted row by row from the top left. A cell's channels are neighbours in a row: a row has columns ×
    channels token columns.
    """

    rows: int
    columns: int
    channels: int = 1
    permutation: tuple[int, ...] | None = None  # None: row by row

    @property
    def n_ctx(self) -> int:
        """T, tokens of an image."""
        return self.rows * self.columns * self.channels

    @property
    def row_length(self) -> int:
        """Tokens of a row."""
        return self.columns * self.channels

    def locate(self, index: Tensor) -> Cells:
        """Coordinates of the tokens at these places of the sequence; those of place -1 mean nothing."""
        cell = index // self.channels
        if self.permutation is not None:
            cell = torch.tensor(self.permutation, device=index.device)[cell]
        return Cells(index, cell // self.columns, cell % self.columns * self.channels + index % self.channels)

    def queries(self, device: torch.device | str = "cpu") -> Cells:
        """The token that each position predicts: 3 × (T,)."""
        return self.locate(torch.arange(self.n_ctx, device=device))

    def keys(self, causal: bool, device: torch.device | str = "cpu") -> Cells:
        """The token that each position carries, index -1 for the start vector: 3 × (T,)."""
        return self.locate(torch.arange(self.n_ctx, device=device) - int(causal))


@dataclass(frozen=True)
class Pattern:
    """The attention pattern of a layer. `half`: which of its two an alternating pattern has here, 0 or 1.

    - `local`: tokens at most `radius` cells away in rows and in columns (Parmar et al. 2018, "Image Transformer", §3.3)
    - `strided`: the last `stride` tokens; every `stride`-th one (Child et al. 2019, "Sparse Transformers", §4.3, who
      count positions, whose keys carry the token before)
    - `fixed`: the same block of `stride` positions; the last eighth of every block (as strided)
    - `axial`: the same row; the same column (Ho et al. 2019, "Axial Attention")

    Every position also sees itself, and in causal attention the start vector, but no later position.
    """

    name: str  # one of SPARSE
    half: int
    causal: bool
    layout: TokenLayout
    radius: int = 0
    stride: int = 0

    def is_visible(self, query: Cells, key: Cells) -> Tensor:
        """Whether a query sees a key, elementwise over the broadcast coordinates: bool.

        `query` are those of `TokenLayout.queries`, `key` of `TokenLayout.keys`.
        """
        shift = int(self.causal)
        seen = self._is_in_pattern(query, key) | (key.place + shift == query.place)
        if not self.causal:
            return seen
        return (seen | (key.place < 0)) & (key.place < query.place)

    def _is_in_pattern(self, query: Cells, key: Cells) -> Tensor:
        if self.name == "local":
            across = query.column // self.layout.channels - key.column // self.layout.channels
            return ((query.row - key.row).abs() <= self.radius) & (across.abs() <= self.radius)
        if self.name == "strided":
            ago = query.place - key.place
            return ago.abs() <= self.stride if self.half == 0 else ago % self.stride == 0
        if self.name == "fixed":  # in positions, not in tokens: the last key of a block must have seen all of it
            place = key.place + int(self.causal)
            if self.half == 0:
                return query.place // self.stride == place // self.stride
            return place % self.stride >= self.stride - max(1, self.stride // 8)
        return query.row == key.row if self.half == 0 else query.column == key.column

    def mask_rows(self, start: int, end: int, device: torch.device | str = "cpu") -> Tensor:
        """Rows `start` to `end` of the mask, True where query i sees key j: (end - start, T) bool."""
        return self.select_rows(torch.arange(start, end, device=device))

    def select_rows(self, queries: Tensor) -> Tensor:
        """The mask's rows of these queries: (Q,) → (Q, T) bool."""
        query, key = self.layout.locate(queries), self.layout.keys(self.causal, queries.device)
        return self.is_visible(Cells(*(each[:, None] for each in query)), Cells(*(each[None] for each in key)))

    def count_pairs(self) -> int:
        """Number of visible pairs of query and key."""
        t = self.layout.n_ctx
        return sum(int(self.mask_rows(start, min(start + 512, t)).sum()) for start in range(0, t, 512))


def layer_patterns(
    attention: Sequence[str], n_layer: int, layout: TokenLayout | None, *, causal: bool, radius: int, stride: int
) -> list[str | Pattern]:
    """The pattern of every layer, `full` and `linear` as their names; `attention` is repeated over the layers."""
    patterns: list[str | Pattern] = []
    before: dict[str, int] = {}
    for layer in range(n_layer):
        name = attention[layer % len(attention)]
        half = before.get(name, 0) % 2 if name in ALTERNATING else 0
        before[name] = before.get(name, 0) + 1
        if name not in SPARSE:
            patterns.append(name)
            continue
        assert layout is not None, "GPTConfig has seen to it"
        patterns.append(Pattern(name, half, causal, layout, radius, stride))
    return patterns


def relative_offsets(layout: TokenLayout, *, causal: bool, device: torch.device | str = "cpu") -> Tensor:
    """Index of every pair's offset in a table of 2·rows - 1 by 2·row_length - 1: (T, T) int32.

    Rows: query minus key, from -(rows - 1); then token columns likewise. Pairs with the start vector have the index
    after the last.
    """
    query, key = layout.queries(device), layout.keys(causal, device)
    down = query.row[:, None] - key.row + layout.rows - 1
    across = query.column[:, None] - key.column + layout.row_length - 1
    wide = 2 * layout.row_length - 1
    return torch.where(key.place < 0, (2 * layout.rows - 1) * wide, down * wide + across).int()
