"""Grid ↔ sequence."""

import pytest
import torch

from igpt.tokens.pixel_order import PixelOrder

GRID = torch.arange(2 * 16).view(2, 4, 4)


@pytest.mark.parametrize("order", ["raster", "random", "random:7"])
def test_unflatten_undoes_flatten(order: str) -> None:
    """Round trip, for any permutation."""
    raster = PixelOrder.from_name(4, order)
    assert torch.equal(raster.unflatten(raster.flatten(GRID)), GRID)
    assert raster.is_raster == (order == "raster")


def test_raster_order_is_row_by_row() -> None:
    """By hand."""
    assert PixelOrder.from_name(4, "raster").flatten(GRID)[0].tolist() == list(range(16))


def test_position_i_is_pixel_permutation_i() -> None:
    """By hand: a 2×2 image in the order bottom right, top left, top right, bottom left."""
    raster = PixelOrder(2, (3, 0, 1, 2))
    assert raster.flatten(torch.tensor([[[10, 11], [12, 13]]])).tolist() == [[13, 10, 11, 12]]
    assert raster.known_positions(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("rows", [-1, 5])
def test_more_rows_than_the_image_has(rows: int) -> None:
    with pytest.raises(ValueError, match="0 to 4 rows"):
        PixelOrder.from_name(4, "raster").known_positions(rows)


@pytest.mark.parametrize("order", ["rastre", "raster:3", "random:x"])
def test_a_bad_order(order: str) -> None:
    with pytest.raises(ValueError, match="raster, random or random:SEED"):
        PixelOrder.from_name(4, order)


def test_a_bad_permutation() -> None:
    with pytest.raises(ValueError, match="once"):
        PixelOrder(2, (0, 1, 2, 2))
