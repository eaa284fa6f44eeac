"""The notebooks: outputs stripped, and every cell runs."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


LONG = ("04", "05", "06", "07")  # they train; .ci/run runs them


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.ci] if path.stem.startswith(LONG) else [])
        for path in sorted(NOTEBOOKS.glob("*.ipynb"))
    ],
)
def test_a_notebook_runs(path: Path, quickstart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: all code cells in turn, in one namespace, as a reader would, with less to fit; none has a `def`."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    shutil.copytree(quickstart, tmp_path / "runs" / quickstart.name)  # the runs beside the notebooks
    (tmp_path / "conf").symlink_to(NOTEBOOKS.parent / "conf")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")  # as Jupyter does
    namespace: dict[str, Any] = {}
    for cell in cells:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        assert "def " not in cell["source"]
        exec(re.sub(r"^(K|STEPS) = \d+", r"\1 = 20", cell["source"], flags=re.MULTILINE), namespace)
