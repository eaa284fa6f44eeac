"""Hostile weights, made from good ones: each function writes into a folder and returns the path that is loaded."""

import hashlib
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from igpt.checkpoint import huggingface
from igpt.checkpoint.find import find_weights
from igpt.checkpoint.head_files import HeadMetadata, save_head
from igpt.checkpoint.igpt_format import FORMAT, save_model, weights_sha256
from igpt.checkpoint.probe_files import ProbeMetadata
from tests.checkpoint.test_igpt_format import make_metadata
from tests.checkpoint.test_sharded import save_sharded
from tests.conftest import Planted, small_net

Make = Callable[[Path], Path]  # an empty folder → the path that is loaded


def model(folder: Path) -> Path:
    """A good folder of our format."""
    net = small_net()
    save_model(folder, net.state_dict(), make_metadata(net))
    return folder


def with_config(**network: Any) -> Make:
    """Other sizes in config.json; without `network`, other fields."""

    def make(folder: Path) -> Path:
        path = model(folder) / "config.json"
        config = json.loads(path.read_text())
        config["network"] |= network
        path.write_text(json.dumps(config))
        return folder

    return make


def with_field(**fields: Any) -> Make:
    def make(folder: Path) -> Path:
        path = model(folder) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return folder

    return make


def with_text(text: Callable[[str], str], name: str = "config.json", start: Make = model) -> Make:
    """The text of a file, changed."""

    def make(folder: Path) -> Path:
        path = start(folder) / name
        path.write_text(text(path.read_text()))
        return folder

    return make


def safetensors(header: Callable[[dict[str, Any]], object] | bytes, length: int | None = None) -> Make:
    """Another header before the same numbers, or other bytes; the hash in config.json is made to fit."""

    def make(folder: Path) -> Path:
        path = model(folder) / "model.safetensors"
        content = path.read_bytes()
        n = struct.unpack("<Q", content[:8])[0]
        if isinstance(header, bytes):
            text = header
        else:
            names = json.loads(content[8 : 8 + n])
            header(names)
            text = json.dumps(names).encode()
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + content[8 + n :])
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"weights_sha256": weights_sha256(folder)}))
        return folder

    return make


def empty_tensors(folder: Path) -> Path:
    """50,000 tensors without numbers, in 3 MB of header."""
    names = {f"h.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(50_000)}
    text = json.dumps(names).encode()
    (model(folder) / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"weights_sha256": weights_sha256(folder)}))
    return folder


def index(part: str) -> Make:
    """An index whose parts lie elsewhere."""

    def make(folder: Path) -> Path:
        (model(folder) / "model.safetensors").unlink()
        names = {name: part.format(folder.parents[1]) for name in small_net().state_dict()}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        return folder

    return make


def in_parts(folder: Path) -> Path:
    """A good folder of our format with an index of one part."""
    part = "model-00001-of-00001.safetensors"
    (model(folder) / "model.safetensors").rename(folder / part)
    names = dict.fromkeys(small_net().state_dict(), part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def hugging_face(folder: Path) -> Path:
    huggingface.write(folder / "hf", find_weights(str(model(folder / "ours"))))
    return folder / "hf"


def hugging_face_with(name: str, **fields: Any) -> Make:
    def make(folder: Path) -> Path:
        path = hugging_face(folder) / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return path.parent

    return make


def deep_list(depth: int) -> Any:
    nested: Any = 0.5
    for _ in range(depth):
        nested = [nested]
    return nested


def shared_lists(depth: int) -> Any:
    """Each list holds the one before twice: as a text it would have 2^depth brackets."""
    nested: Any = []
    for _ in range(depth):
        nested = [nested, nested]
    return nested


def pytorch_bin(
    content: Callable[[dict[str, torch.Tensor], Path], Any],
    *,
    rewrite: Callable[[Path], object] | None = None,
    legacy: bool = False,
) -> Make:
    """A Hugging Face folder with a pytorch_model.bin of this content."""

    def make(folder: Path) -> Path:
        hf = hugging_face(folder)
        state = load_file(hf / "model.safetensors")
        (hf / "model.safetensors").unlink()
        path = hf / "pytorch_model.bin"
        torch.save(content(state, folder.parent), path, _use_new_zipfile_serialization=not legacy)
        if rewrite:
            rewrite(path)
        return hf

    return make


def deflate(path: Path, size: int) -> None:
    """The archive with its pickle deflated and followed by `size` zeros; its directory says so truly."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    packer = zlib.compressobj(wbits=-15)
    pickled = next(data for name, data in members.items() if name.endswith("data.pkl"))
    start = packer.compress(pickled) + packer.flush(zlib.Z_FULL_FLUSH)
    zeros = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)  # the same bytes each time
    packed = start + zeros * (size >> 20) + packer.flush()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, packed if data is pickled else data)
        info = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
        directory = archive.start_dir
    content = bytearray(path.read_bytes())
    entry = content.index(info.filename.encode(), directory) - 46
    for method, unpacked in ((info.header_offset + 8, info.header_offset + 22), (entry + 10, entry + 24)):
        struct.pack_into("<H", content, method, zipfile.ZIP_DEFLATED)
        struct.pack_into("<L", content, unpacked, len(pickled) + size)
    path.write_bytes(content)


def checkpoint(change: Callable[[dict[str, Any], Path], object] = lambda *_: None,
               rewrite: Callable[[Path], object] | None = None) -> Make:  # fmt: skip
    """A training checkpoint with its checksum, which whoever sends a file can write, too."""

    def make(folder: Path) -> Path:
        net = small_net()
        state = {f"net.{name}": weight.clone() for name, weight in net.state_dict().items()}
        content = {"format": FORMAT, "origin": make_metadata(net).to_dict(), "state_dict": state, "global_step": 1}
        change(content, folder.parent)
        path = folder / "step_0000001.ckpt"
        torch.save(content, path)
        if rewrite:
            rewrite(path)
        path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
        return path

    return make


def wide(content: dict[str, Any], _: Path) -> None:
    """A network of 4 GB whose tensors are one number each, seen many times."""
    network = content["origin"]["network"] | {"n_embd": 1 << 13, "n_head": 1}
    content["origin"]["network"] = network
    shapes = {"wpe": (16, 1 << 13), "wte": (11, 1 << 13), "wtet": (11, 1 << 13), "sos": (1 << 13,), "g": (1 << 13,)}
    shapes |= {"c_attn.weight": (3 << 13, 1 << 13), "attn.c_proj.weight": (1 << 13, 1 << 13)}
    shapes |= {"c_fc.weight": (4 << 13, 1 << 13), "mlp.c_proj.weight": (1 << 13, 4 << 13)}
    for name in content["state_dict"]:
        shape = next(shape for end, shape in shapes.items() if name.endswith(end) and (end != "g" or name[-2] == "."))
        content["state_dict"][name] = torch.zeros(1).expand(shape)


def hand_pickled(body: bytes) -> Callable[[Path], None]:
    """The archive's pickle becomes a dictionary with this value in it."""

    def rewrite(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                pickled = b"\x80\x02}X\x01\x00\x00\x00a" + body + b"s."
                archive.writestr(name, pickled if name.endswith("data.pkl") else data)

    return rewrite


def beyond_storage(path: Path) -> None:
    """Sizes in the pickle that its storages do not hold: the width of 24 becomes 24,000."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data.replace(b"K\x0bK\x18", b"K\x0bM\xff\xff") if name.endswith("pkl") else data)


def overlapping(path: Path) -> None:
    """2,000 entries of the archive's directory for one member."""
    content = path.read_bytes()
    end = content.rindex(b"PK\5\6")
    start = struct.unpack("<L", content[end + 16 : end + 20])[0]
    first = content[start : content.index(b"PK\1\2", start + 4)]
    copies = b"".join(first.replace(b"data.pkl", f"d{i:07}".encode()) for i in range(2000))
    directory = content[start : struct.unpack("<L", content[end + 12 : end + 16])[0] + start] + copies
    n = struct.unpack("<H", content[end + 10 : end + 12])[0] + 2000
    path.write_bytes(
        content[:start] + directory + b"PK\5\6" + struct.pack("<HHHHLLH", 0, 0, n, n, len(directory), start, 0)
    )


def fast_growth(depth: int) -> bytes:
    """A pickle of a text written in hexadecimal again and again: 2^depth bytes."""
    call = b"c_codecs\nencode\n"
    text = b"c_codecs\nencode\nX\x04\x00\x00\x00aaaaX\x06\x00\x00\x00latin1\x86R"
    for _ in range(depth):
        text = call + text + b"X\x09\x00\x00\x00hex_codec\x86R"
    return text


def planted(folder: Path) -> Planted:
    """A call that would leave a mark in the folder that every test looks at."""
    return Planted(folder / "ran")


def sharded(folder: Path) -> Path:
    return save_sharded(folder / "step_0000012.ckpt", small_net())


def sharded_with(change: Callable[[Any], object]) -> Make:
    """PyTorch's own metadata, read, changed and written again."""

    def make(folder: Path) -> Path:
        path = sharded(folder) / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        change(metadata)
        path.write_bytes(pickle.dumps(metadata))
        return path.parent

    return make


def sharded_bytes(name: str, content: Callable[[bytes, Path], bytes]) -> Make:
    def make(folder: Path) -> Path:
        path = sharded(folder) / name
        path.write_bytes(content(path.read_bytes(), folder.parent))
        return path.parent

    return make


def long_pieces(metadata: Any) -> None:
    for place, info in metadata.storage_data.items():
        metadata.storage_data[place] = replace(info, length=1 << 40)


def giant_tensor(metadata: Any) -> None:
    """A tensor of 4 TB in one piece of some bytes."""
    described = metadata.state_dict_metadata["state_dict.net.wte"]
    shape = torch.Size((1 << 20, 1 << 20))
    described.size, described.chunks = shape, [ChunkStorageMetadata(torch.Size((0, 0)), shape)]


def many_dimensions(metadata: Any) -> None:
    described = metadata.state_dict_metadata["state_dict.net.sos"]
    shape = torch.Size((1,) * 60)
    places = {place: info for place, info in metadata.storage_data.items() if place.fqn == "state_dict.net.sos"}
    for place, info in places.items():
        del metadata.storage_data[place]
        metadata.storage_data[replace(place, offset=torch.Size((0,) * 60))] = info
    described.size, described.chunks = shape, [ChunkStorageMetadata(torch.Size((0,) * 60), shape)]


def same_bytes(metadata: Any) -> None:
    """Every piece is the first one's bytes."""
    first = next(iter(metadata.storage_data.values()))
    for place in metadata.storage_data:
        metadata.storage_data[place] = first


def many_pieces(metadata: Any) -> None:
    """40,000 pieces of one tensor: compared in pairs they would take minutes."""
    described = metadata.state_dict_metadata["state_dict.net.sos"]
    place, info = next(item for item in metadata.storage_data.items() if item[0].fqn == "state_dict.net.sos")
    one = torch.Size((1,))
    described.size = torch.Size((40_000,))
    described.chunks = [ChunkStorageMetadata(torch.Size((i,)), one) for i in range(40_000)]
    for i in range(40_000):
        metadata.storage_data[replace(place, offset=torch.Size((i,)))] = info


def deflated_piece(folder: Path) -> Path:
    """The piece of one tensor unpacks to 2 GB."""
    path = sharded(folder) / ".metadata"
    metadata, pieces, piece = pickle.loads(path.read_bytes()), path.with_name("__0_0.distcp"), folder / "piece"
    place = next(place for place in metadata.storage_data if place.fqn == "state_dict.net.wte")
    info, content = metadata.storage_data[place], pieces.read_bytes()
    piece.write_bytes(content[info.offset : info.offset + info.length])
    deflate(piece, 2 << 30)
    pieces.write_bytes(content + piece.read_bytes())
    metadata.storage_data[place] = replace(info, offset=len(content), length=piece.stat().st_size)
    path.write_bytes(pickle.dumps(metadata))
    return path.parent


def with_head(change: Callable[[Path], object]) -> Make:
    """A good head, changed."""

    def make(folder: Path) -> Path:
        model(folder)
        about = HeadMetadata(3, "toy4", "0" * 12, weights_sha256(folder), ("a", "b", "c"))
        save_head(folder, torch.ones(3, 24), about)
        change(folder)
        return folder

    return make


def head_fields(**fields: Any) -> Make:
    def change(folder: Path) -> None:
        path = folder / "head.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return with_head(change)


def with_probe(change: Callable[[dict[str, Any]], object]) -> Make:
    """A good probe, with changes to what it says."""

    def make(folder: Path) -> Path:
        path = folder / "probe.safetensors"
        about = ProbeMetadata("ln_1", "float16", "toy4", "0" * 64, 4, 1, 0, ("a", "b", "c"))
        record = {"format": 1, "layers": [1], **vars(about)}
        change(record)
        save_file({"weight": torch.ones(3, 24), "bias": torch.ones(3)}, path, {"probe": json.dumps(record)})
        return path

    return make


def npy(descr: Any, shape: Any, *, order: bool = False, data: bytes = b"", text: str = "") -> bytes:
    """A `.npy` file with this header, whatever it says."""
    header = (text or str({"descr": descr, "fortran_order": order, "shape": shape})).encode() + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + data


def palette(content: bytes, size: int = 0) -> Make:
    """A palette's file with this content; `size`: its length, as a file with a hole."""

    def make(folder: Path) -> Path:
        path = folder / "kmeans_centers.npy"
        path.write_bytes(content)
        if size:
            with path.open("r+b") as file:
                file.truncate(size)
        return path

    return make


def pickled_array(folder: Path) -> Path:
    np.save(
        folder / "kmeans_centers.npy", np.array([[planted(folder.parent)] * 3] * 2, dtype=object), allow_pickle=True
    )
    return folder / "kmeans_centers.npy"


def tokens(x: bytes, y: bytes | None = None) -> Make:
    """OpenAI's token arrays: images and labels of 2×2 pixels, beside a good palette of two colours."""

    def make(folder: Path) -> Path:
        np.save(folder / "kmeans_centers.npy", np.array([[-1] * 3, [1] * 3], np.float32))
        (folder / "made_vaX.npy").write_bytes(x)
        good = npy("|u1", (2, 2), data=bytes([1, 0, 0, 1]))
        (folder / "made_vaY.npy").write_bytes(good if y is None else y)
        return folder

    return make


GOOD_TOKENS = npy("|u1", (2, 4), data=bytes(8))
