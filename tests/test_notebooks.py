"""The notebooks: outputs stripped, and every cell runs."""

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: all code cells in turn, in one namespace, as a reader would run them; none defines anything."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    monkeypatch.chdir(NOTEBOOKS)  # as Jupyter does
    namespace: dict[str, Any] = {}
    for cell in cells:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        assert "def " not in cell["source"]
        exec(cell["source"], namespace)
