"""Generative loss in nats and bits, and two baselines that a network has to beat."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from igpt.metric.result import Number


class BitUnit(NamedTuple):
    """A unit of the loss: bits per token, or per something that has a number of tokens."""

    key: str  # of the number, after `split/`
    unit: str
    tokens: float  # in each


_AT_ONCE = 1024  # images counted at once, against the memory of their int64 copies
PER_TOKEN = BitUnit("bits_per_token", "bits/token", 1.0)
PER_DIM = BitUnit("bits_per_dim", "bits/dim", 1.0)  # of RGB values: the unit of published densities
OF_THESE_PIXELS = "_of_these_pixels"
PER_DIM_OF_THESE_PIXELS = BitUnit(f"bits_per_dim{OF_THESE_PIXELS}", "bits/dim of these pixels", 1.0)


def likelihood_numbers(split: str, per_example_loss: Tensor, units: Sequence[BitUnit] = ()) -> dict[str, Number]:
    """`split/loss_gen`, `split/bits_per_token` and those of further `units`, with standard errors.

    per_example_loss: (N,) in nats per token.
    """
    nats, n = per_example_loss.double(), len(per_example_loss)
    mean = float(nats.mean())
    stderr = float(nats.std()) / math.sqrt(n) if n > 1 else None
    numbers = {f"{split}/loss_gen": Number(mean, "nats/token", n, stderr)}
    for key, unit, tokens in (PER_TOKEN, *units):
        bits = tokens / math.log(2)
        numbers[f"{split}/{key}"] = Number(mean * bits, unit, n, None if stderr is None else stderr * bits)
    return numbers


def unigram_nats(train: np.ndarray, held_out: np.ndarray, n_vocab: int) -> float:
    """Nats per held-out token under the training tokens' histogram (add-one smoothing); both arrays (N, T)."""
    counts = count_tokens(train, n_vocab).sum(axis=0) + 1.0
    return float(-np.log(counts / counts.sum())[held_out].mean())


def position_nats(train: np.ndarray, held_out: np.ndarray, n_vocab: int) -> float:
    """Nats per held-out token under one histogram per position (add-one smoothing); both arrays (N, T)."""
    counts = count_tokens(train, n_vocab) + 1.0
    nats = -np.log(counts / counts.sum(axis=1, keepdims=True))  # (T, V)
    return float(nats[np.arange(len(nats)), held_out].mean())


def count_tokens(tokens: np.ndarray, n_vocab: int) -> np.ndarray:
    """How often each token stands at each position: (N, T) integers → (T, V) int64."""
    n_ctx = tokens.shape[1]
    counts = np.zeros(n_ctx * n_vocab, dtype=np.int64)
    for start in range(0, len(tokens), _AT_ONCE):
        places = np.arange(n_ctx) * n_vocab + tokens[start : start + _AT_ONCE]
        counts += np.bincount(places.ravel(), minlength=len(counts))
    return counts.reshape(n_ctx, n_vocab)
