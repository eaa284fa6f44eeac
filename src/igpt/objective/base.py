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


class TokenHead(Protocol):
    """What reads scores of tokens from hidden states (B, T, C): a network."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token, (B, T, V)."""
        ...

    def token_nats(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """-log p of every token, (B, T) float32, with few of its logits in memory at a time."""
        ...

    def has_large_logits(self, tokens: Tensor) -> bool:
        """Whether the logits of these tokens are too many to be in memory at once."""
        ...


def generative_loss(
    objective: Objective, net: TokenHead, hidden: Tensor, tokens: Tensor, visible: Tensor | None
) -> Tensor:
    """The objective's training loss of the network's last hidden states (B, T, C): a scalar.

    Where there are many logits, without all of them in memory at once.
    """
    if net.has_large_logits(tokens):
        return objective.average_tokens(net.token_nats(hidden, tokens), visible).mean()
    return objective.loss(net.logits(hidden), tokens, visible)


def hidden_nats(net: TokenHead, hidden: Tensor, tokens: Tensor) -> Tensor:
    """`token_nats` of the network's last hidden states (B, T, C), likewise."""
    return net.token_nats(hidden, tokens) if net.has_large_logits(tokens) else token_nats(net.logits(hidden), tokens)


def token_nats(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log p of every token, in float32: logits (B, T, V), tokens (B, T) → (B, T)."""
    nats = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="none")  # (B·T,)
    return nats.view(tokens.shape)
