"""`task.solver=sgd`: rates one after another, and training images without random crops."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from igpt.checkpoint.igpt_format import Weights
from igpt.data.digits import Digits
from igpt.distributed.signals import StoppedError
from igpt.task import sgd_probe
from igpt.tokens.palette import Palette
from tests.data.conftest import mixture
from tests.task.conftest import Arrays, Lab
from tests.task.probing.conftest import heads
from tests.task.test_refit import Watch

RATES = [0.1, 3.0, 1.0]


@pytest.fixture
def lab(few: Arrays, palette: Palette) -> Lab:
    return Lab(few, palette)


def in_turn(lab: Lab, folder: Path, weights: Weights, rates: list[float] = RATES, **changed: Any) -> Any:
    return lab.probe(folder, weights, solver="sgd", sgd={"rates": rates, "search": "in_turn"}, **changed)


def test_a_rate_gives_the_same_heads_in_turn_and_together(tmp_path: Path, lab: Lab, ar: Weights) -> None:
    """Invariant: to the bit, also in what is chosen and measured, where no rate is left out; resumed in the second
    rate, and once more, nothing changes.
    """
    rates = [0.1, 0.01]  # the smaller one is worse: the search ends there
    together = lab.probe(tmp_path / "together", ar, solver="sgd", sgd={"rates": rates})
    with pytest.raises(StoppedError):
        in_turn(lab, tmp_path / "turn", ar, rates, callbacks=(AtRate(tmp_path / "turn" / "rates" / "0.1"),))
    for _ in range(2):
        one = in_turn(lab, tmp_path / "turn", ar, rates)
        expected = heads(tmp_path / "together")
        for r, rate in enumerate(rates):
            for name, value in heads(tmp_path / "turn" / "rates" / str(rate)).items():
                assert torch.equal(value, expected[name.replace("0", str(r))])
        assert one.numbers == together.numbers
        assert one.curves["probe, val"] == together.curves["probe, val"]
    assert one.curves["train/rate_0.1/loss_clf"].x == [1, 2, 3, 4, 5, 6]


class AtRate(Watch):
    """Sends a signal in the training after that of a rate."""

    def __init__(self, first: Path) -> None:
        super().__init__(signal.SIGTERM, step=1)
        self.first = first

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if (self.first / "checkpoints" / "step_0000006.ckpt").is_file():
            super().on_train_batch_start(trainer)


@pytest.mark.parametrize(
    ("accuracies", "expected"), [((0.5, 0.6, 0.55), [3.0, 1.0, 0.1]), ((0.5, 0.4, 0.9), [3.0, 1.0])]
)
def test_the_search_ends_where_it_falls(
    tmp_path: Path, lab: Lab, ar: Weights, monkeypatch: pytest.MonkeyPatch, accuracies: Any, expected: list[float]
) -> None:
    """By hand: from the largest rate down; the one that is worse is the last, whatever would follow."""
    stated = iter(accuracies)

    def state(components: Any, module: Any, split: str) -> None:
        module.right = np.full((2, 3, 1), next(stated))
        module.predictions = np.zeros((3, 1, 60), dtype=np.int64)

    monkeypatch.setattr(sgd_probe, "_fit", lambda *_, **__: sgd_probe.Progress(6, None, None))  # type: ignore[arg-type]
    monkeypatch.setattr(sgd_probe, "_validate", state)
    result = in_turn(lab, tmp_path, ar, test=False)
    assert result.provenance["rates"] == expected
    assert result.numbers["probe/rate"].value == expected[int(np.argmax(accuracies[: len(expected)]))]


@pytest.mark.parametrize("refit", [False, True])
def test_images_without_augmentation(digits: Digits, palette: Palette, refit: bool) -> None:
    """By hand: with `augment` false the batches are images as they are stored; else some of them are shifted."""
    lab = Lab(digits, palette)
    parts = [digits.split(name).pixels for name in (("train", "val") if refit else ("train",))]
    stored = np.concatenate(parts)
    for augment in (False, True):
        data = lab.tokens(augment=augment, with_val=refit)
        images = data.training_images()
        assert len(images) == len(stored)  # type: ignore[arg-type]
        pixels = images.read(range(len(stored)), range(len(stored))).pixels
        assert np.array_equal(pixels, stored) == (not augment)


def test_what_a_stream_cannot_give(tmp_path: Path, palette: Palette) -> None:
    """Val after its images, or its images without random crops: an error that names the setting, before a step."""
    lab = Lab(mixture(tmp_path / "shards", num_readers=1), palette)
    with pytest.raises(ValueError, match=r"val cannot be added to it: .*task\.refit=false"):
        lab.tokens(with_val=True).training_images()
    with pytest.raises(ValueError, match=r"task\.sgd\.augment=true"):
        lab.tokens(augment=False).training_images()
