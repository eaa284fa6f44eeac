"""Fine-tuning that stops early: task.patience, and what a stop or a kill leaves."""

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from igpt.checkpoint.igpt_format import Weights
from igpt.checkpoint.resume import read_best
from igpt.distributed.signals import StoppedError
from igpt.task.class_score import ClassScore
from igpt.tokens.palette import Palette
from tests.task.conftest import (
    Arrays,
    Lab,
    have_equal_weights,
    read_finetuned,
)
from tests.task.test_stopping import Send


@pytest.fixture
def lab(few: Arrays, palette: Palette) -> Lab:
    return Lab(few, palette)


class Stated:
    """Gives the validations of a run stated accuracies, one after another."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, accuracies: list[float]) -> None:
        self.left, self.numbers = list(accuracies), ClassScore.numbers
        stated = self

        def numbers(score: Any, split: str, trainer: L.Trainer, n_image: int) -> Any:
            values, predictions = stated.numbers(score, split, trainer, n_image)
            if trainer.state.fn == "fit":
                values["val/accuracy"] = replace(values["val/accuracy"], value=stated.left.pop(0))
            return values, predictions

        monkeypatch.setattr(ClassScore, "numbers", numbers)


@pytest.fixture(scope="module")
def each_step(tmp_path_factory: pytest.TempPathFactory, few: Arrays, palette: Palette, ar: Weights) -> Path:
    """The checkpoints of five steps in a row."""
    folder = tmp_path_factory.mktemp("each_step")
    Lab(few, palette).finetune(folder, ar, steps=5, val_every=5, checkpoint_every=1, checkpoint_keep=5, test=False)
    return folder / "checkpoints"


@pytest.mark.parametrize(
    ("accuracies", "patience", "best", "last"),
    [
        ([0.3, 0.5, 0.4, 0.5, 0.9], 2, 2, 4),  # as good as the best is not better
        ([0.3, 0.2, 0.9, 0.1, 0.1], 1, 1, 2),
        ([0.1, 0.2, 0.3, 0.2, 0.1], 3, 3, 5),
        ([0.0, 0.0, 0.0, 0.0, 0.0], 2, 1, 3),
        ([0.5, 0.4, 0.4, 0.4, 0.6], None, 5, 5),
    ],
)
def test_early_stop(
    tmp_path: Path,
    lab: Lab,
    ar: Weights,
    each_step: Path,
    monkeypatch: pytest.MonkeyPatch,
    accuracies: list[float],
    patience: int | None,
    best: int,
    last: int,
) -> None:
    """By hand: so many validations without a better one; what is kept is what it was after the best step, to the
    bit."""
    stated = Stated(monkeypatch, accuracies)
    result = lab.finetune(tmp_path, ar, steps=5, val_every=1, patience=patience, test=False)
    assert result.curves["val/accuracy"].x == list(range(1, last + 1))
    assert len(stated.left) == 5 - last
    assert result.numbers["best_step"].value == best
    noted = read_best(tmp_path)
    assert noted is not None
    assert (noted["step"], noted["value"]) == (best, accuracies[best - 1])
    state = torch.load(each_step / f"step_{best:07d}.ckpt", weights_only=True)["state_dict"]
    kept = read_finetuned(tmp_path)
    assert len(state) == len(kept)
    assert all(torch.equal(value, kept[name.removeprefix("net.").removeprefix("head.")])
               for name, value in state.items())  # fmt: skip


def test_early_stop_where_nothing_is_learned(tmp_path: Path, lab: Lab, ar: Weights) -> None:
    """By hand: at a rate float32 rounds to 0, all scores stay 0 and class 0 is said: two validations, the first is
    kept."""
    result = lab.finetune(tmp_path, ar, steps=40, patience=1, learning_rate=1e-60, test=False)
    assert result.curves["val/accuracy"].x == [2, 4]
    assert result.numbers["best_step"].value == 2
    assert result.numbers["val/accuracy"].value == (lab.digits.split("val").labels == 0).mean()
    assert all(torch.equal(read_finetuned(tmp_path)[name], weight) for name, weight in ar.net().state_dict().items())


@pytest.mark.parametrize("stopped", ["after", "at it"])
def test_stopped_early_is_over(
    tmp_path: Path, lab: Lab, ar: Weights, monkeypatch: pytest.MonkeyPatch, stopped: str
) -> None:
    """Invariant: a run that ran out of patience, and ended before its result was written, goes on to that result."""
    accuracies = [0.3, 0.2, 0.9, 0.9]
    how: dict[str, Any] = {"steps": 4, "val_every": 1, "patience": 1, "test": False}
    Stated(monkeypatch, accuracies)
    expected = lab.finetune(tmp_path / "whole", ar, **how)
    monkeypatch.undo()
    stated = Stated(monkeypatch, accuracies)
    if stopped == "after":
        lab.finetune(tmp_path / "again", ar, **how)  # as if killed while it read the validation images once more
    else:
        with pytest.raises(StoppedError, match="after step 2"):
            lab.finetune(tmp_path / "again", ar, callbacks=(Send(signal.SIGTERM, step=1),), **how)
    again = lab.finetune(tmp_path / "again", ar, **how)
    assert again.numbers["best_step"] == expected.numbers["best_step"]
    assert again.curves == expected.curves
    assert len(stated.left) == 2
    assert have_equal_weights(tmp_path / "again", tmp_path / "whole")


def test_patience_is_kept_over_a_stop(tmp_path: Path, lab: Lab, ar: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: validations before a stop count after it."""
    stated = Stated(monkeypatch, [0.3, 0.2, 0.2, 0.2, 0.9])
    how: dict[str, Any] = {"steps": 5, "val_every": 1, "patience": 3, "test": False}
    with pytest.raises(StoppedError, match="after step 3"):
        lab.finetune(tmp_path, ar, callbacks=(Send(signal.SIGTERM, step=2),), **how)
    result = lab.finetune(tmp_path, ar, **how)
    assert result.curves["val/accuracy"].y == [0.3, 0.2, 0.2, 0.2]
    assert result.numbers["best_step"].value == 1
    assert len(stated.left) == 1
