"""The house: each stage imports itself and the stages before it that it is allowed, and nothing else of ours."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "igpt"

# of use to every stage, use none
LEAVES = {
    "cores",
    "files",
    "settings",
    "spelling",
    "global_state",
    "keyed",
    "older_configs",
    "processes",
    "quoting",
    "ranks",
    "stopping",
}
ALLOWED = {
    "data": set(),
    "tokens": {"data"},
    "model": set(),
    "checkpoint": {"tokens", "model"},
    "objective": set(),
    "metric": {"model"},
    "probe": {"data", "tokens", "model", "objective", "metric"},
    "task": {"components", "data", "tokens", "model", "checkpoint", "objective", "metric", "probe"},
    "report": {"data", "tokens", "model", "metric"},
    "targets": set(),
    "inputs": {"checkpoint", "data"},
    "run_config": {"checkpoint", "data", "inputs", "report"},
    "components": {
        "inputs",
        "run_config",
        "targets",
        "data",
        "tokens",
        "model",
        "checkpoint",
        "objective",
        "metric",
        "task",
        "report",
    },
    "run_dir": {"report", "run_config"},
    "stages": {"report", "run_config", "targets"},
    "execute": {"components", "metric", "report", "run_config", "stages", "targets", "task"},
    "launch": {"arguments", "components", "execute", "metric", "report", "run_config", "run_dir", "targets", "task"},
    "app": {
        "components",
        "arguments",
        "settings",
        "data",
        "tokens",
        "model",
        "checkpoint",
        "objective",
        "metric",
        "probe",
        "task",
        "report",
        "hub",
    },
    "sweep": {"arguments", "run_config", "report", "app"},
    "search": {"sweep", "report", "app"},
    "hub": {"tokens", "model", "checkpoint"},
    "arguments": set(),
    **{leaf: set() for leaf in LEAVES},
}


def imports_of(path: Path) -> set[str]:
    """The rooms of igpt that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module] if node.module != "igpt" else [f"igpt.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("igpt.")}
    return found


def files_of(room: str) -> list[Path]:
    return [SRC / f"{room}.py"] if (SRC / f"{room}.py").is_file() else sorted((SRC / room).glob("*.py"))


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_imports_only_what_it_may(room: str) -> None:
    """Invariant: data flows one way."""
    assert files_of(room)
    for path in files_of(room):
        strangers = imports_of(path) - ALLOWED[room] - LEAVES - {room}
        assert not strangers, f"{path.name} imports {strangers}"


def test_every_room_is_listed() -> None:
    """Invariant: a new room states what it may import."""
    rooms = {path.stem for path in SRC.iterdir() if path.name not in ("__init__.py", "__pycache__")}
    assert rooms == set(ALLOWED)
