"""Majority votes over the predictions under several masks."""

import torch
from torch import Tensor

from igpt.utils import keyed

VOTE_COUNTS = 1 << 24  # size of the table of counts at a time: images × heads × classes


def vote(predictions: Tensor, *, n_class: int, rng_keys: Tensor) -> Tensor:
    """Majority vote of M masks per image: (…, M, N) int64, keys (N,) → (…, N). The random keys break ties.

    Source: Chen et al. 2020, §4.6 (BERT: "ensembling 5 masks").
    """
    if predictions.shape[-2] == 1:
        return predictions[..., 0, :]
    shape = *predictions.shape[:-2], predictions.shape[-1]  # (…, N)
    voted = torch.empty(shape, dtype=torch.int64, device=predictions.device)
    chunk = max(1, VOTE_COUNTS // max(1, n_class * voted[..., :1].numel()))  # images at a time
    for start in range(0, shape[-1], chunk):
        rows = slice(start, start + chunk)
        some = predictions[..., rows].mT  # (…, n, M)
        counts = torch.zeros((*some.shape[:-1], n_class), device=some.device)
        counts.scatter_add_(-1, some, torch.ones_like(some, dtype=counts.dtype))
        draw = keyed.uniform(keyed.fold_in(rng_keys[rows], 5), n_class).to(counts)  # (n, K) in [0, 1]
        # below one count: decides ties only
        voted[..., rows] = (counts + 0.5 * draw).argmax(dim=-1)
    return voted
