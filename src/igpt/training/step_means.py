"""Figures of optimiser steps, averaged over ranks and the steps between two log lines, without a wait in a step."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from igpt.distributed.ranks import sum_over_ranks

MINIMISED = "minimised"  # name of the loss that must be finite


class StepMeans:
    """Keeps named scalars of every step on their device; only `gather` waits for it, and for the other ranks.

    Sums are over ranks and steps, in float64, where sums of float32 are exact: how often they are gathered or saved
    changes no mean. `peak`: name of a figure that is given as its square, to be averaged over the ranks; its root is
    averaged over the steps, and the largest is kept, too, as `PEAK_max`.
    """

    def __init__(self, peak: str, n_rank: int) -> None:
        self.peak, self.n_rank = peak, n_rank
        self._names: list[str] = []
        self._pending: list[tuple[int, Tensor]] = []  # steps since the last `gather`, and their figures of this rank
        self._clear()

    def _clear(self) -> None:
        self._steps, self._sums, self._largest = 0, dict[str, float](), 0.0

    def add(self, step: int, names: list[str], values: Tensor) -> None:
        """Adds one step's values (N,) of the names, which are the same in every step."""
        self._names = names
        self._pending.append((step, values))

    def gather(self) -> int | None:
        """Sums the steps since the last call over all ranks. A collective: every rank must call it.

        Returns the first of these steps whose loss was not finite on some rank; None if there is none.
        """
        if not self._pending:
            return None
        steps = [step for step, _ in self._pending]
        totals = sum_over_ranks(self._stack()).cpu()
        self._sum_up(totals)
        finite: list[bool] = totals[:, self._names.index(MINIMISED)].isfinite().tolist()
        return next((step for step, is_finite in zip(steps, finite, strict=True) if not is_finite), None)

    def _stack(self) -> Tensor:
        """The figures of this rank since the last call, (S, N) float64 on their device."""
        values, self._pending = [values for _, values in self._pending], []
        return torch.stack(values).double()

    def _sum_up(self, totals: Tensor) -> None:
        """Adds the sums over ranks of each step, (S, N) on the CPU."""
        if self._sums.keys() != set(self._names):  # none yet, or those of a release with other figures
            self._clear()
            self._sums = dict.fromkeys(self._names, 0.0)
        if self.peak in self._names:
            peaks = totals[:, self._names.index(self.peak)]
            roots = (peaks / self.n_rank).float().sqrt().double()
            self._largest = float(np.maximum(self._largest, roots.max().item()))  # NaN if one is
            peaks.copy_(roots * self.n_rank)
        for name, total in zip(self._names, totals.sum(0).tolist(), strict=True):
            self._sums[name] += total
        self._steps += len(totals)

    def read(self) -> dict[str, float]:
        """The means of what was gathered since the last reading, and the largest value; begins anew."""
        means = {name: total / (self._steps * self.n_rank) for name, total in self._sums.items()}
        means |= {f"{self.peak}_max": self._largest} if self.peak in means else {}
        self._clear()
        return means

    def state_dict(self) -> dict[str, Any]:
        """Sums over ranks and steps, largest value, and numbers of steps and ranks since the last reading.

        Steps that were not gathered, before an error ends the run, count with this rank's figures for all ranks.
        """
        if self._pending:
            self._sum_up(self._stack().cpu() * self.n_rank)
        return {"steps": self._steps, "sums": dict(self._sums), "largest": self._largest, "ranks": self.n_rank}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, also of one with another number of ranks."""
        ranks = int(state.get("ranks", 1))  # the sums of older releases were of means over the ranks
        factor = 1.0 if ranks == self.n_rank else self.n_rank / ranks
        self._sums = {str(name): float(total) * factor for name, total in state["sums"].items()}
        self._steps, self._largest, self._pending = int(state["steps"]), float(state["largest"]), []


def squared_gradient_norm(optimizer: torch.optim.Optimizer, n_rank: int) -> Tensor:
    """The square of the gradient's norm over all weights, a scalar whose mean over the ranks is exact.

    A sharded gradient (FSDP2) counts its local part `n_rank` times; a replicated one is the same on every rank.
    """
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    shards = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
    replicas = [grad for grad in grads if not isinstance(grad, DTensor)]
    return n_rank * get_total_norm(shards).square() + get_total_norm(replicas).square()
