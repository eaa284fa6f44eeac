"""The generative loss of a split: sums over images, so that neither batch size nor process count changes it."""

import lightning as L
import torch
from torch import Tensor

from igpt.metric.likelihood import likelihood_numbers, token_sums
from igpt.metric.result import Number
from igpt.model.gpt import GPT
from igpt.objective.base import Objective
from igpt.tokens.datamodule import Batch


class GenerativeScore:
    """Adds up batches, then gives `split/loss_gen` and `split/bits_per_token` over all processes."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self._sums = torch.zeros(3, dtype=torch.float64)

    def add(self, net: GPT, batch: Batch) -> None:
        keep = self.objective.keep(batch.tokens, batch.keys)  # (B, T) or None
        nats = self.objective.image_nats(net(batch.tokens, keep), batch.tokens, keep)  # (B,)
        self._sums = self._sums.to(nats.device) + token_sums(nats)

    def numbers(self, split: str, trainer: L.Trainer) -> dict[str, Number]:
        """The numbers of all that was added since the last call."""
        sums = trainer.strategy.reduce(self._sums, reduce_op="sum")
        assert isinstance(sums, Tensor)
        self._sums = torch.zeros(3, dtype=torch.float64)
        return likelihood_numbers(split, sums)
