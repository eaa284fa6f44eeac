"""The whole state of a training, from a checkpoint of any strategy: one file, or a folder in pieces."""

import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from igpt.checkpoint import sharded, torch_files
from igpt.checkpoint.sharded import EMA, MOMENTS, STATE
from igpt.checkpoint.tensors import LazyTensor, State, select_prefix

GROUPS = "optimizer_groups"  # key of the optimiser's groups in the rest
STATES = "optimizer_states"  # Lightning's key of the optimisers in one file
_FROZEN = "net.wtet"  # which task=finetune does not train where no loss reads it
_BLOCK = re.compile(r"(^|\.)h\.\d+\.")  # in the name of a weight of a block


def read_training_state(path: Path) -> tuple[State, dict[str, Any]]:
    """The tensors of a training checkpoint, each read when it is asked for, and the rest of it.

    Tensors are named as in a folder in pieces: `state_dict.net.wte`, `optimizer_0.state.net.wte.exp_avg`, `ema.wte`.
    The rest is counters, schedules and curves, and under `optimizer_groups` the groups of the optimiser: its settings,
    and the names of its weights (`params`) in its order.

    Raises:
        ValueError: a missing or damaged file, or an optimiser of other weights than those beside it.
    """
    state, rest = _read_folder(path) if path.is_dir() else _read_file(path)
    _check_optimizer(path, state, rest[GROUPS])
    return state, rest


def read_as_one_file(path: Path) -> dict[str, Any]:
    """A checkpoint in pieces as one process saves it: all tensors in memory, the optimiser's under numbers.

    Raises:
        ValueError: as `read_training_state`.
    """
    state, rest = read_training_state(path)
    groups, moments = rest.pop(GROUPS), _moments_by_weight(state)
    order = [name for group in groups for name in group["params"]]
    numbers = {name: number for number, name in enumerate(order)}
    read = {number: {key: one.read() for key, one in moments.get(name, {}).items()} for name, number in numbers.items()}
    saved = {
        "state": {number: values for number, values in read.items() if values},
        "param_groups": [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups],
    }
    weights = {name: one.read() for name, one in select_prefix(STATE, state).items()}
    averages = {name: one.read() for name, one in select_prefix(f"{EMA}.", state).items()}
    return {**rest, "state_dict": weights, STATES: [saved], **({EMA: averages} if averages else {})}


def is_block_matrix(name: str, n_dim: int) -> bool:
    """Whether a weight is a matrix of a block, by its name and number of dimensions: what Muon trains."""
    return n_dim == 2 and _BLOCK.search(name) is not None


def _read_folder(folder: Path) -> tuple[State, dict[str, Any]]:
    state = sharded.read_state(folder)
    if not (folder / sharded.REST).is_file():
        raise ValueError(f"{folder}: {sharded.REST} missing: copy the checkpoint again, all its files")
    rest = _check_mapping(folder / sharded.REST, torch_files.read_torch(folder / sharded.REST))
    groups: dict[int, dict[str, Any]] = {}
    for name, value in sharded.read_values(folder, sharded.SETTINGS).items():
        number, _, key = name.removeprefix(sharded.SETTINGS).partition(".")
        if number.isdecimal():
            groups.setdefault(int(number), {})[key] = value
    return state, {**rest, GROUPS: [groups[number] for number in sorted(groups)]}


def _read_file(path: Path) -> tuple[State, dict[str, Any]]:
    checkpoint = _check_mapping(path, torch_files.read_torch(path))
    weights, optimizers, averages = (checkpoint.pop(key, {}) for key in ("state_dict", STATES, EMA))
    try:
        (optimizer,) = optimizers
        saved, groups = dict(optimizer["state"]), [dict(group) for group in optimizer["param_groups"]]
        names = _name_by_number(dict(weights), [list(group["params"]) for group in groups])
        tensors = {f"{STATE}{name}": tensor for name, tensor in weights.items()}
        tensors |= {f"{EMA}.{name}": tensor for name, tensor in averages.items()}
        for number, values in saved.items():
            tensors |= {f"{MOMENTS}{names[number]}.{key}": value for key, value in values.items()}
        for group in groups:
            group["params"] = [names[number] for number in group["params"]]
        state = {name: _as_lazy(tensor) for name, tensor in tensors.items()}
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no weights with the optimiser that trained them ({type(error).__name__}: {error!s:.80}): "
            "resume from a checkpoint of a training"
        ) from error
    torch_files.check_total_size(tensors, path)
    return state, {**checkpoint, GROUPS: groups}


def _name_by_number(weights: Mapping[str, Tensor], groups: list[list[int]]) -> dict[int, str]:
    """Number of a weight in the optimiser of a file → its name, of which a file says nothing.

    One process numbers weights in the optimiser's order (Muon's matrices first), `trainer=fsdp` in the network's.
    """
    numbers, names = [number for group in groups for number in group], list(weights)
    if len(numbers) < len(names) and sorted(numbers) == list(range(len(names) - 1)) and _FROZEN in names:
        names.remove(_FROZEN)
    if len(groups) == 2 and numbers == sorted(numbers):
        names.sort(key=lambda name: not is_block_matrix(name, weights[name].dim()))
    trained = [number for number, name in enumerate(names) if number in numbers or name != _FROZEN]
    if sorted(numbers) != trained:
        raise ValueError(f"an optimiser of {len(numbers)} weights, there are {len(names)}")
    return dict(enumerate(names))


def _as_lazy(tensor: Tensor) -> LazyTensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"a {type(tensor).__name__}, expected a tensor")
    return LazyTensor(tuple(tensor.shape), tensor.dtype, partial(tensor.detach))


def _check_mapping(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{path} is of something else than a training: resume from a checkpoint of one")
    return dict(content)


def _moments_by_weight(state: State) -> dict[str, dict[str, LazyTensor]]:
    """Name of a weight → what the optimiser keeps of it, by key."""
    found: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in state.items():
        if name.startswith(MOMENTS):
            weight, _, key = name.removeprefix(MOMENTS).rpartition(".")
            found.setdefault(weight, {})[key] = tensor
    return found


def _check_optimizer(path: Path, state: State, groups: Iterable[Mapping[str, Any]]) -> None:
    """Raises ValueError unless the optimiser's groups name each weight once, and its tensors have their shapes."""
    shapes = {name: one.shape for name, one in select_prefix(STATE, state).items()}
    listed = [group.get("params") for group in groups]
    order = [name for names in listed if isinstance(names, list) for name in names]
    fits = all(isinstance(names, list) for names in listed) and len(order) == len(set(order))
    fits = fits and set(order) | {_FROZEN} & set(shapes) == set(shapes)
    odd = next(
        (
            f"{weight}.{key} has the shape {one.shape}"
            for weight, values in _moments_by_weight(state).items()
            for key, one in values.items()
            if one.shape not in ((), shapes.get(weight))
        ),
        "" if fits else f"it is of {len(order)} weights, there are {len(shapes)}",
    )
    if odd:
        raise ValueError(f"{path}: the optimiser is not of these weights ({odd:.200}): copy the checkpoint again")
