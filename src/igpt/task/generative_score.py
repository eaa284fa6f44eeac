"""Generative loss of a split, accumulated per image, so that it depends on neither batch size nor ranks."""

import logging
from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor

from igpt.metric.likelihood import PER_DIM, PER_DIM_OF_THESE_PIXELS, BitUnit, likelihood_numbers
from igpt.metric.result import Number
from igpt.model.gpt import GPT
from igpt.objective.base import Objective
from igpt.run.components import Components
from igpt.tokens.batches import Batch
from igpt.tokens.rgb import RGBTokenizer

log = logging.getLogger(__name__)


def choose_units(components: Components, split: str) -> list[BitUnit]:
    """The units of the loss on a split besides bits per token; none for masked tokens, whose loss is no likelihood.

    Bits per pixel, where a pixel is not one token; for RGB tokens bits per dimension, the unit of published densities.
    Where the images are not stored as lossless files of this size, the name says that it is of these pixels alone.
    """
    tokenizer = components.tokenizer
    if not components.objective.causal:
        return []
    tokens = tokenizer.grid.n_ctx / tokenizer.side**2
    units = [] if tokens == 1 else [BitUnit("bits_per_pixel", "bits/pixel", tokens)]
    if not isinstance(tokenizer, RGBTokenizer):
        return units
    if changes := components.source.split(split).pixel_changes:
        message = "%s: bits per dimension of these pixels, not to be compared with published densities: %s"
        log.info(message, split, changes)
        return [*units, PER_DIM_OF_THESE_PIXELS]
    return [*units, PER_DIM]


class GenerativeScore:
    """Accumulates the loss of every image, then computes the numbers of `likelihood_numbers` over all ranks."""

    def __init__(self, objective: Objective, units: Sequence[BitUnit] = ()) -> None:
        self.objective, self.units = objective, units
        self._seen: list[tuple[Tensor, Tensor]] = []  # of each batch: rows (B,) and nats per token (1, B)

    def add(self, net: GPT, batch: Batch) -> None:
        visible = self.objective.visible_mask(batch.tokens, batch.rng_keys)  # (B, T) or None
        nats = self.objective.per_example_loss(net(batch.tokens, visible), batch.tokens, visible)  # (B,)
        self._seen.append((batch.rows, nats.double()[None]))

    def numbers(self, split: str, trainer: L.Trainer, n_image: int) -> dict[str, Number]:
        """The numbers over the `n_image` images of the split, each added exactly once since the last call."""
        (nats,) = table_of_images(self._seen, trainer, 1, n_image)
        self._seen = []
        return likelihood_numbers(split, nats, self.units)


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
