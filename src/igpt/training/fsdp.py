"""FSDP2 strategy under Lightning; checkpoints as one file or sharded, written and read like all others."""

import pickle
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
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

from igpt.checkpoint import sharded, tensors, torch_files
from igpt.checkpoint.resume import AtomicCheckpointIO
from igpt.distributed import ranks
from igpt.utils import files


class FSDP(ModelParallelStrategy):
    """Shards weights, gradients and optimiser state evenly over all ranks.

    `in_pieces`: each rank writes its shard of a checkpoint, which is a folder; else rank 0 writes one file.
    """

    def __init__(self, *, count: int, in_pieces: bool) -> None:
        super().__init__(data_parallel_size=count, tensor_parallel_size=1, save_distributed_checkpoint=in_pieces)
        self.in_pieces = in_pieces

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Writes a checkpoint atomically: one file, or a folder of shards."""
        if not self.in_pieces:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        write_folder(
            Path(filepath), self.checkpoint_io, lambda folder: super(FSDP, self).save_checkpoint(checkpoint, folder)
        )

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads a checkpoint, one file or sharded over any number of ranks, without executing code in it."""
        folder = Path(checkpoint_path)
        if not folder.is_dir():
            return super().load_checkpoint(checkpoint_path, weights_only=True)
        module = self.model
        assert module is not None
        state = {"state_dict": get_model_state_dict(module)}
        _load_into(state, folder)
        set_model_state_dict(module, state["state_dict"])
        for index, optimizer in enumerate(self.optimizers):
            name = f"optimizer_{index}"
            moments = {name: get_optimizer_state_dict(module, optimizer)}
            _load_into(moments, folder)
            set_optimizer_state_dict(module, optimizer, optim_state_dict=moments[name])
        rest: dict[str, Any] = torch_files.read_torch(folder / sharded.REST)
        return rest


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
    try:
        write(unfinished)
        refused = None
    except (OSError, RuntimeError, CheckpointException) as error:
        refused = tensors.first_line(error)
    failed = [message for message in ranks.all_gather_object(refused) if message is not None]
    if first and not failed:
        checkpoint_io.replace(unfinished, path)
    if failed:
        checkpoint_io.write_error = OSError(f"{path} could not be written ({failed[0]}): is the disk full?")
        if first:
            files.remove(unfinished)
    ranks.barrier()


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
