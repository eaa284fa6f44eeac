"""The progress bar of a training, on a terminal."""

import shutil
import sys
from collections.abc import Mapping
from typing import Any

import lightning as L
from tqdm.auto import tqdm

from igpt.report.bystanders import Bystander
from igpt.training.base_module import duration

SHORTEST = 8  # columns of the bar itself, its percentage aside


class ProgressBar(L.Callback):
    """One bar over all optimiser steps of the run; only on a terminal, log files get lines instead.

    Its errors end no run.
    """

    is_observer = True  # changes nothing in training

    def __init__(self) -> None:
        bystander = Bystander("the progress bar")
        for hook in ("on_train_start", "on_train_batch_end", "on_train_end", "on_exception"):
            setattr(self, hook, bystander.guard(getattr(self, hook)))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        hidden = not (sys.stderr.isatty() and trainer.is_global_zero)
        size = shutil.get_terminal_size()  # 80 × 24 if the terminal reports no size, where tqdm would draw nothing
        self.bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            bar_format="{percentage:3.0f}%|{bar}| {desc}",
            disable=hidden,
            leave=False,
            ncols=size.columns,
            nrows=size.lines,
        )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.bar.disable:
            return
        module: Any = pl_module  # a TrainedModule: Python floats, no GPU synchronisation
        self.bar.ncols = shutil.get_terminal_size().columns
        newest = {name: points[-1][1] for name, points in module.history.items()}
        text = describe_progress(
            trainer.global_step, trainer.max_steps, self.bar.format_dict["rate"], newest, batch_size=module.batch_size,
            learning_rate=getattr(module, "rate", None), width=self.bar.ncols - len("100%|| ") - SHORTEST,
        )  # fmt: skip
        self.bar.set_description_str(text, refresh=False)
        self.bar.update(trainer.global_step - self.bar.n)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.bar.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


def describe_progress(
    step: int,
    steps: int,
    rate: float | None,
    newest: Mapping[str, float],
    *,
    batch_size: int,
    learning_rate: float | None,
    width: int,
) -> str:
    """The text beside the bar, at most `width` wide where the step alone is: `72/600, loss 1.908, 2.1 min left, …`.

    `rate`: optimiser steps per second, if known. `newest`: the last point of each curve, of which the losses are shown.
    """
    losses = {name.removeprefix("train/loss"): value for name, value in newest.items() if name.startswith("train/loss")}
    parts = [f"{step:,}/{steps:,}"]
    if losses:
        names = [name.removeprefix("_") for name in losses] if len(losses) > 1 else ["loss"]
        parts.append(" ".join(f"{name} {value:.4g}" for name, value in zip(names, losses.values(), strict=True)))
    parts += [f"{duration((steps - step) / rate)} left"] if rate else []
    parts += [f"{rate * batch_size:,.0f} images/s"] if rate else []
    parts += [f"lr {learning_rate:.2g}"] if learning_rate is not None else []
    text = parts[0]
    for part in parts[1:]:  # by importance
        if len(text) + len(part) + 2 > width:
            break
        text += f", {part}"
    return text
