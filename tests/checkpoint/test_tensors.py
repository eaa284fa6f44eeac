"""Tensors in files, one at a time: what safetensors itself reads and writes, and what is refused."""

import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import IO

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from igpt.checkpoint import tensors
from igpt.checkpoint.tensors import plain_name, read, read_safetensors, unwrapped_state, write
from igpt.checkpoint.torch_files import check_torch_file, read_torch
from igpt.model.gpt import GPT
from tests.conftest import Planted


def mixed() -> dict[str, Tensor]:
    """Odd shapes and several precisions: nothing that happens to be aligned."""
    draw = torch.Generator().manual_seed(0)
    return {
        "b": torch.randn(3, 5, generator=draw),
        "a": torch.randn(7, generator=draw).bfloat16(),
        "long": torch.randn(2, 2, generator=draw).double(),
        "half": torch.randn(1, 3, generator=draw).half(),
        "scalar": torch.tensor(2.5),
    }


def values(state: tensors.State) -> dict[str, Tensor]:
    return {name: tensor.read() for name, tensor in state.items()}


def same(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> bool:
    return ours.keys() == reference.keys() and all(
        torch.equal(ours[name], reference[name]) and ours[name].dtype == reference[name].dtype for name in ours
    )


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    """Independent source: the library's own reader."""
    assert write(tmp_path, unwrapped_state(mixed()), label="") == [tmp_path / "model.safetensors"]
    assert same(load_file(tmp_path / "model.safetensors"), mixed())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # what transformers asks for
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_we_read_what_safetensors_writes(tmp_path: Path) -> None:
    """Independent source: the library's own writer."""
    save_file(mixed(), tmp_path / "model.safetensors")
    state = read(tmp_path)
    assert same(values(state), mixed())
    assert {name: tensor.shape for name, tensor in state.items()} == {n: tuple(t.shape) for n, t in mixed().items()}


def test_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Round trip; invariant: no part is larger than is allowed unless it is one tensor, and none overlaps."""
    monkeypatch.setattr(tensors, "SHARD_BYTES", 62)
    (tmp_path / "model.safetensors").write_bytes(b"of an earlier, smaller network")
    paths = write(tmp_path, unwrapped_state(mixed()), label="")
    assert [path.name for path in paths] == [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    assert same({name: t for path in paths for name, t in load_file(path).items()}, mixed())
    assert sum(len(load_file(path)) for path in paths) == len(mixed())
    assert same(values(read(tmp_path)), mixed())
    assert tensors.list_part_files(tmp_path) == paths
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in mixed().values())


def test_a_part_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted download: the part is named."""
    monkeypatch.setattr(tensors, "SHARD_BYTES", 62)
    write(tmp_path, unwrapped_state(mixed()), label="")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors missing"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"b": "../other.safetensors"}}, "not a file beside it"),
        ({"weight_map": {"b": "/etc/passwd"}}, "not a file beside it"),
        ({"weight_map": {}}, "names no parts"),
        ([], "names no parts"),
        ({"weight_map": {"c": "part.safetensors"}}, "does not hold c"),
    ],
)
def test_an_index_that_is_wrong(tmp_path: Path, index: object, message: str) -> None:
    save_file(mixed(), tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 20, 200, -1])
def test_a_file_cut_short(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(mixed(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="is damaged"):
        read_safetensors(path)


@pytest.mark.parametrize("fault", ["length", "json", "offsets", "dtype", "pickle", "whole numbers"])
def test_a_header_that_is_wrong(tmp_path: Path, fault: str) -> None:
    """What the header says is not what follows, or is none; nothing in the file is run."""
    path, mark = tmp_path / "model.safetensors", tmp_path / "ran"
    save_file(mixed(), path)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    if fault == "length":
        content = struct.pack("<Q", 1 << 60) + content[8:]
    elif fault == "json":
        content = content[:8] + b"!" + content[9:]
    elif fault == "pickle":
        content = pickle.dumps(Planted(mark))
    elif fault == "whole numbers":
        save_file({"ids": torch.arange(3)}, path)
        content = path.read_bytes()
    else:
        header["b"] |= {"data_offsets": [0, 8]} if fault == "offsets" else {"dtype": "F99"}
        text = json.dumps(header).encode()
        content = struct.pack("<Q", len(text)) + text + content[8 + length :]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        read_safetensors(path)
    assert not mark.exists()


def test_not_a_number_is_not_written(tmp_path: Path) -> None:
    """Invariant: nothing is left, not even a beginning."""
    bad = mixed()
    bad["b"][1, 2] = torch.nan
    with pytest.raises(ValueError, match="b holds NaN or infinity"):
        write(tmp_path, unwrapped_state(bad), label="")
    assert list(tmp_path.iterdir()) == []


def test_pytorchs_files(tmp_path: Path) -> None:
    """Round trip; code in one is not run."""
    torch.save(mixed(), tmp_path / "good.bin")
    assert same(read_torch(tmp_path / "good.bin"), mixed())
    mark = tmp_path / "ran"
    torch.save({"a": torch.ones(2), "b": Planted(mark)}, tmp_path / "bad.bin")
    with pytest.raises(ValueError, match=r"bad\.bin.*nothing in it was run"):
        read_torch(tmp_path / "bad.bin")
    (tmp_path / "pickle.bin").write_bytes(pickle.dumps(Planted(mark)))
    (tmp_path / "cut.bin").write_bytes((tmp_path / "good.bin").read_bytes()[:-200])
    (tmp_path / "empty.bin").touch()
    for name in ("pickle.bin", "cut.bin", "empty.bin"):
        with pytest.raises(ValueError, match=name):
            read_torch(tmp_path / name)
    assert not mark.exists()


def test_names_are_free_of_wrappers(net: GPT) -> None:
    """Independent source: what torch.compile and data parallelism call the weights of this network."""
    names = set(net.state_dict())
    compiled = torch.compile(net, backend="eager")
    assert set(compiled.state_dict()) != names
    assert set(unwrapped_state(compiled.state_dict())) == names
    around = torch.nn.Module()
    around.module = torch.compile(net, backend="eager")  # as DistributedDataParallel keeps it
    assert set(unwrapped_state(around.state_dict())) == names
    assert plain_name("_fsdp_wrapped_module.h.0._checkpoint_wrapped_module.ln_1.g") == "h.0.ln_1.g"


class OldReader:
    """The reader of archives of PyTorch 2.11, which does not tell how large a member is."""

    def __init__(self, file: IO[bytes]) -> None:
        reader = NEW_READER(file)
        self.get_all_records, self.get_record = reader.get_all_records, reader.get_record


NEW_READER = torch._C.PyTorchFileReader


def test_archives_are_checked_with_an_older_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: what is saved is accepted, nothing that unpacks to more or lists other members."""
    monkeypatch.setattr(torch._C, "PyTorchFileReader", OldReader)
    good, deflated, two = (tmp_path / f"{name}.bin" for name in ("good", "deflated", "two"))
    torch.save({**mixed(), "large": torch.zeros(100_000)}, good)
    check_torch_file(good)
    with zipfile.ZipFile(good) as members, zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as packed:
        for member in members.infolist():
            packed.writestr(member.filename, members.read(member))
    with pytest.raises(ValueError, match="would unpack to 40"):
        check_torch_file(deflated)
    two.write_bytes(good.read_bytes())
    monkeypatch.setattr(OldReader, "get_all_records", lambda self: ["data.pkl"], raising=False)
    monkeypatch.setattr(OldReader, "__init__", lambda self, file: None)
    with pytest.raises(ValueError, match="PyTorch and Python disagree"):
        check_torch_file(two)
