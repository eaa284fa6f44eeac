"""Every callback that Lightning exports: it works in a run, or is refused in a line that says what to take instead."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as of_lightning
from lightning.pytorch.loggers import Logger

from igpt.report.identity import OBSERVERS
from igpt.run.entries import callback_builder
from igpt.training.lightning_callbacks import BASES, WATCHING, is_observer, select
from igpt.training.progress_bar import ProgressBar
from igpt.training.trainer import Runner
from tests.task.conftest import Lab, machine
from tests.task.test_finished_step import weights

SMALL: dict[str, Any] = {"steps": 2, "batch_size": 20, "val_every": 1, "checkpoint_every": 2}
REFUSED = {
    "BackboneFinetuning": "task=finetune",
    "BatchSizeFinder": "trainer.micro_batch=N",
    "Checkpoint": "task.checkpoint_every",
    "EMAWeightAveraging": "task.ema=",
    "GradientAccumulationScheduler": "trainer.micro_batch=N",
    "LearningRateFinder": "sweep=learning_rate",
    "ModelCheckpoint": "task.keep_steps=",
    "ModelPruning": "igpt.load",
    "OnExceptionCheckpoint": "task.checkpoint_every",
    "SpikeDetection": "EarlyStopping",
    "StochasticWeightAveraging": "task.ema=",
    "WeightAveraging": "task.ema=",
    **{kind.__name__: "name a class that is derived from it" for kind in BASES},
}
FUNCTION = {"_target_": "builtins.len", "_partial_": True}
SETTINGS: dict[str, dict[str, Any]] = {  # of those that work
    "DeviceStatsMonitor": {"cpu_stats": True},
    "EarlyStopping": {"monitor": "val/loss_gen", "patience": 3},
    "LambdaCallback": {"on_load_checkpoint": FUNCTION},
    "LearningRateMonitor": {"logging_interval": "step"},
    "ModelSummary": {"max_depth": 2},
    "RichModelSummary": {},
    "RichProgressBar": {"refresh_rate": 1},
    "ThroughputMonitor": {"batch_size_fn": FUNCTION},
    "Timer": {"duration": {"hours": 1}},
    "TQDMProgressBar": {},
}


class Recorder(Logger):
    """Keeps what it is told."""

    name, version = "recorder", "0"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...

    def read(self, name: str) -> dict[int | None, float]:
        return {step: row[name] for step, row in self.rows if name in row}


class Failing(L.Callback):
    """Somebody's own callback, which fails in one hook."""

    def __init__(self, *, hook: str, error: str) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise {"key": KeyError("no such image"), "value": ValueError("not mine")}[error]

        fail.__qualname__ = f"Failing.{hook}"
        setattr(type(self), hook, fail)


class Watching(Failing):
    is_observer = True


def build(name: str, **settings: Any) -> L.Callback:
    """A callback as `+callbacks.mine={_target_: NAME, …}` builds it."""
    return callback_builder({"_target_": name, **settings}, "callbacks.mine")()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, digits: Any, palette: Any) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed")
    Lab(digits, palette).pretrain(folder, **SMALL)
    return weights(folder)


@pytest.mark.parametrize("name", sorted(of_lightning.__all__))
def test_each_works_or_is_refused(
    name: str, tmp_path: Path, lab: Lab, undisturbed: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: with one that works, the weights are those of the run without it; none fails in silence."""
    target = f"lightning.pytorch.callbacks.{name}"
    assert (name in REFUSED) != (name in SETTINGS), f"{name} is new in Lightning: try it, and write down which it is"
    if name in REFUSED:
        with pytest.raises(ValueError, match=rf"^callbacks\.mine: {name} is not for these runs: .*{REFUSED[name]}"):
            build(target)
        return
    callback = build(target, **SETTINGS[name])
    rates = Recorder()
    result = lab.pretrain(tmp_path, **SMALL, callbacks=select([ProgressBar(), callback]), loggers=[rates])
    assert not [line for line in caplog.messages if "the run goes on" in line]
    assert all(torch.equal(weight, undisturbed[key]) for key, weight in weights(tmp_path).items())
    assert is_observer(callback) == (target in OBSERVERS) == (type(callback) in WATCHING)
    assert not result.early_stops
    if name == "LearningRateMonitor":  # at step s the rate of step s + 1, ours at the step that it was used in
        assert {step + 1: rate for step, rate in rates.read("lr-Adam").items()} == rates.read("lr")
    if name == "ThroughputMonitor":
        assert rates.read("train/batches")


@pytest.mark.parametrize("hook", ["setup", "on_train_start", "on_train_batch_end", "on_validation_end"])
def test_an_error_of_a_callback_is_one_line(hook: str, tmp_path: Path, lab: Lab) -> None:
    """By hand: its key, the hook and the error, whatever it is; of Lightning's own, too."""
    callback = build(f"{__name__}.Failing", hook=hook, error="key")
    try:
        with pytest.raises(ValueError, match=rf"^callbacks\.mine: Failing\.{hook} raised KeyError: 'no such image'$"):
            lab.pretrain(tmp_path, **SMALL, callbacks=[callback])
    finally:
        delattr(Failing, hook)


def test_watching_callbacks_end_no_run_once_it_trains(
    tmp_path: Path, lab: Lab, undisturbed: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: the error is logged, once; before training starts, it is refused."""
    callback = build(f"{__name__}.Watching", hook="on_train_batch_end", error="value")
    lab.pretrain(tmp_path, **SMALL, callbacks=[callback])
    assert [line for line in caplog.messages if "the run goes on" in line] == [
        "callbacks.mine: ValueError: not mine; the run goes on"
    ]
    assert all(torch.equal(weight, undisturbed[name]) for name, weight in weights(tmp_path).items())
    alone = build("lightning.pytorch.callbacks.LearningRateMonitor")
    with pytest.raises(ValueError, match=r"^callbacks\.mine: LearningRateMonitor\.on_train_start raised .*no logger"):
        lab.pretrain(tmp_path / "alone", **SMALL, callbacks=[alone])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("lightning.pytorch.callbacks.EarlyStoping", "did you mean lightning.pytorch.callbacks.EarlyStopping?"),
        ("pytorch_lightning.callbacks.Timer", "did you mean lightning.pytorch.callbacks.Timer?"),
        ("nobody.Timer", "cannot be imported: No module named 'nobody'"),
    ],
)
def test_a_callback_that_does_not_exist(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^callbacks\.mine\._target_={target} ") as refused:
        build(target)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_classes_derived_from_a_refused_one_are_refused() -> None:
    class Mine(of_lightning.ModelCheckpoint): ...

    setattr(of_lightning, "Mine", Mine)  # noqa: B010  # where a config can name it
    try:
        with pytest.raises(ValueError, match=r"^callbacks\.mine: Mine is not for these runs: a run saves itself"):
            build("lightning.pytorch.callbacks.Mine")
    finally:
        delattr(of_lightning, "Mine")


def test_one_progress_bar_and_who_watches_on_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: Lightning's bar in place of ours; off rank 0, where no logger is, nothing of Lightning that watches."""
    ours, bar, monitor = ProgressBar(), of_lightning.TQDMProgressBar(), of_lightning.LearningRateMonitor()
    stop = of_lightning.EarlyStopping("val/loss_gen")
    assert select([ours, monitor, stop]) == [ours, monitor, stop]
    assert select([ours, bar, stop]) == [bar, stop]
    runner = Runner(machine(), Path("run"), callbacks=[ours, bar, monitor, stop])
    assert runner.subfolder("refit").callbacks == [ours, bar]  # without loggers
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert select([bar, monitor, stop]) == [stop]
