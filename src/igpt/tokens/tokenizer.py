"""What a tokenizer is: pixels ↔ tokens. All that the rest of the house knows of tokens is stated here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from igpt.data.source import Source


class TokenGrid(NamedTuple):
    """How the tokens of an image lie: rows × columns, so many of them (channels) at each place."""

    rows: int
    columns: int
    channels: int = 1

    @property
    def n_ctx(self) -> int:
        """T, tokens an image."""
        return self.rows * self.columns * self.channels


@runtime_checkable
class Tokenizer(Protocol):
    """Images of one resolution as sequences of tokens, and back. It travels inside the weights that read its tokens."""

    kind: str  # its name in `TOKENIZERS`

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
        """12 hexadecimal digits that differ between tokenizers which make other tokens of some image."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, R, R, 3) uint8 → (B, T) int64, on the pixels' device: the same whatever images are in the batch."""
        ...

    def encoder(self, cache: Path | None) -> Callable[[Tensor], Tensor]:
        """`encode`, by the fastest way for many images; what it prepares may be kept below `cache`."""
        ...

    def decode(self, tokens: Tensor) -> np.ndarray:
        """(B, T) int64 → (B, R, R, 3) uint8. Raises ValueError on a token outside 0 … V - 1."""
        ...

    def known_tokens(self, rows: int) -> Tensor:
        """Which tokens the top `rows` rows of pixels decide: (T,) bool. Raises ValueError outside 0 … R."""
        ...

    def visible_pixels(self, tokens: Tensor) -> Tensor:
        """Which pixels these tokens decide: (T,) bool → (R, R) bool."""
        ...

    def describe(self) -> str:
        """A few words for people: `512 colours`."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """All that is needed to make it again, for a JSON file, without its kind."""
        ...


def whole_rows(tokenizer: Tokenizer, rows: int) -> int:
    """How many of the top `rows` rows of pixels their tokens show: fewer where a token shows several rows."""
    return int(tokenizer.visible_pixels(tokenizer.known_tokens(rows)).all(1).sum())


def token_dtype(n_vocab: int) -> torch.dtype:
    """The integers in which many tokens are kept: int16 up to 2¹⁵ of them, else int32."""
    return torch.int16 if n_vocab <= 1 << 15 else torch.int32


class TokenizerSettings(Protocol):
    """The settings of a tokenizer, as a file in `conf/tokens/` has them: they make it of a dataset."""

    def sizes(self, resolution: int) -> tuple[int, int]:
        """T and V at that resolution, of the settings alone. Raises ValueError where they do not fit it."""
        ...

    def build(self, source: Source, cache: Path) -> Tokenizer:
        """The tokenizer of a dataset's training images; what takes long is kept below `cache`."""
        ...
