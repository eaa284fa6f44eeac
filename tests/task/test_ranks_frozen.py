"""Two ranks that share out a frozen network, against one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from igpt.checkpoint.find import find_weights
from tests.task.conftest import Lab, answers_in, machine, worked
from tests.task.ranks_frozen import read_features, read_frozen, watched


@pytest.fixture(scope="module")
def frozen(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [answer["frozen"] for answer in answers]


def test_no_rank_holds_the_whole_network(frozen: list[dict[str, Any]]) -> None:
    """Invariant: half of the bytes on each of two ranks, while a block of two is computed three quarters, then half.

    Under bf16-mixed the matrices, here 3/4 of all weights, take half of that. What is not a matrix is small.
    """
    for answer in frozen:
        held, half = answer["held"], answer["held in half"]
        assert 0.5 <= held["filled"] < 0.52
        assert held["afterwards"] == held["filled"]
        assert held["of the blocks"] < 0.65
        assert half["filled"] < 0.35


def test_reading_tasks_of_one_process(
    frozen: list[dict[str, Any]], place: Path, one_process: Lab, tmp_path: Path
) -> None:
    """Invariant: of 101 images, and of a single one; accuracies exactly, by either solver, and predicted classes."""
    one = read_frozen(one_process, place / "drawn", tmp_path, machine())
    for answer in frozen:
        read = answer["read"]
        for name in ("val/loss_gen", "val/bits_per_token"):
            assert read["evaluated"][name] == pytest.approx(one["evaluated"][name], rel=1e-6)
        assert read["one image"] == pytest.approx(one["one image"], rel=1e-6)
        for kind in ("sgd", "predicted"):
            assert read[kind] == pytest.approx(one[kind], abs=1e-6)  # calibration errors are of float32 scores
        assert read["confusion"] == one["confusion"]
        assert torch.equal(read["samples"], one["samples"])
    assert len({column for row in one["confusion"] for column, count in enumerate(row) if count}) > 3


def test_features_under_deepspeed(frozen: list[dict[str, Any]], place: Path, one_process: Lab, tmp_path: Path) -> None:
    """Invariant: every accuracy of a probe on features that both ranks computed, those of one process."""
    one = read_features(one_process, tmp_path, find_weights(str(place / "drawn")), machine())
    for answer in frozen:
        assert answer["lbfgs"] == pytest.approx(one, abs=1e-6)


def test_probes_and_samples_while_training(
    frozen: list[dict[str, Any]], place: Path, one_process: Lab, tmp_path: Path
) -> None:
    """Invariant: probes and pictures of samples of one process, whether the network is sharded or on every rank."""
    one = watched(one_process, tmp_path / "one", machine())
    assert len(one) == 2
    for name in ("watched sharded", "watched whole"):
        assert frozen[0][name.replace(" sharded", "")] == one
        pictures = [(run / "samples" / "step_0000002.png").read_bytes() for run in (tmp_path / "one", place / name)]
        assert pictures[0] == pictures[1]


@pytest.mark.slow
def test_probes_and_samples_under_zero(one_process: Lab, tmp_path: Path) -> None:
    """Invariant: those of one process, of a copy that both ranks gather."""
    one = watched(one_process, tmp_path / "one", machine())
    assert answers_in(worked(tmp_path, "watched"))[0] == one
    pictures = [tmp_path / run / "samples" / "step_0000002.png" for run in ("one", "watched zero")]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_samples_without_memory_do_not_end_a_training(frozen: list[dict[str, Any]], place: Path) -> None:
    """Invariant: the rank that has none and the one that has are told the same, and the training ends well."""
    for answer in frozen:
        assert answer["no memory"] == "rank 1: OutOfMemoryError: CUDA out of memory"
    assert (place / "no memory" / "model" / "model.safetensors").is_file()
    assert not (place / "no memory" / "samples").exists()
