"""FSDP2 on two ranks: what it gathers and reduces in which precision, and what resumes into what."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from igpt.checkpoint.resume import AtomicCheckpointIO, find_checkpoints, is_intact
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from tests.task.conftest import Lab, machine
from tests.task.ranks_fsdp import MIXED, MUON, NETWORK


@pytest.fixture(scope="module")
def found(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [answer["fsdp"] for answer in answers]


def test_mixed_precision_is_that_of_data_parallel_training(found: list[dict[str, Any]]) -> None:
    """Independent source: autocast over float32 weights under DDP. Gains and stream are float32, matrices bfloat16."""
    for answer in found:
        ddp, fsdp, exact = (answer[name]["curves"] for name in ("ddp bf16-mixed", "fsdp bf16-mixed", "fsdp 32-true"))
        for name, values in ddp.items():
            assert fsdp[name] == pytest.approx(values, rel=1e-5)
        assert fsdp["train/grad_norm"] != pytest.approx(exact["train/grad_norm"], rel=1e-4)
        wide, narrow = "torch.float32", "torch.bfloat16"
        kinds = [
            ("cut by DDP", "False"),
            ("gain", wide),
            ("gain of queries", wide),
            ("matrix", narrow),
            ("stream", wide),
        ]
        assert answer["fsdp bf16-mixed"]["dtypes"] == kinds
        assert answer["fsdp 32-true"]["dtypes"] == [kinds[0], *((name, wide) for name, _ in kinds[1:])]


def test_gradients_are_those_of_autocast(found: list[dict[str, Any]]) -> None:
    """Independent source: autocast over a whole network, to the bit; offsets, summed in float32, are rounded once."""
    for answer in found:
        errors = answer["gradient errors"]
        assert len([name for name in errors if name.endswith(".g")]) == 9
        for name, error in errors.items():
            assert error <= (2**-8 if name.endswith("relative") else 1e-6), name


def test_blocks_are_gathered_in_half_the_bytes(found: list[dict[str, Any]]) -> None:
    """By hand: a pass gathers every block twice, all else once; there is one reduction of each a step, not a pass."""
    with torch.device("meta"):
        net = GPT(GPTConfig(**NETWORK))
    sizes: Counter[str] = Counter()  # numbers of each group; rows are made up to an even number
    for name, weight in net.named_parameters():
        block, is_gain = ".".join(name.split(".")[:2]) if name.startswith("h.") else "root", name.endswith(".g")
        group = "gains" if is_gain and block != "root" else block
        sizes[group] += -(-weight.shape[0] // 2) * 2 * weight[0].numel()
        sizes[f"float32 {block}"] += -(-weight.shape[0] // 2) * 2 * weight[0].numel()
    blocks = [name for name in sizes if name.startswith("h.")]
    once = [4 * sizes["root"], 4 * sizes["gains"]]
    exact = [4 * sizes[f"float32 {block}"] for block in blocks]
    pass_of = {
        "fsdp bf16-mixed": (
            [2 * sizes[block] for block in blocks] * 2 + once,
            [4 * sizes[each] for each in blocks] + once,
        ),
        "fsdp 32-true": (exact * 2 + once[:1], exact + once[:1]),
    }
    for answer in found:
        for name, (gathered, reduced) in pass_of.items():
            seen = answer[name]["collectives"]
            gathers, reductions = ([n for kind, n in seen if kind == each] for each in ("gather", "reduce"))
            assert sorted(gathers[: 2 * len(gathered)]) == sorted(gathered * 2)  # two passes, the first step
            assert sorted(reductions) == sorted(reduced * MIXED["steps"])


def test_muon_and_the_average_of_sharded_weights(found: list[dict[str, Any]]) -> None:
    """Independent source: the losses, norms and averages of DDP, whose matrices are whole; also when resumed."""
    for answer in found:
        for name in ("fsdp muon", "ddp → fsdp", "fsdp → fsdp"):
            assert answer[name].keys() == answer["ddp muon"].keys()
            for key, values in answer["ddp muon"].items():
                assert answer[name][key] == pytest.approx(values, rel=1e-5)
        assert answer["fsdp → fsdp"] == answer["fsdp muon"]
        assert answer["ddp muon"]["val/loss_gen_ema"] != answer["ddp muon"]["val/loss_gen"]


def test_pieces_of_muon_and_average_are_resumed_by_one_process(
    place: Path, found: list[dict[str, Any]], one_process: Lab
) -> None:
    """Invariant: moments by name, Muon's too, and the average of the weights: the losses of the ranks."""
    folder = place / "fsdp → fsdp"
    AtomicCheckpointIO().remove_checkpoint(find_checkpoints(folder)[-1])
    resumed = one_process.pretrain(folder, on=machine(micro_batch=50), **MUON)
    for name, values in found[0]["ddp muon"].items():
        assert resumed.curves[name].y == pytest.approx(values, rel=1e-5)


def test_each_rank_hashes_what_it_wrote(place: Path, found: list[dict[str, Any]]) -> None:
    """By hand: its own piece, and the first rank the two common files; the checksum is that of the whole folder."""
    n_saved = 2
    assert sorted(found[0]["hashed"]) == sorted([".metadata", "__0_0.distcp", "meta.pt"] * n_saved)
    assert found[1]["hashed"] == ["__1_0.distcp"] * n_saved
    for path in find_checkpoints(place / "fsdp muon"):
        assert is_intact(path)
