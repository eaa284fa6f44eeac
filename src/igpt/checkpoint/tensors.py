"""Weight files, read, converted and written one tensor at a time: the whole network is never in memory.

Reading never executes code from a file.
"""

import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from igpt.distributed import ranks
from igpt.distributed.sharding import gather_weight
from igpt.utils import files

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 10_000_000_000  # largest file; all of the paper's networks but iGPT-XL fit in one
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ALIGNED = 8  # bytes: alignment of the first tensor in a safetensors file


@dataclass(frozen=True)
class LazyTensor:
    """A tensor on disk or in a module, read anew at each call of `read`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def n_parameter(self) -> int:
        return prod(self.shape)

    @property
    def n_byte(self) -> int:
        return self.n_parameter * self.dtype.itemsize

    def reshape(self, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> "LazyTensor":
        """The tensor after `change`, which must give this shape."""
        return LazyTensor(shape, self.dtype, lambda: change(self.read()))

    def to_float32(self) -> "LazyTensor":
        """The tensor as float32; exact, unless it is float64."""
        return LazyTensor(self.shape, torch.float32, lambda: self.read().float())


State = dict[str, LazyTensor]  # by name
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module.")


def unwrapped_state(state: Mapping[str, Tensor]) -> State:
    """A module's tensors under their plain names, without the prefixes of compiler and strategy wrappers.

    Raises:
        ValueError: a tensor that is not dense floating point.
    """

    def one(tensor: Tensor) -> LazyTensor:
        return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: gather_weight(tensor.detach()).to("cpu"))

    for name, tensor in state.items():
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            raise ValueError(f"{name} is {tensor.dtype} ({tensor.layout}), expected dense floating point")
    return {plain_name(name): one(tensor) for name, tensor in state.items()}


def select_prefix(prefix: str, state: State) -> State:
    """The tensors with a prefix in their names, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def plain_name(name: str) -> str:
    """A weight's name without the prefixes of module wrappers: `_orig_mod.h.0.ln_1.g` → `h.0.ln_1.g`."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def write(folder: Path, state: State, *, label: str) -> list[Path]:
    """Writes `folder/model.safetensors` atomically, with a progress bar; above `SHARD_BYTES`, parts and an index.

    Returns the files, in order. Only one tensor at a time is in memory.

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
    if not ranks.this_rank().is_first:  # rank 0 writes; the others take part in gathering, in the same order
        for part in parts:
            for _, tensor in _sort_by_width(part):
                tensor.read()
        return paths
    n_byte = sum(tensor.n_byte for tensor in state.values())
    with tqdm(total=n_byte, unit="B", unit_scale=True, desc=label, disable=None, leave=False) as bar:
        for path, part in zip(paths, parts, strict=True):
            with files.atomic_path(path) as temporary:
                _write_one(temporary, part, bar.update)
    if n > 1:
        part_of = {name: path.name for path, part in zip(paths, parts, strict=True) for name in part}
        files.write_json(folder / INDEX, {"metadata": {"total_size": n_byte}, "weight_map": part_of})
        (folder / WEIGHTS).unlink(missing_ok=True)  # of an earlier, smaller network
    return paths


def _write_one(path: Path, state: State, done: Callable[[float], object]) -> None:
    """Writes one safetensors file: length of the JSON header (8 bytes), header, tensors in its order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    ordered = _sort_by_width(state)
    for name, tensor in ordered:
        start, end = end, end + tensor.n_byte
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNED)
    with path.open("wb") as file:
        files.reserve_space(file, 8 + len(text) + end)
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in ordered:
            values = tensor.read()
            assert (tuple(values.shape), values.dtype) == (tensor.shape, tensor.dtype), name
            if not is_finite(values):
                raise ValueError(f"{name} holds NaN or infinity: training had broken down, take an earlier one")
            file.write(values.contiguous().view(-1).view(torch.uint8).numpy().data)
            done(tensor.n_byte)


def _sort_by_width(state: State) -> list[tuple[str, LazyTensor]]:
    """Tensors in file order: widest dtype first, so that all are aligned."""
    return sorted(state.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))


def read(folder: Path, *, ignore: str = "(?!)") -> State:
    """The tensors in a folder, from one safetensors file or the parts listed in an index.

    Names that fully match the pattern `ignore` are left out.

    Raises:
        ValueError: no such files, a missing part (named), or a damaged file.
    """
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS, ignore=ignore)
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder}: there is no {WEIGHTS} and no {INDEX}")
    listed = {name: part for name, part in read_weight_map(folder / INDEX).items() if not re.fullmatch(ignore, name)}
    merged: State = {}
    for part in sorted(set(listed.values())):
        merged |= read_safetensors(folder / part, ignore=ignore)
    for name, part in listed.items():
        if name not in merged:
            raise ValueError(f"{folder / part} does not hold {name}, as {INDEX} says: copy both again")
    return {name: merged[name] for name in listed}


def list_part_files(folder: Path) -> list[Path]:
    """The files that `read` reads, in order."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [folder / WEIGHTS]
    return [folder / part for part in sorted(set(read_weight_map(folder / INDEX).values()))]


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name → file name, from an index. Raises ValueError on a damaged index, or a missing or distant part."""
    mapping = files.read_json(index)
    listed = mapping.get("weight_map") if isinstance(mapping, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index} names no parts of a network: copy it again")
    names = {str(name): str(part) for name, part in listed.items()}
    if elsewhere := [part for part in names.values() if Path(part).name != part]:
        raise ValueError(f"{index} names {elsewhere[0]}, which is not a file beside it: such an index is not followed")
    if missing := sorted({part for part in names.values() if not (index.parent / part).is_file()}):
        raise ValueError(f"{index.parent}: {', '.join(missing)} missing, which {index.name} names: download it again")
    return names


def read_safetensors(path: Path, *, ignore: str = "(?!)") -> State:
    """The tensors of one file; `ignore` as in `read`. Raises ValueError on a wrong header, dtype or file length."""
    dtypes = {text: dtype for dtype, text in DTYPES.items()}
    try:
        file = safe_open(path, framework="pt")
        names = [name for name in file.offset_keys() if not re.fullmatch(ignore, name)]
        slices = {name: file.get_slice(name) for name in names}
        odd = {name: part.get_dtype() for name, part in slices.items() if part.get_dtype() not in dtypes}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy, download or export it again") from error
    if odd:
        raise ValueError(f"{path}: {next(iter(odd))} is {next(iter(odd.values()))}, expected floating point")
    return {
        name: LazyTensor(tuple(part.get_shape()), dtypes[part.get_dtype()], partial(file.get_tensor, name))
        for name, part in slices.items()
    }


def is_finite(values: Tensor) -> bool:
    """Whether no number is NaN or infinite; without a copy of the tensor."""
    return not values.numel() or bool(torch.stack(torch.aminmax(values)).isfinite().all())


def first_line(error: BaseException) -> str:
    """First line of an exception's message that is not empty; its class name if there is none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_fit(where: Path, state: Mapping[str, LazyTensor], own: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError, naming differences, unless names and shapes of the tensors are exactly the network's."""
    wrong = [
        f"{name}: {tensor.shape} in the file, {own[name]} in the network"
        for name, tensor in state.items()
        if name in own and tensor.shape != own[name]
    ]
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected or wrong:
        raise ValueError(
            f"{where} does not fit: missing {_shorten_list(missing)}, unexpected {_shorten_list(unexpected)}, "
            f"misshapen {_shorten_list(wrong)}"
        )


def _shorten_list(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
