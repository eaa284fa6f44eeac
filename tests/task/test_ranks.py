"""Two ranks against one process. The ranks are started once, and do all that is checked here."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.resume import find_kept, latest_checkpoint
from igpt.checkpoint.sharded import STATE, read_state
from igpt.model.config import GPTConfig
from igpt.objective.ar import AR
from igpt.objective.bert import BERT
from igpt.tokens.tokenizer_registry import TOKENIZER, read_tokenizer
from igpt.training.cost_estimate import estimate_cost
from tests.metric.test_classification import draw_scores, measure
from tests.task.conftest import SIZES, Lab, answers_in, machine, train_tokenizer, worked
from tests.task.ranks_work import (
    BEYOND,
    CLIPPED,
    DEEPSPEED,
    SHARDED_WITH,
    SHORT,
    TWENTY,
    evaluated,
    read_off,
    samples,
)
from tests.tokens.test_quantizer import train_quantizer


@pytest.fixture(scope="module")
def options_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worked(tmp_path_factory.mktemp("options"), "options")


@pytest.fixture(scope="module")
def options(options_place: Path) -> list[dict[str, Any]]:
    """What sharded networks with options came to, on two ranks."""
    return answers_in(options_place)


@pytest.fixture(scope="module")
def zero_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worked(tmp_path_factory.mktemp("deepspeed"), "deepspeed")


@pytest.fixture(scope="module")
def by_zero(zero_place: Path) -> list[dict[str, Any]]:
    """What DeepSpeed's stages came to, on two ranks."""
    return answers_in(zero_place)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, one_process: Lab) -> Any:
    """The same run on one process."""
    return one_process.pretrain(tmp_path_factory.mktemp("one") / "ar", on=machine(micro_batch=50), **TWENTY)


def test_the_losses_of_one_process(
    answers: list[dict[str, Any]], one_process: Lab, reference: Any, tmp_path: Path
) -> None:
    """Invariant: the same global batch, with accumulation on either side, gives the same 20 losses; so does BERT."""
    for name, curve in reference.curves.items():
        assert answers[0]["curves"][name] == pytest.approx(curve.y, rel=1e-5)
    assert len(reference.curves["train/loss_gen"].y) == 20
    bert = one_process.pretrain(tmp_path / "bert", objective=BERT(mask_probability=0.15))
    assert answers[0]["bert"] == pytest.approx(bert.curves["train/loss_gen"].y, rel=1e-5)


def test_classes_are_counted_once(answers: list[dict[str, Any]]) -> None:
    """Invariant: two ranks with 9 and 4, or 13 and no images, have the numbers of one process, to the bit."""
    scores, labels, votes = draw_scores(13, 7)
    numbers, matrix = measure(scores, votes, labels)
    for answer in answers:
        assert answer["classes"] == [(numbers, matrix.tolist())] * 2


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, one_process: Lab) -> dict[str, list[float]]:
    """The curves of a run with clipped gradients and averaged weights, on one process."""
    result = one_process.pretrain(tmp_path_factory.mktemp("one") / "recipe", ema=0.5, **CLIPPED)
    return {name: curve.y for name, curve in result.curves.items()}


def test_later_recipes_of_one_process(
    answers: list[dict[str, Any]], one_process: Lab, recipe: dict[str, list[float]], tmp_path: Path
) -> None:
    """Invariant: clipped gradients and averaged weights; sharded gradients are clipped by the norm of all of them."""
    for answer in answers:
        for name, curve in recipe.items():
            assert answer["recipe"][name] == pytest.approx(curve, rel=1e-5)
        assert answer["sharded"]["clipped"] == pytest.approx(recipe["train/loss_gen"], rel=1e-5)
    assert recipe["val/loss_gen_ema"] != recipe["val/loss_gen"]
    free = one_process.pretrain(tmp_path, **{**CLIPPED, "gradient_clip": None}).curves["train/loss_gen"].y
    assert free[2] != pytest.approx(recipe["train/loss_gen"][2], rel=1e-4)


def test_the_tokenizer_of_one_process(answers: list[dict[str, Any]], place: Path, tmp_path: Path) -> None:
    """Invariant: the losses and the codebook of a VQ-VAE, its start and restarts included; it cannot be sharded."""
    one = train_tokenizer(tmp_path, on=machine(micro_batch=4))
    for name, curve in one.curves.items():
        assert answers[0]["tokenizer"][name] == pytest.approx(curve.y, rel=1e-5)
    files = [run / "model" / TOKENIZER for run in (tmp_path, place / "tokenizer")]
    networks = [read_tokenizer(file).load_network(torch.device("cpu")) for file in files]  # type: ignore[attr-defined]
    one_process, shared = (network.quantizer.codebook for network in networks)
    assert torch.allclose(shared, one_process, rtol=1e-5, atol=1e-5)
    assert "trainer=ddp" in answers[0]["tokenizer refused"]


def test_a_network_in_parts_learns_as_a_whole_one(answers: list[dict[str, Any]]) -> None:
    """Invariant: 20 losses and the validations as under data-parallel training; BERT's too; half is held by each."""
    for answer in answers:
        for name, curve in answers[0]["curves"].items():
            assert answer["sharded"]["curves"][name] == pytest.approx(curve, rel=1e-5)
        assert answer["sharded"]["bert"] == pytest.approx(answers[0]["bert"], rel=1e-5)
        assert 0.45 < answer["sharded"]["held"] <= 0.55


@pytest.mark.slow
@pytest.mark.parametrize("strategy", DEEPSPEED)
def test_deepspeed_learns_as_a_whole_one(
    by_zero: list[dict[str, Any]], reference: Any, recipe: dict[str, list[float]], strategy: str
) -> None:
    """Invariant: 20 losses and the validations as on one process, also when stopped and resumed; clipped, too."""
    for answers in by_zero:
        assert answers[f"{strategy} clipped"] == pytest.approx(recipe["train/loss_gen"], rel=1e-5)
        assert answers[strategy].keys() == reference.curves.keys() - {"train/grad_norm_max"}
        for name, values in answers[strategy].items():
            assert values == pytest.approx(reference.curves[name].y, rel=1e-5)
        assert answers[f"{strategy} validated"] == pytest.approx(reference.numbers["val/loss_gen"].value, rel=1e-5)
        if strategy == "deepspeed_2":
            assert answers[f"{strategy} stopped"].startswith("stopped by SIGTERM after step")
            assert answers[f"{strategy} resumed"] == answers[strategy]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", DEEPSPEED[:2])
def test_deepspeed_holds_what_was_planned(by_zero: list[dict[str, Any]], strategy: str) -> None:
    """Independent source: the bytes of weights and optimiser in each rank, within 15 %."""
    planned = estimate_cost(
        GPTConfig(**SIZES), batch_size=100, micro_batch=25, steps=1, devices=2, strategy=strategy, precision="32-true",
        recompute=False, backends=["sdpa"] * SIZES["n_layer"], on_gpu=True,
    )  # fmt: skip
    for answers in by_zero:
        assert answers[f"{strategy} held"] == pytest.approx(planned.weights + planned.optimiser, rel=0.15)


@pytest.mark.slow
def test_what_deepspeed_saves_is_what_fsdp_does(zero_place: Path, by_zero: list[dict[str, Any]]) -> None:
    """Invariant: weights and Adam's moments after 16 steps of either, by name (moments show the gradients' scale)."""
    folders = [zero_place / run / "checkpoints" / "step_0000016.ckpt" for run in ("sharded pieces", *DEEPSPEED)]
    peer, *saved = map(read_state, folders)
    for other in saved:
        assert set(other) == set(peer)
        for name, tensor in peer.items():
            full = tensor.read()
            torch.testing.assert_close(other[name].read(), full, rtol=0, atol=1e-4 * float(full.abs().max()))
    for strategy, other in zip(DEEPSPEED, saved, strict=True):  # the weights that are kept are those of the checkpoint
        kept = find_weights(str(find_kept(zero_place / strategy)[16])).net().state_dict()
        assert all(torch.equal(weight, other[f"{STATE}net.{name}"].read()) for name, weight in kept.items())


@pytest.mark.slow
def test_a_checkpoint_in_pieces_is_resumed_by_another_number_of_ranks(tmp_path: Path, reference: Any) -> None:
    """Invariant: begun by two, ended by four, its losses are those of one process."""
    for answer in answers_in(worked(tmp_path, "pieces")):
        assert answer["stopped"].startswith("stopped by SIGTERM after step 8")
    for answer in answers_in(worked(tmp_path, "pieces", count=4)):
        assert answer["losses"] == pytest.approx(reference.curves["train/loss_gen"].y, rel=1e-5)


@pytest.mark.slow
def test_a_run_may_change_its_strategy(by_zero: list[dict[str, Any]], reference: Any) -> None:
    """Invariant: begun by DeepSpeed, gone on with by FSDP and ended by DeepSpeed, its losses are those of one."""
    for answers in by_zero:
        first, second, *losses = answers["by turns"]
        assert first.startswith("stopped by SIGTERM after step 8")
        assert second.startswith("stopped by SIGTERM after step 1")
        assert losses == pytest.approx(reference.curves["train/loss_gen"].y, rel=1e-5)


@pytest.mark.ci
def test_what_sharding_goes_together_with(options: list[dict[str, Any]]) -> None:
    """Invariant: the first loss is ln 17 whatever the precision (the head starts at zero), and the second is lower."""
    for name in SHARDED_WITH:
        first, second = options[0][f"with {name}"]
        assert first == pytest.approx(np.log(17), rel=1e-2)
        assert second < first


@pytest.mark.ci
@pytest.mark.parametrize("name", BEYOND)
def test_networks_with_options_are_sharded(
    name: str, options_place: Path, options: list[dict[str, Any]], one_process: Lab, tmp_path: Path
) -> None:
    """Invariant: the losses of one process, with tables of sines, masks and offsets computed after sharding."""
    one = one_process.pretrain(tmp_path, network=BEYOND[name], **SHORT).curves["train/loss_gen"].y
    assert len(one) == 3
    for answer in options:
        assert answer[f"beyond {name}"] == pytest.approx(one, rel=1e-5)
    weights, expected = (
        find_weights(str(run)).net().state_dict() for run in (options_place / f"sharded {name}", tmp_path)
    )
    for key, weight in expected.items():
        torch.testing.assert_close(weights[key], weight, rtol=1e-3, atol=1e-4)


def test_a_sharded_run_is_resumed_to_the_bit(place: Path, answers: list[dict[str, Any]]) -> None:
    """Invariant: stopped and resumed, from a whole checkpoint or from one in pieces, as if it had never stopped."""
    never = load_file(place / "sharded" / "model" / "model.safetensors")
    for name in ("whole", "pieces"):
        assert re.fullmatch(r"stopped by SIGTERM after step \d+", answers[1]["sharded"][f"{name} stopped"])
        assert answers[0]["sharded"][f"{name} resumed"] == answers[0]["sharded"]["curves"]
        resumed = load_file(place / f"sharded {name}" / "model" / "model.safetensors")
        assert all(torch.equal(resumed[key], weight) for key, weight in never.items())
        for step in (4, 16):  # kept before the stop and after it: there once, the same bits
            one, other = (find_kept(place / run)[step] / "model.safetensors" for run in ("sharded", f"sharded {name}"))
            assert one.read_bytes() == other.read_bytes()
    in_pieces = latest_checkpoint(place / "sharded pieces")
    assert in_pieces is not None
    assert len(list(in_pieces.glob("*.distcp"))) == 2
    weights = find_weights(str(in_pieces))
    assert all(torch.equal(weight, never[key]) for key, weight in weights.net().state_dict().items())
    assert weights.metadata.step == 20


def test_weights_of_a_sharded_run_are_those_of_any(
    place: Path, answers: list[dict[str, Any]], one_process: Lab
) -> None:
    """Invariant: evaluated by one process, exactly its two ranks' numbers; loaded into parts, the loss they had."""
    one = evaluated(one_process, place / "sharded", machine(), AR())
    assert [answer["sharded"]["evaluated"] for answer in answers] == [one, one]
    loss = evaluated(one_process, place / "whole", machine(), AR())["val/loss_gen"][0]
    assert answers[0]["sharded"]["started"] == pytest.approx(loss, rel=1e-6)
    assert sorted(path.name for path in (place / "sharded" / "samples").iterdir())[0] == "step_0000008.png"


def test_a_checkpoint_in_pieces_is_resumed_by_one_process(
    place: Path, one_process: Lab, reference: Any, tmp_path: Path
) -> None:
    """Invariant: begun by two ranks that share the network out, ended by one process, the losses of one process."""
    shutil.copytree(place / "sharded pieces", tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_0000016.ckpt\n")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_0000020.ckpt")
    resumed = one_process.pretrain(tmp_path / "run", on=machine(micro_batch=50), **TWENTY)
    for name, curve in reference.curves.items():
        assert resumed.curves[name].y == pytest.approx(curve.y, rel=1e-5)


def test_a_checkpoint_in_pieces_that_is_damaged(place: Path, tmp_path: Path) -> None:
    """One byte of one piece: the checkpoint before it is taken, as with whole ones."""
    shutil.copytree(place / "sharded pieces", tmp_path / "run")
    newest = latest_checkpoint(tmp_path / "run")
    assert newest is not None
    piece = next(newest.glob("__1_*.distcp"))
    content = bytearray(piece.read_bytes())
    content[len(content) // 2] ^= 1
    piece.write_bytes(content)
    before = latest_checkpoint(tmp_path / "run")
    assert before is not None
    assert before.name < newest.name


def test_a_stream_is_read_once_by_two_ranks_of_two_workers(answers: list[dict[str, Any]]) -> None:
    """Invariant: of 3 tar shards and 2 parquet files, every image exactly once in each of two passes; stopped and
    resumed, each rank reads the same images in the same order as never stopped."""
    for answer in answers:
        read = answer["streamed"]
        assert read["rest"] == read["whole"][23:]
    together = [record for answer in answers for record in answer["streamed"]["whole"]]
    passes = [[(lane, image) for lane, epoch, image in together if epoch == at] for at in (0, 1)]
    assert {lane for lane, _ in passes[0]} == {0, 1, 2, 3}
    for one in passes:
        assert len(one) == len({image for _, image in one}) == 38
    assert passes[0] != passes[1]


def test_weights_that_two_ranks_saved_in_pieces(place: Path) -> None:
    """Round trip: sharded by FSDP2, read whole by one process; each piece of a matrix is half of its rows."""
    folder, full = place / "in pieces", load_file(place / "whole" / "model" / "model.safetensors")
    assert len(list(folder.glob("*.distcp"))) == 2
    state = find_weights(str(folder)).state()
    assert state.keys() == full.keys()
    assert all(torch.equal(state[name].read(), weight) for name, weight in full.items())
    next(folder.glob("__1_*.distcp")).unlink()
    with pytest.raises(ValueError, match=r"__1_0\.distcp missing"):
        find_weights(str(folder))


def test_evaluation_is_exactly_that_of_one_process(
    place: Path, answers: list[dict[str, Any]], one_process: Lab
) -> None:
    """Invariant: of 101 images, mean and standard error to the last bit, on either rank."""
    for name, objective in (("whole", AR()), ("bert", BERT(mask_probability=0.15))):
        one = evaluated(one_process, place / name, machine(), objective)
        assert one["val/loss_gen"][2] == 101
        for answer in answers:
            assert answer["evaluated" if name == "whole" else "evaluated bert"] == one


def test_probe_and_fine_tuning_are_those_of_one_process(
    place: Path, answers: list[dict[str, Any]], one_process: Lab, tmp_path: Path
) -> None:
    """Invariant: every accuracy of 101 images, with votes where pixels are masked; losses of fine-tuning to 1e-5."""
    for name, objective in (("whole", AR()), ("bert", BERT(mask_probability=0.15))):
        one = read_off(one_process, place / name, tmp_path / name, machine(), objective)
        for answer in answers:
            for kind, shares in one["shares"].items():  # of 101 images; calibration errors are of float32 scores
                assert answer[f"read off {name}"]["shares"][kind] == pytest.approx(shares, abs=1e-6)
        two = answers[0][f"read off {name}"]["curves"]
        assert two.keys() == one["curves"].keys()
        for key, values in one["curves"].items():
            assert two[key] == pytest.approx(values, rel=1e-5)


def test_samples_are_shared_out(place: Path, answers: list[dict[str, Any]]) -> None:
    """Invariant: five images over two ranks are the five of one process, in their order."""
    for answer in answers:
        assert torch.equal(answer["samples"], samples(place / "whole"))


def test_the_codes_of_one_process(answers: list[dict[str, Any]]) -> None:
    """Invariant: the same on both ranks to the bit; those of one process to 1e-12, and to the last bit of float32."""
    expected = train_quantizer(0, 1)
    for name, value in expected.items():
        assert torch.equal(answers[0]["codes"][name], answers[1]["codes"][name])
        tolerance = 1e-12 if value.dtype == torch.float64 else 1e-6
        assert torch.allclose(answers[0]["codes"][name].double(), value.double(), rtol=tolerance, atol=tolerance)


def test_one_rank_is_asked_to_stop_and_all_do(place: Path, answers: list[dict[str, Any]]) -> None:
    """Invariant: at the same step; and resumed, to the bit as if nothing had happened, over epoch borders."""
    assert answers[1]["stopped"] == "stopped by SIGTERM after step 8"
    assert answers[0]["stopped"] == answers[1]["stopped"]
    assert answers[0]["resumed"] == answers[0]["curves"]
    weights = [load_file(place / name / "model" / "model.safetensors") for name in ("whole", "stopped")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_error_on_both_ranks_loses_no_finished_step(place: Path, answers: list[dict[str, Any]]) -> None:
    """Invariant: rank 0 saves it, without rank 1, in the middle of the next; resumed, all is as before, to the bit."""
    assert [answer["failed"] for answer in answers] == ["of their own"] * 2
    assert [answer["saved"] for answer in answers] == [7, 7]
    assert answers[0]["repaired"] == answers[0]["curves"]
    weights = [load_file(place / name / "model" / "model.safetensors") for name in ("whole", "failed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_what_goes_wrong_is_known_to_both(place: Path, answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        assert answer["not finite"] == answers[0]["not finite"]
        assert re.match(r"the loss of step \d is not finite", answer["not finite"])
        expected = "rank 0 and rank 1 do not agree on the settings: seed 0 ≠ 1; give every machine"
        assert answer["other settings"].startswith(expected)
        assert "invalid literal for int" in answer["from the first"]
        assert "task.batch_size 101 cannot be shared by 2 processes" in answer["odd batch"]
    latest = latest_checkpoint(place / "full disk")
    assert latest is not None
    assert latest.name == "step_0000008.ckpt"  # the refusal at step 4 ended neither
    assert not (latest.parent / "step_0000004.ckpt").exists()


def test_an_agreement_is_heard_by_both_one_step_later(answers: list[dict[str, Any]]) -> None:
    assert [answer["heard"] for answer in answers] == [[0, 0, 0, 5, 0]] * 2


def test_only_the_first_rank_writes(place: Path, answers: list[dict[str, Any]]) -> None:
    """Invariant: the folder of two ranks holds what the folder of one does, and the second opened no file in it."""
    assert "step_0000020.ckpt" in answers[0]["written"]
    assert "model.safetensors" in answers[0]["written"]
    assert answers[1]["written"] == []
    names = {path.relative_to(place / "whole").as_posix() for path in (place / "whole").rglob("*")}
    saved = [f"checkpoints/step_00000{step}" for step in (10, 16, 20)]
    files = {"checkpoints/latest", "checkpoints/best.json", "model/config.json", "model/model.safetensors"}
    files |= {"loss_by_position/step_0000020.png"}
    assert names - {"checkpoints", "model", "loss_by_position"} <= files | {
        f"{s}.{kind}" for s in saved for kind in ("ckpt", "sha256")
    }
    assert np.isin(["checkpoints/latest", "model/model.safetensors"], list(names)).all()
