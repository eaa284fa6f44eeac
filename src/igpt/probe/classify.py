"""Classes of images by a trained head, under the masks of its evaluation."""

from typing import Protocol

import torch
from torch import Tensor

from igpt.model.gpt import GPT
from igpt.objective.base import Objective
from igpt.probe.scores import vote
from igpt.utils import keyed


class Head(Protocol):
    """A head that reads a network."""

    def scores(self, net: GPT, tokens: Tensor, visible: Tensor | None) -> Tensor:
        """Tokens (B, T) → class scores (B, K) float32."""
        ...


def classify(
    net: GPT, head: Head, objective: Objective, tokens: Tensor, *, rng_keys: Tensor, rows: Tensor, masks: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Predicted classes (B,) int64, by vote over `masks` masks, and probabilities (B, K): their mean over the masks.

    Equal to the predictions of `task=probe` and `task=finetune` for images with these keys and rows (B,); an
    autoregressive objective has no masks.

    Raises:
        ValueError: scores that are NaN or infinite.
    """
    under = []
    for mask in range(1 if objective.causal else masks):
        visible = objective.visible_mask(tokens, keyed.fold_in(rng_keys, 100 + mask) if mask else rng_keys)
        under.append(head.scores(net, tokens, visible))
    scores = torch.stack(under)  # (M, B, K)
    if not scores.isfinite().all():
        raise ValueError("class scores hold NaN or infinity: the precision is too low (try trainer.precision=32-true)")
    vote_keys = keyed.per_example_keys(keyed.key(seed, "vote"), rows.cpu())
    classes = vote(scores.argmax(dim=-1), n_class=scores.shape[-1], rng_keys=vote_keys)
    return classes, scores.softmax(dim=-1).mean(dim=0)


def rank_classes(classes: Tensor, probabilities: Tensor, k: int) -> Tensor:
    """The k likeliest classes of each image, the predicted one first: (B,), (B, K) → (B, k)."""
    first = torch.zeros_like(probabilities).scatter_(1, classes[:, None], 1.0)  # a vote may differ from the mean
    return (probabilities + first).topk(k, dim=-1).indices
