"""The workspace of W&B: its panels against the keys that runs log, and what is sent."""

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb_workspaces.workspaces import Workspace

from igpt.app import dashboard
from igpt.app.dashboard import SECTIONS, build_spec, list_panels, run
from igpt.settings.reading import DashboardSettings
from tests.configs import built
from tests.conftest import ROOT

PANELS = [spec for specs in SECTIONS.values() for spec in specs]
KEYS = {key for spec in PANELS for key in spec.keys}
# logged by other runs than the quickstart's: its networks have no training curve of the finer kinds, or no tokenizer
BY_OTHERS = {
    "train": "accuracy commitment loss loss_clf reconstruction",
    "val": "codes_used mse perplexity_share psnr ssim",
    "": "flop_utilisation reconstructions samples confusion_cells loss_by_position",
}


def settings(place: Path, **changed: Any) -> DashboardSettings:
    of_task = {"project": "igpt", "entity": "team", "title": "igpt", "file": str(place / "dashboard.json")}
    return DashboardSettings(**{**of_task, **changed})


def test_panels_show_what_runs_log(quickstart: Path) -> None:
    """Invariant: each key of a panel is logged by some task, and each loss, accuracy … that is logged has a panel."""
    logged: set[str] = set()
    for path in quickstart.rglob("metrics.csv"):
        with path.open() as file:
            logged |= {*next(csv.reader(file))} - {"step", "epoch"}
    assert {"train/loss_gen", "val/loss_gen", "val/loss_clf", "lr", "images_per_s", "tokens_seen"} <= logged
    assert logged <= KEYS
    for path in quickstart.glob("*_*/result.json"):
        result = json.loads(path.read_text())
        logged |= {*result["numbers"]}
        logged |= {f"pictures/{name}" for name, file in result["files"].items() if file.endswith(".png")}
        logged |= {f"curves/{curve['y_unit']} over {curve['x_unit']}" for curve in result["curves"].values()}
    others = {f"{split}/{key}".lstrip("/") for split, keys in BY_OTHERS.items() for key in keys.split()}
    assert logged >= KEYS - others
    code = "".join(
        path.read_text() for room in ("task", "training", "metric") for path in (ROOT / "src/igpt" / room).rglob("*.py")
    )
    for key in others:
        assert re.search(rf"['\"/ ]{key.rpartition('/')[2].removesuffix('_cells')}['\"]|_cells\"", code), key


def test_the_table_of_the_docs_is_that_of_the_panels() -> None:
    assert list_panels() in (ROOT / "docs" / "dashboards.md").read_text()


@pytest.mark.usefixtures("random_state")  # the library draws ids of panels
def test_what_is_sent_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Round trip: the file has every panel with its keys; how to create it later is said."""
    monkeypatch.setattr(wandb, "login", lambda prompt: False)
    with caplog.at_level("INFO"):
        result = run(settings(tmp_path))
    assert result.numbers["dashboard/panels"].value == len(PANELS)
    assert "after `wandb login` (or with WANDB_API_KEY) the same command creates it" in caplog.text
    sent = json.loads((tmp_path / "dashboard.json").read_text())
    assert (sent["entityName"], sent["projectName"], sent["type"]) == ("team", "igpt", "project-view")
    sections = sent["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == list(SECTIONS)
    lines = {panel["config"].get("chartTitle"): panel["config"] for section in sections for panel in section["panels"]}
    assert lines["loss"]["metrics"] == ["train/loss_gen", "val/loss_gen"]
    assert lines["loss"]["yLogScale"] is True
    text = json.dumps(sections)
    assert all(key in text for key in KEYS)


@pytest.mark.usefixtures("random_state")
def test_with_a_key_it_is_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """By hand: the workspace that is saved is that of the file; what W&B refuses is one line, and the file is there."""
    saved: list[Workspace] = []
    monkeypatch.setattr(wandb, "login", lambda prompt: True)
    monkeypatch.setattr(Workspace, "save", lambda self: saved.append(self))
    monkeypatch.setattr(Workspace, "url", property(lambda self: f"https://wandb/{self.entity}/{self.project}"))
    with caplog.at_level("INFO"):
        run(settings(tmp_path))
    assert [section.name for section in saved[0].sections] == list(SECTIONS)
    assert "the workspace is at https://wandb/team/igpt" in caplog.text

    def refuse(workspace: Workspace) -> None:
        raise wandb.errors.CommError("permission denied\nmore")

    monkeypatch.setattr(Workspace, "save", refuse)
    with pytest.raises(ValueError, match=r"W&B refuses, .*\(permission denied\); check task\.entity .* is written$"):
        run(settings(tmp_path))


def test_it_is_for_the_project_of_the_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: entity and project are those of logger=wandb, if it is chosen; without the package a line says so."""
    task = built("task=dashboard", "logger=wandb", "logger.wandb.entity=team", "logger.wandb.project=mine").run.config[
        "task"
    ]
    assert (task["entity"], task["project"]) == ("team", "mine")
    task = built("task=dashboard").run.config["task"]
    assert (task["entity"], task["project"]) == (None, "igpt")
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(ValueError, match="pip install wandb-workspaces"):
        build_spec(settings(tmp_path))
    assert dashboard.INSTALL.startswith("task=dashboard needs")
