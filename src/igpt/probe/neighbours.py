"""Nearest images by cosine similarity of pooled features, and the k-NN classifier that votes with them."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

AT_ONCE = 65536  # rows of features per block of `find_nearest`
MOST_COSINES = 1 << 24  # in memory at a time
TEMPERATURE = 0.07  # of a neighbour's weight exp(cosine / temperature): Wu et al. 2018, §3.4; Caron et al. 2021


def find_nearest(features: np.ndarray, query: np.ndarray, *, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of highest cosine similarity, ties by row index: (N, C), (C,) → rows (k,), cosines (k,)."""
    direction = query.astype(np.float64) / max(float(np.linalg.norm(query.astype(np.float64))), 1e-30)
    cosines = np.empty(len(features))
    for start in range(0, len(features), AT_ONCE):
        some = np.asarray(features[start : start + AT_ONCE], dtype=np.float64)
        cosines[start : start + AT_ONCE] = some @ direction / np.maximum(np.linalg.norm(some, axis=1), 1e-30)
    rows = np.argsort(-cosines, kind="stable")[:k]
    return rows, cosines[rows]


def find_neighbours(train: Tensor, queries: Tensor, *, k: int, centred: bool) -> tuple[Tensor, Tensor]:
    """The k training rows of highest cosine similarity to each query, and the cosines: (N, C), (M, C) → 2 × (M, k).

    `centred`: the mean of the training features is subtracted from both first. A network's features share one large
    component, beside which the cosines of any two images are near 1 (Ethayarajh 2019).
    """
    train, queries = train.float(), queries.float()
    if centred:
        mean = train.mean(0, dtype=torch.float64).float()
        train, queries = train - mean, queries - mean
    train, queries = normalize(train, dim=1), normalize(queries, dim=1)
    found = [(some @ train.T).topk(k, dim=1) for some in torch.split(queries, max(1, MOST_COSINES // len(train)))]
    return torch.cat([rows for _, rows in found]), torch.cat([cosines for cosines, _ in found])


def classify_by_neighbours(train: Tensor, labels: Tensor, queries: Tensor, *, k: int, n_class: int) -> Tensor:
    """Classes of queries by a vote of their k nearest: features (N, C), labels (N,), queries (M, C) → (M,) int64.

    A neighbour of cosine c has weight exp(c / TEMPERATURE). Source: Caron et al. 2021, "Emerging Properties in
    Self-Supervised Vision Transformers" (DINO), §4.1 and `eval_knn.py`.
    """
    rows, cosines = find_neighbours(train, queries, k=k, centred=False)
    votes = torch.zeros(len(queries), n_class, device=queries.device)
    votes.scatter_add_(1, labels[rows], ((cosines - 1) / TEMPERATURE).exp())  # the same vote, and none overflows
    return votes.argmax(dim=1)
