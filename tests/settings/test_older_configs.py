"""Records of older releases: one table, by their version, says what their settings are called now."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from igpt.report.folder import RunFolder
from igpt.report.identity import changes, deciding, identity
from igpt.run.launch import run
from igpt.run.run_dir import find_run_dir
from igpt.settings.config_changes import TABLE, Changes
from igpt.settings.older_configs import (
    VERSION,
    answer,
    flat,
    nested,
    read_record,
    updated,
    updated_record,
)
from igpt.utils import files
from tests.configs import built
from tests.conftest import ROOT

# `train.py OVERRIDES` of the release before `GPTConfig` wrote these
KEPT = ROOT / "tests" / "older_runs"
# defaults of `task=pretrain` then, which are those of a table of recipes now
DEFAULTS = {
    "steps": 1000000, "batch_size": 128, "learning_rate": 0.003, "warmup_steps": 9609, "val_every": 5000,
    "log_every": 100, "checkpoint_every": 5000, "keep_steps": [],
}  # fmt: skip


def command_today(record: dict[str, Any]) -> list[str]:
    """What is typed today to have the run of a record."""
    typed: list[str] = record["overrides"]
    then = [f"task.{key}={value}" for key, value in DEFAULTS.items() if "task=pretrain" in typed]
    return [*(text for text in then if not any(each.startswith(text.partition("=")[0]) for each in typed)), *typed]


@pytest.mark.parametrize("name", ["pretrain", "finetune", "photographs"])
def test_it_is_the_same_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Round trip: by the same overrides and defaults, this release makes the config that the older one meant."""
    monkeypatch.chdir(tmp_path)
    np.save("clusters.npy", np.linspace(-1, 1, 512 * 3, dtype=np.float32).reshape(512, 3))
    record = files.read_json(KEPT / f"{name}.json")
    build = built(*command_today(record))
    assert identity(updated(record["config"]), {}) == identity(build.run.config, {})
    assert changes(updated(record["config"]), build.run.config)[0] == []
    assert deciding(updated(build.run.config)) == deciding(build.run.config)


def test_it_goes_on(tmp_path: Path) -> None:
    """`resume=auto` finds it under its old name, and only where it is the same run, with a checkpoint."""
    record = files.read_json(KEPT / "pretrain.json")
    command = (*command_today(record), f"paths.runs={tmp_path}", "resume=auto")
    build = built(*command)
    old = RunFolder(tmp_path / f"{build.run.name.rpartition('-')[0]}-01234567")
    old.path.mkdir()
    files.write_json(old.path / "run.json", record)
    assert find_run_dir(build.run).path.name == build.run.name
    (old.path / "checkpoints").mkdir()
    (old.path / "checkpoints" / "latest").write_text("step_0000002.ckpt\n")
    assert find_run_dir(build.run) == old
    assert find_run_dir(built(*command, "seed=1").run).path.name != old.path.name
    other: dict[str, Any] = {**record, "files_sha256": {"init": "f" * 64}}
    files.write_json(old.path / "run.json", other)
    assert find_run_dir(build.run).path.name == build.run.name
    (old.path / "run.json").write_text("[]")
    assert find_run_dir(build.run).path.name == build.run.name


# Every kind of change there is, as two later versions of the records could have them
LATER = {
    2: Changes(
        targets={"igpt.task": "igpt.run", "igpt.task.guard": "igpt.training.nan"},
        values={"task.needs": {"origin": "metadata"}, "task.norm": {"old": "new"}},
        joined=TABLE[2].joined,
        renamed={
            "force": "rerun",
            "task.gen": "task.loss_weights.gen",
            "task.masks": "task.eval_masks",
            "task.needs": "task.requires",
            "task.gone": None,
            "data.n_colour": "data.palette_size",
            "data.stream.held": "data.stream.held_in_memory",
            "trainer.attention": "trainer.attention_backend",
        },
        added={"model.positions": ("model._target_", "igpt.model.GPT", "learned")},
    ),
    3: Changes(renamed={"task.eval_masks": "task.votes"}),
}
WAS_AND_IS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a name": ({"trainer.attention": "bmm", "force": True}, {"trainer.attention_backend": "bmm", "rerun": True}),
    "a name, twice": ({"task.masks": 5}, {"task.votes": 5}),
    "into a group": ({"task.gen": 0.5}, {"task.loss_weights.gen": 0.5}),
    "in a stage": (
        {"task.stages.a.gen": 0.5, "task.stages.gen.steps": 1},
        {"task.stages.a.loss_weights.gen": 0.5, "task.stages.gen.steps": 1},
    ),
    "data of a stage": ({"task.stages.a.data.n_colour": 8}, {"task.stages.a.data.palette_size": 8}),
    "data in a mixture": (
        {"data.streams.web.n_colour": 8, "data.streams.web.stream.held": 2},
        {"data.streams.web.palette_size": 8, "data.streams.web.stream.held_in_memory": 2},
    ),
    "values": (
        {"task.norm": "old", "task.needs": ["origin", "net"]},
        {"task.norm": "new", "task.requires": ["metadata", "net"]},
    ),
    "a module": (
        {"task._target_": "igpt.task.probe.run", "x._target_": "igpt.task.guard.Guard", "y._target_": "igpt.tasks.z"},
        {"task._target_": "igpt.run.probe.run", "x._target_": "igpt.training.nan.Guard", "y._target_": "igpt.tasks.z"},
    ),
    "no setting any more": ({"task.gone": 1, "task.steps": 2}, {"task.steps": 2}),
    "what it meant": (
        {"model._target_": "igpt.model.GPT"},
        {"model._target_": "igpt.model.GPT", "model.positions": "learned"},
    ),
    "a list of switches": (
        {"task._target_": "x", "task.untrained": True, "task.pixels": False},
        {"task._target_": "x", "task.baselines": ["untrained"]},
    ),
    "a list of one switch": (
        {"task._target_": "x", "task.pixels": True},
        {"task._target_": "x", "task.baselines": ["pixels"]},
    ),
    "switches of stages": (
        {"task.stages.probe.pixels": False, "task.stages.few.task": "low_data", "task.stages.few.pixels": False},
        {
            "task.stages.probe.baselines": ["untrained"], "task.stages.few.task": "low_data",
            "task.stages.few.baselines": [],
        },
    ),
    "nothing": ({}, {}),
    "names with dots": ({"task.bars": {"0.5 %": {"a.b": "c/d"}}}, {"task.bars": {"0.5 %": {"a.b": "c/d"}}}),
    "empty groups": ({"data.streams": {}, "task.stages.probe": {}}, {"data.streams": {}, "task.stages.probe": {}}),
}  # fmt: skip


def nest_settings(settings: dict[str, Any]) -> dict[str, Any]:
    return nested({tuple(key.split(".")): value for key, value in settings.items()})


@pytest.mark.parametrize("kind", WAS_AND_IS)
def test_each_kind_of_change(kind: str) -> None:
    """A case solved by hand; and invariants: a second time, or of the last version, nothing changes."""
    was, now = map(nest_settings, WAS_AND_IS[kind])
    assert updated(was, LATER.values()) == now
    assert updated(now, LATER.values()) == now
    assert updated_record({"version": 3, "config": was}, LATER)["config"] == was
    assert updated_record({"version": 1, "config": was}, LATER)["config"] == now
    assert nested(flat(was)) == was


def test_only_what_is_newer_than_the_record_changes() -> None:
    """A case solved by hand: of version 2, what version 3 changed."""
    record = {"version": 2, "config": {"task": {"eval_masks": 5, "gen": 1}}}
    assert updated_record(record, LATER)["config"] == {"task": {"votes": 5, "gen": 1}}


def test_overrides_and_hashes_of_files() -> None:
    """A case solved by hand: each override in the words of now, as it was typed but for those."""
    config = {
        "task": {"name": "probe", "_target_": "igpt.task.probe.run", "untrained": False, "pixels": True},
        "trainer": {"attention": "bmm"},
    }
    was_and_is = {
        "task=probe": "task=probe",
        "task.masks=3": "task.votes=3",
        "++task.gen=0.50": "++task.loss_weights.gen=0.50",
        "+task.stages.a.gen=1": "+task.stages.a.loss_weights.gen=1",
        "+task.stages.a={gen: 0.5, steps: 3}": "+task.stages.a={loss_weights:{gen:0.5},steps:3}",
        "+task.stages.a={gen: 0.5}": "+task.stages.a={loss_weights:{gen:0.5}}",
        "~task.gen": "~task.loss_weights.gen",
        "task.norm=old": 'task.norm="new"',
        "task.untrained=false": 'task.baselines=["pixels"]',
        "tokens.palette.k=${data.n_colour}": "tokens.palette.k=${data.palette_size}",
        "data.path='a=b, ${data.x}'": "data.path='a=b, ${data.x}'",
        "hydra/launcher=slurm": "hydra/launcher=slurm",
        "trainer.attention=bmm": "trainer.attention_backend=bmm",
        "no = override": "no = override",
    }
    hashes = {"init": None, "task.masks a b.npy": "1", "data.path": "2", "/runs/x.y z": "3"}
    record = {"version": 1, "config": config, "overrides": [*was_and_is, "task.gone=1"], "files_sha256": hashes}
    now = updated_record(record, LATER)
    assert now["overrides"] == [*was_and_is.values()]
    assert now["files_sha256"] == {"init": None, "task.votes a b.npy": "1", "data.path": "2", "/runs/x.y z": "3"}
    assert updated_record({**record, "overrides": None}, LATER)["overrides"] is None


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("task.masks", "the setting task.masks is called task.votes now"),
        ("task.stages.a.gen", "the setting task.stages.a.gen is called task.stages.a.loss_weights.gen now"),
        ("task.pixels", "the setting task.pixels is an entry of task.baselines now: pixels"),
        ("task.gone", "the setting task.gone is none any more: leave it out"),
        ("task.steps", None),
    ],
)
def test_who_types_an_old_name_is_told_the_new_one(key: str, message: str | None) -> None:
    """A case solved by hand, each kind of change."""
    assert answer(key, LATER) == message


@pytest.mark.parametrize(
    "command",
    [
        ("task=finetune", "task.gen=0.5"),
        ("task=finetune", "++task.gen=0.5"),
        ("task=pipeline", "+task.stages.finetune.gen=0.5"),
        ("task=pipeline", "+task.stages.finetune={gen: 0.5}"),
    ],
)
def test_a_command_with_an_old_name_is_answered(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant: wherever it is typed, the new name is named."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^the setting \S+gen is called \S+loss_weights.gen now$"):
        run(*command, "trainer=cpu", conf=ROOT / "conf")


def test_versions_of_records(tmp_path: Path) -> None:
    """A record without a version is older than those with one; one of a later release is refused, in one line."""
    folder = RunFolder(tmp_path)
    config = {"task": {"gen": 1.0}}
    folder.start(config, ["seed=1"], {})
    assert files.read_json(tmp_path / "run.json")["version"] == VERSION
    assert folder.read_run()["config"] == config  # of this release: as it is
    files.write_json(tmp_path / "run.json", {"config": config, "overrides": None, "files_sha256": {}})
    assert folder.read_run()["config"] == {"task": {"loss_weights": {"gen": 1.0}}}
    for record in ({"version": VERSION + 1}, {"version": "1"}, {"version": True}, []):
        files.write_json(tmp_path / "run.json", record)
        with pytest.raises(
            ValueError, match=r"run\.json is of another version than 0 to \d+: use the release that wrote"
        ) as message:
            folder.read_run()
        assert "\n" not in str(message.value)
    with pytest.raises(ValueError, match="another version than 1 to"):
        read_record(tmp_path / "run.json", oldest=1)


def test_a_probe_before_sgd_had_a_refit() -> None:
    """By hand: task.refit=true, which only L-BFGS obeyed, is auto now; false stays; the other settings are off."""
    sgd = {"rates": [1.0]}
    for was, now in ((True, "auto"), (False, False)):
        config = {"task": {"_target_": "igpt.task.probe.run", "refit": was, "sgd": sgd}}
        task = updated_record({"version": 4, "config": config})["config"]["task"]
        assert (task["refit"], task["resize_positions"]) == (now, False)
        assert task["sgd"] == {**sgd, "search": "together", "augment": True, "gradient_clip": None}
    tuned = updated_record({"version": 4, "config": {"task": {"_target_": "igpt.task.finetune.run"}}})["config"]["task"]
    assert tuned == {"_target_": tuned["_target_"], "refit": False, "dropout": 0.0, "resize_positions": False}
