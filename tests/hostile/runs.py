"""Hostile run folders: each function changes a run of an older release and returns its folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.hostile.weights import Make

RUNS = ROOT / "tests" / "older_runs" / "2dc1449"
NAME = "pretrain-igpt_nano-digits8-ar-s0-11a83508"


def run_folder(file: str, change: Callable[[dict[str, Any], Path], object] | str, *, state: str = "stopped") -> Make:
    """A copy of a run with another record, or with this text in its place."""

    def make(folder: Path) -> Path:
        run = folder / NAME
        shutil.copytree(RUNS / state / NAME, run)
        record = json.loads((run / file).read_text())
        if isinstance(change, str):
            (run / file).write_text(change)
        else:
            change(record, folder.parent)
            (run / file).write_text(json.dumps(record))
        return run

    return make


def with_overrides(*overrides: str) -> Make:
    """More saved overrides; `{}` is the folder of the case."""
    return run_folder("run.json", lambda record, case: record["overrides"].extend(o.format(case) for o in overrides))


def files_named(path: str) -> Make:
    """A finished run whose result names a picture elsewhere; `{}` is the folder that holds `outside`."""

    def change(record: dict[str, Any], case: Path) -> None:
        record["files"]["samples"] = path.format(case.parent)

    return run_folder("result.json", change, state="finished")
