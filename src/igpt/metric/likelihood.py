"""Generative loss in nats and bits, and two baselines that a network has to beat."""

import math

import numpy as np
from torch import Tensor

from igpt.metric.result import Number


def likelihood_numbers(split: str, per_example_loss: Tensor) -> dict[str, Number]:
    """`split/loss_gen` and `split/bits_per_token` with standard errors; image_nats (N,) in nats per token."""
    nats, n = per_example_loss.double(), len(per_example_loss)
    mean = float(nats.mean())
    stderr = float(nats.std()) / math.sqrt(n) if n > 1 else None
    bits = Number(mean / math.log(2), "bits/token", n, None if stderr is None else stderr / math.log(2))
    return {f"{split}/loss_gen": Number(mean, "nats/token", n, stderr), f"{split}/bits_per_token": bits}


def unigram_nats(train: np.ndarray, held_out: np.ndarray, n_vocab: int) -> float:
    """Nats per held-out token under the training tokens' histogram (add-one smoothing)."""
    counts = np.bincount(train.reshape(-1), minlength=n_vocab) + 1.0
    return float(-np.log(counts / counts.sum())[held_out].mean())


def position_nats(train: np.ndarray, held_out: np.ndarray, n_vocab: int) -> float:
    """Nats per held-out token under one histogram per position (add-one smoothing); both arrays (N, T) int64."""
    n_ctx = train.shape[1]
    counts = np.ones((n_ctx, n_vocab))
    np.add.at(counts, (np.broadcast_to(np.arange(n_ctx), train.shape), train), 1.0)
    nats = -np.log(counts / counts.sum(axis=1, keepdims=True))  # (T, V)
    return float(nats[np.arange(n_ctx), held_out].mean())
