"""What only watches a run may fail: it is said once, and the run has the weights of the undisturbed one, to the bit."""

import io
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf
from tensorboard.summary.writer.record_writer import RecordWriter

from igpt.distributed.signals import StoppedError
from igpt.report.bystanders import Bystander
from igpt.run import launch
from igpt.run.logs import StandardStream, guard_streams, log_file, set_up_logging
from igpt.training import online_probe, progress_bar
from igpt.training.callbacks import SampleGrid
from igpt.training.loggers import RunInfo
from igpt.training.loggers import csv as csv_logger
from igpt.training.loggers import tensorboard as tensorboard_logger
from igpt.training.nan_guard import NonFiniteLossError
from igpt.training.progress_bar import ProgressBar
from tests.task.conftest import Lab
from tests.task.test_finished_step import weights

SMALL: dict[str, Any] = {"steps": 4, "batch_size": 20, "val_every": 2, "checkpoint_every": 2}
ABOUT = RunInfo("pretrain", "tiny", "digits8", "ar", run_id="x", first_step=0, trains=True, pipeline=None)


class BrokenLogger(Logger):
    """Somebody's own logger, to a server that is gone."""

    name, version = "broken", "0"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        raise ConnectionError("the server is gone")

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...

    def save(self) -> None:
        raise ConnectionError("the server is gone")

    def finalize(self, status: str) -> None:
        raise ConnectionError("the server is gone")


class AtStart(L.Callback):
    """Does something to a run's files once it trains."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def on_train_start(self, *_: Any) -> None:
        self.act()


def fail(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


def break_csv(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    table = folder / "metrics" / "from_0000000" / "metrics.csv"
    return {
        "loggers": [csv_logger(folder, ABOUT)],
        "callbacks": [AtStart(lambda: table.symlink_to("/dev/full"))],
    }


def remove_csv(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    logger = csv_logger(folder, ABOUT)
    return {"loggers": [logger], "callbacks": [AtStart(lambda: shutil.rmtree(folder / "metrics"))]}


def refuse_csv(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    (folder / "metrics").write_text("a file")
    assert csv_logger(folder, ABOUT) is None
    return {}


def break_logger(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"loggers": [BrokenLogger()]}


def break_tensorboard(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    logger = tensorboard_logger(folder, ABOUT)
    return {"loggers": [logger], "callbacks": [AtStart(lambda: patch.setattr(RecordWriter, "write", fail))]}


def break_samples(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    (folder / "samples").write_text("a file")
    return {"callbacks": [SampleGrid(count=2, every=1, temperature=1.0)]}


def break_probe(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(online_probe, "logistic_regression", fail)
    how: dict[str, Any] = {"depths": [1.0], "train_images": 20, "val_images": 10, "strength": 1.0, "batch_size": 10}
    return {"callbacks": [online_probe.OnlineLinearProbe(every=1, norm="ln_1", **how)]}


def break_bar(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(progress_bar, "tqdm", fail)
    return {"callbacks": [ProgressBar()]}


BYSTANDERS = {
    "from_0000000/metrics.csv: OSError: [Errno 28]": break_csv,
    "from_0000000/metrics.csv: FileNotFoundError": remove_csv,
    "metrics/from_0000000: ": refuse_csv,
    "logger BrokenLogger: ConnectionError: the server is gone": break_logger,
    "a dict or a scalar/tensor., from OSError: [Errno 28] No space left on device": break_tensorboard,
    "samples while it trains: ": break_samples,
    "callbacks.probe: OSError: [Errno 28] No space left on device": break_probe,
    "the progress bar: OSError": break_bar,
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, digits: Any, palette: Any) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed")
    Lab(digits, palette).pretrain(folder, **SMALL)
    return weights(folder)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writing thread
@pytest.mark.parametrize(("message", "disturb"), BYSTANDERS.items(), ids=[way.__name__ for way in BYSTANDERS.values()])
def test_a_bystander_ends_no_run(
    tmp_path: Path, lab: Lab, undisturbed: dict[str, torch.Tensor], message: str, disturb: Any,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Invariant: one line names it and its error, and the weights are those of the run in which nothing failed."""
    lab.pretrain(tmp_path, **SMALL, **disturb(tmp_path, monkeypatch))
    lines = [line for line in caplog.messages if line.endswith("; the run goes on")]
    assert len(lines) == 1
    assert message in lines[0]
    assert all(torch.equal(weight, undisturbed[name]) for name, weight in weights(tmp_path).items())


@contextmanager
def restored_console() -> Iterator[None]:
    """Puts back, after the block, what `set_up_logging` changes."""
    root, package, streams = logging.getLogger(), logging.getLogger("igpt"), (sys.stdout, sys.stderr)
    handlers, levels = root.handlers, (root.level, package.level)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        root.handlers = handlers
        root.setLevel(levels[0])
        package.setLevel(levels[1])


@contextmanager
def console_without_reader() -> Iterator[None]:
    """Standard error is a terminal whose reader is gone; messages are logged as in a run."""
    reader, writer = os.pipe()
    os.close(reader)
    with restored_console():
        sys.stderr = gone = open(writer, "w", buffering=1)  # noqa: SIM115  # closing it fails, too
        gone.isatty = lambda: True
        set_up_logging()
        yield
    with pytest.raises(BrokenPipeError):
        gone.close()


def test_a_reader_of_the_console_that_is_gone(tmp_path: Path, lab: Lab, undisturbed: dict[str, torch.Tensor]) -> None:
    """Invariant: log.txt says so, once, and has every line; bars, too, are drawn into nothing."""
    with console_without_reader(), log_file(tmp_path / "log.txt"):
        lab.pretrain(tmp_path, **SMALL, callbacks=[ProgressBar()])
    text = (tmp_path / "log.txt").read_text()
    assert text.count("the run goes on") == text.count("stderr: BrokenPipeError: [Errno 32] Broken pipe") == 1
    assert text.count("step 4/4") == 2  # its losses, its validation
    assert all(torch.equal(weight, undisturbed[name]) for name, weight in weights(tmp_path).items())


def test_a_log_on_a_full_disk(
    tmp_path: Path, lab: Lab, undisturbed: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: the console says so, once, also if the file cannot be opened; the end of the run is none of its."""
    (tmp_path / "full").symlink_to("/dev/full")
    (tmp_path / "folder").mkdir()
    with ExitStack() as logs, caplog.at_level("INFO"):
        for name in ("full", "folder"):
            logs.enter_context(log_file(tmp_path / name))
        lab.pretrain(tmp_path, **SMALL)
    lines = [line for line in caplog.messages if line.endswith("the run goes on")]
    assert sorted(line.partition(": ")[0] for line in lines) == [str(tmp_path / "folder"), str(tmp_path / "full")]
    assert all(torch.equal(weight, undisturbed[name]) for name, weight in weights(tmp_path).items())


def test_a_standard_stream_that_is_closed() -> None:
    """Python has None where a process was started without one: what is written there goes nowhere."""
    with restored_console():
        sys.stdout, sys.stderr = io.StringIO(), None
        guard_streams()
        guard_streams()  # once more, it changes nothing
        assert isinstance(sys.stdout, StandardStream)
        assert sys.stdout.write("two\n") == 4
        assert sys.stdout.getvalue() == "two\n"
        assert not sys.stderr.isatty()
        assert sys.stderr.write("x") == 1
        sys.stderr._stream.close()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n$\\frac{$\n  ^"), "error: ValueError: $\\frac{$"),
        (ValueError("task.steps: 1 or more"), "error: task.steps: 1 or more"),
        (OSError(), "error: OSError"),
        (ValueError(" \n "), "error: ValueError"),
    ],
)
def test_an_error_line_is_never_empty(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By hand: the first line of the message; where that is empty, the type and the first line that is not."""
    monkeypatch.setattr(launch, "HydraConfig", MagicMock())
    monkeypatch.setattr(launch, "launch", MagicMock(side_effect=error))
    with restored_console(), pytest.raises(SystemExit) as ended:
        launch.main(OmegaConf.create({}))
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{line}\n"


def test_what_ends_a_run_is_no_bystanders(caplog: pytest.LogCaptureFixture) -> None:
    """Invariant: stopped, interrupted, diverged: raised; all else is passed over, and said the first time."""
    bystander = Bystander("W&B")
    for error in (StoppedError(signal.SIGTERM, 5), NonFiniteLossError("nan"), KeyboardInterrupt(), SystemExit(1)):
        with pytest.raises(type(error)), bystander:
            raise error
    assert bystander.error is None
    for error in (MemoryError(), ConnectionError("gone")):
        with bystander:
            raise error
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == ["W&B: MemoryError; the run goes on"]
    assert isinstance(bystander.error, ConnectionError)
