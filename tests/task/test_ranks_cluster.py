"""What ranks share before they train: their answers are those of `ranks_cluster.py`."""

from pathlib import Path
from typing import Any


def test_one_rank_fits_the_palette(answers: list[dict[str, Any]], place: Path) -> None:
    """Invariant: both have the palette that the first has fitted; the other looks at no image and writes no file."""
    first, second = answers
    assert first["fitted"] == [first["palette"]] == [second["palette"]]
    assert second["fitted"] == []
    assert (place / "cache of rank 0" / "palettes").is_dir()
    assert not (place / "cache of rank 1").exists()
