"""`${recipe:…}`: what a run trains with where nobody says otherwise, by its network, tokens and data."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from igpt.run import recipes
from igpt.run.execute import stage_runner
from igpt.run.launch import describe_run
from igpt.run.operations import resolve_steps
from igpt.run.pipeline_stages import stage_configs
from igpt.run.variants import apply_variant
from tests.configs import CONF, built, save_small

VALUES = ("learning_rate", "batch_size", "steps", "warmup_steps")
# the digest's table of rates; batch, steps and an epoch of 1,229,920 images of its section 4
PAPER: dict[str, tuple[str, tuple[float, int, int, int]]] = {
    "pretrain_s": ("model=igpt_s data=imagenet32", (0.003, 128, 1_000_000, 9609)),
    "pretrain_m": ("model=igpt_m data=imagenet32", (0.003, 128, 1_000_000, 9609)),
    "pretrain_l": ("model=igpt_l data=imagenet32", (0.001, 128, 1_000_000, 9609)),
    "pretrain_l_48": ("model=igpt_l data=imagenet48", (0.01, 128, 1_000_000, 9609)),
    "pretrain_xl": ("model=igpt_xl data=imagenet64", (0.0003, 64, 2_000_000, 19218)),
    "pretrain_s_bert": ("model=igpt_s data=imagenet32 objective=bert", (0.01, 128, 1_000_000, 9609)),
    "pretrain_m_bert": ("model=igpt_m data=imagenet32 objective=bert", (0.003, 128, 1_000_000, 9609)),
    "pretrain_l_bert": ("model=igpt_l data=imagenet32 objective=bert", (0.001, 128, 1_000_000, 9609)),
}
WEIGHTS = ("task=finetune", "model=checkpoint", "tokens=checkpoint", "objective=checkpoint")


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def values(cfg: Any) -> tuple[Any, ...]:
    return tuple(cfg.task[key] for key in VALUES)


def save_igpt_l(folder: Path) -> Path:
    """Small weights that say that they are iGPT-L's, of masked pixels."""
    save_small(folder, causal=False)
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": "igpt_l"}))
    return folder


@pytest.mark.parametrize("name", PAPER)
def test_a_network_of_the_paper_has_its_recipe(name: str) -> None:
    """Independent source: the digest; and it is what the experiment of that name trains with."""
    typed, expected = PAPER[name]
    cfg, experiment = composed(*typed.split()), composed(f"experiment=paper/{name}")
    assert values(cfg) == expected
    assert {**cfg.task, "paper": None} == {**experiment.task, "paper": None}


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("data=cifar10 model=igpt_mini", (0.003, 128, 36_562, 352)),  # 104 passes over 45,000; one of warm-up
        ("", (0.003, 128, 600, 60)),
        ("data=letters", (0.003, 128, 600, 60)),
        ("data=stl10 data.path=x", (0.003, 128, 3_656, 36)),  # of 4,500
        ("data=folder data.path=x", (0.003, 128, 10_000, 500)),
        ("data=downsampled_imagenet", (0.003, 128, 1_000_000, 9_909)),  # of 1,268,338
        ("objective=bert", (0.003, 128, 600, 60)),  # a size of ours: not iGPT-S's 0.01
        ("model=igpt_l data=imagenet96 tokens=vqvae", (0.01, 128, 1_000_000, 9_609)),  # as long as at 48×48
        ("model=igpt_l data=imagenet64", (0.001, 128, 1_000_000, 9_609)),  # its first row
        ("model=igpt_xl objective=bert data=imagenet64_web", (0.0003, 64, 2_000_000, 19_218)),
        ("task.steps=20", (0.003, 128, 20, 2)),  # the warm-up is a tenth at most
        ("task.steps=1", (0.003, 128, 1, 0)),
        ("data=cifar10 task.batch_size=32", (0.003, 32, 146_250, 1_407)),  # as many images
        ("task.batch_size=32 task.steps=100 task.warmup_steps=50 task.learning_rate=1", (1, 32, 100, 50)),
        ("model.name=5 data.resolution=no task.batch_size=0 task.steps=many", (0.003, 0, "many", 60)),  # refused later
    ],
)
def test_other_networks_and_data_by_hand(typed: str, expected: tuple[Any, ...]) -> None:
    assert values(composed(*typed.split())) == expected


def test_what_is_given_wins() -> None:
    """Invariant: the command over a variant, a variant and an experiment over the recipe; in a stage as well."""
    assert values(composed("experiment=cifar10_16_pretrain")) == (0.003, 32, 3000, 100)
    for typed, rate in ((), 0.006), (("task.learning_rate=1",), 1):
        apply_variant(cfg := composed("model=igpt_l", "variant=muon", *typed), typed)
        assert values(cfg) == (rate, 128, 600, 60)
    stages = "{a: {task: pretrain, model: igpt_l, batch_size: 64}, b: {task: pretrain, from: null, steps: 30}}"
    run = built("task=pipeline", f"+task.stages={stages}").run
    with initialize_config_dir(str(CONF), version_base="1.3"):
        made = stage_configs(run)
    assert [values(stage.cfg) for stage in made.values()] == [(0.001, 64, 1200, 120), (0.003, 128, 30, 3)]


def test_operations_leave_a_warm_up_that_fits() -> None:
    """By hand: 10 steps of the small network's operations have one of warm-up; a typed one is refused if too long."""
    small = ("model=igpt_pico", "data.palette_size=8", "task.batch_size=4")
    image = 64 * (6 * (8 * 12 * 32**2 + 8 * 32) + 8 * 12 * 32 * 32)  # tests/run/test_operations.py
    run = built(*small, f"task.operations={10 * 4 * image}").run
    resolve_steps(run)
    assert values(run.cfg) == (0.003, 4, 10, 1)
    with pytest.raises(ValueError, match=r"task\.warmup_steps 20 must be below task\.steps 20: lower the warm-up"):
        built("task.steps=20", "task.warmup_steps=20").check_settings()


@pytest.mark.parametrize(
    ("typed", "recipe"),
    [
        (
            "model=igpt_l data=imagenet48 data.path=x",
            "iGPT-L, 48×48, next pixels (Chen et al. 2020, Table 5; the rate from memory, unverified): rate 0.01, "
            "batch 128; imagenet (Chen et al. 2020, §3.1): 1,000,000 steps, warm-up 9,609",
        ),
        (
            "",
            "as iGPT-S, 32×32, next pixels (Chen et al. 2020, Table 5): rate 0.003, batch 128; digits (ours: 57 "
            "passes): 600 steps, warm-up 60",
        ),
        ("task.learning_rate=1 task.batch_size=8 task.steps=9", "digits (ours: 57 passes): warm-up 0"),
        ("task.learning_rate=1 task.batch_size=8 task.steps=9 task.warmup_steps=0", ""),
        (
            "task=finetune data=cifar10 data.path=x model=igpt_l task.batch_size=64",
            "a tenth of the rate of iGPT-L, 32×32, next pixels (Chen et al. 2020, Table 5; the rate from memory, "
            "unverified): rate 0.0001; augmentation (Chen et al. 2020, §3.1): pad 4, flip",
        ),
        (
            "task=finetune data=cifar10 data.path=x task.learning_rate=1 task.batch_size=8 data.augment.pad=0",
            "augmentation (Chen et al. 2020, §3.1): flip",
        ),
        (
            "model=igpt_s data=imagenet32 data.path=x tokens=rgb task.steps=9 task.warmup_steps=0",
            "as iGPT-S, 32×32, next pixels (Chen et al. 2020, Table 5): rate 0.003, batch 128",
        ),
        ("task=palette", ""),
    ],
)
def test_the_first_line_says_what_is_taken_and_from_whom(typed: str, recipe: str, tmp_path: Path) -> None:
    """By hand: only values that nobody gave; nothing where all are given."""
    run = built(*typed.replace("data.path=x", f"data.path={tmp_path}").split()).run
    line = describe_run(run, ", in FOLDER")
    assert line.partition("; ")[0].endswith(", in FOLDER")
    assert line.partition("; recipe: ")[2] == recipe


def test_a_tenth_of_the_rate_and_the_papers_augmentation_are_fine_tunings_alone() -> None:
    """By hand: 4 pixels of 32, 2 of 16; of CIFAR alone."""
    for size, rate in (("igpt_s", 0.0003), ("igpt_l", 0.0001), ("igpt_xl", 0.00003)):
        assert composed("task=finetune", f"model={size}").task.learning_rate == rate
    assert composed("task=finetune", "model=igpt_l", "data=imagenet48").task.learning_rate == 0.001
    for typed, pad, flip in (
        ("task=finetune data=cifar10", 4, True), ("task=finetune data=cifar100 data.resolution=16", 2, True),
        ("task=finetune data=cifar10 data.augment.pad=0", 0, True), ("task=finetune data=imagenet32", 0, False),
        ("data=cifar10", 0, False), ("task=probe data=cifar10", 0, False), ("task=low_data data=cifar100", 0, False),
    ):  # fmt: skip
        assert composed(*typed.split()).data.augment == {"pad": pad, "flip": flip}, typed
    stages = "{pretrain: {}, probe: {}, finetune: {from: pretrain}, own: {task: finetune, data: {augment: {pad: 1}}}}"
    run = built("task=pipeline", "data=cifar10", f"+task.stages={stages}").run
    with initialize_config_dir(str(CONF), version_base="1.3"):
        made = stage_configs(run)
    assert [stage.cfg.data.augment.pad for stage in made.values()] == [0, 0, 4, 1]
    assert [stage.cfg.data.augment.flip for stage in made.values()] == [False, False, True, True]


def test_weights_have_the_recipe_of_their_own_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: iGPT-L's 0.001 with masked pixels, a tenth of it; the same from weights in another format."""
    init = save_igpt_l(tmp_path / "run")
    for place in (init, init / "model", init / "model" / "model.safetensors"):
        assert composed(*WEIGHTS, f"init={place}").task.learning_rate == 0.0001
    assert composed("task=finetune", "objective=bert", f"init={init}").task.learning_rate == 0.0003  # model=igpt_nano
    run = built(*WEIGHTS, f"init={init}").run
    assert "recipe: a tenth of the rate of iGPT-L, 32×32, masked pixels (" in describe_run(run)
    metadata = SimpleNamespace(model="igpt_l", objective={"name": "ar"}, network=SimpleNamespace(n_ctx=48**2))
    monkeypatch.setattr("igpt.checkpoint.find.find_weights", lambda *_, **__: SimpleNamespace(metadata=metadata))
    assert composed(*WEIGHTS, f"init={tmp_path}/igpt-l").task.learning_rate == 0.001
    monkeypatch.undo()
    assert composed(*WEIGHTS, f"init={tmp_path}/nowhere").task.learning_rate == 0.0003


def test_a_stage_has_the_recipe_of_the_weights_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: known once the earlier stage has run, also where a finished run stands in for it."""
    init, seen = save_igpt_l(tmp_path / "run"), []
    monkeypatch.setattr("igpt.run.execute.run_and_report", lambda components: seen.append(components.run.config))
    stage = "{task: finetune, model: checkpoint, objective: checkpoint, steps: 2, val_every: 1}"
    pipeline = ("task=pipeline", "objective=bert", f"+task.stages={{pretrain: {{}}, tune: {stage}}}")
    pipelines = built(*pipeline), built(*pipeline, f"+task.stages.tune.run={tmp_path / 'tuned'}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        run_stage = stage_runner(pipelines[0])
        run_stage("tune", folder=tmp_path / "tuned", init=str(init), tokenizer=None)
        assert seen[0]["task"]["learning_rate"] == 0.0001
        (tmp_path / "tuned" / "result.json").write_text("{}")
        assert stage_configs(pipelines[1].run)["tune"].stand_in == tmp_path / "tuned"


def test_a_run_goes_on_by_the_recipe_it_began_with(tmp_path: Path) -> None:
    """By hand: fine-tuning of an earlier release; what is given stands, and a record brings numbers only."""
    config = {
        "task": {"learning_rate": 0.0003, "batch_size": "${oc.env:HOME}", "steps": 7},
        "data": {"augment": {"pad": 0, "flip": False}},
    }
    (tmp_path / "run.json").write_text(json.dumps({"version": 4, "config": config}))
    for typed, rate in ((), 0.0003), (("task.learning_rate=1",), 1):
        cfg = composed("task=finetune", "data=cifar10", "model=igpt_l", *typed)
        recipes.keep_recorded(cfg, tmp_path)
        assert values(cfg) == (rate, 128, 20000, 0)
        assert cfg.data.augment == {"pad": 0, "flip": False}
    cfg = composed()
    recipes.keep_recorded(cfg, tmp_path / "none")
    assert values(cfg) == (0.003, 128, 600, 60)
