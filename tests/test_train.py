"""The command itself, in processes of its own: one finished quickstart, and what users do next with it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from igpt.report.folder import RunFolder
from tests.conftest import ROOT, TINY, train_py

PRETRAIN = ("model.n_layer=2", "model.n_embd=16", "task.warmup_steps=2", "task.log_every=1", "callbacks=none")


def test_quickstart_leaves_everything_it_names(quickstart: Path) -> None:
    """Invariant: one folder, named as settled; every file its results name is there; pictures open."""
    assert quickstart.name.startswith("pipeline-igpt_nano-digits8-ar-s0-")
    stages = ["1_palette", "2_pretrain", "3_evaluate", "4_sample", "5_complete"]
    assert sorted(p.name for p in quickstart.iterdir() if p.is_dir()) == stages
    for folder in (quickstart, *(quickstart / stage for stage in stages)):
        record = RunFolder(folder).read_result()
        for path in record["files"].values():
            assert (folder / path).exists()
            if path.endswith(".png"):
                Image.open(folder / path).verify()
    assert len(list((quickstart / "2_pretrain" / "samples").glob("step_*.png"))) == 2
    lines = (quickstart / "log.txt").read_text().splitlines()
    assert sum("step 4/6" in line and "nats/token" in line for line in lines) == 1


def test_quickstart_reports_the_baselines(quickstart: Path) -> None:
    """Independent source: a rough trial found 2.07 nats for the colours alone and 1.68 for colour by position."""
    numbers = RunFolder(quickstart).read_result()["numbers"]
    assert numbers["val/unigram"]["value"] == pytest.approx(2.07, abs=0.01)
    assert numbers["val/position_histogram"]["value"] == pytest.approx(1.68, abs=0.01)
    assert numbers["val/palette_mse"]["value"] == 0
    assert numbers["val/loss_gen"]["n"] == 150
    written = json.loads((quickstart / "2_pretrain" / "result.json").read_text())["numbers"]["val/loss_gen"]["value"]
    assert numbers["val/loss_gen"]["value"] == pytest.approx(written, rel=1e-6)  # evaluated again from the file


def test_a_finished_run_is_not_repeated_and_force_repeats_it_to_the_bit(quickstart: Path) -> None:
    """Invariant: the same command prints the result; with force=true a second folder holds the same weights."""
    place = quickstart.parents[1]
    again = train_py("experiment=quickstart", *TINY, cwd=place)
    assert "is finished; force=true repeats it" in again.stderr
    assert "val/loss_gen" in again.stderr
    train_py("experiment=quickstart", *TINY, "force=true", cwd=place)
    first, second = sorted((place / "runs").iterdir())
    assert second.name == f"{first.name}-2"
    weights = [load_file(run / "2_pretrain" / "model" / "model.safetensors") for run in (first, second)]
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    samples = [np.load(run / "4_sample" / "samples_tokens.npy") for run in (first, second)]
    assert np.array_equal(*samples)


def test_sample_from_a_run(quickstart: Path, tmp_path: Path) -> None:
    """The user's next command; with top_k=1 all samples are the same, for there is but one likeliest image."""
    model = quickstart / "2_pretrain"
    train_py("task=sample", f"init={model}", "task.count=3", "task.top_k=1", "seed=5", cwd=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("sample-igpt_nano-digits8-ar-s5-")
    tokens = np.load(run / "samples_tokens.npy")
    assert tokens.shape == (3, 64)
    assert (tokens == tokens[0]).all()


def test_a_stopped_and_killed_run_is_resumed(tmp_path: Path) -> None:
    """Invariant: SIGTERM, then SIGKILL in the middle, the same command refuses and says how; resume= ends as never
    stopped.
    """
    settings = ["task=pretrain", *PRETRAIN, "task.steps=60", "task.checkpoint_every=5", "task.checkpoint_keep=99"]
    settings.append("task.val_every=20")

    def interrupted(number: int, at: int, *arguments: str) -> tuple[int, str]:
        """Exit code and messages of a run that gets a signal once it has saved step `at`."""
        command = [sys.executable, str(ROOT / "train.py"), *arguments]
        with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 60
            while not list(tmp_path.glob("runs/*/checkpoints/latest")) or not list(
                tmp_path.glob(f"runs/*/checkpoints/step_{at:07d}.sha256")
            ):
                assert time.monotonic() < deadline
                time.sleep(0.005)
            process.send_signal(number)
            return process.wait(60), process.communicate()[1]

    code, said = interrupted(signal.SIGTERM, 5, *settings)
    (run,) = (tmp_path / "runs").iterdir()
    assert code == 75
    assert f"continue with `python train.py resume=runs/{run.name}`" in said
    code, said = interrupted(signal.SIGKILL, 30, f"resume=runs/{run.name}")
    assert code == -signal.SIGKILL
    assert not RunFolder(run).finished
    refused = train_py(*settings, cwd=tmp_path, check=False)
    assert refused.returncode == 2
    assert f"resume=runs/{run.name}" in refused.stderr
    train_py(f"resume=runs/{run.name}", cwd=tmp_path)
    train_py(*settings, "paths.runs=whole", cwd=tmp_path)
    (whole,) = (tmp_path / "whole").iterdir()
    files = [load_file(folder / "model" / "model.safetensors") for folder in (run, whole)]
    assert all(np.array_equal(files[0][name], files[1][name]) for name in files[0])
    curves = [RunFolder(folder).read_result()["curves"] for folder in (run, whole)]
    assert curves[0] == curves[1]
    assert len(curves[0]["train/loss_gen"]["x"]) == 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task.stepz=3"], "error: there is no setting or group 'task.stepz', did you mean task.steps?"),
        (["task=sample", "init=nowhere"], "error: init=nowhere: no config.json"),
        (["task=evaluate", "init={model}", "tokens=openai", "tokens.path={other}"], "was trained with palette"),
        (["resume=nowhere"], "error: resume=nowhere: no run.json there"),
    ],
)
def test_bad_commands_end_in_one_line(quickstart: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    other = tmp_path / "other.npy"
    np.save(other, np.linspace(-1, 1, 51).reshape(17, 3).astype(np.float32))
    filled = [a.format(model=quickstart / "2_pretrain", other=other) for a in arguments]
    done = train_py(*filled, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
