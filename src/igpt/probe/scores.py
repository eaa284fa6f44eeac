"""What predictions are worth: accuracy with its interval, votes, confusion."""

import numpy as np
import torch
from torch import Tensor

from igpt.metric.result import Number
from igpt.utils import keyed

RESAMPLES = 10_000  # of the bootstrap
VOTE_COUNTS = 1 << 24  # votes counted at a time: images × heads × classes


def accuracy_number(correct: np.ndarray, *, seed: int) -> Number:
    """The share of (N,) bool that is true, with the 95 % interval of a bootstrap over the images."""
    return share_number(float(np.mean(correct)), len(correct), seed=seed)


def share_number(share: float, n: int, *, seed: int) -> Number:
    """The same for a share of n images that was counted: resampling them draws from Binomial(n, share) / n."""
    share = float(share)
    drawn = keyed.generator(seed, "bootstrap").binomial(n, share, size=RESAMPLES) / n
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    return Number(share, "share", n, (share * (1 - share) / n) ** 0.5, (low, high))


def vote(predictions: Tensor, *, n_class: int, keys: Tensor) -> Tensor:
    """The class that most masks say, of each image: (…, M, N) int64, keys (N,) → (…, N); ties are broken by the keys.

    Source: Chen et al. 2020, §4.6 (BERT: "ensembling 5 masks").
    """
    shape = *predictions.shape[:-2], predictions.shape[-1]  # (…, N)
    voted = torch.empty(shape, dtype=torch.int64, device=predictions.device)
    chunk = max(1, VOTE_COUNTS // max(1, n_class * voted[..., :1].numel()))  # images at a time
    for start in range(0, shape[-1], chunk):
        rows = slice(start, start + chunk)
        some = predictions[..., rows].mT  # (…, n, M)
        counts = torch.zeros((*some.shape[:-1], n_class), device=some.device)
        counts.scatter_add_(-1, some, torch.ones_like(some, dtype=counts.dtype))
        draw = keyed.uniform(keyed.fold(keys[rows], 5), n_class).to(counts)  # (n, K) in [0, 1]
        # a draw decides between equal counts alone
        voted[..., rows] = (counts + 0.5 * draw).argmax(dim=-1)
    return voted


def confusion(labels: np.ndarray, predictions: np.ndarray, n_class: int) -> np.ndarray:
    """How often class i (row) was called j (column): (N,), (N,) → (K, K) int64."""
    return np.bincount(labels * n_class + predictions, minlength=n_class**2).reshape(n_class, n_class)


def top_k(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the label is among the k highest scores: (N, K), (N,) → (N,) bool."""
    return (scores.topk(k, dim=-1).indices == labels[:, None]).any(dim=-1)
