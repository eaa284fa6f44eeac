"""Exponential moving average of weights over optimiser steps: `task.ema`.

Not Lightning's `EMAWeightAveraging`: that puts the average in place of the weights, in checkpoints (`init=` would read
it), in validations and at the end, and has no warm-up of the decay.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def warmed_up_decay(n_averaged: int, decay: float) -> float:
    """The decay of an average of `n_averaged` steps so far, which begins low: min(decay, (1 + n) / (10 + n)).

    So the initial weights are forgotten soon. Source: TensorFlow's `tf.train.ExponentialMovingAverage`, `num_updates`.
    """
    return min(decay, (1 + n_averaged) / (10 + n_averaged))


class WeightAverage:
    """The average of a network's weights, in float32: `weights`, by name. `saved`: those of a checkpoint."""

    def __init__(self, net: nn.Module, decay: float, saved: Mapping[str, Tensor] | None = None) -> None:
        self.decay = decay
        self.weights = {name: weight.detach().float().clone() for name, weight in net.named_parameters()}
        if saved is not None:
            for name, average in self.weights.items():
                average.copy_(saved[name])

    def update(self, net: nn.Module, n_averaged: int) -> None:
        """Averages the weights of `net` after an optimiser step, before which `n_averaged` were."""
        current = [weight.detach().float() for weight in net.parameters()]
        decay = warmed_up_decay(n_averaged, self.decay)
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # PyTorch gives it no types
        average([*self.weights.values()], current, n_averaged)

    @contextmanager
    def applied(self, net: nn.Module) -> Iterator[None]:
        """Has `net` compute with the average inside the block, and with its own weights again after it."""
        own = {name: weight.data for name, weight in net.named_parameters()}
        try:
            for name, weight in net.named_parameters():
                weight.data = self.weights[name].to(own[name])  # of its device and dtype
            yield
        finally:
            for name, weight in net.named_parameters():
                weight.data = own[name]
