"""FSDP2: a network shared out over the ranks, the strategy under Lightning, and checkpoints, read like all others."""

import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import torch
import torch._dynamo
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from igpt.checkpoint import sharded, tensors, torch_files
from igpt.checkpoint.resume import AtomicCheckpointIO
from igpt.checkpoint.training_state import GROUPS, read_training_state
from igpt.distributed import ranks
from igpt.distributed.sharding import copy_into_sharded, gather_weight
from igpt.model.gpt import FORWARD_METHODS, GPT
from igpt.model.layers import Norm
from igpt.utils import files


def shard_network(net: GPT, mesh: DeviceMesh, *, mixed: bool) -> None:
    """Shards a network over the ranks of a mesh, in place: each block is gathered while it computes, and the next one.

    `mixed` (bfloat16 products of float32 weights): the matrices of a block are gathered in bfloat16 and their gradients
    summed over the ranks in float32. All that is computed in float32 stays so: embeddings, positions and head, which
    are one group, and the gains of the blocks' norms, another; both are gathered once a pass. Source: PyTorch's FSDP2.
    """
    gains = None
    if mixed:
        norms: list[nn.Module] = [each for block in net.blocks for each in block.modules() if isinstance(each, Norm)]
        gains = _shard_without_hooks(norms, mesh)
    # the residual stream stays float32: inputs are not cast
    narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = narrow if mixed else MixedPrecisionPolicy()
    blocks = [fully_shard(block, mesh=mesh, mp_policy=policy) for block in net.blocks]
    fully_shard(net, mesh=mesh)
    _gather_once_a_pass(net, gains)
    for earlier, later in pairwise(blocks):
        earlier.set_modules_to_forward_prefetch([later])
        later.set_modules_to_backward_prefetch([earlier])


def _shard_without_hooks(modules: list[nn.Module], mesh: DeviceMesh) -> FSDPModule:
    """Shards modules as one group that is gathered by hand: hooks inside a compiled block would cut its graph."""
    group: FSDPModule = fully_shard(modules, mesh=mesh, reshard_after_forward=False)[0]
    state = group._get_fsdp_state()
    state._pre_forward_hook_handle.remove()  # of all the modules, and of after their forward pass, too
    return group


def _gather_once_a_pass(net: GPT, gains: FSDPModule | None) -> None:
    """Has every method that computes gather the weights outside the blocks, unless another one that called it did."""
    is_inside = False

    def wrap(method: Callable[..., Any], outermost: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal is_inside
            if is_inside:
                return method(*arguments, **named)
            is_inside = True
            try:
                if gains is not None:
                    gains.unshard()  # nothing, if they are
                return outermost(*arguments, **named)
            finally:
                is_inside = False

        return call

    for name in ("forward", *FORWARD_METHODS):
        method = getattr(net, name)
        if name != "forward":  # which has FSDP2's hooks
            register_fsdp_forward_method(net, name)
        setattr(net, name, wrap(method, getattr(net, name)))


def one_graph_a_block() -> AbstractContextManager[None]:
    """Context manager: a compiled block is one graph under DDP, too.

    PyTorch would cut it where DDP's buckets end, to reduce them while the rest of one large graph goes on: blocks are
    compiled one by one, so DDP reduces the earlier ones meanwhile anyway.
    """
    patched: AbstractContextManager[None] = torch._dynamo.config.patch(optimize_ddp=False)
    return patched


class FSDP(ModelParallelStrategy):
    """Shards weights, gradients and optimiser state evenly over all ranks.

    Gradients of several micro-batches are summed on each rank and reduced over the ranks after the last, once a step:
    until then every rank holds those of all weights, in float32.

    `in_pieces`: each rank writes its shard of a checkpoint, which is a folder; else rank 0 writes one file.
    """

    def __init__(self, *, count: int, in_pieces: bool) -> None:
        super().__init__(data_parallel_size=count, tensor_parallel_size=1, save_distributed_checkpoint=in_pieces)
        self.in_pieces = in_pieces

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Context manager: gradients are summed on each rank, not over the ranks."""
        assert self.model is not None
        groups = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for group in groups:
            group.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for group in groups:
                group.set_requires_gradient_sync(True, recurse=False)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Writes a checkpoint atomically: one file, or a folder of shards."""
        averages: dict[str, Tensor] = checkpoint.pop(sharded.EMA, {})
        if not self.in_pieces:
            full = {name: gather_weight(average) for name, average in averages.items()}  # on every rank
            super().save_checkpoint({**checkpoint, **({sharded.EMA: full} if full else {})}, filepath, storage_options)
            return
        state = {"state_dict": checkpoint.pop("state_dict"), **({sharded.EMA: averages} if averages else {})}
        state |= {f"optimizer_{i}": optimizer for i, optimizer in enumerate(checkpoint.pop("optimizer_states", []))}

        def write(folder: Path) -> None:
            save(state, checkpoint_id=folder)
            if self.is_global_zero:
                torch.save(checkpoint, folder / sharded.REST)

        write_folder(Path(filepath), self.checkpoint_io, write)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads a checkpoint, one file or sharded over any number of ranks, without executing code in it."""
        folder, module = Path(checkpoint_path), self.model
        assert module is not None
        if not folder.is_dir():
            return _load_file(module, self.optimizers, folder)
        state = {"state_dict": get_model_state_dict(module)}
        _load_into(state, folder)
        set_model_state_dict(module, state["state_dict"])
        for index, optimizer in enumerate(self.optimizers):
            name = f"optimizer_{index}"
            moments = {name: get_optimizer_state_dict(module, optimizer)}
            _load_into(moments, folder)
            set_optimizer_state_dict(module, optimizer, optim_state_dict=moments[name])
        rest: dict[str, Any] = torch_files.read_torch(folder / sharded.REST)
        averages = tensors.select_prefix(f"{sharded.EMA}.", sharded.read_state(folder))
        return {**rest, **({sharded.EMA: averages} if averages else {})}


def write_folder(path: Path, checkpoint_io: Any, write: Callable[[Path], None]) -> None:
    """Has every rank write its part of a temporary folder, then renames it and writes its checksum beside it.

    A disk error is stored in `checkpoint_io.write_error`, as by `AtomicCheckpointIO`.
    """
    first = ranks.this_rank().is_first
    assert isinstance(checkpoint_io, AtomicCheckpointIO)
    checkpoint_io.write_error = None
    unfinished = path.with_name(f".{path.name}.part")
    if first:
        files.remove(unfinished)
    ranks.barrier()
    hashes: dict[str, str] = {}
    try:
        write(unfinished)
        hashes = _hash_own_parts(unfinished)
        refused = None
    except (OSError, RuntimeError, CheckpointException) as error:
        refused = tensors.first_line(error)
    found = ranks.all_gather_object((refused, hashes))
    failed = [message for message, _ in found if message is not None]
    if first and not failed:
        checkpoint_io.replace(
            unfinished, path, files.combine_sha256({k: v for _, part in found for k, v in part.items()})
        )
    if failed:
        checkpoint_io.write_error = OSError(f"{path} could not be written ({failed[0]}): is the disk full?")
        if first:
            files.remove(unfinished)
    ranks.barrier()


def _hash_own_parts(folder: Path) -> dict[str, str]:
    """SHA-256 by file name of what this rank has written; of the first rank, also of all that no rank's name is on."""
    rank, hashes = ranks.this_rank(), {}
    for file in folder.iterdir():
        piece = re.fullmatch(r"__(\d+)_\d+\.distcp", file.name)
        if (int(piece[1]) if piece else 0) == rank.index:
            hashes[file.name] = files.sha256(file)
    return hashes


def _load_file(module: nn.Module, optimizers: list[Optimizer], path: Path) -> dict[str, Any]:
    """Loads a checkpoint of one file, of any strategy, tensor by tensor into the shards; returns its rest."""
    state, rest = read_training_state(path)
    groups = rest.pop(GROUPS)
    (optimizer,) = optimizers
    own: dict[str, Any] = get_optimizer_state_dict(module, optimizer)
    parts = {f"{sharded.STATE}{name}": weight.detach() for name, weight in module.named_parameters()}
    for name, values in own["state"].items():
        parts |= {f"{sharded.MOMENTS}{name}.{key}": value for key, value in values.items()}
    for name, part in parts.items():
        if name not in state or state[name].shape != tuple(part.shape):
            raise ValueError(f"{path} is of another network or optimiser: it holds no {name} of {tuple(part.shape)}")
        copy_into_sharded(part, state[name].read())
    settings = {tuple(group["params"]): group for group in groups}
    if settings.keys() != {tuple(group["params"]) for group in own["param_groups"]}:
        raise ValueError(f"{path} is of another optimiser: its groups of weights are others")
    own["param_groups"] = [{**group, **settings[tuple(group["params"])]} for group in own["param_groups"]]
    set_optimizer_state_dict(module, optimizer, optim_state_dict=own)
    averages = tensors.select_prefix(f"{sharded.EMA}.", state)
    return {**rest, **({sharded.EMA: averages} if averages else {})}


def _load_into(state: dict[str, Any], folder: Path) -> None:
    """Loads, in place, the tensors whose names are in `state`."""
    try:
        load(state, storage_reader=_SafeReader(folder), planner=_SafePlanner())
    except (CheckpointException, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
        reason = tensors.first_line(next(iter(causes), error))
        raise ValueError(f"{folder} is damaged or of another network ({reason})") from error


class _SafeReader(FileSystemReader):
    """PyTorch's reader with our restricted metadata reader, and pieces checked before they unpack.

    PyTorch's own reader unpickles the metadata without restriction.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return sharded.read_metadata(Path(self.path))

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        piece: IO[bytes] = super()._slice_file(file, sinfo)
        torch_files.check_archive(piece, sinfo.length)
        piece.seek(0)
        return piece


class _SafePlanner(DefaultLoadPlanner):
    """PyTorch's planner; non-tensor values are loaded with `weights_only=True`."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        *path, last = self.mappings[read_item.dest_index.fqn]
        target: Any = self.original_state_dict
        for key in path:
            target = target[key]
        target[last] = torch.load(value, weights_only=True)
