"""Ranks that end before their run does, under each starter: in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from igpt.checkpoint.resume import latest_checkpoint, parse_step
from igpt.report.folder import RunFolder
from tests.conftest import ROOT
from tests.test_photographs import run as run_here
from tests.test_train import SIXTY, list_children

SETTINGS = (*SIXTY, "task.val_every=0")
RANKS = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "resume=auto")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
LAUNCHER = (sys.executable, "-c", "import sys; from igpt.distributed.launcher import run_ranks; "
            "sys.exit(run_ranks([sys.executable, *sys.argv[1:]], 2))")  # fmt: skip
FULL = """
import os, sys, torch
from igpt.task.pretrain import PretrainModule
step = PretrainModule.training_step
def full(self, batch, batch_idx):
    if os.environ["RANK"] == "1" and batch_idx == 12:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return step(self, batch, batch_idx)
PretrainModule.training_step = full
from igpt.cli import main
main()
"""


def wait_for_step(place: Path, step: int) -> None:
    deadline = time.monotonic() + 90
    while not list(place.glob(f"runs/*/checkpoints/step_{step:07d}.sha256")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.ci
def test_torchrun_starts_the_ranks_again(tmp_path: Path) -> None:
    """Invariant: a rank is killed, all are started again and go on: one run, with the losses of one never stopped."""
    command = [*TORCHRUN, "--max-restarts=1", str(ROOT / "train.py"), *SETTINGS, *RANKS]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(tmp_path, 5)
        before = list_children(process.pid)
        os.kill(before[1], signal.SIGKILL)
        message = process.communicate(timeout=150)[1]
    assert process.returncode == 0, message
    assert not any(map(is_running, before))
    (run,) = (path for path in (tmp_path / "runs").iterdir())
    assert "resuming from" in (run / "log.txt").read_text()
    _, uninterrupted = run_here(tmp_path / "one", *SETTINGS, "trainer=cpu")
    restarted, expected = (RunFolder(each).read_result()["curves"]["train/loss_gen"] for each in (run, uninterrupted))
    assert restarted["x"] == expected["x"]
    assert restarted["y"] == pytest.approx(expected["y"], rel=1e-4)


@pytest.mark.parametrize(
    ("starter", "code"),
    [
        pytest.param(LAUNCHER, 2, marks=pytest.mark.ci, id="launcher"),
        pytest.param(TORCHRUN, 1, marks=pytest.mark.slow, id="torchrun"),
    ],
)
def test_memory_of_one_rank_that_is_full(tmp_path: Path, starter: tuple[str, ...], code: int) -> None:
    """Invariant: one line says which rank and what to lower; the other ends, too; what was saved is there to go on."""
    (tmp_path / "full.py").write_text(FULL)
    command = [*starter, str(tmp_path / "full.py"), *SETTINGS, *RANKS]
    start = time.monotonic()
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(tmp_path, 5)
        ranks = list_children(process.pid)
        message = process.communicate(timeout=150)[1]
    assert time.monotonic() - start < 120
    assert process.returncode == code, message
    assert not any(map(is_running, ranks))
    assert message.count("error: the memory of the GPU of rank 1") == 1
    assert "Traceback" not in message.partition("error: the memory of the GPU")[0]
    (run,) = (tmp_path / "runs").iterdir()
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    assert parse_step(checkpoint) >= 10
