"""Stopping well, and disks that refuse."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from igpt.checkpoint.resume import (
    AtomicCheckpointIO,
    checkpoint_path,
    checksum_path,
    find_checkpoints,
    has_checkpoint,
    latest_checkpoint,
    mark_latest,
    parse_step,
    read_best,
)
from igpt.distributed.launcher import Children
from igpt.distributed.signals import StoppedError, StopRequest, forward_signal
from igpt.run import launch
from igpt.task.generative_score import GenerativeScore
from tests.conftest import ROOT
from tests.data.conftest import mixture
from tests.task.conftest import Lab, machine


class Send(L.Callback):
    """Sends this process a signal in the middle of an optimiser step."""

    def __init__(self, number: int, *, step: int) -> None:
        self.number, self.step = number, step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.step = -1
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGTERM, 2), (signal.SIGINT, 3), (signal.SIGUSR2, 5)], ids=["term", "int", "usr2"]
)
def test_a_signal_stops_after_the_step_and_its_validation(tmp_path: Path, lab: Lab, number: int, step: int) -> None:
    """Invariant: with two passes a step, the step is finished and saved; resumed, all is as if nothing had happened."""
    on = machine(micro_batch=50)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)]
    full = lab.pretrain(tmp_path / "whole", on=on)
    with pytest.raises(StoppedError, match=f"stopped by {signal.Signals(number).name} after step {step + 1}"):
        lab.pretrain(tmp_path / "stopped", on=on, callbacks=(Send(number, step=step),))
    saved = latest_checkpoint(tmp_path / "stopped")
    assert saved is not None
    assert parse_step(saved) == step + 1
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)] == handlers
    resumed = lab.pretrain(tmp_path / "stopped", on=on)
    assert resumed.curves == full.curves  # step 3's validation (of every 4) is in it too
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "stopped")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_run_over_a_stream_goes_on_in_the_middle_of_a_pass(tmp_path: Path, palette: Any) -> None:
    """Round trip: the same losses, of which none repeats an image, as never stopped."""
    lab = Lab(mixture(tmp_path / "shards", num_readers=4), palette)
    how: dict[str, Any] = {"on": machine(micro_batch=3), "batch_size": 6, "steps": 10, "val_every": 0}
    full = lab.pretrain(tmp_path / "whole", **how)
    for step in (3, 7):
        with pytest.raises(StoppedError):
            lab.pretrain(tmp_path / "stopped", callbacks=(Send(signal.SIGTERM, step=step),), **how)
    assert lab.pretrain(tmp_path / "stopped", **how).curves == full.curves


def test_a_signal_in_the_last_step_changes_nothing(tmp_path: Path, lab: Lab) -> None:
    assert lab.pretrain(tmp_path, callbacks=(Send(signal.SIGTERM, step=7),)).curves


def test_a_second_signal_leaves_at_once() -> None:
    """In a process of its own: the first is noted, the second ends it as if nobody listened."""
    code = (
        "import os, signal, time; from igpt.distributed.signals import StopRequest\n"
        "stop = StopRequest()\n"
        "with stop.install_handlers():\n"
        "    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1): os.kill(os.getpid(), number)\n"
        "    print(stop.number, flush=True); time.sleep(1.1)\n"  # the same one twice at once, a warning: not again
        "    os.kill(os.getpid(), signal.SIGUSR2); print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('nor here', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{signal.SIGTERM:d}\nstill here\n"
    assert done.returncode == -signal.SIGTERM


def test_only_training_answers_signals(tmp_path: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: Lightning, which would end the run with code 0, answers none, also in the last validation."""
    answers: dict[str, Any] = {}
    numbers = GenerativeScore.numbers

    def noted(self: Any, split: str, trainer: L.Trainer, n_image: int) -> Any:
        answers[str(trainer.state.fn)] = signal.getsignal(signal.SIGTERM)
        return numbers(self, split, trainer, n_image)

    monkeypatch.setattr(GenerativeScore, "numbers", noted)
    before = signal.getsignal(signal.SIGTERM)
    lab.pretrain(tmp_path)
    assert answers["TrainerFn.VALIDATING"] == before
    assert answers["TrainerFn.FITTING"].__func__ is StopRequest._handle_signal


def test_a_run_may_be_started_in_any_thread() -> None:
    """Python lets only a process's main thread answer signals: in another, what answered them before still does."""
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with StopRequest().install_handlers(), Children().supervise():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
    with StopRequest().install_handlers():
        assert signal.getsignal(signal.SIGTERM) != before


def test_a_pipeline_runs_in_any_thread(tmp_path: Path) -> None:
    """Invariant: a run that Python starts in another thread (a notebook's, a server's) is trained to its end."""
    pretrain = "{steps: 2, batch_size: 16, warmup_steps: 1, val_every: 1, log_every: 1, checkpoint_every: 1}"
    overrides = (
        "task=pipeline", f"+task.stages={{pretrain: {pretrain}, sample: {{count: 1}}}}", "callbacks=none",
        "trainer=cpu", "model.n_layer=1", "model.n_embd=16", f"paths.runs={tmp_path}", f"paths.cache={tmp_path}",
    )  # fmt: skip
    with ThreadPoolExecutor(1) as pool:
        result, folder = pool.submit(launch.run, *overrides, conf=ROOT / "conf").result()
    assert folder is not None
    assert result.provenance["pretrain"]["step"] == 2
    assert (folder / "2_sample" / "samples.png").is_file()


def test_who_listened_before_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped run ends with 75, after the signal has gone on to a scheduler's own answer to it."""
    lines: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: lines.append(number))

    def stopped(*_: Any, **__: Any) -> None:
        raise StoppedError(signal.SIGUSR2, 5)

    monkeypatch.setattr(launch, "launch", stopped)
    monkeypatch.setattr(launch, "HydraConfig", MagicMock())
    try:
        with pytest.raises(SystemExit) as ended:
            launch.main(OmegaConf.create({}))
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert ended.value.code == 75
    assert lines == [signal.SIGUSR2]
    assert not forward_signal(signal.SIGUSR2)  # nobody listens now
    assert not forward_signal(signal.SIGINT)  # Python's own answer would be a KeyboardInterrupt


def test_a_clock_set_back(tmp_path: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: what is newest and what is learned depend on no clock; no speed is negative."""
    full = lab.pretrain(tmp_path / "whole")
    now = itertools.count(1e9, -3600)
    monkeypatch.setattr(time, "time", lambda: next(now))
    with pytest.raises(StoppedError):
        lab.pretrain(tmp_path / "back", callbacks=(Send(signal.SIGTERM, step=4),))
    for age, path in enumerate(sorted((tmp_path / "back" / "checkpoints").glob("*.ckpt"))):
        os.utime(path, (1e9 - age, 1e9 - age))
    latest = latest_checkpoint(tmp_path / "back")
    assert latest is not None
    assert parse_step(latest) == 5
    assert lab.pretrain(tmp_path / "back").curves == full.curves


def test_a_disk_that_refuses_once(
    tmp_path: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run says so and goes on; the checkpoint before stays the newest until the next one is written."""
    save, steps = AtomicCheckpointIO.write, []

    def refuses_step_4(self: Any, checkpoint: dict[str, Any], path: Path) -> None:
        steps.append(parse_step(Path(path)))
        if steps[-1] == 4:
            assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_0000002.ckpt"
            raise OSError("No space left on device")
        save(self, checkpoint, path)

    monkeypatch.setattr(AtomicCheckpointIO, "write", refuses_step_4)
    lab.pretrain(tmp_path, checkpoint_every=2)
    assert "step 4 is not saved, the run goes on: No space left on device" in caplog.text
    assert steps[:2] == [2, 4]
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.name == "step_0000008.ckpt"


def test_the_best_stays(tmp_path: Path, lab: Lab) -> None:
    """Invariant: with one kept, the checkpoint of the lowest validation loss is kept too, and found again."""
    result = lab.pretrain(tmp_path, checkpoint_keep=1, checkpoint_every=1, val_every=2)
    best = read_best(tmp_path)
    assert best is not None
    curve = result.curves["val/loss_gen"]
    assert best["value"] == pytest.approx(min(curve.y), rel=1e-6)
    assert best["step"] == curve.x[curve.y.index(min(curve.y))]
    assert (tmp_path / "checkpoints" / best["checkpoint"]).is_file()


def test_killed_before_the_first_pointer(tmp_path: Path) -> None:
    """Invariant: a first checkpoint with its checksum is resumed from; without one, the run starts anew."""
    path = checkpoint_path(tmp_path / "stage", 2)
    AtomicCheckpointIO().write({"step": 2}, path)
    assert latest_checkpoint(tmp_path / "stage") == path
    assert has_checkpoint(tmp_path)
    checksum_path(path).unlink()
    assert latest_checkpoint(tmp_path / "stage") is None
    assert not has_checkpoint(tmp_path)


def test_checkpoints_are_in_order_of_their_steps(tmp_path: Path) -> None:
    """Invariant: the newest is that of the highest step, also where its name, as text, is not the last."""
    for step in (9_999_998, 9_999_999, 10_000_000, 10_000_001):
        AtomicCheckpointIO().write({"step": step}, path := checkpoint_path(tmp_path, step))
        mark_latest(path, keep=2)
        assert latest_checkpoint(tmp_path) == path
    assert [parse_step(path) for path in find_checkpoints(tmp_path)] == [10_000_000, 10_000_001]
