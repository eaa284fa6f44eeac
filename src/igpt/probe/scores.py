"""What predictions are worth: accuracy with its interval, votes, confusion."""

import numpy as np
import torch
from torch import Tensor

from igpt import keyed
from igpt.metric.result import Number

RESAMPLES = 10_000  # of the bootstrap


def accuracy_number(correct: np.ndarray, *, seed: int) -> Number:
    """The share of (N,) bool that is true, with the 95 % interval of a bootstrap over the images."""
    return share_number(float(np.mean(correct)), len(correct), seed=seed)


def share_number(share: float, n: int, *, seed: int) -> Number:
    """The same for a share of n images that was counted: resampling them draws from Binomial(n, share) / n."""
    drawn = keyed.generator(seed, "bootstrap").binomial(n, share, size=RESAMPLES) / n
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    return Number(share, "share", n, (share * (1 - share) / n) ** 0.5, (low, high))


def vote(predictions: Tensor, *, n_class: int, keys: Tensor) -> Tensor:
    """The class that most masks say, of each image: (…, M, N) int64, keys (N,) → (…, N); ties are broken by the keys.

    Source: Chen et al. 2020, §4.6 (BERT: "ensembling 5 masks").
    """
    counts = torch.nn.functional.one_hot(predictions, n_class).sum(dim=-3)  # (…, N, K)
    draw = keyed.uniform(keyed.fold(keys, 5), n_class).to(counts.device)  # (N, K) in [0, 1)
    return (counts + draw).argmax(dim=-1)  # a draw below 1 decides between equal counts alone


def confusion(labels: np.ndarray, predictions: np.ndarray, n_class: int) -> np.ndarray:
    """How often class i (row) was called j (column): (N,), (N,) → (K, K) int64."""
    return np.bincount(labels * n_class + predictions, minlength=n_class**2).reshape(n_class, n_class)


def top_k(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the label is among the k highest scores: (N, K), (N,) → (N,) bool."""
    return (scores.topk(k, dim=-1).indices == labels[:, None]).any(dim=-1)
