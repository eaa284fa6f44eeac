"""Dropout in training, off unless `add_dropout` turns it on: the released networks have none.

A mask is a function of the image's key in this step and the place in the network: independent of the batch's layout.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from igpt.model.gpt import GPT
from igpt.utils import keyed


class Dropout(nn.Module):
    """Sets a `share` of the entries of every image to zero and scales the others: (B, T, C) → the same shape.

    Without `rng_keys` (B,), outside of training, it changes nothing. Source: Srivastava et al. 2014.
    """

    def __init__(self, share: float, place: int) -> None:
        super().__init__()
        self.share = share
        self.rng_keys: Tensor | None = None
        # a tensor, as a compiled block is then compiled once and not for every place
        self.register_buffer("place_key", torch.tensor(keyed.key(place, "dropout")), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.rng_keys is None:
            return x
        rng_keys = keyed.per_example_keys(self.get_buffer("place_key"), self.rng_keys)
        drop = keyed.bernoulli(rng_keys, x[0].numel(), self.share).view(x.shape)
        return (x * (1 / (1 - self.share))).masked_fill(drop, 0.0)


@dataclass(frozen=True)
class NetworkDropout:
    """The dropout of one network, for the steps that train it."""

    places: list[Dropout]

    def begin(self, rng_keys: Tensor) -> None:
        """Drops entries from now on, by the keys of the images of this micro-batch, (B,)."""
        for place in self.places:
            place.rng_keys = rng_keys

    def end(self) -> None:
        """Drops nothing from now on."""
        for place in self.places:
            place.rng_keys = None


def add_dropout(net: GPT, share: float) -> NetworkDropout:
    """Dropout at GPT-2's places: after the embedding, and of what attention and MLP of every block add to the stream.

    Not of the attention weights, as GPT-2 has it, too: fused attention never holds them. `share` is rounded to
    multiples of 2⁻¹⁶. Source: Radford et al. 2019, `model.py` of their release; Vaswani et al. 2017, §5.4.
    """
    places = [Dropout(round(share * 2**16) / 2**16, place) for place in range(1 + 2 * net.n_layer)]
    net.drop = places[0]
    for block, of_attention, of_mlp in zip(net.blocks, places[1::2], places[2::2], strict=True):
        block.drop_attention, block.drop_mlp = of_attention, of_mlp
    return NetworkDropout(places)
