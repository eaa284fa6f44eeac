"""Checkpoints that several processes wrote in pieces (PyTorch's distributed format), put together tensor by tensor.

A folder holds `.metadata`, a pickle that says which piece of which tensor lies where; `*.distcp`, the pieces; and
Lightning's `meta.pt`, all that is no tensor. PyTorch's own reader unpickles `.metadata` freely, which runs whatever
was put there. Here its classes are only ever made into inert records.
"""

import io
import pickle
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

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

from igpt import files
from igpt.checkpoint import tensors
from igpt.checkpoint.native import Weights, origin_in
from igpt.checkpoint.tensors import Lazy, State

T = TypeVar("T")

METADATA, REST, PIECES = ".metadata", "meta.pt", "*.distcp"
STATE = "state_dict."  # under which Lightning keeps the module, beside its optimizers
# What reading a file that is not what it was may raise.
_DAMAGE = (
    pickle.UnpicklingError, OSError, EOFError, RuntimeError, ValueError, TypeError, AttributeError, LookupError,
    ImportError, zlib.error,
)  # fmt: skip
_STORES = "torch.distributed.checkpoint."


class _Record:
    """What stands for an object of a class that is known: its arguments and its fields, none of its behaviour."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    @property
    def fields(self) -> dict[str, Any]:
        """Its fields by name; {} when it was pickled without."""
        state = getattr(self, "state", None)
        return state if isinstance(state, dict) else {}

    def __hash__(self) -> int:  # a record is the key of a mapping before its fields are set
        return id(self)


_INERT = {
    *((f"{_STORES}metadata", name) for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    (f"{_STORES}filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("pathlib", "Path"),
    ("pathlib._local", "PosixPath"), ("pathlib._local", "WindowsPath"),
}  # fmt: skip


class _RefusedError(Exception):
    """A pickle wants something else than records."""


class _Unpickler(pickle.Unpickler):
    """Makes plain values and records, and refuses everything else before any of it is called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and isinstance(kind := getattr(torch, name, None), torch.dtype):
            return kind
        if (module, name) in _INERT:
            return type(name, (_Record,), {})  # a new one each time: nothing that a file does to it lasts
        raise _RefusedError(f"it wants {module}.{name}")


@dataclass(frozen=True)
class _Piece:
    """Where a part of a tensor lies."""

    offsets: tuple[int, ...]  # of its first element in the whole
    sizes: tuple[int, ...]
    file: Path
    start: int  # bytes
    length: int


def read(folder: Path) -> Weights:
    """The network in a sharded checkpoint of a run of ours.

    Raises:
        ValueError: a missing or damaged part, metadata that holds more than plain data, or a checkpoint of no run.
    """
    state = read_state(folder)
    if not (folder / REST).is_file():
        raise ValueError(f"{folder} has no {REST}, which says what network this is: copy the whole folder")
    origin = origin_in(tensors.read_torch(folder / REST), folder / REST)
    prefix = f"{STATE}net."
    own = {name: tensors.plain_name(name) for name in state}
    network = {plain.removeprefix(prefix): state[name] for name, plain in own.items() if plain.startswith(prefix)}
    return Weights(folder, folder, origin, files.sha256(folder / METADATA), lambda: network)


def read_metadata(folder: Path) -> Metadata:
    """The metadata as PyTorch's reader wants them, made of what was read as plain records."""
    record = _read(folder, lambda found: found)
    described: dict[str, Any] = {}
    for name, (shape, dtype, pieces) in _read(folder, lambda found: dict(_tensors(folder, found))).items():
        chunks = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in pieces]
        described[name] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), chunks)
    stored = {}
    for index, info in record.fields["storage_data"].items():
        at, where = index.fields, info.fields
        stored[MetadataIndex(at["fqn"], at.get("offset"), at.get("index"))] = _StorageInfo(
            where["relative_path"], where["offset"], where["length"]
        )
        described.setdefault(at["fqn"], BytesStorageMetadata())
    return Metadata(described, record.fields.get("planner_data"), stored, StorageMeta())


def read_state(folder: Path) -> State:
    """Every tensor of a sharded checkpoint, by its name there."""
    found = _read(folder, lambda metadata: dict(_tensors(folder, metadata)))

    def one(shape: tuple[int, ...], dtype: torch.dtype, pieces: list[_Piece]) -> Lazy:
        return Lazy(shape, dtype, lambda: _whole(shape, dtype, pieces))

    return {name: one(*described) for name, described in found.items()}


def _read(folder: Path, understand: Callable[[Any], T]) -> T:
    """What the metadata say, of pieces that are all there."""
    try:
        with (folder / METADATA).open("rb") as file:
            metadata = _Unpickler(file).load()
        found = understand(metadata)
        pieces = [piece for _, _, of_tensor in dict(_tensors(folder, metadata)).values() for piece in of_tensor]
    except _RefusedError as error:
        raise ValueError(
            f"{folder / METADATA} holds more than a checkpoint's metadata ({error}): it is not read, and nothing in it "
            "was run"
        ) from error
    except _DAMAGE as error:
        raise ValueError(
            f"{folder / METADATA} is damaged ({tensors.first_line(error)}): copy the checkpoint again"
        ) from error
    if missing := sorted({piece.file.name for piece in pieces if not piece.file.is_file()}):
        raise ValueError(f"{folder}: {', '.join(missing)} missing: copy the checkpoint again, all its files")
    return found


def _tensors(folder: Path, metadata: Any) -> Iterator[tuple[str, tuple[tuple[int, ...], torch.dtype, list[_Piece]]]]:
    """What the metadata says of each tensor: its shape, its kind and its pieces."""
    places = {}
    for index, info in metadata.fields["storage_data"].items():
        at, where = index.fields, info.fields
        if at.get("offset") is None:
            continue  # of bytes, not of a tensor
        if where.get("transform_descriptors"):
            raise ValueError("its pieces are compressed or otherwise transformed")
        places[at["fqn"], at["offset"]] = where["relative_path"], where["offset"], where["length"]
    for name, described in metadata.fields["state_dict_metadata"].items():
        if type(described).__name__ != "TensorStorageMetadata":
            continue  # bytes: a pickle of its own, which nobody here needs
        pieces = []
        for chunk in described.fields["chunks"]:
            offsets, sizes = chunk.fields["offsets"], chunk.fields["sizes"]
            relative, start, length = places[name, offsets]
            if Path(relative).name != relative:
                raise ValueError(f"it names {relative}, which is not a file beside it")
            pieces.append(_Piece(offsets, sizes, folder / relative, start, length))
        dtype = described.fields["properties"].state[0]
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{name} is of no kind")
        yield name, (described.fields["size"], dtype, pieces)


def _whole(shape: tuple[int, ...], dtype: torch.dtype, pieces: list[_Piece]) -> Tensor:
    whole, filled = torch.empty(shape, dtype=dtype), 0
    for piece in pieces:
        with piece.file.open("rb") as file:
            file.seek(piece.start)
            content = io.BytesIO(file.read(piece.length))
        try:
            part = torch.load(content, map_location="cpu", weights_only=True)
            place = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.sizes, strict=True))
            whole[place].copy_(part.view(piece.sizes))
            filled += part.numel()
        except _DAMAGE as error:
            raise ValueError(f"{piece.file} is damaged ({tensors.first_line(error)}): copy it again") from error
    if filled != whole.numel():
        raise ValueError(
            f"{pieces[0].file.parent}: {whole.numel() - filled} of {whole.numel()} values of a tensor miss"
        )
    return whole
