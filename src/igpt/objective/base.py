"""The protocol of an objective: visible tokens and the loss of the logits."""

from typing import Protocol

from torch import Tensor


class Objective(Protocol):
    """A generative objective over the tokens of an image."""

    name: str
    causal: bool  # whether position i of the network sees earlier positions only

    def visible_mask(self, tokens: Tensor, rng_keys: Tensor) -> Tensor | None:
        """Mask of tokens the network sees, (B, T) bool, a function of the random keys (B,) alone; None: all."""
        ...

    def per_example_loss(self, logits: Tensor, tokens: Tensor, visible: Tensor | None) -> Tensor:
        """Nats per predicted token of each image: logits (B, T, V), tokens (B, T) → (B,) float32."""
        ...

    def loss(self, logits: Tensor, tokens: Tensor, visible: Tensor | None) -> Tensor:
        """The training loss, a scalar: mean of `per_example_loss` over the images."""
        ...
