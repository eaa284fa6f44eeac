"""What two ranks do for `test_ranks_frozen.py`, beside `ranks_work.py`."""

from pathlib import Path
from typing import Any

from igpt.distributed import ranks
from tests.task.conftest import Lab


def work(lab: Lab, place: Path, rank: ranks.Rank) -> dict[str, Any]:
    return {}
