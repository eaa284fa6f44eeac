"""The scripts of docs/evidence/ as modules, and finished runs as they find them."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="package")
def evidence() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import evidence

    yield evidence
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="package")
def findings(evidence: ModuleType) -> ModuleType:
    import evidence_findings

    found: ModuleType = evidence_findings
    return found


@pytest.fixture(scope="package")
def reading(evidence: ModuleType) -> ModuleType:
    import evidence_runs

    read: ModuleType = evidence_runs
    return read


def write_run(
    folder: Path, *, rate: float, seed: int, val: float, test: float, init: str | None = "runs/a", steps: int = 10
) -> None:
    """A finished run of fine-tuning on a machine's own paths."""
    folder.mkdir(parents=True)
    config = {
        "seed": seed, "init": init, "data": {"path": "/home/me/cifar"}, "objective": {"name": "ar"},
        "task": {"name": "finetune", "learning_rate": rate, "loss_weights": {"gen": 1.0, "clf": 1.0},
                 "steps": steps, "batch_size": 2},
    }  # fmt: skip
    command = f"python /home/me/igpt/train.py data.path=/home/me/cifar seed={seed}"
    record = {"config": config, "working_directory": "/home/me", "command": command, "versions": {}, "commit": ""}
    number = {"unit": "share of images", "n": 100}
    numbers = {
        "val/accuracy": {"value": val, **number},
        "test/accuracy": {"value": test, "interval": [test - 0.02, test + 0.02], **number},
    }
    (folder / "run.json").write_text(json.dumps(record))
    provenance = {"init": "/home/me/runs/a/model"}
    (folder / "result.json").write_text(
        json.dumps({"numbers": numbers, "curves": {}, "files": {}, "provenance": provenance, "seconds": 1})
    )


def write_record(folder: Path, **changes: Any) -> None:
    """Changes run.json of a finished run: `of`, or settings below `config`."""
    record = json.loads((folder / "run.json").read_text())
    for key, value in changes.items():
        if key == "of":
            record["of"] = value
        else:
            record["config"].setdefault(key, {}).update(value)
    (folder / "run.json").write_text(json.dumps(record))


def write_numbers(folder: Path, **numbers: dict[str, Any]) -> None:
    """Adds numbers to result.json of a finished run, `_` for `/`."""
    result = json.loads((folder / "result.json").read_text())
    for key, number in numbers.items():
        result["numbers"][key.replace("__", "/")] = {"unit": "share", "n": 100, **number}
    (folder / "result.json").write_text(json.dumps(result))
