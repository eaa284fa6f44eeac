"""The paper's tokenizer: a token is the index of the nearest of k colours; pixels in raster or another fixed order."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from igpt.data.source import Source
from igpt.tokens.lookup import LookupEncoder
from igpt.tokens.palette import Palette
from igpt.tokens.pixel_order import PixelOrder
from igpt.tokens.tokenizer import GridTokenizer, TokenGrid
from igpt.utils import files


@dataclass(frozen=True, eq=False)
class PaletteTokenizer(GridTokenizer):
    """One token a pixel: the index of its nearest colour. Source: Chen et al. 2020, §3.2 ("9-bit RGB")."""

    palette: Palette
    order: PixelOrder
    kind = "palette"

    @property
    def n_vocab(self) -> int:
        return self.palette.k

    @cached_property
    def hash(self) -> str:
        """The palette's hash in raster order; else a hash of kind, palette and permutation."""
        if self.kind == PaletteTokenizer.kind and self.order.is_raster:
            return self.palette.hash
        return files.hash_json([self.kind, self.palette.hash, self.order.permutation])[:12]

    def encode(self, pixels: Tensor) -> Tensor:
        return self.order.flatten(self.palette.encode(pixels))

    def encoder(self, cache: Path | None) -> Callable[[Tensor], Tensor]:
        if type(self).encode is not PaletteTokenizer.encode:  # a subclass may encode colours otherwise
            return self.encode
        lookup = LookupEncoder(self.palette, cache)
        return lambda pixels: self.order.flatten(lookup(pixels))

    def decode(self, tokens: Tensor) -> np.ndarray:
        return self.palette.decode(self.order.unflatten(tokens))

    def describe(self) -> str:
        order = "" if self.order.is_raster else ", in another order than row by row"
        return f"{self.palette.k} colours{order}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "centres": self.palette.centres.tolist(),  # (k, 3) in [-1, 1], bit for bit
            "hash": self.palette.hash,
            "permutation": list(self.order.permutation),  # position → pixel
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "PaletteTokenizer":
        """The inverse of `to_dict`. Raises ValueError on invalid colours, a wrong hash or an invalid permutation."""
        centres, order = saved["centres"], PixelOrder.from_list(saved["permutation"])
        if not isinstance(centres, list) or not all(isinstance(c, list) and len(c) == 3 for c in centres):
            raise ValueError("the palette has not three numbers for each colour")
        palette = Palette(np.asarray(centres, dtype=np.float32))
        if palette.hash != saved["hash"]:
            raise ValueError(f"the palette's hash is {palette.hash}, not the {saved['hash']!r:.60} that is stated")
        return cls(palette, order)


@dataclass(frozen=True)
class PaletteSettings:
    """The settings of `tokens=fitted` and `tokens=openai`: the source of the palette, and the pixel order."""

    order: str
    palette: Callable[[Source, Path], Palette]  # partial with its own settings
    path: str | None = None  # file of a palette that is not fitted

    def sizes(self, resolution: int) -> tuple[TokenGrid, int]:
        """The token grid and V. V is an upper bound for a fitted palette, since images may have fewer colours."""
        settings = getattr(self.palette, "keywords", {})
        k = settings.get("k") or (Palette.load(Path(self.path)).k if self.path else 512)
        return TokenGrid(resolution, resolution), k

    def build(self, source: Source, cache: Path) -> PaletteTokenizer:
        return PaletteTokenizer(self.palette(source, cache), PixelOrder.from_name(source.resolution, self.order))
