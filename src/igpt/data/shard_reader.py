"""Lanes: disjoint readers of a stream, resumable at any position.

A reader samples several parts by weight, reads its share of each part's shards once per pass and shuffles within
blocks. All random choices are keyed, so that a position is a few integers.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Protocol

from igpt.data.errors import DataError
from igpt.utils import keyed

log = logging.getLogger(__name__)

_EMPTY_PASSES = 16  # passes without an image before a reader raises


class ReaderState(NamedTuple):
    """The position of a reader: the start of its current block and the number of images taken from it."""

    epoch: int
    block: int  # index of the block in this pass
    draws: int  # number of part choices before this block
    shards: tuple[int, ...]  # of each part, the current shard, as an index into this reader's share
    rows: tuple[int, ...]  # of each part, the next row of that shard
    taken: int  # images already taken from the block

    @staticmethod
    def initial(n_part: int, epoch: int = 0) -> "ReaderState":
        return ReaderState(epoch, 0, 0, (0,) * n_part, (0,) * n_part, 0)

    def to_lists(self) -> list[Any]:
        """The position as plain lists, for a checkpoint."""
        return [list(value) if isinstance(value, tuple) else value for value in self]

    @staticmethod
    def from_lists(numbers: Sequence[Any]) -> "ReaderState":
        """The inverse of `numbers`."""
        epoch, block, draws, shards, rows, taken = numbers
        return ReaderState(epoch, block, draws, tuple(shards), tuple(rows), taken)


class ShardAssignment(NamedTuple):
    """A reader's share of a part in one pass: every `sharers`-th row, from `turn` on, of `shards` in this order."""

    shards: list[int]
    turn: int
    sharers: int


def assign_shards(n_shard: int, *, reader: int, n_reader: int, seed: int, name: str, epoch: int) -> ShardAssignment:
    """A reader's share of a part's shards in one epoch. The shares of all readers hold every row exactly once.

    With at least as many shards as readers, a reader gets whole shards; with fewer, several readers interleave the rows
    of a shard. The assignment changes every pass, so that in the long run all readers read equally much.
    """
    groups = max(d for d in range(1, min(n_shard, n_reader) + 1) if n_reader % d == 0)
    order = keyed.generator(seed, f"shards of {name}", epoch).permutation(n_shard)
    return ShardAssignment(order[reader % groups :: groups].tolist(), reader // groups, n_reader // groups)


class StreamPart(Protocol):
    """One of the datasets of a stream."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...

    @property
    def n_shard(self) -> int: ...

    def records(self, share: ShardAssignment, shard: int, row: int) -> Iterator[tuple[Any, int, int]]:
        """Yields (record, index of its shard in the share, next row) of a share, from (shard, row) on."""
        ...


@dataclass(frozen=True)
class ShardReader:
    """Reader `index` of `count` readers of some parts; its order depends on index, count and seed alone."""

    parts: Sequence[StreamPart]
    index: int
    count: int
    seed: int
    block: int  # size of the shuffle buffer, in records

    def iterate(self, at: ReaderState) -> Iterator[tuple[Any, ReaderState]]:
        """Yields (record, position after it) from a position on, pass after pass.

        Raises:
            DataError: no image in _EMPTY_PASSES passes.
        """
        epoch, empty = at.epoch, 0
        while empty < _EMPTY_PASSES:
            empty += 1
            for record, state in self.iterate_epoch(at):
                yield record, state
                empty = 0
            epoch += 1
            at = ReaderState.initial(len(self.parts), epoch)
        raise DataError(
            f"the training stream holds no image for reader {self.index + 1} of {self.count}: give it more images, or "
            "fewer readers (data.stream.num_readers)"
        )

    def iterate_epoch(self, at: ReaderState) -> Iterator[tuple[Any, ReaderState]]:
        """Yields (record, position after it) from a position to the end of its pass."""
        drawn = self._draw_records(at)
        # first blocks differ in length, so that readers do not all refill at the same time
        first = max(1, self.block * (self.index + 1) // self.count)
        while block := list(islice(drawn, self.block if at.block else first)):
            order = keyed.generator(self.seed, "block", at.epoch, self.index, at.block).permutation(len(block))
            for taken in range(at.taken, len(block)):
                yield block[order[taken]][0], at._replace(taken=taken + 1)
            at = block[-1][1]._replace(block=at.block + 1)

    def _draw_records(self, at: ReaderState) -> Iterator[tuple[Any, ReaderState]]:
        """Yields unshuffled (record, position after it), with parts sampled by weight.

        An exhausted part is not sampled again in this pass: every image comes exactly once.
        """
        assign = partial(assign_shards, reader=self.index, n_reader=self.count, seed=self.seed, epoch=at.epoch)
        shares = [assign(part.n_shard, name=part.name) for part in self.parts]
        starts = zip(self.parts, shares, at.shards, at.rows, strict=True)
        flows = [part.records(share, shard, row) for part, share, shard, row in starts]
        live = [p for p, share in enumerate(shares) if at.shards[p] < len(share.shards)]
        state = at._replace(taken=0)
        while live:
            part = self._choose_part(live, state)
            state = state._replace(draws=state.draws + 1)
            item = next(flows[part], None)
            if item is None:
                live.remove(part)
                if live and self.index == 0:
                    left = " and ".join(self.parts[p].name for p in live)
                    log.info(
                        "data: pass %d has no more of %s; what follows is %s", at.epoch, self.parts[part].name, left
                    )
                state = state._replace(shards=_set(state.shards, part, len(shares[part].shards)))
                continue
            record, shard, row = item
            state = state._replace(shards=_set(state.shards, part, shard), rows=_set(state.rows, part, row))
            yield record, state

    def _choose_part(self, live: Sequence[int], state: ReaderState) -> int:
        """Samples one of the remaining parts by weight."""
        key = keyed.key(self.seed, "part", state.epoch, self.index, state.draws)
        left = key / 2**63 * sum(self.parts[p].weight for p in live)
        for part in live:
            left -= self.parts[part].weight
            if left < 0:
                return part
        return live[-1]


def _set(values: tuple[int, ...], index: int, value: int) -> tuple[int, ...]:
    return (*values[:index], value, *values[index + 1 :])
