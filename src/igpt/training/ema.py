"""Exponential moving average of weights over optimiser steps: `task.ema`.

Not Lightning's `EMAWeightAveraging`: that puts the average in place of the weights, in checkpoints (`init=` would read
it), in validations and at the end, and has no warm-up of the decay.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from igpt.checkpoint.tensors import LazyTensor
from igpt.distributed.sharding import copy_into_sharded


def warmed_up_decay(n_averaged: int, decay: float) -> float:
    """The decay of an average of `n_averaged` steps so far, which begins low: min(decay, (1 + n) / (10 + n)).

    So the initial weights are forgotten soon. Source: TensorFlow's `tf.train.ExponentialMovingAverage`, `num_updates`.
    """
    return min(decay, (1 + n_averaged) / (10 + n_averaged))


class WeightAverage:
    """The average of a network's weights, in float32: `weights`, by name. `saved`: those of a checkpoint.

    The average of sharded weights (FSDP2) is sharded as they are.
    """

    def __init__(self, net: nn.Module, decay: float, saved: Mapping[str, Tensor | LazyTensor] | None = None) -> None:
        self.decay = decay
        self.weights = {name: weight.detach().float().clone() for name, weight in net.named_parameters()}
        if saved is not None:
            self.load(saved)

    def load(self, saved: Mapping[str, Tensor | LazyTensor]) -> None:
        """Sets the average to that of a checkpoint."""
        for name, average in self.weights.items():
            value = saved[name]
            copy_into_sharded(average, value.read() if isinstance(value, LazyTensor) else value)

    def update(self, net: nn.Module, n_averaged: int) -> None:
        """Averages the weights of `net` after an optimiser step, before which `n_averaged` were."""
        current = [_local(weight).float() for weight in net.parameters()]
        decay = warmed_up_decay(n_averaged, self.decay)
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # PyTorch gives it no types
        average([_local(weight) for weight in self.weights.values()], current, n_averaged)

    @contextmanager
    def average_parameters(self, net: nn.Module) -> Iterator[None]:
        """Has `net` compute with the average inside the block, and with its own weights again after it."""
        sharded = [module for module in net.modules() if isinstance(module, FSDPModule)]
        _reshard(sharded)
        own = {name: _local(weight).clone() if sharded else weight.data for name, weight in net.named_parameters()}
        try:
            for name, weight in net.named_parameters():
                average = _local(self.weights[name]).to(own[name])  # of its device and dtype
                if sharded:
                    _local(weight).copy_(average)
                else:
                    weight.data = average
            yield
        finally:
            _reshard(sharded)
            for name, weight in net.named_parameters():
                if sharded:
                    _local(weight).copy_(own[name])
                else:
                    weight.data = own[name]


def _local(weight: Tensor) -> Tensor:
    """A weight, or of a sharded one the part of this rank, which shares its memory."""
    return (weight.to_local() if isinstance(weight, DTensor) else weight).detach()


def _reshard(modules: Iterable[FSDPModule]) -> None:
    """Has modules forget the weights that they have gathered."""
    for module in modules:
        module.reshard()
