"""Weights in files, one tensor at a time, so that no process ever holds a network whole to read, convert or write it.

Reading executes nothing that is in a file.
"""

import json
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from igpt.distributed import ranks
from igpt.utils import files

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 10_000_000_000  # a file's size at most: all of the paper's networks but iGPT-XL are one file
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# What reading a file that is not what it was may raise.
DAMAGE = (
    pickle.UnpicklingError, OSError, EOFError, RuntimeError, ValueError, TypeError, AttributeError, LookupError,
    ImportError, ArithmeticError, MemoryError, RecursionError, zlib.error, zipfile.BadZipFile,
)  # fmt: skip
_ALIGNED = 8  # bytes: where safetensors has the first tensor begin


@dataclass(frozen=True)
class Lazy:
    """A tensor that is read from where it lies each time it is asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def n_value(self) -> int:
        return prod(self.shape)

    @property
    def n_byte(self) -> int:
        return self.n_value * self.dtype.itemsize

    def reshaped(self, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> "Lazy":
        """What `change` makes of it, which is of this shape."""
        return Lazy(shape, self.dtype, lambda: change(self.read()))

    def as_float32(self) -> "Lazy":
        """The same in single precision: exact, but for float64, in which nobody trains."""
        return Lazy(self.shape, torch.float32, lambda: self.read().float())


State = dict[str, Lazy]  # by name
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module.")


def held(state: Mapping[str, Tensor]) -> State:
    """The tensors of a module under their plain names: those that compilers and strategies put around it are cut.

    Raises:
        ValueError: a tensor of a network that is not dense floating point.
    """

    def one(tensor: Tensor) -> Lazy:
        return Lazy(tuple(tensor.shape), tensor.dtype, lambda: full_tensor(tensor.detach()).to("cpu"))

    for name, tensor in state.items():
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            raise ValueError(f"{name} is {tensor.dtype} ({tensor.layout}), expected dense floating point")
    return {plain_name(name): one(tensor) for name, tensor in state.items()}


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor, gathered where it is sharded: every process has to call it at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain_name(name: str) -> str:
    """A weight's name without what wraps the module that holds it: `_orig_mod.h.0.ln_1.g` → `h.0.ln_1.g`."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def write(folder: Path, state: State, *, label: str) -> list[Path]:
    """Writes `folder/model.safetensors`, whole or not at all, with a bar; in parts with an index above `SHARD_BYTES`.

    Returns the files, in order. At any time one tensor is in memory.

    Raises:
        ValueError: a tensor with NaN or infinity, named.
    """
    parts: list[State] = [{}]
    for name, tensor in state.items():
        if parts[-1] and sum(other.n_byte for other in parts[-1].values()) + tensor.n_byte > SHARD_BYTES:
            parts.append({})
        parts[-1][name] = tensor
    n = len(parts)
    paths = [folder / (WEIGHTS if n == 1 else f"model-{i:05d}-of-{n:05d}.safetensors") for i in range(1, n + 1)]
    if not ranks.this_rank().first:  # the first writes; what is sharded is put together by all, in its order
        for part in parts:
            for _, tensor in _ordered(part):
                tensor.read()
        return paths
    n_byte = sum(tensor.n_byte for tensor in state.values())
    with tqdm(total=n_byte, unit="B", unit_scale=True, desc=label, disable=None, leave=False) as bar:
        for path, part in zip(paths, parts, strict=True):
            with files.atomic_path(path) as temporary:
                _write_one(temporary, part, bar.update)
    if n > 1:
        of = {name: path.name for path, part in zip(paths, parts, strict=True) for name in part}
        files.write_json(folder / INDEX, {"metadata": {"total_size": n_byte}, "weight_map": of})
        (folder / WEIGHTS).unlink(missing_ok=True)  # of an earlier network, that fitted in one
    return paths


def _write_one(path: Path, state: State, done: Callable[[float], object]) -> None:
    """One safetensors file: the length of a JSON header (8 bytes), the header, the tensors in its order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    ordered = _ordered(state)
    for name, tensor in ordered:
        start, end = end, end + tensor.n_byte
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNED)
    with path.open("wb") as file:
        files.reserve(file, 8 + len(text) + end)
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in ordered:
            values = tensor.read()
            assert (tuple(values.shape), values.dtype) == (tensor.shape, tensor.dtype), name
            if not torch.isfinite(values).all():
                raise ValueError(f"{name} holds NaN or infinity: training had broken down, take an earlier one")
            file.write(values.contiguous().view(-1).view(torch.uint8).numpy().data)
            done(tensor.n_byte)


def _ordered(state: State) -> list[tuple[str, Lazy]]:
    """As they lie in a file: the widest numbers first, so that all are aligned."""
    return sorted(state.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))


def read(folder: Path, *, ignore: str = "(?!)") -> State:
    """The tensors in a folder: in one safetensors file, or in the parts that an index names; without those whose whole
    name the pattern `ignore` matches.

    Raises:
        ValueError: neither is there, a part is missing (named), or a file is damaged.
    """
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS, ignore=ignore)
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder}: there is no {WEIGHTS} and no {INDEX}")
    listed = {name: part for name, part in weight_map(folder / INDEX).items() if not re.fullmatch(ignore, name)}
    whole: State = {}
    for part in sorted(set(listed.values())):
        whole |= read_safetensors(folder / part, ignore=ignore)
    for name, part in listed.items():
        if name not in whole:
            raise ValueError(f"{folder / part} does not hold {name}, as {INDEX} says: copy both again")
    return {name: whole[name] for name in listed}


def parts(folder: Path) -> list[Path]:
    """The files that `read` would read, in order."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [folder / WEIGHTS]
    return [folder / part for part in sorted(set(weight_map(folder / INDEX).values()))]


def weight_map(index: Path) -> dict[str, str]:
    """Which part holds which tensor. Raises ValueError when that is not said, or a part is missing or elsewhere."""
    found = files.read_json(index)
    listed = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index} names no parts of a network: copy it again")
    names = {str(name): str(part) for name, part in listed.items()}
    if elsewhere := [part for part in names.values() if Path(part).name != part]:
        raise ValueError(f"{index} names {elsewhere[0]}, which is not a file beside it: such an index is not followed")
    if missing := sorted({part for part in names.values() if not (index.parent / part).is_file()}):
        raise ValueError(f"{index.parent}: {', '.join(missing)} missing, which {index.name} names: download it again")
    return names


def read_safetensors(path: Path, *, ignore: str = "(?!)") -> State:
    """The tensors of one file, as `read` has it. Raises ValueError when its header is wrong, or it was cut short."""
    known = {text: dtype for dtype, text in DTYPES.items()}
    try:
        file = safe_open(path, framework="pt")
        names = [name for name in file.offset_keys() if not re.fullmatch(ignore, name)]
        slices = {name: file.get_slice(name) for name in names}
        odd = {name: part.get_dtype() for name, part in slices.items() if part.get_dtype() not in known}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy, download or export it again") from error
    if odd:
        raise ValueError(f"{path}: {next(iter(odd))} is {next(iter(odd.values()))}, expected floating point")

    def one(name: str) -> Lazy:
        return Lazy(tuple(slices[name].get_shape()), known[slices[name].get_dtype()], lambda: file.get_tensor(name))

    return {name: one(name) for name in slices}


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote, if it is tensors and plain values; tensors stay on disk until they are read.

    Files of PyTorch before 1.6, which are no zip archives, are read whole.

    Raises:
        ValueError: a damaged file, or one with anything else in it: nothing of it was run.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no file of PyTorch's, or holds more than tensors and plain values: it is not read, and nothing "
            f"in it was run ({first_line(error)})"
        ) from error
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged or no file of PyTorch's ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """What an exception says, shortly; its kind when it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def check_fit(where: Path, state: Mapping[str, Lazy], own: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError, naming every difference, unless the tensors are exactly a network's: names and shapes."""
    wrong = [
        f"{name}: {tensor.shape} in the file, {own[name]} in the network"
        for name, tensor in state.items()
        if name in own and tensor.shape != own[name]
    ]
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected or wrong:
        raise ValueError(
            f"{where} does not fit: missing {_some(missing)}, unexpected {_some(unexpected)}, misshapen {_some(wrong)}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
