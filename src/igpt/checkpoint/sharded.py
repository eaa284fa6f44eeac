"""Sharded checkpoints (PyTorch's distributed format), read tensor by tensor.

A folder holds `.metadata`, a pickle with the file and offset of each piece of each tensor; `*.distcp`, the pieces; and
Lightning's `meta.pt`, everything else. PyTorch's own reader unpickles `.metadata` without restriction, which can run
code. Here its objects become inert records.
"""

import io
import pickle
import pickletools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from igpt.checkpoint import tensors, torch_files
from igpt.checkpoint.igpt_format import Weights, extract_metadata
from igpt.checkpoint.tensors import LazyTensor, State, select_prefix
from igpt.utils import files

EMA = "ema"  # key of the average of the weights, and with a point the prefix of its tensors
METADATA, REST, PIECES = ".metadata", "meta.pt", "*.distcp"
STATE = "state_dict."  # Lightning's prefix of the module's tensors
MOMENTS = "optimizer_0.state."  # its prefix of the optimiser's tensors
SETTINGS = "optimizer_0.param_groups."  # its prefix of the optimiser's settings
_STORES = "torch.distributed.checkpoint."
MOST_DIMENSIONS = 8  # of a tensor


class _InertObject:
    """Inert substitute for an object of a known class: its arguments and fields, none of its code."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    @property
    def fields(self) -> dict[str, Any]:
        """Fields by name; {} if pickled without any."""
        state = getattr(self, "state", None)
        return state if isinstance(state, dict) else {}

    def __hash__(self) -> int:  # records are used as dictionary keys before their fields are set
        return id(self)


_INERT = {
    *((f"{_STORES}metadata", name) for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    (f"{_STORES}filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("builtins", "getattr"),  # with which Python before 3.11.4 pickles a member of an Enum; inert: nothing is looked up
    ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("pathlib", "Path"),
    ("pathlib._local", "PosixPath"), ("pathlib._local", "WindowsPath"),
}  # fmt: skip


class _RefusedError(Exception):
    """A pickle refers to a class or function outside the allow-list."""


class _Unpickler(pickle.Unpickler):
    """Unpickles plain values and records; refuses everything else before calling any of it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and isinstance(kind := getattr(torch, name, None), torch.dtype):
            return kind
        if (module, name) in _INERT:
            return type(name, (_InertObject,), {})  # a new class each time, so a file cannot alter later ones
        raise _RefusedError(f"it wants {module}.{name}")


@dataclass(frozen=True)
class _Chunk:
    """File and byte range of a piece of a tensor."""

    offsets: tuple[int, ...]  # of its first element in the full tensor
    sizes: tuple[int, ...]
    file: Path
    start: int  # bytes
    length: int


Described = tuple[tuple[int, ...], torch.dtype, list[_Chunk]]  # a tensor's shape, dtype and pieces


def read(folder: Path) -> Weights:
    """The network in a sharded training checkpoint of ours.

    Raises:
        ValueError: a missing or damaged file, metadata with code in it, or a checkpoint of another program.
    """
    state = read_state(folder)
    if not (folder / REST).is_file():
        raise ValueError(f"{folder} has no {REST}, which says what network this is: copy the whole folder")
    metadata = extract_metadata(torch_files.read_torch(folder / REST), folder / REST)
    plain = {tensors.plain_name(name): tensor for name, tensor in state.items()}
    network, wclf = select_prefix(f"{STATE}net.", plain), plain.get(f"{STATE}head.wclf")
    return Weights(folder, folder, metadata, files.sha256(folder / METADATA), lambda: network, wclf)


def read_metadata(folder: Path) -> Metadata:
    """The metadata as PyTorch's own classes, rebuilt from inert records, for PyTorch's reader."""
    record, tensors_there = _read_checked(folder)
    described: dict[str, Any] = {}
    for name, (shape, dtype, pieces) in tensors_there.items():
        chunks = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in pieces]
        described[name] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), chunks)
    stored = {}
    for index, info in record.fields["storage_data"].items():
        at, where = index.fields, info.fields
        key = MetadataIndex(at["fqn"], at.get("offset"), at.get("index"))
        stored[key] = _StorageInfo(where["relative_path"], where["offset"], where["length"])
        described.setdefault(at["fqn"], BytesStorageMetadata())
    return Metadata(described, record.fields.get("planner_data"), stored, StorageMeta())


def read_state(folder: Path) -> State:
    """All tensors of a sharded checkpoint, by their names in it."""
    described = _read_checked(folder)[1]
    return {
        name: LazyTensor(shape, dtype, partial(_assemble_tensor, shape, dtype, pieces))
        for name, (shape, dtype, pieces) in described.items()
    }


def read_values(folder: Path, prefix: str) -> dict[str, Any]:
    """The values of a sharded checkpoint that are no tensors and whose names begin so, by their full names.

    Raises:
        ValueError: a missing or damaged file, or one with other than plain values, none of which are executed.
    """
    stored = _read_checked(folder)[0].fields["storage_data"]
    found: dict[str, Any] = {}
    for index, info in stored.items():
        name, where = index.fields["fqn"], info.fields
        if index.fields.get("offset") is not None or not str(name).startswith(prefix):
            continue
        try:
            path = _file_beside(folder, where["relative_path"])
            with path.open("rb") as file:
                content = _read_part(file, int(where["offset"]), int(where["length"]))
            found[name] = torch.load(content, weights_only=True)
        except torch_files.DAMAGE as error:
            raise ValueError(f"{folder}: {name:.80} is damaged ({tensors.first_line(error)}): copy it again") from error
    return found


def _file_beside(folder: Path, relative: Any) -> Path:
    """A file of a folder by its name in the metadata. Raises ValueError if that leads elsewhere."""
    if not isinstance(relative, str) or Path(relative).name != relative:
        raise ValueError(f"it names {relative}, which is not a file beside it")
    return folder / relative


def _read_part(file: IO[bytes], start: int, length: int) -> io.BytesIO:
    """A `torch.save` archive inside a file, checked to unpack to no more than it holds."""
    file.seek(start)
    content = io.BytesIO(file.read(length))
    torch_files.check_archive(content, length)
    content.seek(0)
    return content


def _read_checked(folder: Path) -> tuple[Any, dict[str, Described]]:
    """Returns (metadata record, shape, dtype and pieces of each tensor). Raises ValueError if a file is missing."""
    try:
        metadata = _unpickle_inert((folder / METADATA).read_bytes())
        described = dict(_list_tensors(folder, metadata))
    except _RefusedError as error:
        raise ValueError(
            f"{folder / METADATA} holds more than a checkpoint's metadata ({error}): it is not read, and nothing in it "
            "was run"
        ) from error
    except torch_files.DAMAGE as error:
        raise ValueError(
            f"{folder / METADATA} is damaged ({tensors.first_line(error)}): copy the checkpoint again"
        ) from error
    named = {piece.file for _, _, pieces in described.values() for piece in pieces}
    if missing := sorted(file.name for file in named if not file.is_file()):
        raise ValueError(f"{folder}: {', '.join(missing)} missing: copy the checkpoint again, all its files")
    _check_files(folder, described)
    return metadata, described


def _check_files(folder: Path, described: dict[str, Described]) -> None:
    """Raises ValueError unless every piece lies in its file, is as long as its numbers, and no two share bytes."""
    ranges = sorted((p.file, p.start, p.start + p.length) for _, _, pieces in described.values() for p in pieces)
    sizes = {file: file.stat().st_size for file in {file for file, _, _ in ranges}}
    for file, start, end in ranges:
        if not 0 <= start <= end <= sizes[file]:
            raise ValueError(f"{file} is damaged: it is shorter than {METADATA} says, copy it again")
    overlap = any(one[0] == two[0] and one[2] > two[1] for one, two in pairwise(ranges))
    for name, (_, dtype, pieces) in described.items():
        if overlap or any(prod(piece.sizes) * dtype.itemsize > piece.length for piece in pieces):
            raise ValueError(f"{folder / METADATA} gives {name:.80} more numbers than its files hold: copy them again")


def _unpickle_inert(content: bytes) -> Any:
    """Unpickles plain records. Raises ValueError on a memo index beyond the pickle's size, which would fill memory."""
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(content):
            raise ValueError("it counts more objects than it holds")
    return _Unpickler(io.BytesIO(content)).load()


def _list_tensors(folder: Path, metadata: Any) -> Iterator[tuple[str, Described]]:
    """Yields (name, (shape, dtype, pieces)) of each tensor in the metadata."""
    places = {}
    for index, info in metadata.fields["storage_data"].items():
        at, where = index.fields, info.fields
        if at.get("offset") is None:
            continue  # bytes, not a tensor
        if where.get("transform_descriptors"):
            raise ValueError("its pieces are compressed or otherwise transformed")
        places[at["fqn"], at["offset"]] = where["relative_path"], where["offset"], where["length"]
    for name, described in metadata.fields["state_dict_metadata"].items():
        if type(described).__name__ != "TensorStorageMetadata":
            continue  # bytes: another pickle, not needed here
        if not isinstance(name, str):
            raise ValueError("the name of a tensor is no text")
        pieces = []
        for chunk in described.fields["chunks"]:
            offsets, sizes = chunk.fields["offsets"], chunk.fields["sizes"]
            relative, start, length = places[name, offsets]
            pieces.append(_Chunk(offsets, sizes, _file_beside(folder, relative), int(start), int(length)))
        dtype = described.fields["properties"].state[0]
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{name} is of no kind")
        _check_cover(name, described.fields["size"], pieces)
        yield name, (described.fields["size"], dtype, pieces)


def _check_cover(name: str, shape: tuple[int, ...], pieces: list[_Chunk]) -> None:
    """Raises ValueError unless the pieces of a tensor fill it without overlap.

    Each box adds ±1 to its corners (the differences of its indicator function in every dimension): the sums over the
    pieces equal those of the whole box exactly where every number is in one piece.
    """
    full = _Chunk((0,) * len(shape), shape, Path(), 0, 0)
    numbers = [n for piece in (full, *pieces) for n in (*piece.offsets, *piece.sizes)]
    if len(shape) > MOST_DIMENSIONS or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise ValueError(f"the shape of {name:.80} is none")
    corners: Counter[tuple[int, ...]] = Counter()
    for weight, piece in ((-1, full), *((1, piece) for piece in pieces)):
        for ends in product((False, True), repeat=len(shape)):
            sides = zip(piece.offsets, piece.sizes, ends, strict=True)
            corners[tuple(o + n if at_end else o for o, n, at_end in sides)] += weight * (-1) ** sum(ends)
    if any(corners.values()):
        raise ValueError(f"the pieces of {name:.80} do not make {shape}")


def _assemble_tensor(shape: tuple[int, ...], dtype: torch.dtype, pieces: list[_Chunk]) -> Tensor:
    full = torch.empty(shape, dtype=dtype)
    for piece in pieces:
        try:
            with piece.file.open("rb") as file:
                content = _read_part(file, piece.start, piece.length)
            part = torch.load(content, map_location="cpu", weights_only=True)
            if (part.dtype, part.numel()) != (dtype, prod(piece.sizes)):
                raise ValueError(f"{part.numel()} numbers of {part.dtype}, expected {prod(piece.sizes)} of {dtype}")
            slices = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.sizes, strict=True))
            full[slices].copy_(part.view(piece.sizes))
        except torch_files.DAMAGE as error:
            raise ValueError(f"{piece.file} is damaged ({tensors.first_line(error)}): copy it again") from error
    return full
