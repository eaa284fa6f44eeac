"""Datasets of whole batches for DataLoaders, over splits and over streams, and the state of a stream."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from igpt.data.order import Item, ReaderSchedule
from igpt.data.shard_reader import ReaderState
from igpt.data.source import Split, Stream
from igpt.distributed import ranks
from igpt.utils import keyed


class Batch(NamedTuple):
    """The input of a step: tokens, labels, and the keys of all per-image randomness."""

    tokens: Tensor  # (B, T) int64; of a PixelDataModule, and until they reach the device: (B, R, R, 3) uint8 pixels
    labels: Tensor  # (B,) int64
    rng_keys: Tensor  # (B,) int64
    rows: Tensor  # (B,) int64 position in the split; in a stream, a hash of the content

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the tensors as NumPy arrays, by value; PyTorch would send them through shared memory.

        A container may have very little of it, and a worker without any would block the run. Batches of pixels are
        small: a pipe is as fast.
        """
        return _make_batch, tuple(part.numpy() for part in self)


def _make_batch(*arrays: np.ndarray) -> Batch:
    return Batch(*map(torch.from_numpy, arrays))


class PixelBatches(Dataset[Any]):
    """A split as a map-style dataset that fetches whole batches (`__getitems__`)."""

    def __init__(self, split: Split, *, seed: int, stream: str) -> None:
        self.split, self.seed, self.stream = split, seed, stream

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, items: list[Item]) -> Batch:
        index = torch.tensor([item.image for item in items], dtype=torch.int64)
        epochs = torch.tensor([keyed.key(self.seed, self.stream, item.epoch) for item in items], dtype=torch.int64)
        rng_keys = keyed.per_example_keys(epochs, index)  # (B,)
        pixels, labels = self.split.read(index.tolist(), rng_keys.tolist())
        return Batch(torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(labels), rng_keys, index)


class StreamBatch(NamedTuple):
    """A batch of a stream, its reader, and the position of the reader after it."""

    batch: Batch
    reader: int
    state: Any


class StreamBatches(IterableDataset[Any]):
    """A stream as an iterable dataset of batches, from its readers in turn."""

    def __init__(self, images: Stream, *, seed: int, schedule: ReaderSchedule, states: Sequence[Any]) -> None:
        self.images, self.seed, self.schedule, self.states = images, seed, schedule, states

    def __iter__(self) -> Iterator[StreamBatch]:
        worker = get_worker_info()
        flows: dict[int, Iterator[Any]] = {}
        for index in self.schedule.readers(worker.id, worker.num_workers) if worker else self.schedule.readers(0, 1):
            if index not in flows:
                reader = self.images.make_reader(index, self.schedule.count, self.seed)
                flows[index] = reader.iterate(self.states[index])
            items = list(islice(flows[index], self.schedule.plan.micro_batch))
            records, state = [record for record, _ in items], items[-1][1]
            epochs = [keyed.key(self.seed, "train", after.epoch) for _, after in items]
            digests = torch.tensor([record.digest for record in records])
            rng_keys = keyed.per_example_keys(torch.tensor(epochs), digests)
            pixels, labels = self.images.read(records, rng_keys.tolist())
            batch = Batch(torch.from_numpy(pixels), torch.from_numpy(labels), rng_keys, digests)
            yield StreamBatch(batch, index, state)


@dataclass
class StreamState:
    """The state of a stream in a checkpoint: the position of every reader, and the next reader."""

    contents: dict[str, int]  # shards per part, for which the positions are valid
    states: list[ReaderState]  # position of each reader
    next: int  # the reader of the next micro-batch
    # positions of the readers that this rank has read from
    _local: dict[int, ReaderState] = field(default_factory=dict)

    @staticmethod
    def start(images: Stream, count: int) -> "StreamState":
        return StreamState(images.contents, [images.initial_state()] * count, 0)

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> "StreamState":
        """The state from the result of `gather`."""
        states = [ReaderState.from_lists(numbers) for numbers in saved["places"]]
        return StreamState(dict(saved["contents"]), states, saved["next"])

    @property
    def count(self) -> int:
        return len(self.states)

    def copy(self) -> "StreamState":
        """The position of now, for a single process: what is read later does not move it."""
        return StreamState(self.contents, list(self.states), self.next)

    def check(self, images: Stream) -> None:
        """Raises ValueError if the parts or shards of the stream differ from the saved ones."""
        if images.contents != self.contents:
            there, then = (
                ", ".join(f"{name} of {n} shard(s)" for name, n in saved.items())
                for saved in (images.contents, self.contents)
            )
            raise ValueError(
                f"the stream is not the one this run was reading: it has {there}, it had {then}. Put the files back as "
                "they were, or begin a run with init=RUN_FOLDER"
            )

    def record_read(self, reader: int, state: ReaderState, n_device: int) -> None:
        """Advances by one micro-batch on every rank: this rank has read `reader` up to `state`."""
        self.states[reader] = self._local[reader] = state
        self.next = (self.next + n_device) % self.count

    def gather(self) -> dict[str, Any]:
        """The state over all ranks as plain numbers, for a checkpoint. Collective: all ranks must call it."""
        for rank_states in ranks.all_gather_object(self._local):
            for reader, state in rank_states.items():
                self.states[reader] = state
        return {"contents": self.contents, "places": [state.to_lists() for state in self.states], "next": self.next}
