"""The protocol of an objective: visible tokens and the loss of the logits."""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class Objective(Protocol):
    """A generative objective over the tokens of an image."""

    name: str
    causal: bool  # whether position i of the network sees earlier positions only

    def visible_mask(self, tokens: Tensor, rng_keys: Tensor) -> Tensor | None:
        """Mask of tokens the network sees, (B, T) bool, a function of the random keys (B,) alone; None: all."""
        ...

    def average_tokens(self, nats: Tensor, visible: Tensor | None) -> Tensor:
        """The mean over each image's predicted tokens of `token_nats` (B, T) → (B,)."""
        ...

    def per_example_loss(self, logits: Tensor, tokens: Tensor, visible: Tensor | None) -> Tensor:
        """Nats per predicted token of each image: logits (B, T, V), tokens (B, T) → (B,) float32."""
        ...

    def loss(self, logits: Tensor, tokens: Tensor, visible: Tensor | None) -> Tensor:
        """The training loss, a scalar: mean of `per_example_loss` over the images."""
        ...


def token_nats(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log p of every token, in float32: logits (B, T, V), tokens (B, T) → (B, T)."""
    nats = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="none")  # (B·T,)
    return nats.view(tokens.shape)
