"""Keyed randomness: random numbers as pure functions of a key, independent of process and time.

Every random choice of a run (crop, mask, order of the images, sampled pixel) is a pure function of
(seed, name of the stream, epoch or step, image index). Rank, worker, batch size and restarts do not change it, and
there is no generator state to save.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

# Finaliser constants of splitmix64 (Steele, Lea & Flood 2014), as signed integers for torch.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def key(seed: int, stream: str, *counters: int) -> int:
    """A 63-bit key of one stream of random numbers: the hash of seed, name and counters."""
    text = "/".join([str(seed), stream, *map(str, counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, stream: str, *counters: int) -> np.random.Generator:
    """A fresh counter-based numpy generator for one stream, for choices made on the host."""
    return np.random.Generator(np.random.Philox(key=key(seed, stream, *counters)))


def fold_in(rng_keys: Tensor, salt: int) -> Tensor:
    """New keys from keys and a number: (B,) int64 → (B,) int64, equal on every device."""
    return _mix(rng_keys ^ key(salt, "fold"))


def per_example_keys(stream_key: int | Tensor, index: Tensor) -> Tensor:
    """One key per image: a stream's key (or one per image, (B,)) folded with the index: (B,) int64 → (B,) int64."""
    return _mix(_mix(index * _GAMMA) ^ stream_key)


def uniform(rng_keys: Tensor, n: int) -> Tensor:
    """Uniform numbers in [0, 1): (B,) int64 → (B, n) float64.

    Entry (i, j) is a function of (keys[i], j) only, so a longer row begins with the shorter one.
    """
    counter = torch.arange(1, n + 1, device=rng_keys.device, dtype=torch.int64)
    bits = _mix(rng_keys[:, None] + counter * _GAMMA)  # (B, n)
    return ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def bernoulli(rng_keys: Tensor, n: int, share: float) -> Tensor:
    """True with probability `share`, a multiple of 2⁻¹⁶: (B,) int64 → (B, n) bool.

    Entry (i, j) is a function of (keys[i], j) only. 64 bits give four entries: a quarter of the work of `uniform`.
    """
    counter = torch.arange(1, -(-n // 4) + 1, device=rng_keys.device, dtype=torch.int64)
    bits = _mix(rng_keys[:, None] + counter * _GAMMA).view(torch.int16)[:, :n]  # (B, n) in -2¹⁵ … 2¹⁵ - 1
    return bits < round(share * 2**16) - 2**15


def _mix(z: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64 with wrap-around; shifts are logical (unsigned)."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _MIX_1
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _MIX_2
    return z ^ ((z >> 31) & ((1 << 33) - 1))
