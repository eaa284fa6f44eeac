"""What a palette leaves out, in bits: the code length of the original colours, given the palette's."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtr

from igpt.tokens.palette import Palette

PRIOR = 30.0  # pixels for which the covariance of all colours together counts in that of each
LEAST_VARIANCE = 1e-3  # grey levels²
UNIFORM = 1e-6  # probability of any value at all: no pixel costs more than 3 · 28 bits
CHUNK = 1 << 18  # pixels at a time: 0.2 kB of memory each


@dataclass(frozen=True, eq=False)
class ColourRemainder:
    """A distribution over the 256³ colours for each colour of a palette: normal, discretised, fitted to pixels.

    A network's bits per token plus `bits` are those of a code of the original pixels (first the token, then the
    colour), and so comparable between palettes, while the loss per token is not. An upper bound of the best such code:
    each pixel is coded alone, which costs the more the fewer the colours, and colours that are nearer to another centre
    keep their probability.
    """

    palette: Palette
    means: np.ndarray  # (k, 3), of original minus palette colour, in grey levels
    factors: np.ndarray  # (k, 3, 3), Cholesky factors of the covariances

    @staticmethod
    def fit(palette: Palette, pixels: np.ndarray) -> "ColourRemainder":
        """Mean and covariance of the pixels (…, 3) uint8 of each palette colour; rare ones lean on all together."""
        tokens, residuals = _subtract_palette(palette, pixels)
        counts = np.bincount(tokens, minlength=palette.k).astype(float)
        sums = np.stack([np.bincount(tokens, of, minlength=palette.k) for of in residuals.T], axis=1)
        means = sums / np.maximum(counts, 1)[:, None]
        around = residuals - means[tokens]
        covariances = np.zeros((palette.k, 3, 3))
        for i in range(3):
            for j in range(3):
                covariances[:, i, j] = np.bincount(tokens, around[:, i] * around[:, j], minlength=palette.k)
        pooled = covariances.sum(axis=0) / max(len(tokens), 1)
        covariances = (covariances + PRIOR * pooled) / (counts + PRIOR)[:, None, None] + LEAST_VARIANCE * np.eye(3)
        return ColourRemainder(palette, means, np.linalg.cholesky(covariances))

    def bits(self, pixels: np.ndarray) -> np.ndarray:
        """The code length of each pixel's colour given its palette colour, in bits: (…, 3) uint8 → (…)."""
        flat, lengths = pixels.reshape(-1, 3), np.empty(pixels.size // 3)
        for start in range(0, len(flat), CHUNK):
            lengths[start : start + CHUNK] = self._measure(flat[start : start + CHUNK])
        return lengths.reshape(pixels.shape[:-1])

    def _measure(self, values: np.ndarray) -> np.ndarray:
        """`bits` of a few pixels: (N, 3) → (N,)."""
        tokens, residuals = _subtract_palette(self.palette, values)
        factors, means = self.factors[tokens], self.means[tokens]
        length = np.zeros(len(tokens))
        known = np.zeros((len(tokens), 3))  # standardised residuals of the channels before
        for channel in range(3):
            mean = means[:, channel] + (factors[:, channel, :channel] * known[:, :channel]).sum(axis=1)
            deviation, value = factors[:, channel, channel], values[:, channel]
            known[:, channel] = (residuals[:, channel] - mean) / deviation
            below = np.where(value == 0, -np.inf, known[:, channel] - 0.5 / deviation)
            above = np.where(value == 255, np.inf, known[:, channel] + 0.5 / deviation)
            upper = below > 0  # there 1 - ndtr loses all digits: mirrored
            share = ndtr(np.where(upper, -below, above)) - ndtr(np.where(upper, -above, below))
            length -= np.log2((1 - UNIFORM) * share + UNIFORM / 256)
        return length


def _subtract_palette(palette: Palette, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(…, 3) uint8 → tokens (N,), and the pixels minus their palette colours, (N, 3) float64."""
    flat = pixels.reshape(-1, 3)
    tokens = palette.encode(torch.from_numpy(flat)).numpy()
    return tokens, flat.astype(np.float64) - palette.colours[tokens]
