"""Lanes: a stream's images shared out so that each is read by one reader only, each lane from any place it was left at.

Every lane draws from several parts by weight, goes through its share of each part's shards once a pass, and shuffles
within blocks. All of it is keyed, so that a place is a few whole numbers.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

from igpt.data.errors import DataError
from igpt.utils import keyed

log = logging.getLogger(__name__)

_EMPTY_PASSES = 16  # that a lane goes through before it says that there is nothing for it


class Place(NamedTuple):
    """How far a lane has come: where its present block begins, and how many of its images were given."""

    epoch: int
    block: int  # of this pass
    draws: int  # choices of a part, before this block
    shards: tuple[int, ...]  # of each part, the shard it is at, counted in this lane's order
    rows: tuple[int, ...]  # of each part, the first row of that shard that was not read
    taken: int  # images of the block that were given

    @staticmethod
    def start(n_part: int, epoch: int = 0) -> "Place":
        return Place(epoch, 0, 0, (0,) * n_part, (0,) * n_part, 0)

    def numbers(self) -> list[Any]:
        """As plain lists, for a checkpoint."""
        return [list(value) if isinstance(value, tuple) else value for value in self]

    @staticmethod
    def of(numbers: Sequence[Any]) -> "Place":
        """The opposite of `numbers`."""
        epoch, block, draws, shards, rows, taken = numbers
        return Place(epoch, block, draws, tuple(shards), tuple(rows), taken)


class Dealt(NamedTuple):
    """What of a part one lane reads in one pass: every `sharers`-th row, from `turn` on, of some shards in turn."""

    shards: list[int]
    turn: int
    sharers: int


def dealt(n_shard: int, *, lane: int, n_lane: int, seed: int, name: str, epoch: int) -> Dealt:
    """A lane's share of a part's shards: all lanes' together are every row once.

    Whole shards where there are as many as lanes; of fewer, each is read by several lanes, which take turns at its
    rows. They are dealt anew each pass, so that in the long run no lane has more than another.
    """
    groups = max(d for d in range(1, min(n_shard, n_lane) + 1) if n_lane % d == 0)
    order = keyed.generator(seed, f"shards of {name}", epoch).permutation(n_shard)
    return Dealt(order[lane % groups :: groups].tolist(), lane // groups, n_lane // groups)


class Part(Protocol):
    """One of the sources a lane draws from."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...

    @property
    def n_shard(self) -> int: ...

    def records(self, share: Dealt, shard: int, row: int) -> Iterator[tuple[Any, int, int]]:
        """What is in a share from a place on: each record with the shard it is in (in the share) and its next row."""
        ...


@dataclass(frozen=True)
class Lane:
    """One of `count` readers of some parts; what it gives depends on its number and the seed alone."""

    parts: Sequence[Part]
    index: int
    count: int
    seed: int
    block: int  # records among which each is shuffled

    def endless(self, at: Place) -> Iterator[tuple[Any, Place]]:
        """Pass after pass from a place on: each record, and the place after it.

        Raises:
            DataError: there is nothing to read.
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
        """The rest of one pass, from a place on."""
        drawn = self._drawn(at)
        # the first blocks are of different lengths, so that lanes do not all wait for their next at the same time
        first = max(1, self.block * (self.index + 1) // self.count)
        while block := list(islice(drawn, self.block if at.block else first)):
            order = keyed.generator(self.seed, "block", at.epoch, self.index, at.block).permutation(len(block))
            for taken in range(at.taken, len(block)):
                yield block[order[taken]][0], at._replace(taken=taken + 1)
            at = block[-1][1]._replace(block=at.block + 1)

    def _drawn(self, at: Place) -> Iterator[tuple[Any, Place]]:
        """Records in the order in which their parts are drawn, each with the place after it.

        A part that has run out is not drawn again in this pass: no image is left out and none comes twice.
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
        """One of the parts that are left, by their weights."""
        key = keyed.key(self.seed, "part", place.epoch, self.index, place.draws)
        left = key / 2**63 * sum(self.parts[p].weight for p in live)
        for part in live:
            left -= self.parts[part].weight
            if left < 0:
                return part
        return live[-1]


def _put(values: tuple[int, ...], index: int, value: int) -> tuple[int, ...]:
    return (*values[:index], value, *values[index + 1 :])
