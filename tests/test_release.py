"""The files of a release agree: versions, pins, the hooks of pre-commit."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import igpt
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read_requirements(name: str) -> list[Requirement]:
    lines = [line.partition("  #")[0].partition(" #")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]


def test_every_dependency_is_pinned_within_its_range() -> None:
    """Invariant: what pyproject.toml and the requirements ask for has one version in constraints.txt, which fits."""
    pins = {each.name.lower().replace("_", "-"): each for each in read_requirements("constraints.txt")}
    extras = [Requirement(text) for texts in PROJECT["optional-dependencies"].values() for text in texts]
    needed = [Requirement(text) for text in PROJECT["dependencies"]] + extras
    needed += read_requirements("requirements-dev.txt") + read_requirements("requirements-notebooks.txt")
    assert len(needed) > 40
    for each in needed:
        (pin,) = pins[each.name.lower()].specifier
        assert pin.operator == "=="
        assert each.specifier.contains(pin.version), f"{each}, pinned to {pin.version}"
    text = (ROOT / "requirements.txt").read_text()
    assert "\n-c constraints.txt\n" in text
    assert text.endswith("\n-e .\n")
    assert [each.name for each in read_requirements("requirements.txt")] == [
        Requirement(each).name for each in PROJECT["dependencies"]
    ]
    for name in ("requirements-dev.txt", "requirements-notebooks.txt"):
        assert (ROOT / name).read_text().startswith("-r requirements.txt\n")


def test_one_version() -> None:
    """Invariant: the version is the newest released one of the changelog, and the one to cite."""
    newest = re.search(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == igpt.__version__


def test_hooks_find_what_they_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: one file that each of the project's own hooks refuses, and one that it lets pass."""
    hooks = {
        h["id"]: h["entry"] for h in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    }
    cell = {"cell_type": "code", "outputs": [], "execution_count": None}
    (tmp_path / "clean.ipynb").write_text(json.dumps({"cells": [cell]}))
    (tmp_path / "run.ipynb").write_text(json.dumps({"cells": [cell, cell | {"execution_count": 1}]}))
    (tmp_path / "large.png").write_bytes(bytes(1_000_001))
    monkeypatch.chdir(tmp_path)
    for hook, passes, refused in (
        ("notebook-outputs", "clean.ipynb", "run.ipynb"),
        ("large-files", "clean.ipynb", "large.png"),
    ):
        for name, code in ((passes, 0), (refused, 1)):
            done = subprocess.run(["bash", "-c", f"{hooks[hook]} {name}"], capture_output=True, text=True)
            assert (done.returncode, refused in done.stderr) == (code, bool(code)), done.stderr
