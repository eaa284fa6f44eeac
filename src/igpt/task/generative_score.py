"""Generative loss of a split, accumulated per image, so that it depends on neither batch size nor ranks."""

import logging
from collections.abc import Sequence
from functools import partial

import lightning as L
import torch
from torch import Tensor

from igpt.distributed.ranks import sum_over_ranks
from igpt.metric.likelihood import PER_DIM, PER_DIM_OF_THESE_PIXELS, BitUnit, likelihood_numbers
from igpt.metric.result import Number
from igpt.model.gpt import GPT
from igpt.objective.base import Objective, hidden_nats
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
        self.by_position: Tensor | None = None  # (T,) mean nats of the tokens that were predicted; of the last numbers
        self._seen: list[tuple[Tensor, Tensor]] = []  # of each batch: rows (B,) and nats per token (1, B)
        self._of_positions: list[Tensor] = []  # of each batch: sums of nats, numbers of tokens (2, T)

    def add(self, net: GPT, batch: Batch) -> None:
        visible = self.objective.visible_mask(batch.tokens, batch.rng_keys)  # (B, T) or None
        nats = net(batch.tokens, visible, partial(hidden_nats, net, tokens=batch.tokens))  # (B, T)
        self._seen.append((batch.rows, self.objective.average_tokens(nats, visible).double()[None]))
        predicted = torch.ones_like(nats) if visible is None else (~visible).to(nats)
        self._of_positions.append(torch.stack([(nats * predicted).double().sum(0), predicted.double().sum(0)]))

    def numbers(self, split: str, trainer: L.Trainer, n_image: int) -> dict[str, Number]:
        """The numbers over the `n_image` images of the split, each added exactly once since the last call."""
        (nats,) = table_of_images(self._seen, trainer, 1, n_image)
        of_positions = sum_over_ranks(torch.stack(self._of_positions).sum(0))
        self.by_position = (of_positions[0] / of_positions[1]).cpu()  # NaN where no token was predicted
        self._seen, self._of_positions = [], []
        return likelihood_numbers(split, nats, self.units)


def table_of_images(seen: list[tuple[Tensor, Tensor]], trainer: L.Trainer, n_figure: int, n_image: int) -> Tensor:
    """Figures of all images, from those of each rank's batches: rows (B,) and figures (F, B) → (F, N) on the CPU."""
    table = torch.zeros(n_figure + 1, n_image, dtype=torch.float64, device=trainer.strategy.root_device)
    for rows, figures in seen:
        table[:-1, rows] += figures
        table[-1, rows] += 1
    everywhere = sum_over_ranks(table)  # exact: each column is nonzero on one rank only
    assert (everywhere[-1] == 1).all(), "an image was scored twice, or not at all"
    return everywhere[:-1].cpu()
