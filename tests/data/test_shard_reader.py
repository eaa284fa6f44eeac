"""Lanes: who reads what of a stream, and from where."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

import pytest

from igpt.data.shard_reader import ReaderState, ShardAssignment, ShardReader, assign_shards


@dataclass(frozen=True)
class Numbers:
    """A part whose shards hold (name, shard, row); no file is read."""

    name: str
    sizes: tuple[int, ...]
    weight: float = 1.0

    @property
    def n_shard(self) -> int:
        return len(self.sizes)

    def all(self) -> list[tuple[str, int, int]]:
        return [(self.name, shard, row) for shard, size in enumerate(self.sizes) for row in range(size)]

    def records(self, share: ShardAssignment, shard: int, row: int) -> Iterator[tuple[tuple[str, int, int], int, int]]:
        for index in range(shard, len(share.shards)):
            number = share.shards[index]
            for i in range(row if index == shard else 0, self.sizes[number]):
                if i % share.sharers == share.turn:
                    yield (self.name, number, i), index, i + 1


PARTS = (Numbers("a", (7, 0, 11, 5), 3.0), Numbers("b", (6, 9)), Numbers("c", (1,), 0.5))


def lane(index: int, count: int, *, parts: tuple[Numbers, ...] = PARTS, block: int = 4, seed: int = 0) -> ShardReader:
    return ShardReader(parts, index, count, seed, block)


@pytest.mark.parametrize("n_lane", [1, 2, 3, 4, 6, 7, 12])
@pytest.mark.parametrize("epoch", [0, 1])
def test_every_image_exactly_once_a_pass(n_lane: int, epoch: int) -> None:
    """Invariant: over all readers, with more and fewer shards than readers, one of them empty; passes differ in
    order."""
    passes = [
        [record for record, _ in lane(i, n_lane).iterate_epoch(ReaderState.initial(3, epoch))] for i in range(n_lane)
    ]
    assert sorted(chain(*passes)) == sorted(record for part in PARTS for record in part.all())
    assert passes[0] != [record for record, _ in lane(0, n_lane).iterate_epoch(ReaderState.initial(3, epoch + 2))]
    assert passes[0] != [record for record, _ in lane(0, n_lane, seed=1).iterate_epoch(ReaderState.initial(3, epoch))]


def test_it_goes_on_from_any_place() -> None:
    """Invariant: what follows a place is the same, however the reader came there; a place survives a round trip."""
    full_list = list(islice(lane(1, 2).iterate(ReaderState.initial(3)), 60))
    for taken in range(59):
        place = ReaderState.from_lists(full_list[taken][1].to_lists())
        assert list(islice(lane(1, 2).iterate(place), 59 - taken)) == full_list[taken + 1 :]


def test_parts_are_drawn_by_their_weights_as_long_as_they_last() -> None:
    """Invariant: 3 to 1 while both last (five standard deviations), then the rest of the other one."""
    parts = (Numbers("a", (3000,), 3.0), Numbers("b", (3000,)))
    names = [record[0] for record, _ in lane(0, 1, parts=parts, block=1).iterate_epoch(ReaderState.initial(2))]
    ended = max(i for i, name in enumerate(names) if name == "a")
    assert Counter(names) == {"a": 3000, "b": 3000}
    assert abs(names[:ended].count("a") / ended - 0.75) < 5 * (0.75 * 0.25 / ended) ** 0.5
    assert set(names[ended + 1 :]) == {"b"}


@pytest.mark.parametrize(("n_shard", "sharers"), [(1, 12), (2, 6), (5, 3), (12, 1), (40, 1)])
def test_whole_shards_where_there_are_enough(n_shard: int, sharers: int) -> None:
    """Invariant: a shard is read by as few readers as can be shared equally."""
    shares = [assign_shards(n_shard, reader=i, n_reader=12, seed=0, name="a", epoch=0) for i in range(12)]
    assert {share.sharers for share in shares} == {sharers}
    read = Counter(shard for share in shares for shard in share.shards)
    assert read == dict.fromkeys(range(n_shard), sharers)


def test_lanes_do_not_wait_for_their_blocks_together() -> None:
    """Invariant: the first blocks of four readers are of four lengths; all are shuffled within."""
    parts = (Numbers("a", (1000,)),)
    for index in range(4):
        flow = lane(index, 4, parts=parts, block=40).iterate_epoch(ReaderState.initial(1))
        rows = [record[2] for record, place in flow if place.block == 0]
        assert len(rows) == 10 * (index + 1)
        assert rows != sorted(rows)


def test_a_lane_with_nothing_to_read() -> None:
    with pytest.raises(ValueError, match=r"holds no image for reader 2 of 2.*data\.stream\.num_readers"):
        next(lane(1, 2, parts=(Numbers("a", (1,)),)).iterate(ReaderState.initial(1)))
