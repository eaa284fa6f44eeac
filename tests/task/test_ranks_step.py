"""Steps of two ranks: no barrier, and no collective that is waited for but where figures are logged or saved."""

import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.task.conftest import machine
from tests.task.ranks_step import SELDOM
from tests.task.ranks_work import a_lab

STOP = "all_reduce, asynchronous"  # of the stop signal, on the host


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_collectives_of_a_step(answers: list[dict[str, Any]], strategy: str) -> None:
    """Counted in Python, beside those of gradients: the stop signal's, and one for the figures of a logged step."""
    for answer in answers:
        calls = answer[f"calls {strategy}"]
        assert list(calls) == list(range(1, 20))
        assert calls.pop(10) == ["all_reduce", STOP]
        assert list(calls.values()) == [[STOP]] * 18


def test_figures_between_log_lines(answers: list[dict[str, Any]], tmp_path: Path) -> None:
    """Invariant: those of one process, gradients' norms too; stopped between two log lines and resumed, to the bit."""
    one = a_lab().pretrain(tmp_path, on=machine(micro_batch=50), **SELDOM).curves
    for answer, strategy in product(answers, ("ddp", "fsdp")):
        assert answer[f"seldom {strategy}"].keys() == one.keys()
        for name, curve in one.items():
            assert answer[f"seldom {strategy}"][name] == pytest.approx(curve.y, rel=1e-5)
        assert re.fullmatch(r"stopped by SIGTERM after step 1[45]", answer[f"seldom {strategy} stopped"])
        assert answer[f"seldom {strategy} resumed"] == answer[f"seldom {strategy}"]


def test_a_loss_of_one_rank_that_is_not_finite(answers: list[dict[str, Any]]) -> None:
    """Both ranks name its step, before the next checkpoint, which is not written."""
    for answer in answers:
        assert answer["overflow"].startswith("the loss of step 5 is not finite")
        assert answer["saved before overflow"] == 4


def test_a_rank_that_works_alone_is_waited_for(answers: list[dict[str, Any]]) -> None:
    """By hand: a day, where PyTorch's gloo gives up after half an hour."""
    assert [answer["patience"] for answer in answers] == [[86_400.0] * 2] * 2
