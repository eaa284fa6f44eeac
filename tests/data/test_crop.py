"""Crops: the paper's geometry, every random choice by key."""

import io
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from igpt.data.crop import Crop, CropPlan, padded_crop
from igpt.settings.data import AugmentSettings, CropSettings
from igpt.settings.fields import parse_settings
from tests.data.conftest import SETTINGS, encoded, photo

PAPER: dict[str, Any] = {"resolution": 32, "short_side": (256, 384), "size": 224, "filter": "bilinear"}
EXACT = {"resize": "twice", "draft": None}


@pytest.mark.parametrize("name", get_args(CropSettings.model_fields["filter"].annotation))
@pytest.mark.parametrize("size", [(500, 375), (300, 420)])
def test_it_equals_resize_crop_resize(name: str, size: tuple[int, int]) -> None:
    """Independent source: Pillow's whole-image resize, crop, resize, in the paper's order, to 1 grey level."""
    data = encoded(photo(0, *size), "PNG")
    crop = Crop(**{**PAPER, "filter": name}, **EXACT)
    width, height = size
    for key in range(5):
        (left, top, right, _), _ = crop.box(width, height, key)
        scale = 224 / (right - left)
        wide, tall = round(width * scale), round(height * scale)
        x, y = round(left * wide / width), round(top * tall / height)
        image = Image.open(io.BytesIO(data)).resize((wide, tall), Image.Resampling[name.upper()])
        expected = image.crop((x, y, x + 224, y + 224)).resize((32, 32), Image.Resampling[name.upper()])
        difference = np.abs(np.asarray(expected).astype(int) - crop(data, key))
        if name not in ("nearest", "box"):
            assert difference.max() <= 1
        assert (difference > 1).mean() < 0.04  # those two cut sharply: a pixel on the edge may fall to either side


def test_lengths_and_places_are_uniform() -> None:
    """By hand: shorter sides fill 256 … 384, ends included; the crop lies within; its place goes from edge to edge."""
    crop = Crop(**PAPER, **EXACT)
    boxes = np.array([crop.box(500, 400, key)[0] for key in range(4000)])
    sides = np.rint(400 * 224 / (boxes[:, 3] - boxes[:, 1])).astype(int)
    assert set(sides) == set(range(256, 385))
    assert abs(sides.mean() - 320) < 3
    assert boxes.min() == 0
    assert boxes[:, 2].max() <= 500 + 1e-9
    assert boxes[:, 3].max() <= 400 + 1e-9
    room = 500 - (boxes[:, 2] - boxes[:, 0])
    assert abs((boxes[:, 0] / room).mean() - 0.5) < 0.02


def test_the_centre_crop_by_hand() -> None:
    """600×300 with shorter side 224 is 448×224; the middle 224 of 448 columns begin at 112, so at 150 of 600."""
    crop = Crop(**{**PAPER, "short_side": (224, 224)}, **EXACT)
    box, _ = crop.box(600, 300, key=7)
    assert np.allclose(box, (150, 0, 450, 300))
    full = Crop(resolution=8, short_side=None, size=None, filter="box", **EXACT)
    assert full.box(64, 48, 0)[0] == (8, 0, 56, 48)


def test_shrinking_averages() -> None:
    """By hand: a 2×2 checkerboard of black and white, shrunk by the box filter, is grey, not one of the two."""
    board = np.indices((16, 16)).sum(0) % 2 * 255
    data = encoded(Image.fromarray(board.astype(np.uint8)), "PNG")
    crop = Crop(resolution=8, short_side=None, size=None, filter="box", **EXACT)
    assert np.unique(crop(data, 0)).tolist() == [128]


@pytest.mark.parametrize(
    ("how", "limit"), [({"resize": "once", "draft": None}, 2), ({"resize": "once", "draft": 3}, 3)]
)
def test_faster_ways_change_little(how: dict[str, Any], limit: float) -> None:
    """Against the exact way: root mean square below 2 and 3 grey levels (docs/data.md has it for photographs)."""
    exact, fast = Crop(**PAPER, **EXACT), Crop(**PAPER, **how)
    for seed in range(4):
        data = encoded(photo(seed, 800, 600))
        difference = exact(data, seed).astype(float) - fast(data, seed)
        assert np.sqrt((difference**2).mean()) < limit


def test_padded_crops_are_windows_of_the_reflected_image() -> None:
    """Independent source: all 2 · 81 windows of the image padded by hand; half are mirrored; the same for one key."""
    pixels = np.stack([np.asarray(photo(i, 16, 16)) for i in range(100)])
    keys = list(range(100))
    result = padded_crop(pixels, keys, pad=4, flip=True)
    mirrored = 0
    for i in range(100):
        items = []
        for flipped in (False, True):
            image = pixels[i, :, ::-1] if flipped else pixels[i]
            rows = [abs(r) if r < 16 else 30 - r for r in range(-4, 20)]  # 4 3 2 1 | 0 … 15 | 14 13 12 11
            padded = image[rows][:, rows]
            items += [
                flipped for y in range(9) for x in range(9) if (padded[y : y + 16, x : x + 16] == result[i]).all()
            ]
        assert len(items) == 1
        mirrored += items[0]
    assert 35 < mirrored < 65
    assert np.array_equal(padded_crop(pixels[30:40], keys[30:40], pad=4, flip=True), result[30:40])
    assert np.array_equal(padded_crop(pixels, keys, pad=0, flip=False), pixels)


def cut(
    resolution: int = 32, *, crop: dict[str, Any] = SETTINGS["crop"], augment: dict[str, Any] = SETTINGS["augment"]
) -> CropPlan:
    """From settings, as a config has them."""
    parsed = parse_settings(CropSettings, crop, "data.crop")
    return CropPlan.from_settings(resolution, parsed, parse_settings(AugmentSettings, augment, "data.augment"))


@pytest.mark.parametrize(
    ("crop", "message"),
    [
        ({"filter": "gaussian"}, "nearest, box, bilinear"),
        ({"size": 224}, "go together"),
        ({"size": 300, "short_side": [256, 384], "eval_short_side": 300}, "crop of 300 pixels must fit"),
        ({"size": 224, "short_side": [384, 256], "eval_short_side": 224}, "must fit"),
        ({"size": 224, "short_side": [256], "eval_short_side": 224}, r"short_side must be a list of at least 2"),
        ({"draft": 0.5}, "draft must be at least 1"),
        ({"resise": "once"}, "no setting 'resise', did you mean resize"),
        ({"resize": "thrice"}, "resize must be one of once, twice"),
        ({"short_side": 7}, r"short_side must be a list or null, got 7"),
        ({"short_side": ["a", "b"]}, r"short_side\.0 must be a whole number, got 'a'"),
        (
            {"size": "big", "short_side": [256, 384], "eval_short_side": 224},
            "size must be a whole number or null, got 'big'",
        ),
        ({"draft": "much"}, "draft must be a number or null, got 'much'"),
    ],
)
def test_bad_settings(crop: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut(crop={**SETTINGS["crop"], **crop})


def test_bad_augmentation_and_resolution() -> None:
    with pytest.raises(ValueError, match=r"pad must lie in 0 … 31"):
        cut(augment={"pad": 32, "flip": False})
    with pytest.raises(ValueError, match=r"data\.augment\.pad must be a whole number, got 1\.5"):
        cut(augment={"pad": 1.5, "flip": False})
    with pytest.raises(ValueError, match=r"data\.augment\.flip must be true or false, got 'maybe'"):
        cut(augment={"pad": 1, "flip": "maybe"})
