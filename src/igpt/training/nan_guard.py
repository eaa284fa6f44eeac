"""Stops a run at a non-finite loss, before a good checkpoint is overwritten."""

import torch
from torch import Tensor

from igpt.distributed.ranks import this_rank
from igpt.distributed.signals import RunEndedError


class NonFiniteLossError(RunEndedError):
    """The loss became NaN or infinite; the message names the step."""


class FiniteGuard:
    """Refuses a non-finite loss, without a wait for a GPU or for other ranks at every step.

    On a CPU without other ranks `record` raises at once. Else `report` does, on every rank: at every logged step and
    before every checkpoint.
    """

    def __init__(self, *, hint: str = "a lower task.learning_rate or more task.warmup_steps") -> None:
        self.hint = hint
        self._recorded: list[tuple[int, Tensor]] = []  # steps since the last report, and their losses here

    def record(self, loss: Tensor, step: int) -> None:
        """Records the scalar loss of optimiser step `step` (counted from 1) on this rank."""
        self._recorded.append((step, loss))
        if loss.device.type == "cpu" and this_rank().count == 1:
            self.check()

    def check(self) -> None:
        """Raises NonFiniteLossError if a loss recorded here since the last report is not finite; asks no other rank."""
        finite = torch.stack([loss for _, loss in self._recorded]).isfinite().tolist() if self._recorded else []
        bad = [step for (step, _), is_finite in zip(self._recorded, finite, strict=True) if not is_finite]
        self.report(min(bad, default=None))

    def report(self, first_bad: int | None) -> None:
        """Ends the steps recorded so far: raises NonFiniteLossError if there is a first bad one, of any rank."""
        if first_bad is not None:
            raise NonFiniteLossError(
                f"the loss of step {first_bad} is not finite: the run is stopped and its last checkpoint kept; "
                f"begin again with {self.hint}"
            )
        self._recorded = []
