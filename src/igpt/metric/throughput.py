"""Cost and speed of training: floating-point operations from the network's sizes, images and tokens per second."""

import time
from functools import cache

from igpt.model.config import GPTConfig
from igpt.model.patterns import Pattern


def train_flops_per_image(network: GPTConfig) -> float:
    """Floating-point operations of one image's forward and backward pass.

    6 per weight matrix element and token (2 forward, 4 backward) plus 12 C per pair of query and key, of which full
    attention has T² (half of these if causal) and a sparse pattern those that are visible, whatever a backend computes.
    Linear attention adds keys times values, (D, D) per head, to its state and reads it, as in decoding: 12 C D per
    token. What is not a product of matrices does not count: norms (of queries and keys, too), rotations, biases of
    scores, mixed values, embeddings, activations; neither do recomputed activations.
    """
    c, t = network.n_embd, network.n_ctx
    of_mlp = (3 if network.activation == "swiglu" else 2) * c * network.hidden_size
    matrix_weights = network.n_layer * (4 * c**2 + of_mlp) + c * network.n_vocab
    pairs = sum(_count_pairs(network, pattern) for pattern in network.patterns)
    return float(t * 6 * matrix_weights + 12 * c * pairs)


def count_steps(operations: float, flops_per_image: float, batch_size: int) -> int:
    """Optimiser steps that come nearest to these operations; one at least."""
    return max(1, round(operations / (flops_per_image * batch_size)))


def _count_pairs(network: GPTConfig, pattern: str | Pattern) -> float:
    """Pairs of query and key in one layer; of linear attention the number of as many operations."""
    t = network.n_ctx
    if pattern == "linear":
        return t * network.n_embd // network.n_head
    if isinstance(pattern, Pattern):
        return _count_visible_pairs(pattern)
    return t**2 / 2 if network.causal else t**2


@cache
def _count_visible_pairs(pattern: Pattern) -> int:
    return pattern.count_pairs()


class Meter:
    """Images and tokens per second, and FLOP utilisation, since the last reading.

    Time between `pause` and `resume`, e.g. of validation, does not count. `peak_flops`: FLOP/s of all devices
    together; None: no utilisation.
    """

    def __init__(self, *, flops_per_image: float, n_ctx: int, peak_flops: float | None) -> None:
        self.flops_per_image, self.n_ctx, self.peak_flops = flops_per_image, n_ctx, peak_flops
        self._images = 0
        self._elapsed, self._since = 0.0, time.perf_counter()

    def pause(self) -> None:
        self._elapsed += time.perf_counter() - self._since

    def resume(self) -> None:
        self._since = time.perf_counter()

    def add(self, images: int) -> None:
        self._images += images

    def read(self) -> dict[str, float]:
        """The figures since the last reading; resets the meter."""
        self.pause()
        images_per_s = self._images / max(self._elapsed, 1e-9)
        self._images, self._elapsed = 0, 0.0
        self.resume()
        figures = {"images_per_s": images_per_s, "tokens_per_s": images_per_s * self.n_ctx}
        if self.peak_flops:
            figures["flop_utilisation"] = images_per_s * self.flops_per_image / self.peak_flops
        return figures
