"""The order in which a training run sees its images: endless, keyed, and at step s the same wherever it runs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from igpt.utils import keyed


@dataclass(frozen=True)
class BatchPlan:
    """How one optimiser step's images are shared out: batch_size = n_device × micro_batch × accumulate.

    Raises:
        ValueError: a batch size that devices and micro-batch do not divide.
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
    """Where an image stands in the run: which pass over the data, which image."""

    epoch: int
    image: int


class EndlessBatches:
    """A batch sampler without end: position p of the run is image `order(epoch)[p mod n]`, epoch = p div n.

    Optimiser step s takes positions s·batch_size … (s+1)·batch_size, whatever the number of devices or accumulated
    passes; only their sharing out differs. There is no state: a resumed run states the step it starts from.
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
        """The image at one position of the run."""
        epoch, offset = divmod(position, self.n_image)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, keyed.generator(self.seed, "order", epoch).permutation(self.n_image)
        return Item(epoch, int(self._order[offset]))


class OncePerImage:
    """A batch sampler for evaluation: every image exactly once over all ranks, none repeated to fill a batch.

    Whole batches are dealt out in turn, so that an image meets the same others however many ranks there are. All ranks
    have equally many, since a sharded network is put together by all of them for each: the last may be empty.
    """

    def __init__(self, n_image: int, *, plan: BatchPlan) -> None:
        self.n_image, self.plan = n_image, plan
        turn = plan.n_device * plan.micro_batch  # images of one batch each
        self.starts = [start + plan.rank * plan.micro_batch for start in range(0, n_image, turn)]

    def __iter__(self) -> Iterator[list[Item]]:
        for start in self.starts:
            yield [Item(0, i) for i in range(start, min(start + self.plan.micro_batch, self.n_image))]

    def __len__(self) -> int:
        return len(self.starts)


@dataclass(frozen=True)
class Lanes:
    """From which lane of a stream each micro-batch is read: from each in turn, over all devices.

    A lane is read by one device, and by one worker of it, so that nobody reads what another does.

    Raises:
        ValueError: lanes that the devices cannot share.
    """

    plan: BatchPlan
    count: int
    first: int  # the lane of the next micro-batch

    def __post_init__(self) -> None:
        if self.count % self.plan.n_device:
            raise ValueError(
                f"{self.plan.n_device} devices cannot share the {self.count} lanes of a stream equally: take a number "
                "of devices that divides them, or before a run begins another data.stream.lanes (which is kept in its "
                "checkpoints)"
            )

    def workers(self, at_most: int) -> int:
        """How many workers of one device can share its lanes: as many as there are, or the next number that divides."""
        mine = self.count // self.plan.n_device
        return max((n for n in range(1, min(at_most, mine) + 1) if mine % n == 0), default=0)

    def mine(self, worker: int, n_worker: int) -> Iterator[int]:
        """The lanes of this device's micro-batches, of every `n_worker`-th from `worker` on, without end."""
        plan = self.plan
        batch = self.first + plan.rank + worker * plan.n_device
        while True:
            yield batch % self.count
            batch += n_worker * plan.n_device
