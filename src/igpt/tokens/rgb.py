"""RGB values as tokens: every pixel is three tokens, its red, green and blue, so that nothing is lost."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from igpt.data.source import Source
from igpt.settings.fields import Settings
from igpt.tokens.pixel_order import PixelOrder, check_rows
from igpt.tokens.tokenizer import TokenGrid
from igpt.utils import files

LEVELS = 256
CHANNELS = 3  # red, green, blue: one after the other


@dataclass(frozen=True, eq=False)
class RGBTokenizer:
    """Three tokens a pixel: its 8-bit red, green and blue, in this order. Exact: `decode(encode(x)) == x`.

    The loss in bits per token is the images' bits per dimension. Source of the factorisation: van den Oord et al.
    2016, "Pixel Recurrent Neural Networks", §2.
    """

    order: PixelOrder
    kind = "rgb"
    reach = 0
    n_vocab = LEVELS

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RGBTokenizer) and self.hash == other.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    @property
    def grid(self) -> TokenGrid:
        return TokenGrid(self.order.side, self.order.side, CHANNELS)

    @property
    def side(self) -> int:
        return self.order.side

    @cached_property
    def hash(self) -> str:
        return files.hash_json([self.kind, self.order.permutation])[:12]

    def encode(self, pixels: Tensor) -> Tensor:
        return self.order.flatten(pixels).flatten(1).long()  # (B, R, R, 3) → (B, R², 3) → (B, T)

    def encode_top(self, pixels: Tensor, rows: int) -> Tensor:
        """As `encode`: a token depends on its own pixel alone."""
        check_rows(rows, self.side)
        return self.encode(pixels)

    def encoder(self, cache: Path | None) -> Callable[[Tensor], Tensor]:
        return self.encode

    def decode(self, tokens: Tensor) -> np.ndarray:
        values = tokens.cpu()
        if values.numel() and (values.min() < 0 or values.max() >= LEVELS):
            raise ValueError(f"tokens lie in 0 … {LEVELS - 1}, got {values.min()} to {values.max()}")
        grid = self.order.unflatten(values.reshape(-1, self.side**2, CHANNELS))  # (B, T) → (B, R², 3) → (B, R, R, 3)
        return grid.numpy().astype(np.uint8)

    def known_tokens(self, rows: int) -> Tensor:
        return self.order.known_positions(rows).repeat_interleave(CHANNELS)

    def visible_pixels(self, tokens: Tensor) -> Tensor:
        """Mask of the pixels whose three tokens are all there: (T,) bool → (R, R) bool."""
        complete = tokens.view(-1, CHANNELS).all(1)  # (R²,)
        return self.order.unflatten(complete[None])[0]

    def describe(self) -> str:
        order = "" if self.order.is_raster else ", in another order than row by row"
        return f"{LEVELS} levels of red, green and blue{order}"

    def to_dict(self) -> dict[str, Any]:
        return {"permutation": list(self.order.permutation), "hash": self.hash}

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> "RGBTokenizer":
        """The inverse of `to_dict`. Raises ValueError on an invalid permutation or a wrong hash."""
        permutation = saved["permutation"]
        if not isinstance(permutation, list) or not all(type(i) is int for i in permutation):
            raise ValueError("the permutation holds no whole numbers")
        tokenizer = RGBTokenizer(PixelOrder(round(len(permutation) ** 0.5), tuple(permutation)))
        if tokenizer.hash != saved["hash"]:
            raise ValueError(
                f"the pixel order's hash is {tokenizer.hash}, not the {saved['hash']!r:.60} that is stated"
            )
        return tokenizer


class RGBSettings(Settings):
    """The settings of `tokens=rgb`."""

    order: str

    def sizes(self, resolution: int) -> tuple[int, int]:
        return CHANNELS * resolution**2, LEVELS

    def build(self, source: Source, cache: Path) -> RGBTokenizer:
        return RGBTokenizer(PixelOrder.from_name(source.resolution, self.order))
