"""Runs that an older release began: their configs, as that release wrote them, mean what they meant."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from igpt import files
from igpt.older_configs import updated
from igpt.report.folder import RunFolder, changes, identity
from igpt.run_dir import find_run_dir
from tests.conftest import ROOT
from tests.test_conf import built

# `train.py OVERRIDES` of the release before `GPTConfig` wrote these
KEPT = ROOT / "tests" / "older_runs"


@pytest.mark.parametrize("name", ["pretrain", "finetune", "photographs"])
def test_it_is_the_same_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Round trip: by the same overrides, this release makes the config that the older one meant."""
    monkeypatch.chdir(tmp_path)
    np.save("clusters.npy", np.linspace(-1, 1, 512 * 3, dtype=np.float32).reshape(512, 3))
    record = files.read_json(KEPT / f"{name}.json")
    build = built(*record["overrides"])
    assert identity(updated(record["config"]), {}) == identity(build.run.config, {})
    assert changes(record["config"], build.run.config)[0] == []
    assert updated(build.run.config) == build.run.config


def test_it_goes_on(tmp_path: Path) -> None:
    """`resume=auto` finds it under its old name, and only where it is the same run, unfinished, with a checkpoint."""
    record = files.read_json(KEPT / "pretrain.json")
    command = (*record["overrides"], f"paths.runs={tmp_path}", "resume=auto")
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
