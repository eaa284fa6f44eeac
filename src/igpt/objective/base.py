"""What an objective is: what the network may see, and what its logits cost."""

from typing import Protocol

from torch import Tensor


class Objective(Protocol):
    """A generative objective over the tokens of an image."""

    name: str
    causal: bool  # whether position i of the network sees only what comes before it

    def visible_mask(self, tokens: Tensor, keys: Tensor) -> Tensor | None:
        """The pixels the network may see, (B, T) bool, drawn from `keys` (B,) alone; None: all of them."""
        ...

    def per_example_loss(self, logits: Tensor, tokens: Tensor, visible: Tensor | None) -> Tensor:
        """Nats per predicted token of each image: logits (B, T, V), tokens (B, T) → (B,) float32."""
        ...

    def loss(self, logits: Tensor, tokens: Tensor, visible: Tensor | None) -> Tensor:
        """The mean of `per_example_loss` over the images, a scalar: what is minimised."""
        ...
