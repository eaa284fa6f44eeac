"""What two ranks do for `test_ranks_network.py`, beside `ranks_work.py`."""

from pathlib import Path
from typing import Any

import pytest

from igpt.distributed import ranks
from igpt.model import token_loss
from igpt.objective.bert import BERT
from tests.task.conftest import Lab, machine

IN_CHUNKS: dict[str, Any] = {"steps": 3, "warmup_steps": 1, "val_every": 3}


def work(lab: Lab, place: Path, rank: ranks.Rank) -> dict[str, Any]:
    """Curves of the loss in chunks, of a sharded network: of AR, and of BERT in two passes a step."""
    curves = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_loss, "LARGE_VOCABULARY", 0)
        patch.setattr(token_loss, "CHUNK", 5000)
        for name, changed, micro_batch in (
            ("ar", {}, None),
            ("bert", {"objective": BERT(mask_probability=0.15)}, 25),
        ):
            on = machine(devices="auto", strategy="fsdp", micro_batch=micro_batch)
            done = lab.pretrain(place / f"chunks {name}", on=on, **IN_CHUNKS, **changed)
            curves[name] = [done.curves[curve].y for curve in ("train/loss_gen", "val/loss_gen")]
    return {"in chunks": curves}
