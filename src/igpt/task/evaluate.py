"""The generative loss of a trained network on a split, beside what its colours alone would tell."""

from collections.abc import Callable

import lightning as L

from igpt.checkpoint.native import Weights
from igpt.data.source import check_split_name
from igpt.metric.likelihood import position_nats, unigram_nats
from igpt.metric.result import Number, Result
from igpt.model.gpt import GPT
from igpt.objective.base import Objective
from igpt.task.fit import Machine, Runner
from igpt.task.score import GenerativeScore
from igpt.tokens.datamodule import Batch, TokenDataModule


class EvaluateModule(L.LightningModule):
    """Scores a frozen network; it trains nothing."""

    def __init__(self, *, net: GPT, objective: Objective, machine: Machine, split: str, n_image: int) -> None:
        super().__init__()
        machine.prepare(net)
        self.net, self.split, self.n_image = net, split, n_image
        self.score = GenerativeScore(objective)
        self.numbers: dict[str, Number] = {}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.score.add(self.net, batch)

    def on_validation_epoch_end(self) -> None:
        self.numbers = self.score.numbers(self.split, self.trainer, self.n_image)


def check(*, split: str, batch_size: int, baseline_images: int) -> None:
    """Raises ValueError when a setting of the task cannot be right, before anything is built."""
    check_split_name(split)
    if batch_size < 1:
        raise ValueError(f"task.batch_size must be at least 1, got {batch_size}")
    if baseline_images < 0:
        raise ValueError(f"task.baseline_images must be at least 0 (no baselines), got {baseline_images}")


def run(
    *,
    runner: Runner,
    tokens: Callable[..., TokenDataModule],
    weights: Weights,
    objective: Objective,
    split: str,
    batch_size: int,
    baseline_images: int,
) -> Result:
    """Nats and bits per token on `split`, and those of two histograms of `baseline_images` training images."""
    data = tokens(plan=runner.machine.reading_plan(batch_size), eval_split=split)
    module = EvaluateModule(
        net=weights.net(),
        objective=objective,
        machine=runner.machine,
        split=split,
        n_image=len(data.source.split(split)),
    )
    runner.validate(module, data)
    numbers = dict(module.numbers)
    if baseline_images:
        train = data.some_tokens("train", at_most=baseline_images).numpy()
        held_out = data.some_tokens(split).numpy()
        k, n = data.palette.k, len(held_out)
        numbers[f"{split}/unigram"] = Number(unigram_nats(train, held_out, k), "nats/token", n)
        numbers[f"{split}/position_histogram"] = Number(position_nats(train, held_out, k), "nats/token", n)
    return Result(numbers=numbers, provenance={"weights": weights.sha256, "palette": data.palette.hash, "split": split})
