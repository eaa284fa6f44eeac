"""What two ranks do for `test_ranks_cluster.py`, beside `ranks_work.py`."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from igpt.data.source import Source
from igpt.distributed import ranks
from igpt.tokens.kmeans import fit_cached
from igpt.tokens.palette import Palette
from igpt.tokens.palette_tokenizer import PaletteSettings
from tests.conftest import parts_of_run
from tests.task.conftest import Lab


def work(lab: Lab, place: Path, rank: ranks.Rank) -> dict[str, Any]:
    """Each rank has a cache of its own, as on two machines."""
    fitted: list[str] = []

    def fit(source: Source, cache: Path) -> Palette:
        palette = fit_cached(source, cache, k=5, n_pixels=6400, iterations=3, restarts=1, seed=0)
        fitted.append(palette.hash)
        return palette

    components = parts_of_run(
        run=SimpleNamespace(cfg=SimpleNamespace(data=None), takes_from_weights=lambda _: False, saved_tokenizer=None),
        weights=None, tokenizer_settings=PaletteSettings("raster", fit), _full_source=lab.digits,
        cache_dir=place / f"cache of rank {rank.index}",
    )  # fmt: skip
    return {"palette": components.tokenizer.hash, "fitted": fitted}
