"""Lanes: disjoint readers of a stream, resumable at any position.

A lane samples several parts by weight, reads its share of each part's shards once per pass and shuffles within
blocks. All random choices are keyed, so that a position is a few integers.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

from igpt.data.errors import DataError
from igpt.utils import keyed

log = logging.getLogger(__name__)

_EMPTY_PASSES = 16  # passes without an image before a lane raises


class Place(NamedTuple):
    """The position of a lane: the start of its current block and the number of images taken from it."""

    epoch: int
    block: int  # index of the block in this pass
    draws: int  # number of part choices before this block
    shards: tuple[int, ...]  # of each part, the current shard, as an index into this lane's share
    rows: tuple[int, ...]  # of each part, the next row of that shard
    taken: int  # images already taken from the block

    @staticmethod
    def start(n_part: int, epoch: int = 0) -> "Place":
        return Place(epoch, 0, 0, (0,) * n_part, (0,) * n_part, 0)

    def numbers(self) -> list[Any]:
        """The position as plain lists, for a checkpoint."""
        return [list(value) if isinstance(value, tuple) else value for value in self]

    @staticmethod
    def of(numbers: Sequence[Any]) -> "Place":
        """The inverse of `numbers`."""
        epoch, block, draws, shards, rows, taken = numbers
        return Place(epoch, block, draws, tuple(shards), tuple(rows), taken)


class Dealt(NamedTuple):
    """A lane's share of a part in one pass: every `sharers`-th row, from `turn` on, of `shards` in this order."""

    shards: list[int]
    turn: int
    sharers: int


def dealt(n_shard: int, *, lane: int, n_lane: int, seed: int, name: str, epoch: int) -> Dealt:
    """A lane's share of a part's shards in one epoch. The shares of all lanes hold every row exactly once.

    With at least as many shards as lanes, a lane gets whole shards; with fewer, several lanes interleave the rows of
    a shard. The assignment changes every pass, so that in the long run all lanes read equally much.
    """
    groups = max(d for d in range(1, min(n_shard, n_lane) + 1) if n_lane % d == 0)
    order = keyed.generator(seed, f"shards of {name}", epoch).permutation(n_shard)
    return Dealt(order[lane % groups :: groups].tolist(), lane // groups, n_lane // groups)


class Part(Protocol):
    """One of the datasets of a stream."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...

    @property
    def n_shard(self) -> int: ...

    def records(self, share: Dealt, shard: int, row: int) -> Iterator[tuple[Any, int, int]]:
        """Yields (record, index of its shard in the share, next row) of a share, from (shard, row) on."""
        ...


@dataclass(frozen=True)
class Lane:
    """Reader `index` of `count` readers of some parts; its order depends on index, count and seed alone."""

    parts: Sequence[Part]
    index: int
    count: int
    seed: int
    block: int  # size of the shuffle buffer, in records

    def endless(self, at: Place) -> Iterator[tuple[Any, Place]]:
        """Yields (record, position after it) from a position on, pass after pass.

        Raises:
            DataError: no image in _EMPTY_PASSES passes.
        """
        epoch, empty = at.epoch, 0
        while empty < _EMPTY_PASSES:
            empty += 1
            for record, place in self.one_pass(at):
                yield record, place
                empty = 0
            epoch += 1
            at = Place.start(len(self.parts), epoch)
        raise DataError(
            f"the training stream holds no image for reader {self.index + 1} of {self.count}: give it more images, or "
            "fewer readers (data.stream.lanes)"
        )

    def one_pass(self, at: Place) -> Iterator[tuple[Any, Place]]:
        """Yields (record, position after it) from a position to the end of its pass."""
        drawn = self._drawn(at)
        # first blocks differ in length, so that lanes do not all refill at the same time
        first = max(1, self.block * (self.index + 1) // self.count)
        while block := list(islice(drawn, self.block if at.block else first)):
            order = keyed.generator(self.seed, "block", at.epoch, self.index, at.block).permutation(len(block))
            for taken in range(at.taken, len(block)):
                yield block[order[taken]][0], at._replace(taken=taken + 1)
            at = block[-1][1]._replace(block=at.block + 1)

    def _drawn(self, at: Place) -> Iterator[tuple[Any, Place]]:
        """Yields unshuffled (record, position after it), with parts sampled by weight.

        An exhausted part is not sampled again in this pass: every image comes exactly once.
        """
        shares = [
            dealt(part.n_shard, lane=self.index, n_lane=self.count, seed=self.seed, name=part.name, epoch=at.epoch)
            for part in self.parts
        ]
        flows = [
            part.records(share, shard, row)
            for part, share, shard, row in zip(self.parts, shares, at.shards, at.rows, strict=True)
        ]
        live = [p for p, share in enumerate(shares) if at.shards[p] < len(share.shards)]
        place = at._replace(taken=0)
        while live:
            part = self._chosen(live, place)
            place = place._replace(draws=place.draws + 1)
            found = next(flows[part], None)
            if found is None:
                live.remove(part)
                if live and self.index == 0:
                    left = " and ".join(self.parts[p].name for p in live)
                    log.info(
                        "data: pass %d has no more of %s; what follows is %s", at.epoch, self.parts[part].name, left
                    )
                place = place._replace(shards=_put(place.shards, part, len(shares[part].shards)))
                continue
            record, shard, row = found
            place = place._replace(shards=_put(place.shards, part, shard), rows=_put(place.rows, part, row))
            yield record, place

    def _chosen(self, live: Sequence[int], place: Place) -> int:
        """Samples one of the remaining parts by weight."""
        key = keyed.key(self.seed, "part", place.epoch, self.index, place.draws)
        left = key / 2**63 * sum(self.parts[p].weight for p in live)
        for part in live:
            left -= self.parts[part].weight
            if left < 0:
                return part
        return live[-1]


def _put(values: tuple[int, ...], index: int, value: int) -> tuple[int, ...]:
    return (*values[:index], value, *values[index + 1 :])
