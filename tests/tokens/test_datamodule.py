"""Batches of tokens."""

import numpy as np
import pytest
import torch

from igpt.data.digits import Digits
from igpt.data.order import BatchPlan
from igpt.tokens.datamodule import Batch, TokenDataModule
from igpt.tokens.kmeans import fit
from igpt.tokens.raster import Raster

SOURCE = Digits(
    name="digits", resolution=8, val_fraction=0.1, test_fraction=0.1, split_seed=0, shift=1, shift_share=0.5
)
PALETTE = fit(SOURCE.split("train").pixels, k=17, iterations=10, restarts=1, seed=0)


def module(micro_batch: int = 8, num_workers: int = 0, order: str = "raster") -> TokenDataModule:
    plan = BatchPlan(16, micro_batch)
    raster = Raster.of(8, order)
    return TokenDataModule(source=SOURCE, palette=PALETTE, raster=raster, plan=plan, seed=3, num_workers=num_workers)


def first_images(data: TokenDataModule, n: int) -> Batch:
    batches, seen = [], 0
    for batch in data.train_dataloader():
        batches.append(data.on_after_batch_transfer(batch))
        seen += len(batch.keys)
        if seen >= n:
            break
    return Batch(*(torch.cat(parts)[:n] for parts in zip(*batches, strict=True)))


@pytest.mark.parametrize(("micro_batch", "num_workers"), [(16, 0), (4, 0), (8, 2)])
def test_the_same_images_whatever_reads_them(micro_batch: int, num_workers: int) -> None:
    """Invariant: tokens, labels and keys do not depend on batch size or workers."""
    expected = first_images(module(), 64)
    for ours, theirs in zip(first_images(module(micro_batch, num_workers), 64), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("order", ["raster", "random"])
def test_decode_undoes_encode(order: str) -> None:
    """Round trip: the digits' palette is exact, so the pixels come back."""
    data = module(order=order)
    pixels = SOURCE.split("val").pixels
    assert np.array_equal(data.decode(data.all_tokens("val")), pixels)


def test_an_empty_split() -> None:
    source = Digits(
        name="digits", resolution=8, val_fraction=0.0, test_fraction=0.1, split_seed=0, shift=1, shift_share=0.5
    )
    data = TokenDataModule(
        source=source, palette=PALETTE, raster=Raster.of(8, "raster"), plan=BatchPlan(1, 1), seed=0, num_workers=0
    )
    with pytest.raises(ValueError, match="no images in its val split"):
        data.val_dataloader()
