"""Cost and speed of training: floating-point operations from the network's sizes, images and tokens per second."""

import time

from igpt.model.config import GPTConfig


def train_flops_per_image(network: GPTConfig) -> float:
    """Floating-point operations of one image's forward and backward pass.

    6 per weight matrix element and token (2 forward, 4 backward) plus the attention's two products, half of these if
    causal. Norms, embeddings and recomputed activations do not count.
    """
    n_embd, n_ctx = network.n_embd, network.n_ctx
    matrix_weights = 12 * network.n_layer * n_embd**2 + n_embd * network.n_vocab
    attention = 12 * network.n_layer * n_ctx * n_embd * (0.5 if network.causal else 1.0)
    return float(n_ctx * (6 * matrix_weights + attention))


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
