"""The digits as a source."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from igpt.data.digits import Digits
from igpt.run.targets import checked_partial

SETTINGS = {
    "name": "digits",
    "resolution": 8,
    "val_fraction": 0.1,
    "test_fraction": 1 / 6,
    "split_seed": 0,
    "shift": 1,
    "shift_share": 0.5,
}


def test_splits_hold_every_digit_once() -> None:
    """Independent source: scikit-learn's own array; sizes by hand (1797 → 300 test, 150 val, 1347 train)."""
    digits = Digits(**SETTINGS)
    parts = {name: digits.split(name) for name in ("train", "val", "test")}
    assert digits.class_names == tuple(map(str, load_digits().target_names))
    assert {name: len(part) for name, part in parts.items()} == {"train": 1347, "val": 150, "test": 300}
    grey = np.concatenate([part.pixels[..., 0] for part in parts.values()]).reshape(1797, 64)
    reference = np.rint(load_digits().images.reshape(1797, 64) * 255 / 16)
    assert sorted(map(tuple, grey)) == sorted(map(tuple, reference.astype(np.uint8)))


def test_a_known_pixel_and_grey_channels() -> None:
    """Independent source: image 0 of load_digits has level 13 at row 0, column 3, and is a zero."""
    everything = Digits(**{**SETTINGS, "val_fraction": 0.0, "test_fraction": 0.0}).split("train")
    assert everything.pixels[0, 0, 3].tolist() == [207, 207, 207]  # rint(13 · 255 / 16)
    assert everything.labels[0] == 0


def test_the_same_split_seed_gives_the_same_split() -> None:
    """Invariant."""
    again = [Digits(**SETTINGS).split("val").pixels for _ in range(2)]
    other = Digits(**{**SETTINGS, "split_seed": 1}).split("val").pixels
    assert np.array_equal(*again)
    assert not np.array_equal(again[0], other)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"resolution": 16}, "resolution=16"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"test_fraction": -0.1}, "test_fraction"),
        ({"test_fraction": 0.9999}, "leave none"),
        ({"shift": -1}, "shift"),
        ({"shift_share": 2.0}, "shift_share"),
    ],
)
def test_bad_settings(changed: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_partial({"_target_": "igpt.data.digits.Digits", **SETTINGS, **changed}, "data")()


def test_an_unknown_split() -> None:
    with pytest.raises(ValueError, match="'valid'"):
        Digits(**SETTINGS).split("valid")


def test_only_training_images_are_moved_and_only_when_asked() -> None:
    """Invariant: the augmented split holds the plain one's images, some moved, the same for the same keys."""
    digits = Digits(**SETTINGS)
    index, keys = list(range(200)), [1000 + i for i in range(200)]
    plain = digits.split("train").read(index, keys)
    moved = digits.training().read(index, keys)
    assert np.array_equal(digits.training().read(index[50:60], keys[50:60]).pixels, moved.pixels[50:60])
    assert np.array_equal(plain.labels, moved.labels)
    padded = np.pad(plain.pixels, ((0, 0), (1, 1), (1, 1), (0, 0)))
    moves = [
        [(padded[i, y : y + 8, x : x + 8] == moved.pixels[i]).all() for y in range(3) for x in range(3)] for i in index
    ]
    assert all(any(row) for row in moves)
    stayed = sum(row[4] for row in moves)  # by hand: half are not moved, and a ninth of the rest; 111 ± 7
    assert 85 < stayed < 135


def test_sources_share_no_pixels() -> None:
    """Invariant: the digits are read once a process; what is written into one source is in no other."""
    first, second = (Digits(**SETTINGS).split("train") for _ in range(2))
    expected = second.read([0], [0]).pixels.copy()
    first.pixels[:] = 77
    assert np.array_equal(second.read([0], [0]).pixels, expected)
    assert np.array_equal(Digits(**SETTINGS).split("train").read([0], [0]).pixels, expected)
