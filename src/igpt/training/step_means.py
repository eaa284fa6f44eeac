"""Figures of optimiser steps, averaged over the steps between two log lines, without waiting for the device."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


class StepMeans:
    """Sums named scalars over optimiser steps on their device, in float64; only `read` waits for it.

    `peak`: name of a figure whose largest value is kept, too, as `PEAK_max`.
    """

    def __init__(self, peak: str) -> None:
        self.peak = peak
        self._names: list[str] = []
        self._steps = 0

    def add(self, names: list[str], values: Tensor) -> None:
        """Adds one step's values (N,) of the names."""
        values = values.double()
        largest = values[names.index(self.peak)] if self.peak in names else values[0]
        if not self._steps or names != self._names:  # a first step, also of a release with other figures
            self._names, self._steps, self._sums, self._largest = names, 1, values, largest
            return
        self._steps += 1
        self._sums = self._sums.to(values.device) + values
        self._largest = torch.maximum(self._largest.to(values.device), largest)

    def read(self) -> dict[str, float]:
        """The means since the last reading, and the largest value; resets them."""
        state = self.state_dict()
        means = {name: total / state["steps"] for name, total in state["sums"].items()}
        self._steps = 0
        return means | ({f"{self.peak}_max": state["largest"]} if self.peak in means else {})

    def state_dict(self) -> dict[str, Any]:
        """Sums, largest value and number of steps since the last reading, as plain numbers."""
        if not self._steps:
            return {"steps": 0, "sums": {}, "largest": 0.0}
        *sums, largest = torch.cat([self._sums, self._largest[None]]).tolist()
        return {"steps": self._steps, "sums": dict(zip(self._names, sums, strict=True)), "largest": largest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._names, self._steps = list(map(str, state["sums"])), int(state["steps"])
        self._sums = torch.tensor([float(total) for total in state["sums"].values()], dtype=torch.float64)
        self._largest = torch.tensor(float(state["largest"]), dtype=torch.float64)


def squared_gradient_norm(optimizer: torch.optim.Optimizer, n_rank: int) -> Tensor:
    """The square of the gradient's norm over all weights, a scalar whose mean over the ranks is exact.

    A sharded gradient (FSDP2) counts its local part `n_rank` times; a replicated one is the same on every rank.
    """
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    shards = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
    replicas = [grad for grad in grads if not isinstance(grad, DTensor)]
    return n_rank * get_total_norm(shards).square() + get_total_norm(replicas).square()
