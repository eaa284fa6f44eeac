"""Recipes of pretraining and fine-tuning by size, objective, tokens a side and data: the table `recipes.yaml`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

OBJECTIVES = {"ar": "next pixels", "bert": "masked pixels"}
FROM_MEMORY = "from memory, unverified"
SHARE_OF_WARMUP = 10  # the warm-up is at most a tenth of the steps


@dataclass(frozen=True)
class Rate:
    """Peak learning rate and images per step of a size."""

    model: str
    objective: str
    side: int  # tokens
    learning_rate: float
    batch_size: int
    confirmed: bool = False  # the rate, by a second source; else it is from memory

    @property
    def network(self) -> str:
        """`iGPT-L, 48×48, next pixels`."""
        size = self.model.removeprefix("igpt_").upper()
        return f"iGPT-{size}, {self.side}×{self.side}, {OBJECTIVES[self.objective]}"

    @property
    def source(self) -> str:
        return f"Chen et al. 2020, Table 5{'' if self.confirmed else f'; the rate {FROM_MEMORY}'}"


@dataclass(frozen=True)
class Length:
    """Duration of a training on some data, and of its warm-up; intervals in optimiser steps."""

    images: int
    warmup_images: int
    source: str
    val_every: int
    log_every: int
    checkpoint_every: int
    keep_steps: list[int] = field(default_factory=list)  # whose weights are kept for good
    data: list[str] = field(default_factory=list)  # `data.name`; empty: all others

    def steps(self, batch_size: int) -> int:
        """Optimiser steps."""
        return max(1, round(self.images / batch_size))

    def warmup_steps(self, batch_size: int, steps: int) -> int:
        """Optimiser steps of the warm-up of a training of `steps`."""
        return min(ceil(self.warmup_images / batch_size), steps // SHARE_OF_WARMUP)


@dataclass(frozen=True)
class Finetuning:
    """How fine-tuning differs from pretraining."""

    rate_divisor: int
    augmented: list[str]  # `data.name`
    pad_of_side: int  # reflection padding is the side divided by this

    def rate(self, of_pretraining: float) -> float:
        return float(f"{of_pretraining / self.rate_divisor:.12g}")


@dataclass(frozen=True)
class RecipeTable:
    """The content of `recipes.yaml`."""

    rates: list[Rate]
    other_sizes: Rate
    lengths: list[Length]
    other_data: Length
    finetuning: Finetuning

    def find_rate(self, model: Any, objective: Any, side: Any) -> Rate:
        """The row of a network; of its size and objective if there is none, of its size, or that of other sizes."""
        of_size = [row for row in self.rates if row.model == model]
        alike = [row for row in of_size if row.objective == objective] or of_size
        same = [row for row in alike if row.side == side] or alike
        return same[0] if same else self.other_sizes

    def find_length(self, data: Any) -> Length:
        """The row of a dataset, by `data.name`."""
        return next((row for row in self.lengths if data in row.data), self.other_data)


@cache
def load_recipes() -> RecipeTable:
    """The content of `recipes.yaml`."""
    table: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("recipes.yaml")))
    cadence: Mapping[str, int] = table["cadence"]
    return RecipeTable(
        [Rate(**row) for row in table["rates"]],
        Rate(**table["other_sizes"]),
        [Length(**{**cadence, **row}) for row in table["lengths"]],
        Length(**{**cadence, **table["other_data"]}),
        Finetuning(**table["finetuning"]),
    )
