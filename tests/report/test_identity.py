"""The identity of a run: everything that may change what is learned, callbacks included."""

import importlib
import os
import pkgutil
import subprocess
from pathlib import Path
from typing import Any

import lightning as L
import pytest

import igpt
from igpt.metric.result import Result
from igpt.report.folder import RunFolder
from igpt.report.groups import group_by_seed, list_differing
from igpt.report.identity import OBSERVERS, changes, deciding, identity
from igpt.report.runs import RunRecord
from igpt.training.lightning_callbacks import WATCHING
from igpt.utils import files
from igpt.utils.program import describe_commit

WATCHED = {"bar": {"_target_": "igpt.training.progress_bar.ProgressBar"}}
STOP = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/loss_gen"}


def config(callbacks: Any) -> dict[str, Any]:
    task = {"steps": 8, "requires": ["tokens", "network"]}
    return {"task": task, "trainer": {"precision": "32-true", "compile": True}, "seed": 0, "callbacks": callbacks}


def test_only_callbacks_that_watch_are_outside() -> None:
    """Invariant: a name that is not known to watch is part of it, whatever it is; null is as if it were not there."""
    plain = identity(config({}), {})
    for watching in (None, WATCHED, {"a": None, **WATCHED}, {name: {"_target_": name} for name in OBSERVERS}):
        assert identity(config(watching), {}) == plain
        assert "callbacks" not in deciding(config(watching))
    others = [STOP, STOP | {"patience": 3}, {"_target_": "mine.Freeze"}, {"_target_": "igpt.training.callbacks"}, {}, 5]
    hashes = {identity(config(WATCHED | {"stop": other}), {}) for other in others}
    assert len({plain, *hashes}) == 1 + len(others)
    assert changes(config(WATCHED), config({"stop": STOP}))[0] == [f"callbacks None ≠ {{'stop': {STOP}}}"]
    assert changes(config(WATCHED), config(None))[0] == []


def test_a_residual_stream_counts_unless_it_is_the_default() -> None:
    """Invariant: records of runs from before the setting state none; compiling does not count."""
    plain = config({})
    trainer = plain["trainer"]
    assert identity(plain | {"trainer": trainer | {"residual": "float32", "compile": False}}, {}) == identity(plain, {})
    assert identity(plain | {"trainer": trainer | {"residual": "bfloat16"}}, {}) != identity(plain, {})


def test_those_that_declare_it_are_those_that_are_listed() -> None:
    """Invariant: the closed list of names, which is compared without an import, is every class with the declaration."""
    for module in pkgutil.iter_modules(importlib.import_module("igpt.training").__path__, "igpt.training."):
        importlib.import_module(module.name)
    ours = [each for each in L.Callback.__subclasses__() if each.__module__.startswith(f"{igpt.__name__}.")]
    watching = {f"{each.__module__}.{each.__name__}" for each in ours if getattr(each, "is_observer", False)}
    assert watching | {f"lightning.pytorch.callbacks.{each.__name__}" for each in WATCHING} == {*OBSERVERS}
    assert len(ours) > len(watching)  # the callback that saves changes what is kept


@pytest.mark.parametrize("other", [STOP, {"_target_": "mine.Freeze"}])
def test_runs_of_other_callbacks_are_not_repetitions(other: dict[str, Any], tmp_path: Path) -> None:
    """Invariant: compare neither averages them nor leaves one out."""
    for i in range(3):
        files.write_json(tmp_path / str(i) / "result.json", {})
    runs = [
        RunRecord(RunFolder(tmp_path / str(i)).path, {}, {"task": "pretrain", "config": config(callbacks)}, Result())
        for i, callbacks in enumerate((WATCHED, WATCHED, {"own": other}))
    ]
    groups, repeated = group_by_seed(runs)
    assert [len(group) for group in groups] == [1, 1]
    assert len(repeated) == 1


def test_a_callback_that_not_all_have_is_named_by_its_class() -> None:
    """By hand: its settings are shown only where runs of the same class differ in them."""
    stop = {"callbacks.stop._target_": "EarlyStopping", "callbacks.stop.patience": 1}
    named = [{"callbacks.stop._target_": "EarlyStopping"}, {"callbacks.stop._target_": "–"}]
    assert list_differing([stop, {}]) == named
    longer = stop | {"callbacks.stop.patience": 3}
    assert list_differing([stop, longer]) == [{"callbacks.stop.patience": "1"}, {"callbacks.stop.patience": "3"}]
    assert [row["callbacks.stop.patience"] for row in list_differing([stop, longer, {}])] == ["1", "3", "–"]


def test_the_commit_is_read_without_a_write(tmp_path: Path) -> None:
    """Oracle: git. Invariant: its index is left as it is, also where a file has another time; changes are told."""

    def git(*command: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ("git", "-C", str(tmp_path), *who, *command)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert describe_commit(tmp_path) == "unknown"
    git("init")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "--message", "first")
    os.utime(tmp_path / "code.py", (0, 0))
    index = tmp_path / ".git" / "index"
    before = index.read_bytes()
    head = git("rev-parse", "--short=12", "HEAD")
    assert describe_commit(tmp_path) == head
    (tmp_path / "code.py").write_text("2")
    assert describe_commit(tmp_path) == f"{head}-dirty"
    assert index.read_bytes() == before
