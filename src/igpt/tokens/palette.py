"""The palette: pixels ↔ tokens. A token is the index of the nearest of k colours ("9 bits" at k = 512)."""

import hashlib
import struct
import tokenize
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from igpt.utils import files

K_MIN, K_MAX = 2, 4096
PaletteSize = Annotated[int, Field(ge=K_MIN, le=K_MAX)]
MOST_BYTES = 1 << 20  # of a palette's file
_CHUNK = 1 << 20  # distances per step, to stay in the CPU cache
_FLOAT32_SLACK = 1e-5  # five times the rounding error bound: values below 16, five operations of 2⁻²⁴ each


@dataclass(frozen=True, eq=False)
class Palette:
    """k colours in [-1, 1], in the released format: `centres` (k, 3) float32.

    Raises:
        ValueError: wrong shape, dtype or range, or NaN.
    """

    centres: np.ndarray

    def __post_init__(self) -> None:
        centres = self.centres
        if centres.ndim != 2 or centres.shape[1] != 3:
            raise ValueError(f"a palette has shape (k, 3), got {centres.shape}")
        if centres.dtype != np.float32:
            raise ValueError(f"a palette holds float32, got {centres.dtype}: convert it with .astype('float32')")
        if not K_MIN <= len(centres) <= K_MAX:
            raise ValueError(f"a palette has {K_MIN} to {K_MAX} colours, got {len(centres)}")
        if not np.isfinite(centres).all():
            raise ValueError(f"palette row {int(np.argwhere(~np.isfinite(centres))[0, 0])} is not finite")
        if centres.min() < -1 or centres.max() > 1:
            raise ValueError(
                f"palette colours lie in [-1, 1] (pixel / 127.5 - 1), got {centres.min():g} to {centres.max():g}"
            )

    @property
    def k(self) -> int:
        """Number of colours: the network's vocabulary."""
        return len(self.centres)

    @cached_property
    def hash(self) -> str:
        """12 hexadecimal digits of a hash of the colours in order. Stored in checkpoints."""
        return hashlib.sha256(self.centres.astype("<f4").tobytes()).hexdigest()[:12]

    def encode(self, pixels: Tensor) -> Tensor:
        """The index of the nearest colour: (…, 3) uint8 → (…) int64, on the pixels' device.

        Exact: the smallest squared distance in float64, the lowest index on a tie. Each distinct colour is encoded
        once. (OpenAI and Hugging Face expand the square in float32, which differs in about 20 of a million pixels,
        all near-ties.)
        """
        codes, inverse = torch.unique(colour_codes(pixels), return_inverse=True)  # (U,), (…)
        return self.nearest(decode_colour_codes(codes))[inverse]

    def nearest(self, colours: Tensor) -> Tensor:
        """The index of the nearest centre of each colour: (U, 3) int64 in 0 … 255 → (U,) int64.

        Distances are compared in float32 first (without the square of the colour, a constant). If the two smallest
        differ by less than the rounding error, float64 decides.
        """
        device = colours.device
        centres = torch.from_numpy(self.centres).double()
        chunk = (centres**2).sum(1).float().to(device)  # (k,)
        twice = (-2 * centres.T).float().contiguous().to(device)  # (3, k)
        points = (colours.double() / 127.5 - 1).float()  # (U, 3)
        indices, close = [], []
        for p in torch.split(points, max(1, _CHUNK // self.k)):
            d = torch.addcmul(chunk, p[:, :1], twice[0]).addcmul_(p[:, 1:2], twice[1]).addcmul_(p[:, 2:], twice[2])
            least, index = d.min(1)  # (rows, k) → (rows,)
            d.scatter_(1, index[:, None], torch.inf)
            indices.append(index)
            close.append(d.amin(1) < least + _FLOAT32_SLACK)
        nearest = torch.cat(indices)
        (doubtful,) = torch.cat(close).nonzero(as_tuple=True)
        if len(doubtful):
            nearest[doubtful] = self._nearest_float64(colours[doubtful])
        return nearest

    def _nearest_float64(self, colours: Tensor) -> Tensor:
        r, g, b = (squared_differences(self, channel).to(colours.device).T for channel in range(3))  # each (256, k)
        nearest = [
            ((r[chunk[:, 0]] + g[chunk[:, 1]]) + b[chunk[:, 2]]).min(-1).indices  # (rows, k) → (rows,)
            for chunk in torch.split(colours, max(1, _CHUNK // self.k))
        ]
        return torch.cat(nearest)

    @cached_property
    def colours(self) -> np.ndarray:
        """The colours as pixels, (k, 3) uint8: rint(127.5 · (centre + 1)), half to even, as OpenAI decodes."""
        colours: np.ndarray = np.rint(127.5 * (self.centres + 1.0)).astype(np.uint8)
        return colours

    def decode(self, tokens: Tensor) -> np.ndarray:
        """The colour of every token: (…) int64 → (…, 3) uint8. Raises ValueError on a token outside 0 … k-1."""
        indices = tokens.cpu().numpy()
        if indices.size and (indices.min() < 0 or indices.max() >= self.k):
            raise ValueError(f"tokens lie in 0 … {self.k - 1}, got {indices.min()} to {indices.max()}")
        pixels: np.ndarray = self.colours[indices]
        return pixels

    def save(self, path: Path) -> None:
        """Writes the released format: a float32 `.npy` of shape (k, 3), atomically."""
        with files.atomic_write(path) as file:
            np.save(file, self.centres, allow_pickle=False)

    @staticmethod
    def load(path: Path) -> "Palette":
        """The palette in a `.npy` file such as OpenAI's `kmeans_centers.npy`, without pickle.

        Raises:
            ValueError: a missing, invalid or too large `.npy` file, an object array (a pickle), or an invalid palette.
        """
        if not path.is_file():
            raise ValueError(f"no palette at {path}: give a .npy file of shape (k, 3), float32 in [-1, 1]")
        centres = read_npy(path, most_bytes=MOST_BYTES)
        try:
            return Palette(centres)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def read_npy(path: Path, *, most_bytes: int | None = None) -> np.ndarray:
    """The array of numbers in a `.npy` file, without pickle; memory-mapped, unless the file has a bound of bytes.

    Raises:
        ValueError: another file, one that is shorter than its shape, or larger than `most_bytes`.
    """
    try:
        if most_bytes is not None and path.stat().st_size > most_bytes:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, at most {most_bytes:,} are read")
        mapped = np.lib.format.open_memmap(path, mode="r")
        if mapped.dtype.kind not in "biuf":
            raise ValueError(f"it holds {mapped.dtype!s:.60}")
    except (ValueError, TypeError, OSError, LookupError, OverflowError, SyntaxError, RecursionError, MemoryError,
            tokenize.TokenError, struct.error) as error:  # fmt: skip  # of numpy's reader of the header
        raise ValueError(
            f"{path} is no .npy array of numbers, or is damaged ({error!s:.200}): copy it again"
        ) from error
    return mapped if most_bytes is None else np.array(mapped, order="C")


def colour_codes(pixels: Tensor) -> Tensor:
    """r · 256² + g · 256 + b of every pixel: (…, 3) uint8 → (…) int32. Raises ValueError on anything else."""
    if pixels.dtype != torch.uint8 or pixels.shape[-1] != 3:
        raise ValueError(f"pixels are uint8 (…, 3), got {pixels.dtype} {tuple(pixels.shape)}")
    r, g, b = pixels.int().unbind(-1)
    return (r << 16) + (g << 8) + b


def decode_colour_codes(codes: Tensor) -> Tensor:
    """The inverse of `colour_codes`: (U,) int32 → (U, 3) int64."""
    return torch.stack([codes >> 16, codes >> 8 & 255, codes & 255], dim=-1).long()


def squared_differences(palette: Palette, channel: int) -> Tensor:
    """The squared difference of every centre from every level of one channel: → (k, 256) float64.

    A distance is the sum (red + green) + blue of three of these; this order of additions reproduces `encode` exactly.
    """
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    centres = torch.from_numpy(palette.centres[:, channel]).double()
    return (levels - centres[:, None]) ** 2


def from_file(source: object, cache: Path, *, path: str | None) -> Palette:
    """The palette in a file, for `tokens=openai`; `source` and `cache` are unused."""
    if path is None:
        raise ValueError("tokens=openai needs the released file: tokens.path=PATH/kmeans_centers.npy")
    return Palette.load(Path(path))
