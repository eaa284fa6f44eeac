"""Batch samplers: the order of images, keyed by seed and equal at step s for any number of devices."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from igpt.utils import keyed


@dataclass(frozen=True)
class BatchPlan:
    """The distribution of one optimiser step's images: batch_size = n_device × micro_batch × accumulate.

    Raises:
        ValueError: a batch size that is no multiple of n_device × micro_batch.
    """

    batch_size: int  # images per optimiser step, over all devices
    micro_batch: int  # images per forward pass on one device
    n_device: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.micro_batch < 1:
            raise ValueError(f"batch sizes start at 1, got {self.batch_size} and micro_batch {self.micro_batch}")
        if self.batch_size % (self.n_device * self.micro_batch):
            raise ValueError(
                f"task.batch_size {self.batch_size} is no multiple of {self.n_device} device(s) × "
                f"trainer.micro_batch {self.micro_batch}: change one of them, nothing is rounded in silence"
            )

    @property
    def accumulate(self) -> int:
        """Forward passes on each device before the optimiser steps."""
        return self.batch_size // (self.n_device * self.micro_batch)


class Item(NamedTuple):
    """The index that a batch sampler yields: the epoch and the position of the image in its split."""

    epoch: int
    image: int


class InfiniteBatchSampler:
    """Infinite batch sampler: position p of the run is image `order(epoch)[p mod n]`, epoch = p div n.

    Optimiser step s takes positions s·batch_size … (s+1)·batch_size - 1 for any number of devices and accumulated
    passes; only their distribution differs. There is no state: a resumed run passes its `first_step`.
    """

    def __init__(self, n_image: int, *, plan: BatchPlan, seed: int, first_step: int) -> None:
        assert n_image > 0
        self.n_image, self.plan, self.seed, self.first_step = n_image, plan, seed, first_step
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __iter__(self) -> Iterator[list[Item]]:
        plan = self.plan
        start = self.first_step * plan.batch_size + plan.rank * plan.micro_batch
        while True:
            yield [self.item(position) for position in range(start, start + plan.micro_batch)]
            start += plan.n_device * plan.micro_batch

    def item(self, position: int) -> Item:
        """The epoch and image at a position of the run."""
        epoch, offset = divmod(position, self.n_image)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, keyed.generator(self.seed, "order", epoch).permutation(self.n_image)
        return Item(epoch, int(self._order[offset]))


class EvalBatchSampler:
    """Evaluation batch sampler: every image exactly once over all ranks, without padding.

    Batches are assigned to ranks in turn, so that their content does not depend on the number of ranks. All ranks get
    equally many batches, since a sharded model needs all ranks in every forward pass: the last batch may be empty.
    """

    def __init__(self, n_image: int, *, plan: BatchPlan) -> None:
        self.n_image, self.plan = n_image, plan
        turn = plan.n_device * plan.micro_batch  # images of one batch on every rank
        self.starts = [start + plan.rank * plan.micro_batch for start in range(0, n_image, turn)]

    def __iter__(self) -> Iterator[list[Item]]:
        for start in self.starts:
            yield [Item(0, i) for i in range(start, min(start + self.plan.micro_batch, self.n_image))]

    def __len__(self) -> int:
        return len(self.starts)


@dataclass(frozen=True)
class ReaderSchedule:
    """The reader of each micro-batch of a stream: round robin over all devices.

    A reader belongs to one worker of one device, so that no image is read twice.

    Raises:
        ValueError: a number of readers that n_device does not divide.
    """

    plan: BatchPlan
    count: int
    first: int  # the reader of the next micro-batch

    def __post_init__(self) -> None:
        if self.count % self.plan.n_device:
            raise ValueError(
                f"{self.plan.n_device} devices cannot share the {self.count} readers of a stream equally: take a "
                "number of devices that divides them, or before a run begins another data.stream.num_readers (which is "
                "kept in its checkpoints)"
            )

    def usable_workers(self, at_most: int) -> int:
        """The largest number of workers, up to `at_most`, that divides the readers of one device."""
        mine = self.count // self.plan.n_device
        return max((n for n in range(1, min(at_most, mine) + 1) if mine % n == 0), default=0)

    def readers(self, worker: int, n_worker: int) -> Iterator[int]:
        """Yields without end the reader of every `n_worker`-th micro-batch of this device, from number `worker` on."""
        plan = self.plan
        batch = self.first + plan.rank + worker * plan.n_device
        while True:
            yield batch % self.count
            batch += n_worker * plan.n_device
