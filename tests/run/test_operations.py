"""`task.operations`: a training as long as its floating-point operations allow."""

import logging
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from igpt.run.jobs import Job
from igpt.run.launch import build_components, run
from igpt.run.sweep import _predict_folders
from tests.conftest import ROOT

CONF = ROOT / "conf"
SMALL = ("trainer=cpu", "data=digits", "data.palette_size=8", "model=igpt_pico", "callbacks=none", "logger=none")
TRAINING = (*SMALL, "task.batch_size=4", "task.warmup_steps=1", "task.val_every=0")
PIPELINE = (*SMALL, "task=pipeline", "++task.stages.pretrain={batch_size: 4, warmup_steps: 1, val_every: 0}")
# by hand: 64 positions, of each 6 operations a weight of 8 layers of 12 · 32² and of 8 colours · 32, and 12 of causal
# attention for each of the 32 positions that are before it on average, and 32 channels
IMAGE = 64 * (6 * (8 * 12 * 32**2 + 8 * 32) + 8 * 12 * 32 * 32)
STAGE = "++task.stages.pretrain"


@pytest.mark.parametrize(
    ("base", "place"), [(TRAINING, "task"), (PIPELINE, STAGE)], ids=["a run", "a stage of a pipeline"]
)
def test_operations_are_the_steps_that_they_make(base: tuple[str, ...], place: str, tmp_path: Path) -> None:
    """By hand: 2.6 steps are 3. Invariant: it is the run that states these steps, in a sweep, too."""
    base = (*base, f"paths.runs={tmp_path / 'runs'}")
    typed = f"{place}.operations={2.6 * 4 * IMAGE}"
    named = build_components(*base, typed, conf=CONF).run
    assert named.name == build_components(*base, f"{place}.steps=3", conf=CONF).run.name
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=[*base, typed], return_hydra_config=True)
        job = Job(0, [])
        _predict_folders([job], [cfg])
    assert job.folder is not None
    assert Path(job.folder).name == named.name


def test_a_short_one_takes_a_step_and_is_met_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Invariant: finished, it is found by its command, by its steps, and by resume=."""
    base = (*TRAINING, f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}", "task.warmup_steps=0")
    with caplog.at_level(logging.INFO):
        result, folder = run(*base, "task.operations=5", conf=CONF)
    assert f"task.operations=5: 1 steps of 4 images, {IMAGE:.4g} operations an image" in caplog.text
    assert result.provenance["step"] == 1
    for again in ([*base, "task.operations=5"], [*base, "task.steps=1"], [f"resume={folder}"]):
        assert run(*again, conf=CONF) == (result, folder)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((*TRAINING, "task.operations=1e9", "task.steps=5"), r"^task\.operations=1e\+09 decides .* leave one out$"),
        (
            (*PIPELINE, f"{STAGE}.steps=5", f"{STAGE}.operations=1e9"),
            r"^task\.stages\.pretrain\.operations=1e\+09 decides the steps, and task\.stages\.pretrain\.steps is given",
        ),
        ((*TRAINING, "task.operations=5"), r"^task\.warmup_steps 1 must be below task\.steps 1: .*task\.operations$"),
        ((*TRAINING, "task.operations=-5"), r"^task\.operations must be at least 1e-100 or null, got -5$"),
        ((*TRAINING, "task.operations=many"), r"^task\.operations must be a number or null, got 'many'$"),
        ((*TRAINING, "task.operations=1e9", "data.resolution=no"), r"^data\.resolution must be a whole number"),
        (
            (*PIPELINE, f"{STAGE}.model=checkpoint", f"{STAGE}.operations=1e9"),
            r"^task\.stages\.pretrain\.operations: the network of an earlier stage is not known yet: give",
        ),
        ((*PIPELINE, "++task.stages.evaluate.operations=1e9"), r"^task\.stages\.evaluate has no setting 'operations'"),
    ],
)
def test_operations_that_are_refused(overrides: tuple[str, ...], message: str, tmp_path: Path) -> None:
    """By hand: one line, before anything starts."""
    with pytest.raises(ValueError, match=message):
        run(*overrides, f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}", conf=CONF)
    assert not (tmp_path / "runs").exists()
