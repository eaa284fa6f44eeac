"""The command itself, in processes of its own: one finished quickstart, and what users do next with it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from safetensors.numpy import load_file

from igpt.report.folder import RunFolder
from igpt.run.early_checks import TASKS, check_early
from igpt.run.launch import run as run_command
from igpt.run.targets import find_target
from tests.conftest import ROOT, TINY, train_py
from tests.offline import offline_runs
from tests.test_photographs import run as run_here

PRETRAIN = ("model.n_layer=2", "model.n_embd=16", "task.warmup_steps=2", "task.log_every=1", "callbacks=none")


def test_quickstart_leaves_everything_it_names(quickstart: Path) -> None:
    """Invariant: one folder, named as settled; every file its results name is there; pictures open."""
    assert quickstart.name.startswith("pipeline-igpt_nano-digits8-ar-s0-")
    stages = ["1_palette", "2_pretrain", "3_evaluate", "4_sample", "5_complete", "6_probe", "7_finetune", "8_scratch"]
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
    assert sum(re.search(rf"\w, in \S*{quickstart.name}\b", line) is not None for line in lines) == 1  # of the start


def test_quickstart_reports_the_baselines(quickstart: Path) -> None:
    """Independent source: a rough trial found 2.07 nats for the colours alone and 1.68 for colour by position."""
    numbers = RunFolder(quickstart).read_result()["numbers"]
    assert numbers["evaluate/val/unigram"]["value"] == pytest.approx(2.07, abs=0.01)
    assert numbers["evaluate/val/position_histogram"]["value"] == pytest.approx(1.68, abs=0.01)
    assert numbers["palette/val/palette_mse"]["value"] == 0
    assert numbers["palette/val/palette_remainder"]["value"] == pytest.approx(0, abs=1e-4)
    assert numbers["pretrain/val/loss_gen"]["n"] == 150
    written = json.loads((quickstart / "2_pretrain" / "result.json").read_text())["numbers"]["val/loss_gen"]["value"]
    evaluated = json.loads((quickstart / "3_evaluate" / "result.json").read_text())["numbers"]["val/loss_gen"]["value"]
    assert numbers["pretrain/val/loss_gen"]["value"] == written
    assert evaluated == pytest.approx(written, rel=1e-6)  # again, from the file
    assert numbers["evaluate/val/loss_gen"]["value"] == evaluated
    assert all(name.split("/")[0] in {folder.name[2:] for folder in quickstart.glob("[1-8]_*")} for name in numbers)


def test_quickstart_tells_what_the_features_know(quickstart: Path) -> None:
    """Independent source: logistic regression on the digits' raw pixels gets 98 %; a head begins at ln 10."""
    record = RunFolder(quickstart).read_result()
    numbers = record["numbers"]
    assert numbers["probe/val/raw_pixels"]["value"] == pytest.approx(0.98, abs=0.011)
    assert numbers["probe/probe/layer"]["value"] in (0, 1, 2)
    curve = record["curves"]["probe/probe, val"]
    assert curve["x"] == [0, 1, 2]
    assert max(curve["y"]) == numbers["probe/val/accuracy"]["value"]
    starts = {name: RunFolder(quickstart / name).read_run()["config"]["init"] for name in ("7_finetune", "8_scratch")}
    assert starts == {"7_finetune": str(Path("runs") / quickstart.name / "2_pretrain"), "8_scratch": None}
    assert numbers["scratch/val/loss_clf"]["value"] == pytest.approx(np.log(10), abs=0.1)
    confusion = np.load(quickstart / "7_finetune" / "confusion_counts.npy")
    assert confusion.sum() == 300
    assert confusion.trace() / 300 == pytest.approx(numbers["finetune/test/accuracy"]["value"])
    digits = [str(i) for i in range(10)]
    of_stages = {"probe/confusion", "finetune/confusion", "scratch/confusion"}
    assert record["class_names"] == dict.fromkeys(of_stages, digits)
    assert of_stages < record["files"].keys()
    for stage in ("6_probe", "7_finetune", "8_scratch"):
        assert RunFolder(quickstart / stage).read_result()["class_names"] == {"confusion": digits}
    assert (quickstart / "report.html").read_text().count("".join(f"<li><bdi>{i}</bdi></li>" for i in digits)) == 3


def test_accuracy_needs_a_head_that_was_trained(quickstart: Path, tmp_path: Path) -> None:
    """Round trip: evaluated again, fine-tuned weights have the accuracy they were reported with; others have none."""
    of_test = ("task=evaluate", "task.split=test", "task.baseline_images=0")
    tuned, _ = run_here(tmp_path, *of_test, f"init={quickstart / '7_finetune'}")
    assert tuned.class_names == {"confusion": tuple("0123456789")}
    written = RunFolder(quickstart / "7_finetune").read_result()["numbers"]
    for name in ("test/accuracy", "test/loss_clf", "test/loss_gen"):
        assert tuned.numbers[name].value == pytest.approx(written[name]["value"], rel=1e-6)
    with pytest.raises(ValueError, match=r"has no trained class head.*task=finetune init="):
        run_here(tmp_path, *of_test, f"init={quickstart / '2_pretrain'}", "task.accuracy=true")


def test_a_finished_run_is_not_repeated_and_force_repeats_it_to_the_bit(
    quickstart: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: the same command prints the result; with rerun=true a second folder holds the same weights."""
    place = quickstart.parents[1]
    monkeypatch.chdir(place)
    caplog.set_level("INFO")
    run_command("experiment=quickstart", "data=digits", *TINY, conf=ROOT / "conf")
    assert "is finished; rerun=true repeats it" in caplog.text
    assert "validation loss" in caplog.text
    run_here(place, "experiment=quickstart", "data=digits", *TINY, "rerun=true")
    first, second = sorted((place / "runs").iterdir())
    assert second.name == f"{first.name}-2"
    weights = [load_file(run / "2_pretrain" / "model" / "model.safetensors") for run in (first, second)]
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    samples = [np.load(run / "4_sample" / "samples_tokens.npy") for run in (first, second)]
    assert np.array_equal(*samples)


def test_sample_from_a_run(quickstart: Path, tmp_path: Path) -> None:
    """The user's next command; with top_k=1 all samples are the same, for there is but one likeliest image."""
    model = quickstart / "2_pretrain"
    _, run = run_here(tmp_path, "task=sample", f"init={model}", "task.count=3", "task.top_k=1", "seed=5")
    assert run.name.startswith("sample-igpt_nano-digits8-ar-s5-")
    tokens = np.load(run / "samples_tokens.npy")
    assert tokens.shape == (3, 64)
    assert (tokens == tokens[0]).all()


def interrupted(place: Path, at: int, number: int, *arguments: str, whom: Callable[[int], int]) -> tuple[int, str]:
    """Exit code and messages of a run of which a process gets a signal once step `at` is saved.

    `whom` turns the number of the process that was started into that of the one to signal.
    """
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    with subprocess.Popen(command, cwd=place, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(place.glob(f"runs/*/checkpoints/step_{at:07d}.sha256")):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(whom(process.pid), number)
        return process.wait(60), process.communicate()[1]


def list_children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


SIXTY = ("task=pretrain", *PRETRAIN, "task.steps=60", "task.checkpoint_every=5", "task.checkpoint_keep=99")


def test_a_stopped_run_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: SIGTERM ends it well and says how to go on; resume= ends as never stopped."""
    settings = [*SIXTY, "task.val_every=20"]
    code, message = interrupted(tmp_path, 5, signal.SIGTERM, *settings, whom=int)
    (run,) = (tmp_path / "runs").iterdir()
    assert code == 75
    assert f"continue with `python train.py resume=runs/{run.name}`" in message
    monkeypatch.chdir(tmp_path)
    run_command(f"resume=runs/{run.name}", conf=ROOT / "conf")
    _, uninterrupted = run_here(tmp_path / "whole", *settings)
    files = [load_file(folder / "model" / "model.safetensors") for folder in (run, uninterrupted)]
    assert all(np.array_equal(files[0][name], files[1][name]) for name in files[0])
    curves = [RunFolder(folder).read_result()["curves"] for folder in (run, uninterrupted)]
    assert curves[0] == curves[1]
    assert len(curves[0]["train/loss_gen"]["x"]) == 60


@pytest.mark.slow
def test_a_run_goes_on_without_a_reader_of_its_messages(tmp_path: Path) -> None:
    """`python train.py … 2>&1 | head -1`: the run ends well, and log.txt has what nobody read."""
    command = [sys.executable, str(ROOT / "train.py"), "task=pretrain", *PRETRAIN, "task.steps=4"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert RunFolder(run).is_finished
    text = (run / "log.txt").read_text()
    assert text.count("Broken pipe; the run goes on") == 1
    assert "step 4/4" in text


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_which_one_process_goes_on_with(tmp_path: Path) -> None:
    """Invariant: one folder; within a minute both ranks are gone, and the log says which was killed."""
    settings = [*SIXTY, "task.val_every=0", "trainer=ddp", "trainer.accelerator=cpu"]
    ranks: list[int] = []

    def second(pid: int) -> int:
        ranks.extend(list_children(pid))
        return ranks[1]

    code, message = interrupted(tmp_path, 5, signal.SIGKILL, *settings, whom=second)
    assert code == 128 + signal.SIGKILL
    assert len(ranks) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    (run,) = (tmp_path / "runs").iterdir()
    for text in (message, (run / "log.txt").read_text()):
        assert "rank 1 of 2 was killed by SIGKILL" in text
    assert not RunFolder(run).is_finished
    text = train_py(f"resume=runs/{run.name}", "trainer=cpu", cwd=tmp_path).stderr
    assert "resuming with other settings" in text
    assert "trainer.devices auto ≠ 1" in text
    assert RunFolder(run).is_finished


@pytest.mark.ci
def test_a_sweep(tmp_path: Path) -> None:
    """Invariant: a folder a job, its table says what came of each; what differs is shown, what is equal is not."""
    settings = ["task=pretrain", *PRETRAIN, "task.steps=3", "task.val_every=0", "trainer.accelerator=cpu"]
    done = train_py(
        "-m", *settings, "task.learning_rate=0.01,1e30", "hydra.launcher.n_jobs=2", cwd=tmp_path, check=False
    )
    assert done.returncode == 1
    assert "2 jobs: 1 finished, 1 failed" in done.stderr
    assert "error: the loss of step" in done.stderr
    (sweep,) = (tmp_path / "runs" / "sweeps").glob("*/")
    jobs = json.loads((sweep / "jobs.json").read_text())["jobs"]
    assert [job["state"] for job in jobs] == ["finished", "failed"]
    folders = [Path(job["folder"]) for job in jobs]
    assert sorted(p for p in (tmp_path / "runs").iterdir() if p.name != "sweeps") == sorted(folders)
    value = RunFolder(folders[0]).read_result()["numbers"]["val/loss_gen"]["value"]
    assert jobs[0]["value"] == value
    assert (sweep / "job_001.txt").read_text().startswith("job 1/2: task.learning_rate=0.01\n")
    assert re.search(rf"1 +task.learning_rate=0.01 +finished +{value:.4f} +runs/{folders[0].name}", done.stderr)


@pytest.mark.slow
def test_a_sweep_of_runs_of_two_processes_one_of_them_killed(tmp_path: Path) -> None:
    """Invariant: four folders, three results, one error, nothing left running; the same command mends the fourth."""
    command = [sys.executable, str(ROOT / "train.py"), "-m", *SIXTY, "task.val_every=0", "seed=0,1,2,3"]
    command += ["trainer=ddp", "trainer.accelerator=cpu", "hydra.launcher.n_jobs=2"]
    command += ["logger=[csv,wandb]", "logger.wandb.offline=true"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 90
        while not list(tmp_path.glob("runs/*-s1-*/checkpoints/latest")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        started = list_children(process.pid)
        os.kill(list_children(started[1])[0], signal.SIGKILL)  # the first rank of seed 1
        message = process.communicate(timeout=150)[1]
    assert process.returncode == 1
    folders = [path for path in (tmp_path / "runs").iterdir() if path.name != "sweeps"]
    assert len(folders) == 4
    assert sorted(RunFolder(path).is_finished for path in folders) == [False, True, True, True]
    assert "4 jobs: 3 finished, 1 failed" in message
    assert "rank 0 of 2 was killed by SIGKILL" in message
    mine = [path for path in Path("/proc").glob("[0-9]*/cwd") if path.exists() and path.resolve() == tmp_path]
    assert not mine
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=150)
    assert "3 were finished before" in again.stderr
    assert "4 jobs: 4 finished" in again.stderr
    # the one that was mended goes on in its own; what SIGKILL left of its first part may be without any record
    logged = offline_runs(tmp_path)
    assert len({run.run_id for run in logged if run.run_id}) == 4
    assert len({run.run_id for run in logged if run.exit_code == 0}) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer.lightning.limit_val=3"], "error: lightning.Trainer has no argument 'limit_val' (trainer.lightning)"),
        (["resume=nowhere"], "error: resume=nowhere: no run.json there"),
    ],
)
def test_bad_commands_end_in_one_line(
    tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without PyTorch, which takes seconds to import; so does a setting of a task that is out of bounds."""
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    done = train_py(*arguments, cwd=tmp_path, check=False)
    imported, messages = [], []
    for line in done.stderr.splitlines():
        (imported if line.startswith("import time:") else messages).append(line)
    assert done.returncode == 2
    assert messages[0].startswith(message)
    assert len(messages) == 1
    assert {"torch", "lightning"}.isdisjoint(line.rpartition("|")[2].strip() for line in imported)
    assert any("hydra" in line for line in imported)


def test_settings_are_checked_early_as_they_are_later() -> None:
    """Invariant: the message of `check_early` is that of the run; it says nothing of what is not settled yet."""
    assert {target: find_target(target, "task").__annotations__["settings"] for target in TASKS} == TASKS
    refused: tuple[tuple[tuple[str, ...], str], ...] = (
        (("task.steps=text",), "task.steps must be a whole number, got 'text'"),
        (("task.warmup_steps=99999999",), "task.warmup_steps 99999999 must be below task.steps"),
        (("trainer.precision=16",), "trainer.precision must be one of"),
        (("trainer=fsdp", "trainer.strategy=deepspeed_2"), "trainer=fsdp and trainer.strategy=deepspeed_2 name two"),
        (("trainer=deepspeed_3", "trainer.compile=true"), "trainer=deepspeed_3 does not go with trainer.compile=true"),
        (("trainer=deepspeed_2", "trainer.precision=bf16-true"), "does not go with trainer.precision=bf16-true"),
        (
            ("trainer=deepspeed_2", "+trainer.lightning.gradient_clip_algorithm=value"),
            "does not go with trainer.lightning.gradient_clip_algorithm=value",
        ),
        (("trainer=deepspeed_3", "task.ema=0.9"), r"task\.ema averages whole weights, trainer=deepspeed_3 takes"),
        (("trainer=deepspeed_3", "task.optimizer=muon"), r"task\.optimizer=muon works on whole matrices"),
    )
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for overrides, message in refused:
            with pytest.raises(ValueError, match=message):
                check_here(*overrides)
        check_here("task.operations=1e9", "task.steps=null")
        check_here("trainer=gpu", "trainer.strategy=fsdp")


def check_here(*overrides: str) -> None:
    composed = compose("config", overrides=list(overrides), return_hydra_config=True)
    choices = composed.hydra.runtime.choices
    check_early(OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"]), choices)


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"init=nowhere: no config\.json"):
        run_here(tmp_path, "task=sample", "init=nowhere")


@pytest.mark.slow
def test_a_recipe_in_small(tmp_path: Path) -> None:
    """iGPT-XL's recipe with a nano network, sharded over two processes on a CPU; its weights are read by one."""
    small = (
        "model=igpt_nano", "data=digits", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.nodes=1",
        "trainer.compile=false", "task.batch_size=8", "task.steps=4", "task.keep_steps=[2]", "task.warmup_steps=1",
        "task.val_every=2",
    )  # fmt: skip
    train_py("experiment=pretrain_igpt_xl_64", *small, cwd=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    numbers = RunFolder(run).read_result()["numbers"]
    result, _ = run_here(tmp_path, "task=evaluate", f"init={run}", "task.baseline_images=0", "trainer=cpu")
    assert result.numbers["val/loss_gen"].value == pytest.approx(numbers["val/loss_gen"]["value"], rel=1e-2)  # bfloat16
    assert sorted(path.suffix for path in (run / "samples").iterdir()) == [".png", ".png"]
