"""A class head beside its network: its own, of the same labels, whole, or not taken."""

import json
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.head_files import HeadMetadata, copy_head, find_head, read_head, save_head
from igpt.checkpoint.igpt_format import save_model
from igpt.checkpoint.probe_files import save_probe
from igpt.model.gpt import GPT
from igpt.model.head import ClassHead
from tests.checkpoint.test_igpt_format import make_metadata
from tests.conftest import perturbed

CLASSES = "00ff00ff00ff00ff"
NAMES = ("cat", "dog", "dog\n", "שלום $x$", "\udcff")


@pytest.fixture
def weight(net: GPT) -> torch.Tensor:
    """(K, C)"""
    return torch.randn(5, net.n_embd, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path: Path, net: GPT, weight: torch.Tensor) -> Path:
    """The `model/` of a network with a head for five classes."""
    folder = tmp_path / "model"
    save_model(folder, net.state_dict(), make_metadata(net))
    save_head(folder, weight, HeadMetadata(5, "toy4", CLASSES, find_weights(str(folder)).sha256, NAMES))
    return folder


def find_in(
    folder: Path, *, n_class: int | None = 5, classes: str = CLASSES, names: tuple[str, ...] | None = None
) -> ClassHead | None:
    return find_head(find_weights(str(folder)), n_class=n_class, classes=classes, class_names=names)


def test_round_trip(saved: Path, weight: torch.Tensor) -> None:
    """Round trip: the weights to the bit; by hand: a score is the mean over positions times a row."""
    head = find_in(saved)
    assert head is not None
    assert torch.equal(head.wclf, weight)
    hidden = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(head(hidden), torch.einsum("btc,kc->bk", hidden, weight) / 16, atol=1e-5)
    names = ["config.json", "head.json", "head.safetensors", "model.safetensors"]
    assert sorted(path.name for path in saved.iterdir()) == names


def test_a_full_disk_is_named_with_the_file(tmp_path: Path, weight: torch.Tensor) -> None:
    """Invariant: an OSError, which ends a run in one line; nothing is left, of a probe's head neither."""
    import resource

    before, size = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, size[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/head\.safetensors'"):
            save_head(tmp_path, weight, HeadMetadata(5, "toy4", CLASSES, "0" * 64))
        with pytest.raises(OSError, match=r"File too large: '.*/probe\.safetensors'"):
            save_probe(tmp_path / "probe.safetensors", weight, weight[:, 0], [1], None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, size)
        signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.iterdir())


def test_half_precision_is_read_as_float32(saved: Path, weight: torch.Tensor) -> None:
    """Round trip: as weights of a network are."""
    save_head(saved, weight.bfloat16(), HeadMetadata(5, "toy4", CLASSES, find_weights(str(saved)).sha256))
    head = find_in(saved)
    assert head is not None
    assert head.wclf.dtype == torch.float32
    assert torch.equal(head.wclf, weight.bfloat16().float())


def test_saving_again_replaces_both(saved: Path, weight: torch.Tensor) -> None:
    """Round trip: the last one is read."""
    save_head(saved, weight[:3] * 2, HeadMetadata(3, "toy4", "other", find_weights(str(saved)).sha256))
    head = find_in(saved, n_class=3, classes="other")
    assert head is not None
    assert torch.equal(head.wclf, weight[:3] * 2)


def test_there_is_none(tmp_path: Path, net: GPT) -> None:
    save_model(tmp_path / "model", net.state_dict(), make_metadata(net))
    assert find_in(tmp_path / "model") is None


def test_beside_other_weights(saved: Path, net: GPT) -> None:
    save_model(saved, perturbed(net, seed=7).state_dict(), make_metadata(net))
    with pytest.raises(ValueError, match=r"head\.safetensors belongs to other weights than lie beside it"):
        find_in(saved)


@pytest.mark.parametrize(("n_class", "classes"), [(6, CLASSES), (5, "11ff11ff11ff11ff"), (None, CLASSES)])
def test_for_other_labels(saved: Path, n_class: int | None, classes: str) -> None:
    with pytest.raises(ValueError, match="tells 5 classes of toy4 apart, the labels of this data are not those"):
        find_in(saved, n_class=n_class, classes=classes)


def test_names_of_classes_are_kept(saved: Path, weight: torch.Tensor, tmp_path: Path) -> None:
    """Round trip: whatever they are called, and where the head is copied to; it fits data that calls them so."""
    about, _ = read_head(find_weights(str(saved)))
    assert about.class_names == NAMES
    assert find_in(saved, names=NAMES) is not None
    assert find_in(saved, names=None) is not None
    again = tmp_path / "again" / "model"
    shutil.copytree(saved, again, ignore=shutil.ignore_patterns("head.*"))
    copy_head(find_weights(str(saved)), again)
    assert read_head(find_weights(str(again)))[0].class_names == NAMES
    long = tuple(f"{i} {'x' * 1000}" for i in range(5))
    save_head(saved, weight, HeadMetadata(5, "toy4", CLASSES, find_weights(str(saved)).sha256, long))
    assert find_in(saved, names=long) is not None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("cat", "dog\n", "dog", *NAMES[3:]), r"in another order: class 1 is 'dog' to the head, 'dog\\n' to the data"),
        (("cat", "dog", "cow", *NAMES[3:]), r"\(class 2 is 'dog\\n' to the head, 'cow' to the data\)"),
    ],
)
def test_for_classes_of_other_names(saved: Path, names: tuple[str, ...], message: str) -> None:
    """By hand: as many classes, and labels of the same hash, but another thing is meant by one of them."""
    with pytest.raises(ValueError, match=rf"the labels of this data are not those .*{message}.*: evaluate it on"):
        find_in(saved, names=names)


def test_a_head_of_before_classes_had_names(saved: Path) -> None:
    """Round trip: the file as it was then is read, and says of no data that it is called otherwise."""
    path = saved / "head.json"
    written = json.loads(path.read_text())
    del written["class_names"]
    path.write_text(json.dumps(written))
    assert read_head(find_weights(str(saved)))[0].class_names is None
    assert find_in(saved, names=("a", "b", "c", "d", "e")) is not None


@pytest.mark.parametrize(
    "change",
    [
        {"class_names": ["a", "b"]},
        {"class_names": "abcde"},
        {"class_names": dict.fromkeys("abcde")},
        {"class_names": ["a", "b", "c", "d", 5]},
        {"class_names": ["a", "b", "c", "d", "e" * 256]},
        {"class_names": 5},
        {"n_class": True},
        {"n_class": "5"},
        {"data": None},
        {"eval_masks": "5"},
        {"eval_masks": -1},
        {"seed": 0.5},
    ],
    ids=str,
)
def test_a_description_of_other_kinds(saved: Path, change: dict[str, Any]) -> None:
    """Invariant: a field that is not what is written there makes no head; the file is named."""
    path = saved / "head.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"head\.json is damaged"):
        find_in(saved)


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_weights_cut_short(saved: Path, kept: int) -> None:
    path = saved / "head.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"head\.safetensors is damaged"):
        find_in(saved)


def test_weights_that_are_gone(saved: Path) -> None:
    (saved / "head.safetensors").unlink()
    with pytest.raises(ValueError, match=r"head\.safetensors is damaged"):
        find_in(saved)


def test_one_byte_turned_over(saved: Path) -> None:
    """Invariant: as with the network's weights, what is read is what was written, or nothing."""
    path = saved / "head.safetensors"
    body = path.read_bytes()
    path.write_bytes(body[:-2] + bytes([body[-2] ^ 64]) + body[-1:])
    with pytest.raises(ValueError, match=r"head\.safetensors"):
        find_in(saved)


def test_two_tensors(saved: Path, weight: torch.Tensor) -> None:
    save_file({"wclf": weight, "more": weight + 1}, saved / "head.safetensors")
    with pytest.raises(ValueError, match=r"head\.safetensors is damaged"):
        find_in(saved)


@pytest.mark.parametrize("shape", [(4, 24), (5, 23), (5, 1, 24), (24,)])
def test_weights_of_another_shape(saved: Path, shape: tuple[int, ...]) -> None:
    """Five classes are stated, and the network beside it is 24 wide."""
    save_file({"wclf": torch.zeros(shape)}, saved / "head.safetensors")
    with pytest.raises(ValueError, match=r"head\.safetensors"):
        find_in(saved)


@pytest.mark.parametrize("text", ["", '{"n_class": 5,', "null", "[5]", '{"n_class": 5}', "more"])
def test_a_damaged_description(saved: Path, text: str) -> None:
    """Not JSON, no object, a field too few, a field too many: the file is named."""
    path = saved / "head.json"
    if text == "more":
        text = json.dumps(json.loads(path.read_text()) | {"more": 1})
    path.write_text(text)
    with pytest.raises(ValueError, match=r"head\.json"):
        find_in(saved)


def test_what_is_written(saved: Path, weight: torch.Tensor) -> None:
    """Round trip: a description that others can read, and one tensor with the released checkpoint's name."""
    about = HeadMetadata(5, "toy4", CLASSES, find_weights(str(saved)).sha256, eval_masks=3, seed=7)
    save_head(saved, weight, replace(about, class_names=NAMES))
    written = json.loads((saved / "head.json").read_text())
    assert asdict(about) | {"class_names": list(NAMES), "sha256": written["sha256"]} == written
    assert list(load_file(saved / "head.safetensors")) == ["wclf"]
