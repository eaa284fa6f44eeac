"""The tokenizer protocol: pixels ↔ tokens. Other packages use tokenizers through it alone."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from igpt.data.source import Source
from igpt.tokens.pixel_order import PixelOrder, check_rows


class TokenGrid(NamedTuple):
    """The layout of the tokens of an image: rows × columns × channels (tokens per cell)."""

    rows: int
    columns: int
    channels: int = 1

    @property
    def n_ctx(self) -> int:
        """T, tokens per image."""
        return self.rows * self.columns * self.channels


@runtime_checkable
class Tokenizer(Protocol):
    """Maps images of one resolution to token sequences and back. Model checkpoints contain their tokenizer."""

    kind: str  # its name in `TOKENIZERS`

    @property
    def order(self) -> PixelOrder:
        """The order of the grid's cells in the sequence; the channels of a cell follow each other."""
        ...

    @property
    def n_vocab(self) -> int:
        """V: tokens are 0 … V - 1."""
        ...

    @property
    def grid(self) -> TokenGrid: ...

    @property
    def side(self) -> int:
        """R, pixels a side."""
        ...

    @property
    def hash(self) -> str:
        """12 hexadecimal digits; different for tokenizers that encode some image differently."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, R, R, 3) uint8 → (B, T) int64, on the pixels' device; independent of the other images in the batch."""
        ...

    def encoder(self, cache: Path | None) -> Callable[[Tensor], Tensor]:
        """A function equal to `encode`, the fastest for many images. It may store files below `cache`."""
        ...

    def decode(self, tokens: Tensor) -> np.ndarray:
        """(B, T) int64 → (B, R, R, 3) uint8. Raises ValueError on a token outside 0 … V - 1."""
        ...

    def known_tokens(self, rows: int) -> Tensor:
        """Mask of the tokens that the top `rows` pixel rows determine: (T,) bool. Raises ValueError outside 0 … R."""
        ...

    def encode_top(self, pixels: Tensor, rows: int) -> Tensor:
        """As `encode`; tokens in `known_tokens(rows)` depend on the top `rows` pixel rows alone. Others: any token.

        Raises:
            ValueError: `rows` outside 0 … R.
        """
        ...

    def visible_pixels(self, tokens: Tensor) -> Tensor:
        """Mask of the pixels that these tokens stand for: (T,) bool → (R, R) bool."""
        ...

    @property
    def reach(self) -> int:
        """Pixels on each side of those that a token stands for that also change with it; 0 but for networks."""
        ...

    def describe(self) -> str:
        """A short description for people: `512 colours`."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """The tokenizer as JSON values, without its kind; see `tokenizer_registry`."""
        ...


class GridTokenizer(ABC):
    """The members that tokenizers have in common, of `cell` × `cell` pixels a token, which depends on them alone."""

    order: PixelOrder

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GridTokenizer) and self.hash == other.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    @property
    @abstractmethod
    def hash(self) -> str: ...

    @property
    def cell(self) -> int:
        """Pixels a side of a token."""
        return 1

    @property
    def reach(self) -> int:
        return 0

    @property
    def grid(self) -> TokenGrid:
        return TokenGrid(self.order.side, self.order.side)

    @property
    def side(self) -> int:
        return self.order.side * self.cell

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor: ...

    def encode_top(self, pixels: Tensor, rows: int) -> Tensor:
        check_rows(rows, self.side)
        return self.encode(pixels)

    def encoder(self, cache: Path | None) -> Callable[[Tensor], Tensor]:
        return self.encode

    def known_tokens(self, rows: int) -> Tensor:
        check_rows(rows, self.side)
        return self.order.known_positions(rows // self.cell)

    def visible_pixels(self, tokens: Tensor) -> Tensor:
        grid = self.order.unflatten(tokens[None])[0]  # (R/cell, R/cell)
        return grid.repeat_interleave(self.cell, 0).repeat_interleave(self.cell, 1)


def count_decided_rows(tokenizer: Tokenizer, rows: int) -> int:
    """The number of complete pixel rows among the top `rows` that their tokens determine, whatever the others are.

    Fewer than `rows` if a token stands for several rows, or changes rows above its own.
    """
    n_shown = int(tokenizer.visible_pixels(tokenizer.known_tokens(rows)).all(1).sum())
    return n_shown if n_shown == tokenizer.side else max(0, n_shown - tokenizer.reach)


def token_dtype(n_vocab: int) -> torch.dtype:
    """The dtype for storing tokens: int16 up to a vocabulary of 2¹⁵, else int32."""
    return torch.int16 if n_vocab <= 1 << 15 else torch.int32


class TokenizerSettings(Protocol):
    """The settings of a tokenizer, from a file in `conf/tokens/`."""

    order: str  # of the cells, as `PixelOrder.from_name` reads it

    def sizes(self, resolution: int) -> tuple[TokenGrid, int]:
        """The token grid and V at a resolution, from the settings alone. Raises ValueError if they do not fit it."""
        ...

    def build(self, source: Source, cache: Path) -> Tokenizer:
        """The tokenizer for a dataset, fitted to its training images if need be and cached below `cache`."""
        ...
