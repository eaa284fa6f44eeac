"""`init=` alone: data, network, tokens and objective of the run it names, as if typed."""

import json
import logging
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from igpt.report.folder import RunFolder
from igpt.report.identity import identity
from igpt.run.arguments import parse_overrides, prepare_arguments
from igpt.run.init_defaults import complete_job, describe_taken, init_overrides
from igpt.run.launch import run
from igpt.run.run_config import to_dict
from tests.compositions import check_overrides
from tests.conftest import ROOT

CONF = ROOT / "conf"
OLDER = ROOT / "tests" / "older_runs"
PRETRAINED = OLDER / "2dc1449" / "finished" / "pretrain-igpt_nano-digits8-ar-s0-11a83508"
STAGE = next((OLDER / "2dc1449" / "finished").glob("pipeline-*")) / "2_pretrain"
WEIGHTS = ["model=checkpoint", "tokens=checkpoint", "objective=checkpoint"]


@cache
def composed(*overrides: str) -> DictConfig:
    """Their config, of the files in conf/; nobody changes it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def added(*typed: str) -> list[str]:
    """What `init=` adds to a command."""
    base = composed(*(text for text in typed if (CONF / text.partition("=")[0]).is_dir()))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return init_overrides(parse_overrides(list(typed)), base, lambda _: base, [])


def begin(folder: Path, *typed: str, option: str = "digits", init: Path | None = None, **data: Any) -> Path:
    """A run folder with the record of a command, as `launch` writes it; `data`: other recorded settings of these."""
    config = to_dict(composed(*typed))
    config |= {"init": init and str(init), "data": config["data"] | data}
    folder.mkdir(parents=True)
    RunFolder(folder).start(config, list(typed), {}, {"data_option": option})
    return folder


@pytest.mark.parametrize(
    ("trained", "task", "taken"),
    [
        # padding and mirroring are the recipe's, none in pretraining and 4 and true in fine-tuning: nobody chose them
        (["data=cifar10", "data.path=HERE", "data.labels_per_class=25"], "finetune", []),
        # but for one that was typed, even the one that pretraining has anyway
        (["data=cifar10", "data.augment.pad=0"], "finetune", []),
        (["data=cifar10", "task=finetune"], "pretrain", ["data=cifar10"]),
        # chosen in an experiment's file
        (
            ["experiment=cifar10_16_pretrain", "data.path=HERE"],
            "probe",
            ["data=cifar10", "data.path=HERE", "data.resolution=16", "data.palette_size=128"],
        ),
        # streams, composed of parts of options
        (["data=imagenet64_web", "data.resolution=32", "data.streams.web.path=HERE/{0..1}.tar"], "evaluate", []),
        (["data=openai_npy", "data.name=cifar10", "data.path=HERE", "data.clusters=HERE/c.npy"], "complete", []),
    ],
)
def test_the_data_are_taken_as_they_were_typed(trained: list[str], task: str, taken: list[str], tmp_path: Path) -> None:
    """Round trip, through the record: the overrides that chose the data, and no other."""
    here = tmp_path / "a b=c"
    here.mkdir()
    (here / "c.npy").touch()
    trained, taken = (
        [re.sub(r"=HERE(.*)", rf'="{here}\1"', text) for text in texts] for texts in (trained, taken or trained)
    )
    init = f"init={begin(tmp_path / 'run', *trained, option=taken[0].partition('=')[2])}"
    found = added(f"task={task}", init)
    of_weights = WEIGHTS if task in ("finetune", "pretrain") else []
    assert sorted(found) == sorted([*of_weights, *taken])
    if "data.labels_per_class=25" in trained:  # Chen et al. 2020, §3.1: 4 pixels
        short, long = (check_overrides([f"task={task}", init, *more], [CONF]) for more in ([], [*WEIGHTS, *taken]))
        assert identity(to_dict(short), {}) == identity(to_dict(long), {})
        assert short.data.augment == {"pad": 4, "flip": True}


def test_what_is_chosen_stays_chosen() -> None:
    """By hand, over a record of an older release: what the command, its experiment, or its pipeline decides."""
    init = f"init={PRETRAINED}"
    assert added("task=finetune", init) == [*WEIGHTS, "data=digits"]
    assert added("task=pretrain", init, "model=igpt_s", "tokens.order=random") == [
        "objective=checkpoint",
        "data=digits",
    ]
    assert added("task=probe", init, "data=cifar10") == []
    assert added("experiment=paper/finetune_cifar10", init) == []
    assert added("task=pipeline", f"init={STAGE / 'model'}") == ["data=digits"]
    assert added("task=scaling", f"task.runs=[{PRETRAINED}]") == ["data=digits"]
    assert added("task=sample", init) == added("task=compare") == added("task=finetune") == []
    assert prepare_arguments(["task=probe", init, "data=checkpoint"], CONF) == ["data=digits", "task=probe", init]
    with pytest.raises(
        ValueError, match=r"^data=checkpoint takes the data of the run that init= names: init=RUN_FOLDER"
    ):
        added("task=probe", "data=checkpoint")


def test_own_images_are_read_at_the_size_of_the_weights(tmp_path: Path) -> None:
    """By hand: `data=folder` has no resolution of its own; what is typed wins."""
    photos = ("task=probe", "data=folder", f"data.path={tmp_path}")
    without_record = ROOT / "tests" / "checkpoint" / "format_1"  # 2×2 pixels
    assert added(*photos, f"init={PRETRAINED}") == ["data.resolution=8"]
    assert added(*photos, f"init={without_record}") == ["data.resolution=2"]
    assert added(*photos, f"init={PRETRAINED}", "data.resolution=16") == []
    assert added(*photos, f"init={PRETRAINED}", "tokens=rgb") == []


def test_imports_lead_to_the_pretraining_and_a_probe_has_its_own_data(tmp_path: Path) -> None:
    """By hand: steps, files, exports and imports of a run have its data, and not what happens to be in their record."""
    runs = tmp_path / "runs"
    begin(runs / "trained", labels_per_class=9)
    (runs / "trained" / "model").mkdir()
    begin(runs / "imported", "task=import", init=runs / "trained" / "model", labels_per_class=1)
    begin(runs / "exported", "task=export", init=runs / "imported")
    begin(runs / "probed", "task=probe", init=runs / "trained", labels_per_class=4)
    for place, n in (("trained/checkpoints/step_3/0.distcp", 9), ("exported/huggingface", 9), ("probed", 4)):
        assert added("task=evaluate", f"init={runs / place}") == ["data=digits", f"data.labels_per_class={n}"]
    assert added("task=evaluate", f"init={runs / 'probed'}", "data.labels_per_class=7") == ["data=digits"]


def test_a_record_before_the_names_of_options(tmp_path: Path) -> None:
    """By hand: version 1, of relative paths and other names of settings; its command tells the option."""
    record = json.loads((OLDER / "photographs.json").read_text())
    record["config"]["data"] |= {"path": "photos", "stream": {"buffer": 7, "lanes": 2, "held": 5000}}
    folder, photos = tmp_path / "runs" / "x", tmp_path / "photos"
    folder.mkdir(parents=True)
    photos.mkdir()
    (folder / "run.json").write_text(json.dumps(record))
    assert added("task=probe", f"init={folder}") == [
        "data=imagenet32", f"data.path={photos}", "data.stream.buffer=7", "data.stream.num_readers=2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"path": "/nowhere/a"},
            r"the images of its run were in /nowhere/a, where nothing is now: type data\.path=… of",
        ),
        (
            {"_target_": "os.system"},
            r"its data=folder need data\._target_=os\.system, which is never taken from a file;",
        ),
        ({"crop": {"_target_": "os.system"}}, r"need \+\+data\.crop\._target_=os\.system, which is never taken"),
    ],
)
def test_a_record_brings_options_and_plain_values_only(data: Any, message: str, tmp_path: Path) -> None:
    """By hand, of a folder that was sent: refused in a line."""
    folder = begin(tmp_path / "sent", "data=folder", "data.path=.", option="folder", **data)
    with pytest.raises(ValueError, match=message) as caught:
        added("task=evaluate", f"init={folder}")
    assert len(str(caught.value).splitlines()) == 1
    path = folder / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "search_path": 3}))
    with pytest.raises(ValueError, match=r"run\.json is damaged: its search_path are no list of texts"):
        added("task=evaluate", f"init={folder}")


def test_a_text_of_a_record_is_no_interpolation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "canary")
    folder = begin(tmp_path / "sent", option="digits", name="${oc.env:SECRET}")
    name = added("task=evaluate", f"init={folder}")[-1]
    assert name == r'data.name="\${oc.env:SECRET}"'
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert compose("config", overrides=[name]).data.name == "${oc.env:SECRET}"


def test_an_option_of_another_config_folder_is_typed(tmp_path: Path) -> None:
    """Round trip: the command in the error has the folder, and with it the run's data are taken."""
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "mine.yaml").write_text("defaults: [digits]\nshift: 0\n")
    folder = begin(tmp_path / "sent", option="mine", shift=0, split_seed=3)
    record = json.loads((folder / "run.json").read_text())
    record["search_path"] = ["--config-dir", str(tmp_path / "conf")]
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"its data=mine is no option of conf/data/; if you trust it, type") as caught:
        prepare_arguments(["task=evaluate", f"init={folder}"], CONF)
    _, _, flag, place, *typed = shlex.split(str(caught.value).rpartition("type it: ")[2])
    assert prepare_arguments([flag, place, *typed], CONF) == [flag, place, "data=mine", "data.split_seed=3", *typed]


def test_weights_without_a_record_need_data(tmp_path: Path) -> None:
    known = ROOT / "tests" / "checkpoint" / "format_1"
    for init, message in (
        ("openai/imagegpt-small", "no record tells which images these weights are of: type data=OPTION"),
        (str(known), r"these weights are of \(their config\.json names toy2\): type data=OPTION, as data=cifar10"),
        (str(tmp_path / "nothing"), "give a finished run folder"),
    ):
        with pytest.raises(ValueError, match=f"^init={init}: .*{message}"):
            added("task=probe", f"init={init}", "data.val_fraction=0")


def test_the_jobs_of_a_sweep_take_what_is_theirs(tmp_path: Path) -> None:
    """By hand: over seeds and equal runs for all together, over others for each; on a cluster that is refused."""
    other = begin(tmp_path / "other", labels_per_class=9)
    sweep = ["-m", "task=probe", f"init={PRETRAINED},{STAGE}", "seed=0,1"]
    assert prepare_arguments(sweep, CONF) == ["-m", "data=digits", *sweep[1:], "resume=auto"]
    with pytest.raises(
        ValueError, match=r"^hydra/launcher=slurm: jobs of init take different data from init=: type data"
    ):
        prepare_arguments([*sweep[:2], f"init={PRETRAINED},{other}", "hydra/launcher=slurm"], CONF)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        job = ["task=probe", f"init={other}", "data=checkpoint"]
        cfg = complete_job(lambda texts: compose("config", overrides=texts, return_hydra_config=True), job)
    assert cfg.hydra.overrides.task == ["data=digits", "data.labels_per_class=9", *job[:2]]


def test_the_first_line_says_what_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: the run that is named by `init=` alone is the one with all typed, and is resumed from its record."""
    monkeypatch.chdir(tmp_path)
    base = ["task=evaluate", f"init={PRETRAINED}", "task.baseline_images=0", "trainer=cpu", "logger=none"]
    with caplog.at_level(logging.INFO):
        result, folder = run(*base, conf=CONF)
    assert f"{folder}; data from {PRETRAINED}: digits" in caplog.text
    assert run(*base, "data=digits", conf=CONF) == (result, folder)
    assert run(f"resume={folder}", conf=CONF) == (result, folder)
    cfg = OmegaConf.create({"paths": {}, "init": str(PRETRAINED), "task": {"requires": []}})
    assert describe_taken(cfg, ["data=digits"]) == f"data from {PRETRAINED}: digits"
    assert describe_taken(cfg, ["data=digits", "data.path=elsewhere"]) == ""  # other images
