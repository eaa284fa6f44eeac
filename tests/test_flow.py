"""The flow of data through the rooms of igpt: a room imports rooms listed before it, and no others."""

import ast
from collections import Counter
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "igpt"

# The order of the rooms, each with the rooms it may import: all of them stand above it.
BASE = {"utils", "settings", "distributed"}
ROOMS: dict[str, set[str]] = {
    "utils": set(),
    "settings": {"utils"},
    "distributed": {"utils"},
    "data": BASE,
    "model": BASE,
    "objective": BASE,
    "metric": {"model"},
    "tokens": BASE | {"data"},
    "checkpoint": BASE | {"model", "tokens"},
    "encoder": BASE | {"checkpoint"},
    "probe": BASE | {"data", "model", "objective", "metric"},
    "report": BASE | {"data", "metric"},
    "scaling_law": BASE | {"model", "metric", "report"},
    "training": BASE | {"data", "model", "objective", "metric", "tokens", "checkpoint", "probe", "report"},
    "run": BASE | {"data", "model", "objective", "metric", "tokens", "checkpoint", "report", "scaling_law", "training"},
    "task": BASE
    | {"data", "model", "objective", "metric", "tokens", "checkpoint", "encoder", "probe", "training", "run"},
    "app": BASE
    | {"data", "model", "objective", "metric", "tokens", "checkpoint", "probe", "report", "scaling_law", "training"}
    | {"run", "task"},
    "hub": {"utils", "settings", "data", "model", "objective", "checkpoint", "probe"},
    "cli": {"utils", "distributed", "run"},
    "__main__": {"cli"},
}


def find_imports(path: Path) -> set[str]:
    """The rooms of igpt that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module] if node.module != "igpt" else [f"igpt.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("igpt.")}
    return found


def list_modules(package: str) -> list[Path]:
    return [SRC / f"{package}.py"] if (SRC / f"{package}.py").is_file() else sorted((SRC / package).rglob("*.py"))


@pytest.mark.parametrize("package", ROOMS)
def test_a_room_imports_only_rooms_it_may(package: str) -> None:
    """Invariant: data flows one way."""
    assert list_modules(package)
    for path in list_modules(package):
        strangers = find_imports(path) - ROOMS[package] - {package}
        assert not strangers, f"{path.relative_to(SRC)} imports {strangers}"


def test_the_rooms_are_in_order() -> None:
    """Invariant: no room may import one that stands below it, so there is no cycle."""
    order = list(ROOMS)
    for package, allowed in ROOMS.items():
        assert allowed <= set(order[: order.index(package)]), package


def test_every_room_is_listed() -> None:
    """Invariant: a new room states what it may import; no module lies beside the rooms but these three."""
    others = ("__init__.py", "__pycache__", "conf")
    packages = {path.name for path in SRC.iterdir() if path.name not in others}
    assert packages == {room if room not in ("hub", "cli", "__main__") else f"{room}.py" for room in ROOMS}


def test_a_file_name_is_used_once() -> None:
    """Invariant: a module's name alone says which one it is."""
    names = Counter(path.name for path in SRC.rglob("*.py") if path.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_utils_is_closed() -> None:
    """Invariant: what fits nowhere else does not go there."""
    assert {path.stem for path in list_modules("utils")} == {"__init__", "keyed", "files", "overrides", "program"}


def test_files_are_short() -> None:
    """Invariant: no file of src/ or benchmarks/ has more than 300 lines; where there are more, there are two ideas."""
    paths = [*SRC.parent.rglob("*.py"), *(SRC.parents[1] / "benchmarks").glob("*.py")]
    assert {path.name: n for path in paths if (n := len(path.read_text().splitlines())) > 300} == {}
