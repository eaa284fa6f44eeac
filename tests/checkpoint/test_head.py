"""A class head beside its network: its own, of the same labels, whole, or not taken."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from igpt.checkpoint.find import find
from igpt.checkpoint.head import HeadOrigin, find_head, save_head
from igpt.checkpoint.native import save_model
from igpt.model.gpt import GPT
from igpt.model.head import ClassHead
from tests.checkpoint.test_native import origin_of
from tests.conftest import perturbed

CLASSES = "00ff00ff00ff00ff"


@pytest.fixture
def weight(net: GPT) -> torch.Tensor:
    """(K, C)"""
    return torch.randn(5, net.n_embd, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path: Path, net: GPT, weight: torch.Tensor) -> Path:
    """The `model/` of a network with a head for five classes."""
    folder = tmp_path / "model"
    save_model(folder, net.state_dict(), origin_of(net))
    save_head(folder, weight, HeadOrigin(5, "toy4", CLASSES, find(str(folder)).sha256))
    return folder


def found(folder: Path, *, n_class: int | None = 5, classes: str = CLASSES) -> ClassHead | None:
    return find_head(find(str(folder)), n_class=n_class, classes=classes)


def test_round_trip(saved: Path, weight: torch.Tensor) -> None:
    """Round trip: the weights to the bit; by hand: a score is the mean over positions times a row."""
    head = found(saved)
    assert head is not None
    assert torch.equal(head.wclf, weight)
    hidden = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(head(hidden), torch.einsum("btc,kc->bk", hidden, weight) / 16, atol=1e-5)
    names = ["config.json", "head.json", "head.safetensors", "model.safetensors"]
    assert sorted(path.name for path in saved.iterdir()) == names


def test_half_precision_is_read_as_float32(saved: Path, weight: torch.Tensor) -> None:
    """Round trip: as weights of a network are."""
    save_head(saved, weight.bfloat16(), HeadOrigin(5, "toy4", CLASSES, find(str(saved)).sha256))
    head = found(saved)
    assert head is not None
    assert head.wclf.dtype == torch.float32
    assert torch.equal(head.wclf, weight.bfloat16().float())


def test_saving_again_replaces_both(saved: Path, weight: torch.Tensor) -> None:
    """Round trip: the last one is read."""
    save_head(saved, weight[:3] * 2, HeadOrigin(3, "toy4", "other", find(str(saved)).sha256))
    head = found(saved, n_class=3, classes="other")
    assert head is not None
    assert torch.equal(head.wclf, weight[:3] * 2)


def test_there_is_none(tmp_path: Path, net: GPT) -> None:
    save_model(tmp_path / "model", net.state_dict(), origin_of(net))
    assert found(tmp_path / "model") is None


def test_beside_other_weights(saved: Path, net: GPT) -> None:
    save_model(saved, perturbed(net, seed=7).state_dict(), origin_of(net))
    with pytest.raises(ValueError, match=r"head\.safetensors belongs to other weights than lie beside it"):
        found(saved)


@pytest.mark.parametrize(("n_class", "classes"), [(6, CLASSES), (5, "11ff11ff11ff11ff"), (None, CLASSES)])
def test_for_other_labels(saved: Path, n_class: int | None, classes: str) -> None:
    with pytest.raises(ValueError, match="tells 5 classes of toy4 apart, the labels of this data are not those"):
        found(saved, n_class=n_class, classes=classes)


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_weights_cut_short(saved: Path, kept: int) -> None:
    path = saved / "head.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"head\.safetensors is damaged"):
        found(saved)


def test_weights_that_are_gone(saved: Path) -> None:
    (saved / "head.safetensors").unlink()
    with pytest.raises(ValueError, match=r"head\.safetensors is damaged"):
        found(saved)


def test_one_byte_turned_over(saved: Path) -> None:
    """Invariant: as with the network's weights, what is read is what was written, or nothing."""
    path = saved / "head.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 64]) + whole[-1:])
    with pytest.raises(ValueError, match=r"head\.safetensors"):
        found(saved)


def test_two_tensors(saved: Path, weight: torch.Tensor) -> None:
    save_file({"wclf": weight, "more": weight + 1}, saved / "head.safetensors")
    with pytest.raises(ValueError, match=r"head\.safetensors is damaged"):
        found(saved)


@pytest.mark.parametrize("shape", [(4, 24), (5, 23), (5, 1, 24), (24,)])
def test_weights_of_another_shape(saved: Path, shape: tuple[int, ...]) -> None:
    """Five classes are stated, and the network beside it is 24 wide."""
    save_file({"wclf": torch.zeros(shape)}, saved / "head.safetensors")
    with pytest.raises(ValueError, match=r"head\.safetensors"):
        found(saved)


@pytest.mark.parametrize("text", ["", '{"n_class": 5,', "null", "[5]", '{"n_class": 5}', "more"])
def test_a_damaged_description(saved: Path, text: str) -> None:
    """Not JSON, no object, a field too few, a field too many: the file is named."""
    path = saved / "head.json"
    if text == "more":
        text = json.dumps(json.loads(path.read_text()) | {"more": 1})
    path.write_text(text)
    with pytest.raises(ValueError, match=r"head\.json"):
        found(saved)


def test_what_is_written(saved: Path, weight: torch.Tensor) -> None:
    """Round trip: a description that others can read, and one tensor with the released checkpoint's name."""
    about = HeadOrigin(5, "toy4", CLASSES, find(str(saved)).sha256)
    assert asdict(about).items() <= json.loads((saved / "head.json").read_text()).items()
    assert list(load_file(saved / "head.safetensors")) == ["wclf"]
