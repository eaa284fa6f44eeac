"""Trainings that a callback ends early: progress is what the Trainer did; result, table and page say who ended it."""

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer

from igpt.checkpoint.find import find_weights
from igpt.run.launch import run
from igpt.tokens.palette import Palette
from igpt.utils import files
from tests.conftest import ROOT
from tests.task.conftest import Arrays, Lab, machine

STOP = ("+callbacks.stop._target_=lightning.pytorch.callbacks.EarlyStopping", "+callbacks.stop.monitor=val/loss_gen")
IMPATIENT = (*STOP, "+callbacks.stop.min_delta=10", "+callbacks.stop.patience=1")  # no loss improves by 10 nats
SMALL = (
    "trainer=cpu", "model=igpt_nano", "model.n_layer=1", "model.n_embd=16", "callbacks=none", "logger=[]",
)  # fmt: skip
STEPS = ("batch_size=16", "steps=8", "warmup_steps=1", "val_every=2", "log_every=8", "checkpoint_every=8")
EARLY = "stopped early by EarlyStopping at step 4 of 8"


def impatient(monitor: str = "val/loss_gen") -> EarlyStopping:
    """Ends a training at its second validation."""
    return EarlyStopping(monitor, min_delta=10, patience=1)


class Halt(L.Callback):
    """Ends a training in the middle of it, as `Timer` does."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 3


def test_progress_is_what_the_trainer_did(tmp_path: Path, lab: Lab) -> None:
    """Round trip: step and images are those of the checkpoint of step 4 of the same training left alone.

    Resumed without the callback, after a kill before the result was written, it has ended all the same.
    """
    lab.pretrain(tmp_path / "whole", val_every=2, checkpoint_keep=9)
    at_4 = find_weights(str(tmp_path / "whole" / "checkpoints" / "step_0000004.ckpt"))
    for callbacks in ([impatient()], []):
        result = lab.pretrain(tmp_path / "early", val_every=2, callbacks=callbacks)
        weights = find_weights(str(tmp_path / "early"))
        assert weights.metadata.step == result.provenance["step"] == 4
        assert result.numbers["train/images_seen"].value == 4 * 100
        assert result.provenance["stopped_early"] == EARLY
        assert result.curves["train/loss_gen"].x == [1, 2, 3, 4]
        saved, expected = weights.net().state_dict(), at_4.net().state_dict()
        assert all(torch.equal(saved[name], expected[name]) for name in expected)
        shutil.rmtree(tmp_path / "early" / "model")


@pytest.mark.parametrize("val_every", [0, 4])
def test_a_callback_that_ends_it_between_validations(tmp_path: Path, lab: Lab, val_every: int) -> None:
    """Invariant: with two passes a step, whether or not there are validations, whoever ended it; again when resumed."""
    how: dict[str, Any] = {"on": machine(micro_batch=50), "val_every": val_every}
    for callbacks in ([Halt()], []):
        result = lab.pretrain(tmp_path, callbacks=callbacks, **how)
        assert result.provenance["step"] == 3
        assert result.provenance["stopped_early"] == "stopped early by Halt at step 3 of 8"


def test_a_training_that_is_ended_before_its_first_step(tmp_path: Path, lab: Lab) -> None:
    """By hand: no step is taken, and the result says so."""
    result = lab.pretrain(tmp_path, callbacks=[Timer("00:00:00:00")])
    assert result.provenance["step"] == result.numbers["train/images_seen"].value == 0
    assert result.provenance["stopped_early"] == "stopped early by the Trainer at step 0 of 8"


def test_at_the_last_step_nothing_was_stopped(tmp_path: Path, lab: Lab) -> None:
    result = lab.pretrain(tmp_path, val_every=4, callbacks=[impatient()])
    assert result.provenance["step"] == 8
    assert not result.early_stops


def test_fine_tuning_and_heads_trained_by_sgd(tmp_path: Path, few: Arrays, palette: Palette, pretrained: Path) -> None:
    """Invariant: so it is in every task that trains, and with our own patience."""
    lab, weights = Lab(few, palette), find_weights(str(pretrained))
    how: dict[str, Any] = {"steps": 6, "val_every": 1, "test": False}
    tuned = lab.finetune(tmp_path / "a", weights, callbacks=[impatient("val/accuracy")], **how)
    assert tuned.early_stops == ["stopped early by EarlyStopping at step 2 of 6"]
    waited = lab.finetune(tmp_path / "b", weights, patience=1, learning_rate=1e-60, **how)
    assert waited.early_stops == ["stopped early by task.patience at step 2 of 6"]
    sgd = {"steps": 6, "val_every": 1}
    stop = [impatient("val/accuracy")]
    probed = lab.probe(tmp_path / "c", weights, solver="sgd", sgd=sgd, test=False, callbacks=stop)
    assert probed.early_stops == ["stopped early by EarlyStopping at step 2 of 6"]


@pytest.mark.slow
def test_the_same_command_without_the_callback_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Round trip: record, closing table and page say who ended it; also of a pipeline, with the stage."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "igpt")
    task = [f"task.{setting}" for setting in STEPS]
    early, folder = run(*SMALL, *task, *IMPATIENT, conf=ROOT / "conf")
    assert folder is not None
    assert early.numbers["train/images_seen"].value == 4 * 16
    assert files.read_json(folder / "result.json")["provenance"]["stopped_early"] == EARLY
    assert files.read_json(folder / "model" / "config.json")["step"] == 4
    assert f"pretrain\n{EARLY}\n" in caplog.text
    page = (folder / "report.html").read_text()
    assert f">{EARLY}</p>" in page
    assert "in 4 steps of 16 images" in page
    again, same = run(*SMALL, *task, *IMPATIENT, conf=ROOT / "conf")
    assert (again.numbers, same) == (early.numbers, folder)
    full, other = run(*SMALL, *task, conf=ROOT / "conf")
    assert other != folder
    assert full.provenance["step"] == 8
    stages = f"+task.stages.pretrain={{{','.join(STEPS).replace('=', ':')}}}"
    merged, of_all = run("task=pipeline", stages, *SMALL, *IMPATIENT, conf=ROOT / "conf")
    assert of_all is not None
    assert merged.early_stops == [f"pretrain: {EARLY}"]
    assert f">pretrain: {EARLY}</p>" in (of_all / "report.html").read_text()
