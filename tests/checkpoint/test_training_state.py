"""The state of a training is the same from one file and from a folder in pieces, under the same names."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from igpt.checkpoint.resume import AtomicCheckpointIO, latest_checkpoint, mark_latest
from igpt.checkpoint.training_state import GROUPS, read_as_one_file, read_training_state
from igpt.model.gpt import GPT
from igpt.training.optimizers import make_optimizer
from igpt.utils import files

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
RATES = {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}
REST = {"global_step": 3, "lr_schedulers": [{"_last_lr": [0.01]}]}


@pytest.fixture(params=["adam", "muon"])
def trained(request: pytest.FixtureRequest, net: GPT) -> tuple[nn.Module, Any]:
    """A module after two steps, and its optimiser."""
    module = nn.Module()
    module.net = net
    optimizer = make_optimizer(request.param, net, **RATES)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for weight in net.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return module, optimizer


@pytest.fixture
def saved(trained: tuple[nn.Module, Any], tmp_path: Path) -> tuple[Path, Path]:
    """What one process writes, and what a strategy that shards does."""
    module, optimizer = trained
    full, pieces = tmp_path / "step_0000003.ckpt", tmp_path / "pieces.ckpt"
    state = dict(module.state_dict())
    torch.save({**REST, "state_dict": state, "optimizer_states": [optimizer.state_dict()]}, full)
    dcp.save({"state_dict": state, "optimizer_0": get_optimizer_state_dict(module, optimizer)}, checkpoint_id=pieces)
    torch.save(REST, pieces / "meta.pt")
    return full, pieces


def test_one_file_and_pieces_are_the_same(trained: tuple[nn.Module, Any], saved: tuple[Path, Path]) -> None:
    """Independent source: PyTorch's names of a weight's moments; a file numbers them, Muon's matrices first."""
    module, optimizer = trained
    (one, rest), (other, rest_of_other) = map(read_training_state, saved)
    names = {weight: name for name, weight in module.named_parameters()}
    expected = {f"state_dict.{name}": weight.detach() for weight, name in names.items()}
    for weight, values in optimizer.state.items():
        expected |= {f"optimizer_0.state.{names[weight]}.{key}": value for key, value in values.items()}
    assert one.keys() == other.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(one[name].read(), tensor)
        assert torch.equal(other[name].read(), tensor)
        assert one[name].shape == other[name].shape == tuple(tensor.shape)
    assert rest == rest_of_other
    assert [[names[weight] for weight in group["params"]] for group in optimizer.param_groups] == [
        group["params"] for group in rest[GROUPS]
    ]
    assert {key: rest[key] for key in REST} == REST


def test_pieces_become_one_file(saved: tuple[Path, Path]) -> None:
    """Round trip: what one process would have written, settings of the optimiser included."""
    expected = torch.load(saved[0], weights_only=True)
    joined = read_as_one_file(saved[1])
    assert joined.keys() == expected.keys()
    (optimizer,), (of_one,) = joined["optimizer_states"], expected["optimizer_states"]
    assert optimizer["param_groups"] == of_one["param_groups"]
    torch.testing.assert_close(joined["state_dict"], dict(expected["state_dict"]), rtol=0, atol=0)
    torch.testing.assert_close(optimizer["state"], of_one["state"], rtol=0, atol=0)


def test_a_weight_that_is_not_trained(net: GPT, tmp_path: Path) -> None:
    """Invariant: without the loss of pixels nothing trains `wtet`, which one process's numbers leave out."""
    module = nn.Module()
    module.net = net
    net.wtet.requires_grad_(False)
    optimizer = torch.optim.Adam([weight for weight in net.parameters() if weight.requires_grad])
    for weight in net.parameters():
        weight.grad = weight.detach() if weight.requires_grad else None
    optimizer.step()
    path = tmp_path / "step_0000001.ckpt"
    torch.save({"state_dict": dict(module.state_dict()), "optimizer_states": [optimizer.state_dict()]}, path)
    state, rest = read_training_state(path)
    names = [f"net.{name}" for name, weight in net.named_parameters() if weight.requires_grad]
    assert rest[GROUPS][0]["params"] == names
    assert {"state_dict.net.wtet"} == {f"state_dict.{n}" for n in module.state_dict()} - {
        f"state_dict.{n}" for n in names
    }
    for name, weight in net.named_parameters():
        if weight.requires_grad:  # Adam's first moment after one step is a tenth of the gradient, here the old weight
            assert torch.equal(
                state[f"optimizer_0.state.net.{name}.exp_avg"].read(), optimizer.state[weight]["exp_avg"]
            )


def change(path: Path, what: Callable[[dict[str, Any]], object]) -> None:
    checkpoint = torch.load(path, weights_only=True)
    what(checkpoint)
    torch.save(checkpoint, path)


def misshape_a_moment(checkpoint: dict[str, Any]) -> None:
    moments = next(iter(checkpoint["optimizer_states"][0]["state"].values()))
    key = next(key for key, value in moments.items() if value.dim())
    moments[key] = torch.zeros(3, 5)


@pytest.mark.parametrize("trained", ["adam"], indirect=True)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda c: c.pop("optimizer_states"), "no weights with the optimiser"),
        (lambda c: c.update(optimizer_states=[]), "no weights with the optimiser"),
        (lambda c: c.update(state_dict=3), "no weights with the optimiser"),
        (lambda c: c["state_dict"].popitem(), r"an optimiser of \d+ weights, there are \d+"),
        (lambda c: c["optimizer_states"][0]["param_groups"][0]["params"].pop(), "KeyError: 22"),
        (lambda c: c["optimizer_states"][0]["param_groups"][0].update(params=[0, 1]), "an optimiser of 2 weights"),
        (lambda c: c["optimizer_states"][0]["state"].update({77: {"exp_avg": torch.zeros(1)}}), "KeyError: 77"),
        (lambda c: c["optimizer_states"][0]["state"][0].update(exp_avg="text"), "a str, expected a tensor"),
        (misshape_a_moment, r"has the shape \(3, 5\)"),
    ],
)
def test_a_file_that_is_no_training(
    saved: tuple[Path, Path], fault: Callable[[dict[str, Any]], object], message: str
) -> None:
    change(saved[0], fault)
    with pytest.raises(ValueError, match=message) as error:
        read_training_state(saved[0])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("trained", ["adam"], indirect=True)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda f: (f / "meta.pt").unlink(), r"meta\.pt missing"),
        (lambda f: torch.save([1], f / "meta.pt"), "something else than a training"),
        (lambda f: (f / "__0_0.distcp").unlink(), r"__0_0\.distcp missing"),
        (lambda f: (f / "__0_0.distcp").write_bytes((f / "__0_0.distcp").read_bytes()[:-4000]), "damaged"),
    ],
)
def test_a_folder_that_is_not_whole(saved: tuple[Path, Path], fault: Callable[[Path], object], message: str) -> None:
    fault(saved[1])
    with pytest.raises(ValueError, match=message) as error:
        read_as_one_file(saved[1])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["missing", "swapped", "cut", "none"])
def test_every_part_is_under_the_checksum(tmp_path: Path, damage: str) -> None:
    """By hand: the hashes of the parts, by name, make the checksum, whoever computed them."""
    path, unfinished = tmp_path / "checkpoints" / "step_0000003.ckpt", tmp_path / "checkpoints" / ".part"
    contents = {"__0_0.distcp": b"first", "__1_0.distcp": b"other", ".metadata": b"where", "meta.pt": b"rest"}
    unfinished.mkdir(parents=True)
    for name, content in contents.items():
        (unfinished / name).write_bytes(content)
    lines = [f"{name} {hashlib.sha256(contents[name]).hexdigest()}\n" for name in sorted(contents)]
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert files.sha256(unfinished) == expected
    AtomicCheckpointIO().replace(unfinished, path, expected)
    mark_latest(path, keep=1)
    one, other = path / "__0_0.distcp", path / "__1_0.distcp"
    if damage == "none":
        assert latest_checkpoint(tmp_path) == path
        return
    if damage == "missing":
        other.unlink()
    elif damage == "swapped":
        one.write_bytes(contents[other.name])
        other.write_bytes(contents[one.name])
    else:
        other.write_bytes(b"oth")
    with pytest.raises(ValueError, match=r"holds no checkpoint that is whole \(1 are damaged\)") as error:
        latest_checkpoint(tmp_path)
    assert "\n" not in str(error.value)
