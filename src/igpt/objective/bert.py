"""Masked-pixel prediction: the cross-entropy of the pixels that were hidden, given those that were not."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from igpt.objective.base import token_nats
from igpt.utils import keyed

_STREAM = 2  # random stream of the masks, folded into each key; no other random choice uses it


class BERT:
    """Each token is masked independently with probability p; the loss counts masked tokens, in nats per masked token.

    It is the mean over each image's masked tokens, then over images, as in the released code; the paper writes a sum
    (Chen et al. 2020, §2.2; `model.py:model`). At least one token per image is masked, the one with the smallest
    random number, because the mean of an empty set is NaN.
    """

    name = "bert"
    causal = False

    def __init__(self, *, mask_probability: Annotated[float, Field(gt=0, lt=1)]) -> None:
        self.mask_probability = mask_probability

    def visible_mask(self, tokens: Tensor, rng_keys: Tensor) -> Tensor:
        """Mask of visible tokens, (B, T) bool: a function of each image's key alone."""
        u = keyed.uniform(keyed.fold_in(rng_keys, _STREAM), tokens.shape[1])  # (B, T)
        threshold = torch.clamp(u.amin(dim=1, keepdim=True), min=self.mask_probability)
        return u > threshold

    def per_example_loss(self, logits: Tensor, tokens: Tensor, visible: Tensor | None) -> Tensor:
        return self.average_tokens(token_nats(logits, tokens), visible)

    def average_tokens(self, nats: Tensor, visible: Tensor | None) -> Tensor:
        assert visible is not None
        hidden = (~visible).to(nats)  # (B, T)
        return (nats * hidden).sum(dim=1) / hidden.sum(dim=1).clamp(min=1)

    def loss(self, logits: Tensor, tokens: Tensor, visible: Tensor | None) -> Tensor:
        return self.per_example_loss(logits, tokens, visible).mean()
