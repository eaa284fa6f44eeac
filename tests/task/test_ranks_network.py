"""Losses of large vocabularies on two ranks, over which the network is sharded."""

from pathlib import Path
from typing import Any

import pytest

from igpt.objective.bert import BERT
from tests.task.ranks_network import IN_CHUNKS
from tests.task.ranks_work import a_lab


@pytest.mark.parametrize("name", ["ar", "bert"])
def test_losses_in_chunks_of_a_sharded_network(name: str, tmp_path: Path, answers: list[dict[str, Any]]) -> None:
    """Invariant: training and validation are those of one process that holds all logits, to 1e-5."""
    changed = {"objective": BERT(mask_probability=0.15)} if name == "bert" else {}
    alone = a_lab().pretrain(tmp_path / "alone", **IN_CHUNKS, **changed)
    for answer in answers:
        for sharded, curve in zip(answer["in chunks"][name], ("train/loss_gen", "val/loss_gen"), strict=True):
            assert sharded == pytest.approx(alone.curves[curve].y, rel=1e-5)
