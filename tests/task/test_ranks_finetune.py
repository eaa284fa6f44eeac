"""Fine-tuning of a sharded network by two ranks against one process."""

from pathlib import Path
from typing import Any

import pytest

from igpt.checkpoint.find import find_weights
from tests.task.conftest import Lab, machine
from tests.task.ranks_finetune import CASES, SIX, described
from tests.task.ranks_work import a_lab


@pytest.fixture(scope="module")
def alone() -> Lab:
    return a_lab()


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_network_is_fine_tuned_as_a_whole_one(
    place: Path, answers: list[dict[str, Any]], alone: Lab, tmp_path: Path, name: str
) -> None:
    """Invariant: losses, best step and numbers of one process, with a refit, stopped and resumed on the way; with
    dropout and clipped gradients; without L_GEN."""
    weights = find_weights(str(place / "whole"))
    one = described(alone.finetune(tmp_path, weights, on=machine(micro_batch=20), **SIX, **CASES[name]))
    for answer in answers:
        assert answer[f"fine-tuned {name} stopped"].startswith("stopped by SIGTERM after step")
        two = answer[f"fine-tuned {name}"]
        assert two["curves"].keys() == one["curves"].keys()
        for key, values in one["curves"].items():
            assert two["curves"][key] == pytest.approx(values, rel=1e-5, abs=1e-6), key
        assert two["numbers"] == pytest.approx(one["numbers"], rel=1e-5, abs=1e-6)
