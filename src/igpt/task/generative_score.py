"""Generative loss of a split, accumulated per image, so that it depends on neither batch size nor ranks."""

import lightning as L
import torch
from torch import Tensor

from igpt.metric.likelihood import likelihood_numbers
from igpt.metric.result import Number
from igpt.model.gpt import GPT
from igpt.objective.base import Objective
from igpt.tokens.batches import Batch


class GenerativeScore:
    """Accumulates the loss of every image, then computes `split/loss_gen` and `split/bits_per_token` over all ranks."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self._seen: list[tuple[Tensor, Tensor]] = []  # of each batch: rows (B,) and nats per token (1, B)

    def add(self, net: GPT, batch: Batch) -> None:
        visible = self.objective.visible_mask(batch.tokens, batch.rng_keys)  # (B, T) or None
        nats = self.objective.per_example_loss(net(batch.tokens, visible), batch.tokens, visible)  # (B,)
        self._seen.append((batch.rows, nats.double()[None]))

    def numbers(self, split: str, trainer: L.Trainer, n_image: int) -> dict[str, Number]:
        """The numbers over the `n_image` images of the split, each added exactly once since the last call."""
        (nats,) = table_of_images(self._seen, trainer, 1, n_image)
        self._seen = []
        return likelihood_numbers(split, nats)


def table_of_images(seen: list[tuple[Tensor, Tensor]], trainer: L.Trainer, n_figure: int, n_image: int) -> Tensor:
    """Figures of all images, from those of each rank's batches: rows (B,) and figures (F, B) → (F, N) on the CPU."""
    table = torch.zeros(n_figure + 1, n_image, dtype=torch.float64, device=trainer.strategy.root_device)
    for rows, figures in seen:
        table[:-1, rows] += figures
        table[-1, rows] += 1
    everywhere = trainer.strategy.reduce(table, reduce_op="sum")  # exact: each column is nonzero on one rank only
    assert isinstance(everywhere, Tensor)
    assert (everywhere[-1] == 1).all(), "an image was scored twice, or not at all"
    return everywhere[:-1].cpu()
