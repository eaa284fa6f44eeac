"""An exception ends a run after the finished step is saved; resumed, the run is the undisturbed one, to the bit."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from igpt.checkpoint.resume import AtomicCheckpointIO, latest_checkpoint, parse_step, read_best
from igpt.metric.result import Result
from igpt.objective.ar import AR
from igpt.tokens.batches import StreamState
from igpt.training.nan_guard import NonFiniteLossError
from tests.conftest import learned_numbers
from tests.data.conftest import mixture
from tests.task.conftest import FINETUNE, Lab, drawn, machine

SMALL: dict[str, Any] = {"steps": 7, "batch_size": 20, "val_every": 2, "checkpoint_every": 100}


class OwnError(Exception):
    """Of somebody's own callback."""


class Raise(L.Callback):
    """Raises in one hook, the `times`-th time that it is called while `step` is the last that was finished."""

    def __init__(self, hook: str, step: int, times: int = 1, error: Exception | None = None) -> None:
        self.step, self.times, self.error = step, times, error or OwnError("of their own")
        setattr(self, hook, self._raise)

    def _raise(self, trainer: L.Trainer, *_: Any) -> None:
        self.times -= trainer.global_step == self.step
        if self.times == 0:
            raise self.error


class Record(L.Callback):
    """Adds a point to a curve at every validation, as a callback that watches may."""

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit":
            pl_module.record("own/figure", trainer.global_step, 1.0)


def accumulated(**changed: Any) -> dict[str, Any]:
    """Settings of a run of two micro-batches a step."""
    return {**SMALL, "on": machine(micro_batch=10), **changed}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def check_equal(folder: Path, result: Result, undisturbed: tuple[Path, Result]) -> None:
    """Weights, curves, numbers and the best validation are those of the undisturbed run, to the bit."""
    expected = weights(undisturbed[0])
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(folder).items())
    assert result.curves == undisturbed[1].curves
    assert learned_numbers(result) == learned_numbers(undisturbed[1])
    assert read_best(folder) == read_best(undisturbed[0])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, digits: Any, palette: Any) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, Lab(digits, palette).pretrain(folder, callbacks=(Record(),), **accumulated())


def interrupt(lab: Lab, folder: Path, hook: str, step: int, times: int = 1, **settings: Any) -> None:
    """A run that ends in an error after `step`, which is the newest that is saved."""
    with pytest.raises(OwnError):
        lab.pretrain(folder, callbacks=(Record(), Raise(hook, step, times)), **settings)
    saved = latest_checkpoint(folder)
    assert saved is not None
    assert parse_step(saved) == step


CHAINS = {
    "micro-batches": [
        ("on_train_batch_start", 1, 1),  # the first of two
        ("on_train_batch_start", 2, 2),
        ("on_after_backward", 3, 2),
        ("on_before_zero_grad", 4, 1),
        ("on_before_optimizer_step", 5, 1),
    ],
    "validations": [
        ("on_validation_batch_end", 2, 1),
        ("on_train_batch_end", 3, 1),
        ("on_validation_epoch_end", 4, 1),
        ("on_validation_end", 6, 1),
    ],
    "the step before a validation": [("on_train_batch_end", 2, 1), ("on_validation_start", 4, 1)],
}


@pytest.mark.parametrize("errors", CHAINS.values(), ids=CHAINS)
def test_errors_of_a_callback(
    tmp_path: Path, lab: Lab, undisturbed: tuple[Path, Result], errors: list[tuple[str, int, int]]
) -> None:
    """Invariant: after one error after the other, each in another hook, all is as in the run without one."""
    for error in errors:
        interrupt(lab, tmp_path, *error, **accumulated())
    check_equal(tmp_path, lab.pretrain(tmp_path, callbacks=(Record(),), **accumulated()), undisturbed)


def test_a_validation_that_is_not_better(tmp_path: Path, lab: Lab) -> None:
    """Invariant: with patience 1, too, a validation that an error ended is done before it is judged."""
    how = {**FINETUNE, "val_every": 2, "checkpoint_every": 100, "patience": 1, "learning_rate": 0.05, "steps": 8}
    undisturbed = lab.execute("finetune", tmp_path / "undisturbed", None, **how)
    for step in (2, 4):
        with pytest.raises(OwnError):
            raising = (Raise("on_validation_epoch_end", step),)
            lab.execute("finetune", tmp_path / "errors", None, callbacks=raising, **how)
    check_equal(tmp_path / "errors", lab.execute("finetune", tmp_path / "errors", None, **how), (
        tmp_path / "undisturbed", undisturbed,
    ))  # fmt: skip


def test_heads_trained_by_sgd(tmp_path: Path, lab: Lab, palette: Any) -> None:
    """Invariant: a probe goes on from its finished step, too, with the same curves and accuracies."""
    frozen = drawn(tmp_path / "network", palette, AR())
    how: dict[str, Any] = {"solver": "sgd", "sgd": {"checkpoint_every": 100}}
    undisturbed = lab.probe(tmp_path / "undisturbed", frozen, **how)
    with pytest.raises(OwnError):
        lab.probe(tmp_path / "errors", frozen, callbacks=(Raise("on_after_backward", 4),), **how)
    saved = latest_checkpoint(tmp_path / "errors")
    assert saved is not None
    assert parse_step(saved) == 4
    resumed = lab.probe(tmp_path / "errors", frozen, **how)
    assert (resumed.curves, resumed.numbers) == (undisturbed.curves, undisturbed.numbers)


def test_an_error_of_the_loader_over_a_stream(tmp_path: Path, palette: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: no image is left out or read twice, whichever micro-batch of a step it was."""
    lab = Lab(mixture(tmp_path / "shards", num_readers=4), palette)
    how = {"on": machine(micro_batch=3), "batch_size": 6, "steps": 8, "val_every": 0}
    full = lab.pretrain(tmp_path / "undisturbed", **how)
    record_read, n_read = StreamState.record_read, 0

    def refuse(self: Any, *read: Any) -> None:
        nonlocal n_read
        n_read += 1
        record_read(self, *read)
        if n_read in (8, 18):  # the second of step 4 and, read from step 3 on, of step 8
            raise OSError("a damaged shard")

    monkeypatch.setattr(StreamState, "record_read", refuse)
    for step in (3, 7):
        with pytest.raises(OSError, match="a damaged shard"):
            lab.pretrain(tmp_path / "errors", **how)
        saved = latest_checkpoint(tmp_path / "errors")
        assert saved is not None
        assert parse_step(saved) == step
    assert lab.pretrain(tmp_path / "errors", **how).curves == full.curves


def test_a_step_that_is_not_finished_is_not_saved(
    tmp_path: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Half an update of the weights, and a last step whose validation did not end: neither is saved; both are said."""
    step = torch.optim.Adam.step

    def break_off(self: Any, closure: Any) -> Any:
        step(self, closure)
        if all(int(state["step"]) == 4 for state in self.state.values()):
            raise OwnError

    monkeypatch.setattr(torch.optim.Adam, "step", break_off)
    with pytest.raises(OwnError):
        lab.pretrain(tmp_path / "half", **accumulated())
    assert "step 3, the last that was finished, is not saved: the weights were already changed" in caplog.text
    saved = latest_checkpoint(tmp_path / "half")
    assert saved is not None
    assert parse_step(saved) == 2  # of the best validation
    monkeypatch.undo()
    with pytest.raises(OwnError):
        lab.pretrain(tmp_path / "last", **accumulated(steps=4), callbacks=(Raise("on_validation_epoch_end", 4),))
    assert "step 4, the last that was finished, is not saved: its validation, the last one, did not end" in caplog.text


@pytest.mark.parametrize("error", [NonFiniteLossError("the loss is not finite"), OwnError("of the disk")])
def test_an_error_that_nothing_is_saved_after(
    tmp_path: Path, lab: Lab, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A loss that is not finite leaves the checkpoint before; where the disk refuses, the run's own error is raised."""

    def refuse(self: Any, checkpoint: Any, path: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(AtomicCheckpointIO, "write", refuse)
    with pytest.raises(type(error)):
        lab.pretrain(tmp_path, **accumulated(), callbacks=(Raise("on_train_batch_start", 1, error=error),))
    assert latest_checkpoint(tmp_path) is None
    assert ("is not saved: No space left on device" in caplog.text) == isinstance(error, OwnError)


def test_a_last_step_that_the_disk_refuses(
    tmp_path: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried twice, and the reason is logged once: the run ends with that error."""
    written: list[Path] = []

    def refuse(self: Any, checkpoint: Any, path: Path) -> None:
        written.append(path)
        raise OSError("No space left on device")

    monkeypatch.setattr(AtomicCheckpointIO, "write", refuse)
    with pytest.raises(OSError, match="No space left on device"):
        lab.pretrain(tmp_path, steps=2, val_every=2, checkpoint_every=2)
    assert [path.name for path in written] == ["step_0000002.ckpt"] * 2
    assert "No space left on device: step 2, the last that was finished, is not saved: refused again" in caplog.text
