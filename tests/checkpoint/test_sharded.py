"""Checkpoints in pieces: written by PyTorch's own code, read without running what is in them."""

import io
import pickle
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.igpt_format import FORMAT, save_model
from igpt.checkpoint.resume import checksum_path
from igpt.checkpoint.sharded import _check_cover, _Chunk, _InertObject, _Unpickler, read_state
from igpt.model.gpt import GPT
from igpt.utils import files
from tests.checkpoint.test_igpt_format import make_metadata
from tests.conftest import Planted, perturbed

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save_sharded(folder: Path, net: GPT) -> Path:
    """What Lightning's sharded strategies leave: the module and its optimizer in pieces, and the rest in `meta.pt`."""
    state = {f"net.{name}": weight for name, weight in net.state_dict().items()}
    moments = {f"state.net.{name}.exp_avg": torch.zeros_like(w) for name, w in net.state_dict().items()}
    dcp.save({"state_dict": state, "optimizer_0": moments | {"note": "bytes"}}, checkpoint_id=folder)
    torch.save({"format": FORMAT, "origin": make_metadata(net).to_dict(), "global_step": 12}, folder / "meta.pt")
    return folder


@pytest.fixture
def sharded(tmp_path: Path, net: GPT) -> Path:
    return save_sharded(tmp_path / "checkpoints" / "step_0000012.ckpt", net)


def test_it_is_put_together(sharded: Path, net: GPT, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Round trip, of the folder and of a part of it, which is said; consolidated, it is a model of ours."""
    with caplog.at_level("INFO"):
        for place in (sharded, sharded / "__0_0.distcp", sharded / ".metadata", sharded / "meta.pt"):
            weights = find_weights(str(place))
            again = weights.net().state_dict()
            assert all(torch.equal(weight, again[name]) for name, weight in net.state_dict().items())
            assert weights.metadata == make_metadata(net)
    assert re.search(r"__0_0\.distcp: .*step_0000012\.ckpt is taken", caplog.text)
    save_model(tmp_path / "model", weights.state(), weights.metadata)
    assert find_weights(str(tmp_path / "model")).net().state_dict().keys() == net.state_dict().keys()


def test_every_tensor_is_what_pytorch_reads(sharded: Path) -> None:
    """Independent source: PyTorch's own conversion of such a folder into one file."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    full_path = sharded.parent / "whole.pt"
    dcp_to_torch_save(sharded, full_path)
    reference = torch.load(full_path, weights_only=True)
    flat = {f"{part}.{name}": value for part, values in reference.items() for name, value in values.items()}
    own = read_state(sharded)
    assert own.keys() == {name for name, value in flat.items() if isinstance(value, torch.Tensor)}
    assert all(torch.equal(tensor.read(), flat[name]) for name, tensor in own.items())


class Nested:
    """A pickle that is a checkpoint's metadata, with a call hidden in it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Metadata, ({"state_dict.net.wte": Planted(self.mark)},)


@pytest.mark.parametrize("planted", [Planted, Nested])
@pytest.mark.parametrize("where", [".metadata", "meta.pt", "__0_0.distcp"])
def test_code_in_it_is_not_run(sharded: Path, tmp_path: Path, where: str, planted: type) -> None:
    """In the metadata, in the rest, in a piece. Independent source: PyTorch's reader does run it."""
    mark = tmp_path / "ran"
    if where == "meta.pt":
        torch.save({"format": FORMAT, "origin": planted(mark)}, sharded / where)
    else:
        (sharded / where).write_bytes(pickle.dumps(planted(mark)))
    with pytest.raises(ValueError, match=rf"{where}.*(nothing in it was run|is damaged)"):
        find_weights(str(sharded)).net()
    assert not mark.exists()
    if where == ".metadata" and planted is Planted:
        with pytest.raises(AttributeError):  # the call made no metadata
            dcp.FileSystemReader(sharded).read_metadata()
        assert mark.exists()


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.load", "torch.hub.load", "pathlib.Path.touch"])
def test_what_metadata_may_name(sharded: Path, name: str) -> None:
    """Only the classes of metadata, and these as records: every other name is refused before it is looked up."""
    module, _, attribute = name.rpartition(".")
    (sharded / ".metadata").write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(ValueError, match=rf"it wants {module}\.{attribute}"):
        find_weights(str(sharded))


def test_a_file_does_nothing_to_the_classes_it_names(sharded: Path) -> None:
    """Invariant: setting fields on a class, which a pickle may, does not reach PyTorch's."""
    before = dict(vars(Metadata))
    field = b"}X\x08\x00\x00\x00__init__K\x01s"  # {"__init__": 1}
    hostile = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n" + field + b"b."  # set on the class
    (sharded / ".metadata").write_bytes(hostile)
    with pytest.raises(ValueError, match=r"\.metadata is damaged"):
        find_weights(str(sharded))
    assert dict(vars(Metadata)) == before


def elsewhere(folder: Path) -> None:
    text = (folder / ".metadata").read_bytes()
    assert text.count(b"__0_0.distcp")
    (folder / ".metadata").write_bytes(text.replace(b"__0_0.distcp", b"../x0.distcp"))


def metadata(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / ".metadata").write_bytes(content)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda f: (f / "__0_0.distcp").unlink(), r"__0_0\.distcp missing"),
        (lambda f: (f / "__0_0.distcp").write_bytes((f / "__0_0.distcp").read_bytes()[:9000]), r"distcp is damaged"),
        (lambda f: (f / ".metadata").unlink(), r"\.metadata"),
        (lambda f: (f / ".metadata").write_bytes((f / ".metadata").read_bytes()[:500]), r"\.metadata is damaged"),
        (lambda f: (f / ".metadata").write_bytes(b""), r"\.metadata is damaged"),
        (lambda f: (f / ".metadata").write_bytes(pickle.dumps({"a": 1})), r"\.metadata is damaged"),
        (lambda f: (f / "meta.pt").unlink(), r"has no meta\.pt"),
        (lambda f: torch.save({"epoch": 1}, f / "meta.pt"), "does not say what it is"),
        (lambda f: torch.save({"format": 1, "origin": {"step": 1}}, f / "meta.pt"), r"meta\.pt is not complete"),
        (
            lambda f: (f / ".metadata").write_bytes(b"\x80\x02K\x01r\xff\xff\xff\x7f."),
            "counts more objects than it holds",
        ),
        (
            lambda f: (f / ".metadata").write_bytes(b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b"."),
            r"\.metadata is damaged",
        ),
        (elsewhere, "not a file beside it"),
    ],
)
def test_what_is_refused(sharded: Path, fault: Callable[[Path], object], message: str) -> None:
    fault(sharded)
    with pytest.raises(ValueError, match=message):
        find_weights(str(sharded)).net()


def test_pieces_that_do_not_make_a_tensor(tmp_path: Path) -> None:
    """By hand: the same half twice, which is as many numbers as the whole, and one that reaches beyond."""
    half = _Chunk((0, 0), (2, 3), tmp_path / "a", 0, 1)
    other = _Chunk((2, 0), (2, 3), tmp_path / "a", 0, 1)
    _check_cover("w", (4, 3), [half, other])
    for pieces in ([half, half], [half], [half, _Chunk((3, 0), (2, 3), tmp_path / "a", 0, 1)], []):
        with pytest.raises(ValueError, match="the pieces of w do not make"):
            _check_cover("w", (4, 3), pieces)


def test_pieces_are_a_partition() -> None:
    """Invariant: boxes pass exactly where each number of the tensor, counted by hand, is in one of them."""
    rng = np.random.default_rng(0)
    accepted = 0
    for _ in range(300):
        shape = tuple(rng.integers(1, 5, rng.integers(1, 4)).tolist())
        pieces = [_Chunk((0,) * len(shape), shape, Path(), 0, 1)]
        for _ in range(rng.integers(0, 5)):  # cut one in two
            box = pieces.pop(rng.integers(len(pieces)))
            axis = int(rng.integers(len(shape)))
            at = int(rng.integers(0, box.sizes[axis] + 1))
            low, high = list(box.sizes), list(box.sizes)
            low[axis], high[axis] = at, box.sizes[axis] - at
            offset = [o + at * (i == axis) for i, o in enumerate(box.offsets)]
            pieces += [replace(box, sizes=tuple(low)), replace(box, offsets=tuple(offset), sizes=tuple(high))]
        if rng.integers(0, 2):  # move one
            box = pieces.pop(rng.integers(len(pieces)))
            pieces.append(replace(box, offsets=tuple(rng.integers(0, 3, len(shape)).tolist())))
        counts = np.zeros([2 * n + 2 for n in shape], int)
        for box in pieces:
            counts[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))] += 1
        inner = tuple(slice(0, n) for n in shape)
        is_partition = (counts[inner] == 1).all() and counts.sum() == counts[inner].sum()
        accepted += bool(is_partition)
        with nullcontext() if is_partition else pytest.raises(ValueError, match="do not make"):
            _check_cover("w", shape, pieces)
    assert 100 < accepted < 280


def test_a_class_head_inside_is_taken_along(tmp_path: Path, net: GPT) -> None:
    """Round trip: of a fine-tuned network's checkpoint, in pieces and whole."""
    state = {f"net.{name}": weight for name, weight in net.state_dict().items()} | {"head.wclf": torch.ones(5, 24)}
    folder = tmp_path / "pieces"
    dcp.save({"state_dict": state}, checkpoint_id=folder)
    rest = {"format": FORMAT, "origin": make_metadata(net).to_dict()}
    torch.save(rest, folder / "meta.pt")
    full_path = tmp_path / "step_0000012.ckpt"
    torch.save(rest | {"state_dict": state}, full_path)
    checksum_path(full_path).write_text(files.sha256(full_path))
    for place in (folder, full_path):
        weights = find_weights(str(place))
        assert weights.wclf is not None
        assert torch.equal(weights.wclf.read(), torch.ones(5, 24))
        assert weights.state().keys() == net.state_dict().keys()


def test_a_network_that_is_not_its_own(sharded: Path, net: GPT) -> None:
    """Another network's pieces under this one's description."""
    other = perturbed(GPT(replace(net.config, n_layer=2)))
    folder = save_sharded(sharded.parent / "other", other)
    (folder / "meta.pt").write_bytes((sharded / "meta.pt").read_bytes())
    with pytest.raises(ValueError, match=r"missing h\.2\.attn"):
        find_weights(str(folder)).net()


class LookedUp:
    """Pickles as a member of an Enum does before Python 3.11.4: by `getattr` of its class and name."""

    def __reduce__(self) -> tuple[object, tuple[object, str]]:
        return getattr, (_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")


def test_a_member_of_an_enum_is_read_as_every_python_pickles_it() -> None:
    """Invariant: read without being looked up; a substitute without code stands for it."""
    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    for pickled in (pickle.dumps(member), pickle.dumps(LookedUp())):
        assert isinstance(_Unpickler(io.BytesIO(pickled)).load(), _InertObject)
