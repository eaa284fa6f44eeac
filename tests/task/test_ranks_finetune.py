"""Fine-tuning of a sharded network against one process; DeepSpeed on one process, and its files."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.resume import read_best
from tests.task.conftest import Lab, answers_in, machine, worked
from tests.task.ranks_finetune import CASES, ONE, finetuned
from tests.task.ranks_work import BEYOND, SHORT
from tests.task.test_predict import predict_test

TIED = "train/accuracy"  # after a step from zero the classes' scores are nearly equal: rounding decides


@pytest.fixture(scope="module")
def zero_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worked(tmp_path_factory.mktemp("deepspeed"), "finetune")


@pytest.fixture(scope="module")
def by_zero(zero_place: Path) -> list[dict[str, Any]]:
    return answers_in(zero_place)


def check_equal(sharded: dict[str, Any], one: dict[str, Any]) -> None:
    assert {name for name in one["curves"] if "grad_norm_max" not in name} <= sharded["curves"].keys()
    for name, values in sharded["curves"].items():
        if name != TIED:
            assert values == pytest.approx(one["curves"][name], rel=1e-5), name
    assert sharded["numbers"] == pytest.approx(one["numbers"], rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_network_is_fine_tuned_as_a_whole_one(
    place: Path, answers: list[dict[str, Any]], one_process: Lab, tmp_path: Path, name: str
) -> None:
    """Invariant: losses, best step and test of one process: with dropout and clipped gradients; without L_GEN, from
    scratch, refitted, stopped and resumed. Each rank holds half; `task=predict` of one process reads the weights."""
    one = finetuned(one_process, place, tmp_path / "one", name, on=machine(micro_batch=20))
    for answer in answers:
        sharded = answer["fine-tuned fsdp"]
        check_equal(sharded[name], one)
        assert sharded["stopped"].startswith("stopped by SIGTERM after step")
        assert 0.45 < sharded["held"] < 0.55
    folder = place / f"fsdp fine-tuned {name}"
    best = read_best(folder)
    assert best is not None
    assert (folder / "checkpoints" / best["checkpoint"]).is_dir() == (name == "pieces")
    again = predict_test(one_process, tmp_path / "again", find_weights(str(folder)), None)
    assert again.numbers["test/accuracy"].value == sharded[name]["numbers"]["test/accuracy"]
    weights = [load_file(run / "model" / "model.safetensors") for run in (tmp_path / "one", folder)]
    for key, weight in weights[0].items():
        torch.testing.assert_close(weights[1][key], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["deepspeed_2", "deepspeed_3"])
def test_deepspeed_fine_tunes_as_one_process(
    zero_place: Path, by_zero: list[dict[str, Any]], one_process: Lab, tmp_path: Path, strategy: str
) -> None:
    """Invariant: as above, on DeepSpeed's CPU accelerator."""
    for name in CASES:
        one = finetuned(one_process, zero_place, tmp_path / name, name, on=machine(micro_batch=20))
        for answer in by_zero:
            sharded = answer[f"fine-tuned {strategy}"]
            check_equal(sharded[name], one)
            assert sharded["stopped"].startswith("stopped by SIGTERM after step")
        again = predict_test(
            one_process,
            tmp_path / f"again {name}",
            find_weights(str(zero_place / f"{strategy} fine-tuned {name}")),
            None,
        )
        assert again.numbers["test/accuracy"].value == sharded[name]["numbers"]["test/accuracy"]


@pytest.mark.slow
def test_one_file_is_resumed_by_deepspeed_and_its_pieces_by_others(
    zero_place: Path, by_zero: list[dict[str, Any]], one_process: Lab, tmp_path: Path
) -> None:
    """Invariant: begun by ddp, gone on with by DeepSpeed, ended by ddp or by one process: the losses of one; so with
    tables of positions, which are no module's own weights in its forward pass."""
    one = one_process.pretrain(tmp_path / "one", **ONE).curves["train/loss_gen"].y
    tables = one_process.pretrain(tmp_path / "tables", network=BEYOND["biases"], **SHORT).curves["train/loss_gen"].y
    for answer in by_zero:
        assert all(turn.startswith("stopped by SIGTERM after step") for turn in answer["turns"])
        assert len(set(answer["turns"])) == 2
        assert answer["by turns"] == pytest.approx(one, rel=1e-5)
        assert answer["tables"] == pytest.approx(tables, rel=1e-5)
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(zero_place / "by turns", tmp_path / "run")
    for path in sorted(checkpoints.glob("*.ckpt"))[::-1]:
        if path.is_file():
            path.unlink()
    (pieces,) = (path for path in checkpoints.glob("*.ckpt"))
    assert pieces.is_dir()
    resumed = one_process.pretrain(tmp_path / "run", **ONE).curves["train/loss_gen"].y
    assert resumed == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_deepspeed_offloads_from_one_process(one_process: Lab, tmp_path: Path) -> None:
    """Invariant: the curves and the fine-tuning of one process without it, gradients clipped by the same norm."""
    (answer,) = answers_in(worked(tmp_path / "place", "offload", count=1))
    one = one_process.pretrain(tmp_path / "one", **ONE)
    for strategy in ("deepspeed_2_offload", "deepspeed_3_offload"):
        assert answer[strategy].keys() == one.curves.keys() - {"train/grad_norm_max"}
        for name, values in answer[strategy].items():
            assert values == pytest.approx(one.curves[name].y, rel=1e-5)
        assert answer[f"{strategy} validated"] == pytest.approx(one.numbers["val/loss_gen"].value, rel=1e-5)
    check_equal(answer["fine-tuned"], finetuned(one_process, tmp_path, tmp_path / "fine-tuned", "pieces"))
