"""The chosen settings trained again on train and val: what is reported and kept, and that it resumes."""

import gc
import signal
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from igpt.checkpoint.igpt_format import Weights
from igpt.checkpoint.resume import AtomicCheckpointIO, find_checkpoints
from igpt.data.source import ArraySplit, JoinedSplit
from igpt.distributed.signals import StoppedError
from igpt.metric.result import Result
from igpt.report.folder import RunFolder
from igpt.run.fingerprint import compare_splits
from igpt.task import finetune
from igpt.tokens.palette import Palette
from igpt.training.cost_estimate import SECONDS_A_DAY
from igpt.training.deepspeed import release_training_state
from tests.configs import built
from tests.conftest import learned_numbers
from tests.task.conftest import Arrays, Lab, have_equal_weights
from tests.task.test_stopping import Send


class Watch(Send):
    """Sends a signal as `Send`, and may: only what observes a run watches its second training, too."""

    is_observer = True


@pytest.fixture
def lab(few: Arrays, palette: Palette) -> Lab:
    return Lab(few, palette)


@pytest.fixture
def both(few: Arrays, palette: Palette) -> Lab:
    """The same digits with those of val among the training images."""
    parts = [few.split(name) for name in ("train", "val")]
    joined = ArraySplit(
        np.concatenate([part.pixels for part in parts]), np.concatenate([part.labels for part in parts])
    )
    return Lab(replace(few, splits=few.splits | {"train": joined}), palette)


@pytest.fixture(scope="module")
def refitted(
    tmp_path_factory: pytest.TempPathFactory, few: Arrays, palette: Palette, ar: Weights
) -> tuple[Path, Result]:
    """Fine-tuned for six steps, then again."""
    folder = tmp_path_factory.mktemp("refitted")
    return folder, Lab(few, palette).finetune(folder, ar, refit=True)


def test_fine_tuning_again(tmp_path: Path, lab: Lab, both: Lab, ar: Weights, refitted: tuple[Path, Result]) -> None:
    """Invariant: val's numbers are those without a refit; `model/` and test's are those of the best step of a training
    on a split that holds both, to the bit.
    """
    folder, result = refitted
    plain = lab.finetune(tmp_path / "plain", ar, test=False)
    best = int(plain.numbers["best_step"].value)
    for name in ("val/accuracy", "val/loss_gen", "best_step"):
        assert result.numbers[name] == plain.numbers[name]
    same = both.finetune(tmp_path / "both", ar, steps=best, val_every=best)
    assert have_equal_weights(folder, tmp_path / "both")
    assert not have_equal_weights(folder, tmp_path / "plain")
    for name in ("test/accuracy", "test/loss_gen", "test/loss_clf"):
        assert result.numbers[name] == same.numbers[name]
    assert result.curves["refit/loss_clf"].y == same.curves["train/loss_clf"].y
    assert [run.provenance["refitted_on_val"] for run in (result, plain)] == [True, False]


def test_a_kill_while_it_is_trained_again(tmp_path: Path, lab: Lab, ar: Weights, refitted: tuple[Path, Result]) -> None:
    """Invariant: stopped in the second training, a run goes on there, to the bit; done once more, nothing changes.

    Its device-days are those of both trainings: the last checkpoint of the second one counts from the first's.
    """
    first = tmp_path / "checkpoints"
    with pytest.raises(StoppedError, match="after step 1"):  # `Send` alone would stop the first training
        lab.finetune(tmp_path, ar, refit=True, callbacks=(AtRefit(first),))
    assert (tmp_path / "refit" / "checkpoints" / "step_0000001.ckpt").is_file()
    assert not (tmp_path / "model").exists()
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    folder, complete = refitted
    for _ in range(2):
        resumed = lab.finetune(tmp_path, ar, refit=True)
        assert have_equal_weights(tmp_path, folder)
        assert (learned_numbers(resumed), resumed.curves) == (learned_numbers(complete), complete.curves)
    ends = [find_checkpoints(place)[-1] for place in (tmp_path, tmp_path / "refit")]
    first_one, both = (AtomicCheckpointIO().load_checkpoint(end)["device_seconds"] for end in ends)
    assert 0 < first_one < both
    assert resumed.numbers["train/device_days"].value >= both / SECONDS_A_DAY
    assert {path: path.stat().st_mtime_ns for path in first.glob("step_*")}.items() <= before.items()


class AtRefit(Watch):
    """Sends a signal at the first step of a training that begins after another one has ended."""

    def __init__(self, first: Path) -> None:
        super().__init__(signal.SIGTERM, step=0)
        self.first = first

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if (self.first / "step_0000006.ckpt").is_file():
            super().on_train_batch_start(trainer)


def test_few_labels_stay_few(
    tmp_path: Path, few: Arrays, palette: Palette, ar: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    """Where labels are limited, those of val are not trained on, and that is said and recorded."""
    lab = Lab(replace(few, labels_per_class=2), palette)
    result = lab.finetune(tmp_path, ar, refit=True, steps=2, test=False)
    assert result.provenance["refitted_on_val"] is False
    assert "data.labels_per_class=2 limits labels" in caplog.text
    assert not (tmp_path / "refit").exists()


@pytest.mark.parametrize(
    ("refit", "labels", "warned"), [("true", "null", True), ("true", 2, False), ("false", "null", False)]
)
def test_weights_that_have_seen_val_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, refit: str, labels: int | str, warned: bool
) -> None:
    """By hand: a warning where they are used on the same images; not where few labels left val out."""
    run = built("task=finetune", f"task.refit={refit}", f"data.labels_per_class={labels}").run
    RunFolder(tmp_path).start(run.config, None, {}, run.subject)
    compare_splits(built("task=palette").run.config["data"], tmp_path)
    assert ("val is not held out from it, test is" in caplog.text) is warned


def test_a_probe_again(tmp_path: Path, lab: Lab, both: Lab, ar: Weights) -> None:
    """Invariant: the chosen layer and rate, trained on a split that holds train and val; val's numbers as without."""
    plain, again = (lab.probe(tmp_path / str(refit), ar, solver="sgd", refit=refit) for refit in ("auto", True))
    layer, rate = (int(plain.numbers["probe/layer"].value), plain.numbers["probe/rate"].value)
    same = both.probe(tmp_path / "both", ar, solver="sgd", layer=layer, sgd={"rates": [rate]})
    assert again.numbers["val/accuracy"] == plain.numbers["val/accuracy"]
    assert again.curves == plain.curves | {"refit/loss_clf": same.curves["train/loss_clf"]}
    heads = [load_file(tmp_path / name / "probe.safetensors") for name in ("True", "both", "auto")]
    for name in ("weight", "bias"):
        assert torch.equal(heads[0][name], heads[1][name])
        assert not torch.equal(heads[0][name], heads[2][name])
    for name in ("test/accuracy", "test/top_5"):
        assert again.numbers[name] == same.numbers[name]
    assert [run.provenance["refitted_on_val"] for run in (plain, again)] == [False, True]


def test_two_splits_as_one(few: Arrays) -> None:
    """By hand: rows in any order, and twice, are those of the one or of the other."""
    train, val = few.split("train"), few.split("val")
    joined = JoinedSplit(train, val)
    rows = [259, 3, 200, 199, 3]
    pixels, labels = joined.read(rows, [0] * 5)
    expected = [(val, 59), (train, 3), (val, 0), (train, 199), (train, 3)]
    assert len(joined) == len(joined.labels) == 260
    assert labels.tolist() == [int(of.labels[row]) for of, row in expected] == joined.labels[rows].tolist()
    assert np.array_equal(pixels, np.stack([of.pixels[row] for of, row in expected]))


def test_memory_of_a_training_is_free_after_it(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: neither weights nor Adam's moments are left when the network is refitted and judged."""
    held: list[weakref.ref[Any]] = []

    class Hold(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            (moments, *_) = trainer.optimizers[0].state.values()
            module: Any = pl_module
            held.extend(weakref.ref(each) for each in (trainer.optimizers[0], moments["exp_avg"], module.net))

    def release(module: L.LightningModule) -> None:
        release_training_state(module)
        gc.collect()
        assert [each() for each in held] == [None] * 3

    monkeypatch.setattr(finetune, "release_training_state", release)
    lab.finetune(tmp_path, None, steps=2, callbacks=(Hold(),))
    assert held
