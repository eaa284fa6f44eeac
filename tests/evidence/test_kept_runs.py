"""docs/evidence/ and the table that README.md makes of it: numbers are those of the files, and no path of a machine."""

import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.evidence.conftest import write_run

MACHINE = re.compile(r"(?<![\w.])(/(tmp|root|home|work|mnt|Users)|~)/")  # a path that a place in a list may precede
RUNS = sorted((ROOT / "docs" / "evidence").glob("*/*/run.json"))


def test_tables_are_what_the_files_give(evidence: ModuleType) -> None:
    assert RUNS, "docs/evidence/ has no runs"
    for path, table in ((evidence.README, evidence.render()), (evidence.PAGE, evidence.render_runs())):
        assert evidence.fill(path, table) == path.read_text(encoding="utf-8"), "python benchmarks/evidence.py write"


def test_every_picture_of_the_page_is_there() -> None:
    """docs/evidence/README.md shows pictures of the runs that are kept."""
    page = ROOT / "docs" / "evidence" / "README.md"
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert pictures
    assert all((page.parent / picture).is_file() for picture in pictures)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.parent.name)
def test_kept_run_can_be_started_again_and_names_no_machine(path: Path) -> None:
    record, result = (json.loads(path.with_name(name).read_text()) for name in ("run.json", "result.json"))
    assert record["command"].startswith("python train.py ")
    assert record["versions"]["torch"]
    assert record["commit"]
    for text in (path.read_text(), path.with_name("result.json").read_text()):
        assert not MACHINE.search(text)
    assert result["numbers"]
    for key, number in result["numbers"].items():
        low, high = number.get("interval") or (-np.inf, np.inf)
        assert low <= number["value"] <= high, key


@pytest.mark.parametrize(
    "path", [path for path in RUNS if path.parent.parent.name == "depth"], ids=lambda path: path.parent.name
)
def test_fall_of_a_kept_depth_curve_is_that_of_its_points(path: Path) -> None:
    result = json.loads(path.with_name("result.json").read_text())
    curve = result["curves"]["probe, val"]["y"]
    numbers = {key: number["value"] for key, number in result["numbers"].items()}
    assert max(curve) == pytest.approx(numbers["val/accuracy"], abs=1e-9)
    assert max(curve) - curve[-1] == pytest.approx(numbers["val/fall_to_last_layer"], abs=1e-9)
    assert int(np.argmax(curve)) == numbers["probe/layer"]


def test_collected_runs_have_no_path_of_the_machine(evidence: ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "one", rate=0.1, seed=0, val=0.5, test=0.5)
    evidence.collect("finetuning", [tmp_path / "runs" / "one"], tmp_path / "docs" / "evidence")
    kept = tmp_path / "docs" / "evidence" / "finetuning" / "one"
    record = json.loads((kept / "run.json").read_text())
    assert record["command"] == "python train.py data.path=DATA seed=0"
    assert record["config"]["data"]["path"] == "DATA"
    assert json.loads((kept / "result.json").read_text())["provenance"]["init"] == "runs/a/model"
    assert "/home" not in (kept / "run.json").read_text()
    (tmp_path / "runs" / "one" / "result.json").unlink()
    with pytest.raises(SystemExit, match=r"has no result\.json"):
        evidence.collect("finetuning", [tmp_path / "runs" / "one"], tmp_path)


def test_only_whole_paths_are_replaced(evidence: ModuleType) -> None:
    """By hand: a path that merely begins or ends as one of the machine's stays, for the test of kept runs to find."""
    names = {"/data/cifar": "DATA", "/home/me": "."}
    for value, expected in (
        ("init=/home/me/runs/a data.path=/data/cifar", "init=runs/a data.path=DATA"),
        ("task.runs=[/home/me/runs/a,/home/me]", "task.runs=[runs/a,.]"),
        ("/home/melissa/a /data/cifar100/x /backup/home/me", "/home/melissa/a /data/cifar100/x /backup/home/me"),
    ):
        assert evidence.replace_paths([value], names) == [expected]
    assert MACHINE.search("task.runs=[/home/melissa/a]")
