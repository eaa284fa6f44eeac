"""A run's name, and what goes on under it: resumed runs, pipelines and sweeps."""

import logging
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import initialize_config_dir
from hydra.utils import get_object

from igpt.metric.result import Result
from igpt.report.folder import RunFolder
from igpt.run.arguments import prepare_arguments
from igpt.run.launch import launch
from igpt.run.run_dir import find_run_dir
from tests.configs import CONF, built, save_small
from tests.conftest import learned_numbers


def test_what_decides_a_run_decides_its_name(tmp_path: Path) -> None:
    """Invariant: where and how a run is carried out does not change its identity; what it learns from does."""
    palettes = [tmp_path / name for name in ("a.npy", "b.npy")]
    for i, path in enumerate(palettes):
        np.save(path, np.linspace(-1, 1, 51).reshape(17, 3).astype(np.float32)[:: 1 - 2 * i])
    name = built().run.name
    same = ["paths.cache=x", "paths.runs=y", "rerun=true", "trainer=cpu", "trainer.micro_batch=8", "callbacks=none"]
    for override in [*same, "trainer.num_workers=3", "logger=[csv,wandb]"]:
        assert built(override).run.name == name
    others = ["seed=1", "task.steps=7", "trainer.precision=bf16-mixed", "data.shift=0", "tokens.order=random"]
    names = {built(override).run.name for override in others}
    names |= {built("tokens=openai", f"tokens.path={path}").run.name for path in palettes}
    before = built("tokens=openai", f"tokens.path={palettes[0]}").run.name
    palettes[1].rename(palettes[0])
    names.add(built("tokens=openai", f"tokens.path={palettes[0]}").run.name)
    assert before in names
    assert name not in names
    assert len(names) == 8


def test_a_sample_is_named_after_what_its_weights_saw(tmp_path: Path) -> None:
    """By hand: no image is read, so the data is the checkpoint's."""
    init = save_small(tmp_path / "run")
    assert built("task=sample", f"init={init}").run.name.startswith("sample-small-toy-ar-s0-")


def test_a_stopped_pipeline_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: finished stages are not run again, and the end is that of a pipeline that was never stopped."""
    small = ["experiment=quickstart", "data=digits", "callbacks=none"]
    small += ["model.n_layer=1", "model.n_embd=8", "model.n_head=2"]
    small += [f"task.stages.{stage}=null" for stage in ("probe", "finetune", "scratch")]
    steps = ["steps=4", "warmup_steps=1", "val_every=0", "log_every=1", "checkpoint_every=2"]
    overrides = [*small, *(f"task.stages.pretrain.{s}" for s in steps), f"paths.cache={tmp_path}"]

    def start(*more: str, runs: str) -> tuple[dict[str, Any], Path]:
        build = built(*overrides, *more, f"paths.runs={tmp_path / runs}")
        with initialize_config_dir(str(CONF), version_base="1.3"):
            result = launch(build.run.cfg, choices=build.run.choices, overrides=overrides)
        (folder,) = (tmp_path / runs).iterdir()
        return {key: of.value for key, of in learned_numbers(result).items() if "per_s" not in key}, folder

    full, _ = start(runs="whole")
    again: list[str] = []
    for stage in ("igpt.task.pretrain.run", "igpt.task.complete.run"):  # stopped, resumed, stopped again
        with monkeypatch.context() as patch:
            patch.setattr(stage, failing(get_object(stage)))
            with pytest.raises(KeyError):
                start(*again, runs="stopped")
        (folder,) = (tmp_path / "stopped").iterdir()
        again = [f"resume={folder}"]
    done = [folder / stage / "result.json" for stage in ("1_palette", "2_pretrain")]
    written = [path.stat().st_mtime_ns for path in done]
    resumed, _ = start(*again, runs="stopped")
    assert resumed == full
    assert [path.stat().st_mtime_ns for path in done] == written


def failing(task: Any) -> Any:
    """A task that takes the same settings, and stops."""

    @wraps(task)
    def stop(*_: Any, **__: Any) -> None:
        raise KeyError("stopped")

    return stop


def test_resume_and_force_together() -> None:
    with pytest.raises(ValueError, match="choose one of them"):
        find_run_dir(built("resume=x", "rerun=true").run)


def test_a_resumed_run_with_other_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What differs is named; what does not decide what is learned may differ, and is listed."""
    first = built(f"paths.runs={tmp_path}")
    folder = find_run_dir(first.run)
    folder.start(first.run.config, [], first.run.input_hashes)
    with caplog.at_level(logging.INFO):
        assert find_run_dir(built(f"resume={folder.path}", "trainer.num_workers=2").run).path == folder.path
    assert "has no checkpoint yet: it starts from the first step" in caplog.text
    with caplog.at_level(logging.INFO):
        find_run_dir(built(f"resume={folder.path}", "trainer.num_workers=2", "task.log_every=7").run)
    assert "trainer.num_workers None ≠ 2; task.log_every 20 ≠ 7" in caplog.text
    with pytest.raises(ValueError, match=r"another run .*: task.steps 600 ≠ 5; task.warmup_steps 60 ≠ 0; seed 0 ≠ 1$"):
        find_run_dir(built(f"resume={folder.path}", "task.steps=5", "seed=1", "task.log_every=7").run)
    for override, message in (
        ("model=igpt_micro", "model.n_embd 64 ≠ 128"),
        ("tokens.palette.k=5", "tokens.palette.k 17 ≠ 5"),
        ("data.shift=0", "data.shift 1 ≠ 0"),
        ("objective=bert", "objective.mask_probability None ≠ 0.15"),
    ):
        with pytest.raises(ValueError, match=message):
            find_run_dir(built(f"resume={folder.path}", override).run)


def test_resume_auto_takes_the_folder_this_command_has_begun(tmp_path: Path) -> None:
    """Invariant: begun or not, the folder is the one of the settings; without it a begun run is not touched."""
    build = built(f"paths.runs={tmp_path}", "resume=auto")
    folder = find_run_dir(build.run)
    assert folder.path == tmp_path / build.run.name == find_run_dir(built(f"paths.runs={tmp_path}").run).path
    folder.start(build.run.config, [], build.run.input_hashes)
    (folder.path / "checkpoints").mkdir()
    (folder.path / "checkpoints" / "latest").touch()
    assert find_run_dir(build.run).path == folder.path
    with pytest.raises(ValueError, match=r"was begun and is not finished: continue it with `python train.py resume="):
        find_run_dir(built(f"paths.runs={tmp_path}").run)


def test_a_sweep_goes_on_by_itself() -> None:
    assert prepare_arguments(["-m", "seed=0,1"], CONF) == ["-m", "seed=0,1", "resume=auto"]
    assert prepare_arguments(["-m", "seed=0,1", "rerun=true"], CONF) == ["-m", "seed=0,1", "rerun=true"]
    assert prepare_arguments(["seed=0"], CONF) == ["seed=0"]


def test_resume_reads_the_saved_arguments(tmp_path: Path) -> None:
    """Round trip: saved overrides come first, in front of new ones; quotes and another directory do no harm."""
    folder = RunFolder(tmp_path / "a run")
    folder.start({}, ["task.steps=7", "rerun=true"], {})
    arguments = [f"resume='{folder.path}'", "trainer.num_workers=1"]
    assert prepare_arguments(arguments, CONF) == ["task.steps=7", *arguments]
    stage = RunFolder(folder.path / "2_pretrain")
    stage.start({}, None, {})
    with pytest.raises(ValueError, match=r"stage of a pipeline; continue that: resume=.*a run"):
        prepare_arguments([f"resume='{stage.path}'"], CONF)


STAGES = "++task.stages={pretrain: {steps: 2, warmup_steps: 1, val_every: 0, checkpoint_every: 2}, sample: {count: 1}}"
SMALLEST = ("task=pipeline", "model.n_layer=1", "model.n_embd=8", "model.n_head=2", "callbacks=none", "logger=none")


def test_a_finished_run_stands_for_a_stage(tmp_path: Path) -> None:
    """Invariant: nothing of it is computed again; one with other settings, or begun from other weights, is refused."""
    paths = (f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path}")

    def start(stages: str, *more: str) -> Result:
        build = built(*SMALLEST, *more, stages, *paths)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return launch(build.run.cfg, choices=build.run.choices, overrides=[])

    first = start(STAGES)
    (full_path,) = (tmp_path / "runs").iterdir()
    given = STAGES.replace("steps: 2", f"run: '{full_path / '1_pretrain'}', steps: 2")
    second = start(given)
    assert second.numbers["pretrain/val/loss_gen"] == first.numbers["pretrain/val/loss_gen"]
    assert [path.name for path in (tmp_path / "runs").glob("*/1_*") if (path / "run.json").exists()] == ["1_pretrain"]
    with pytest.raises(ValueError, match=r"task\.stages\.pretrain\.run=.*: that run is another: seed 0 ≠ 1"):
        start(given, "seed=1")
    with pytest.raises(ValueError, match="no finished run is there"):
        start(given.replace("1_pretrain", "2_pretrain"))
    other = start(
        STAGES.replace("sample: {count: 1}", f"again: {{task: sample, count: 1, run: '{full_path / '2_sample'}'}}")
    )
    assert {key.replace("again/", "sample/") for key in other.numbers} == first.numbers.keys()
    swapped = "{pretrain: {steps: 3, warmup_steps: 1, val_every: 0, checkpoint_every: 2}, "
    swapped += f"sample: {{count: 1, run: '{full_path / '2_sample'}'}}}}"
    with pytest.raises(ValueError, match=r"task\.stages\.sample\.run=.*: it began from other files \(init\)"):
        start(f"++task.stages={swapped}")
