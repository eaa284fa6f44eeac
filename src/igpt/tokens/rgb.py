"""RGB values as tokens: every pixel is three tokens, its red, green and blue, so that nothing is lost."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from igpt.data.source import Source
from igpt.settings.fields import Settings
from igpt.tokens.pixel_order import PixelOrder
from igpt.tokens.tokenizer import GridTokenizer, TokenGrid
from igpt.utils import files

LEVELS = 256
CHANNELS = 3  # red, green, blue: one after the other


@dataclass(frozen=True, eq=False)
class RGBTokenizer(GridTokenizer):
    """Three tokens a pixel: its 8-bit red, green and blue, in this order. Exact: `decode(encode(x)) == x`.

    The loss in bits per token is the images' bits per dimension. Source of the factorisation: van den Oord et al.
    2016, "Pixel Recurrent Neural Networks", §2.
    """

    order: PixelOrder
    kind = "rgb"
    n_vocab = LEVELS

    @property
    def grid(self) -> TokenGrid:
        return TokenGrid(self.order.side, self.order.side, CHANNELS)

    @cached_property
    def hash(self) -> str:
        return files.hash_json([self.kind, self.order.permutation])[:12]

    def encode(self, pixels: Tensor) -> Tensor:
        return self.order.flatten(pixels).flatten(1).long()  # (B, R, R, 3) → (B, R², 3) → (B, T)

    def decode(self, tokens: Tensor) -> np.ndarray:
        values = tokens.cpu()
        if values.numel() and (values.min() < 0 or values.max() >= LEVELS):
            raise ValueError(f"tokens lie in 0 … {LEVELS - 1}, got {values.min()} to {values.max()}")
        grid = self.order.unflatten(values.reshape(-1, self.side**2, CHANNELS))  # (B, T) → (B, R², 3) → (B, R, R, 3)
        return grid.numpy().astype(np.uint8)

    def known_tokens(self, rows: int) -> Tensor:
        return super().known_tokens(rows).repeat_interleave(CHANNELS)

    def visible_pixels(self, tokens: Tensor) -> Tensor:
        """Mask of the pixels whose three tokens are all there: (T,) bool → (R, R) bool."""
        return super().visible_pixels(tokens.view(-1, CHANNELS).all(1))  # of (R²,)

    def describe(self) -> str:
        order = "" if self.order.is_raster else ", in another order than row by row"
        return f"{LEVELS} levels of red, green and blue{order}"

    def to_dict(self) -> dict[str, Any]:
        return {"permutation": list(self.order.permutation), "hash": self.hash}

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> "RGBTokenizer":
        """The inverse of `to_dict`. Raises ValueError on an invalid permutation or a wrong hash."""
        tokenizer = RGBTokenizer(PixelOrder.from_list(saved["permutation"]))
        if tokenizer.hash != saved["hash"]:
            raise ValueError(
                f"the pixel order's hash is {tokenizer.hash}, not the {saved['hash']!r:.60} that is stated"
            )
        return tokenizer


class RGBSettings(Settings):
    """The settings of `tokens=rgb`."""

    order: str

    def sizes(self, resolution: int) -> tuple[TokenGrid, int]:
        return TokenGrid(resolution, resolution, CHANNELS), LEVELS

    def build(self, source: Source, cache: Path) -> RGBTokenizer:
        return RGBTokenizer(PixelOrder.from_name(source.resolution, self.order))
