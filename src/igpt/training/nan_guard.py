"""Stops a run at a non-finite loss, before a good checkpoint is overwritten."""

import torch
from torch import Tensor

from igpt.distributed.signals import RunEndedError


class NonFiniteLossError(RunEndedError):
    """The loss became NaN or infinite; the message names the step."""


class FiniteGuard:
    """Stores the first step with a non-finite loss, without a GPU synchronisation at every step.

    On a CPU `record` raises at once; on a GPU `check` does, which is called at every logged step and before every
    checkpoint.
    """

    def __init__(self, *, hint: str = "a lower task.learning_rate or more task.warmup_steps") -> None:
        self.hint = hint
        self._first_bad: Tensor | None = None

    def record(self, loss: Tensor, step: int) -> None:
        """Records the scalar loss of optimiser step `step` (counted from 1)."""
        if self._first_bad is None:
            self._first_bad = torch.zeros((), dtype=torch.int64, device=loss.device)
        newly_bad = ~loss.isfinite() & (self._first_bad == 0)
        self._first_bad = torch.where(newly_bad, step, self._first_bad)
        if loss.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raises NonFiniteLossError if any recorded loss was not finite."""
        if self._first_bad is not None and (step := int(self._first_bad.item())):
            raise NonFiniteLossError(
                f"the loss of step {step} is not finite: the run is stopped and its last checkpoint kept; "
                f"begin again with {self.hint}"
            )
