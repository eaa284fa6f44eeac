"""The palette: pixels ↔ tokens. A token is the index of the nearest of k colours ("9 bits" at k = 512)."""

import hashlib
import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from igpt import files

K_MIN, K_MAX = 2, 4096
_CHUNK = 1 << 22  # distances computed at a time: 32 MiB of float64


@dataclass(frozen=True, eq=False)
class Palette:
    """k colours in [-1, 1], in the released format: `centres` (k, 3) float32.

    Raises:
        ValueError: centres of another shape, dtype or range, or with NaN.
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
        """12 hexadecimal digits that change when any colour, or their order, does. Checkpoints carry them."""
        return hashlib.sha256(self.centres.astype("<f4").tobytes()).hexdigest()[:12]

    def encode(self, pixels: Tensor) -> Tensor:
        """The index of the nearest colour: (…, 3) uint8 → (…) int64, on the pixels' device.

        Exact: the smallest squared distance, computed directly in float64, the lowest index on a tie. Each distinct
        colour is computed once. (OpenAI and Hugging Face expand the square in float32, which differs in about 20 of
        a million pixels, all near-ties.)
        """
        if pixels.dtype != torch.uint8 or pixels.shape[-1] != 3:
            raise ValueError(f"pixels are uint8 (…, 3), got {pixels.dtype} {tuple(pixels.shape)}")
        r, g, b = pixels.long().unbind(-1)
        codes, inverse = torch.unique(r << 16 | g << 8 | b, return_inverse=True)  # (U,), (…)
        colours = torch.stack([codes >> 16, codes >> 8 & 255, codes & 255], dim=-1)  # (U, 3)
        return self._nearest(colours)[inverse]

    def _nearest(self, colours: Tensor) -> Tensor:
        centres = torch.from_numpy(self.centres).to(colours.device, torch.float64)  # (k, 3)
        points = colours.double() / 127.5 - 1  # (U, 3)
        nearest = [
            ((chunk[:, None] - centres) ** 2).sum(-1).min(-1).indices  # (rows, k) → (rows,)
            for chunk in torch.split(points, max(1, _CHUNK // self.k))
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
        buffer = io.BytesIO()
        np.save(buffer, self.centres, allow_pickle=False)
        with files.atomic_write(path) as file:
            file.write(buffer.getvalue())

    @staticmethod
    def load(path: Path) -> "Palette":
        """The palette in a `.npy` file, OpenAI's `kmeans_centers.npy` for one. Runs nothing that is in the file.

        Raises:
            ValueError: no `.npy` array, one that holds objects (a pickle), or no palette.
        """
        if not path.is_file():
            raise ValueError(f"no palette at {path}: give a .npy file of shape (k, 3), float32 in [-1, 1]")
        try:
            with path.open("rb") as file:
                centres = np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"{path} is no .npy array of numbers ({error}): expected a (k, 3) float32 palette"
            ) from error
        try:
            return Palette(centres)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def given(source: object, cache: Path, *, path: str | None) -> Palette:
    """The palette in a file, for `tokens=openai`. Nothing is fitted, so `source` and `cache` are not looked at."""
    if path is None:
        raise ValueError("tokens=openai needs the released file: tokens.path=PATH/kmeans_centers.npy")
    return Palette.load(Path(path))
