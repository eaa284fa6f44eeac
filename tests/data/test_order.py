"""The order of training: endless, and the same however it is shared out."""

from itertools import islice

import pytest

from igpt.data.order import BatchPlan, EvalBatchSampler, InfiniteBatchSampler, Item


def steps(plan: BatchPlan, n_step: int, first_step: int = 0) -> list[list[Item]]:
    """The items of each optimiser step, as one device of `plan` sees them."""
    batches = iter(InfiniteBatchSampler(10, plan=plan, seed=1, first_step=first_step))
    return [[item for batch in islice(batches, plan.accumulate) for item in batch] for _ in range(n_step)]


def test_every_epoch_holds_every_image_once() -> None:
    """Invariant: also where an epoch ends inside a batch; and epochs differ."""
    items = [item for step in steps(BatchPlan(4, 4), 10) for item in step]
    for epoch in range(4):
        assert sorted(item.image for item in items if item.epoch == epoch) == list(range(10))
    assert [i.image for i in items[:10]] != [i.image for i in items[10:20]]


@pytest.mark.parametrize(("n_device", "micro_batch"), [(1, 6), (1, 3), (2, 3), (3, 1), (2, 1)])
def test_devices_and_accumulation_share_out_the_same_step(n_device: int, micro_batch: int) -> None:
    """Invariant: the union over devices of a step's images is that of one device taking all at once."""
    full_list = steps(BatchPlan(6, 6), 5)
    ranks = [steps(BatchPlan(6, micro_batch, n_device, rank), 5) for rank in range(n_device)]
    for step, expected in enumerate(full_list):
        assert sorted(item for rank in ranks for item in rank[step]) == sorted(expected)


def test_it_starts_at_any_step() -> None:
    """Invariant: starting at step 7 continues what starting at 0 would have given."""
    assert steps(BatchPlan(4, 2), 3, first_step=7) == steps(BatchPlan(4, 2), 10)[7:]


def test_evaluation_sees_every_image_once() -> None:
    """Invariant: over ranks of unequal share, nothing is repeated to fill a batch."""
    seen = [i.image for r in range(3) for batch in EvalBatchSampler(101, plan=BatchPlan(12, 4, 3, r)) for i in batch]
    assert sorted(seen) == list(range(101))
    assert len(EvalBatchSampler(101, plan=BatchPlan(4, 4))) == 26


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="128 is no multiple of 3 device"):
        BatchPlan(128, 8, 3)
    with pytest.raises(ValueError, match="start at 1"):
        BatchPlan(0, 1)
