"""The drawn letters as a source."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import get_data_path
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from igpt.data.letters import EM, FONTS, Letters, load_glyphs
from igpt.data.source import SPLITS
from igpt.run.targets import checked_partial

SETTINGS = {
    "_target_": "igpt.data.letters.Letters",
    "name": "letters",
    "resolution": 12,
    "counts": {"train": 260, "val": 52, "test": 78},
    "height": [0.8, 1.15],
    "turn": 15.0,
    "shear": 0.2,
    "split_seed": 0,
}


def drawn(**changed: Any) -> Letters:
    letters = checked_partial({**SETTINGS, **changed}, "data")()
    assert isinstance(letters, Letters)
    return letters


@pytest.fixture(scope="module")
def letters() -> Letters:
    return drawn()


def test_letters_are_a_balanced_source_of_16_grey_levels(letters: Letters) -> None:
    """Invariant; sizes by hand: 260 images of 26 letters are 10 of each."""
    assert {name: len(letters.split(name)) for name in ("train", "val", "test")} == SETTINGS["counts"]
    train = letters.split("train")
    assert train.labels.dtype == np.int64
    assert np.bincount(train.labels).tolist() == [10] * 26
    assert (train.pixels == train.pixels[..., :1]).all()
    assert set(np.unique(train.pixels)) == set(range(0, 256, 17))


def test_pytorch_takes_the_arrays_without_a_warning(letters: Letters) -> None:
    """It warns of read-only ones, on the terminal of every run."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for array in (letters.split("val").pixels, letters.split("val").labels):
            torch.from_numpy(array)
    assert letters.split("val").labels.flags.writeable


def test_glyphs_are_those_of_the_font_files() -> None:
    """Independent source: area and extent of the outlines that matplotlib reads, by Gauss's formula."""
    glyphs = load_glyphs()
    for font in range(0, len(FONTS), 3):
        prop = FontProperties(fname=Path(get_data_path()) / "fonts" / "ttf" / f"{FONTS[font]}.ttf")
        for letter, glyph in zip("ABIQW", [glyphs[font][ord(letter) - ord("A")] for letter in "ABIQW"], strict=True):
            outline = TextPath((0, 0), letter, size=EM, prop=prop)
            contours = [part.T for part in outline.to_polygons()]  # holes turn the other way
            area = abs(sum((x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2 for x, y in contours))
            assert np.asarray(glyph.mask, np.float64).sum() / 255 == pytest.approx(area, rel=0.08)
            assert glyph.width == pytest.approx(outline.get_extents().width, abs=3)
            assert glyph.height == pytest.approx(outline.get_extents().height, abs=3)


def test_resolution_only_samples_the_same_drawing(letters: Letters) -> None:
    """Invariant: four times as fine and averaged, a drawing is the coarse one, up to the rounding of grey levels."""
    fine = drawn(resolution=48).split("val").pixels[..., 0]
    averaged = fine.reshape(-1, 12, 4, 12, 4).mean((2, 4))
    apart = np.abs(averaged - letters.split("val").pixels[..., 0])
    assert apart.mean() < 4
    assert apart.max() < 40
    assert averaged.std() > 50


def test_a_letter_lies_inside_where_it_fits() -> None:
    """Invariant: small letters keep all of their ink: as much as the mask has, in units of the image."""
    small = drawn(resolution=32, height=[0.5, 0.5], turn=180.0).split("train")
    ink = small.pixels[..., 0].astype(np.float64).sum((1, 2)) / 255 * (EM / 16) ** 2
    masks = np.array([[np.asarray(glyph.mask, np.float64).sum() / 255 for glyph in row] for row in load_glyphs()])
    nearest = np.abs(masks[:, small.labels] / ink - 1).min(0)  # over the fonts, (N,)
    assert nearest.max() < 0.05
    edges = [small.pixels[:, [0, -1]].max((2, 3)), small.pixels[:, :, [0, -1]].max((1, 3))]
    assert [(edge > 0).any(0).tolist() for edge in edges] == [[True, True], [True, True]]  # and reach every edge


def test_an_image_is_a_function_of_seed_split_and_index(letters: Letters) -> None:
    """Invariant: the numbers of images change none of them; another seed changes all."""
    more = drawn(counts={"train": 300, "val": 20, "test": 78})
    assert np.array_equal(more.split("train").pixels[:260], letters.split("train").pixels)
    assert np.array_equal(more.split("val").pixels, letters.split("val").pixels[:20])
    other = drawn(split_seed=1).split("train").pixels
    assert not (other == letters.split("train").pixels).all((1, 2, 3)).any()


def test_no_image_is_in_two_splits(letters: Letters) -> None:
    """Invariant; nor twice in one."""
    images = [image.tobytes() for name in SPLITS for image in letters.split(name).pixels]
    assert len(set(images)) == len(images) == 390


def test_labels_per_class_keeps_training_images(letters: Letters) -> None:
    """Invariant: a balanced part of the training split; val and test stay, and follow in training with val."""
    few = drawn(labels_per_class=3)
    assert np.bincount(few.split("train").labels).tolist() == [3] * 26
    full = letters.split("train")
    every = {image.tobytes(): label for image, label in zip(full.pixels, full.labels, strict=True)}
    train = few.split("train")
    assert [every[image.tobytes()] for image in train.pixels] == train.labels.tolist()
    joined = few.training(with_val=True)
    assert np.array_equal(joined.labels, np.concatenate([train.labels, letters.split("val").labels]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"height": [1.0, 0.5]}, "smallest, then the largest"),
        ({"height": [1.0]}, "data.height"),
        ({"resolution": 4}, "data.resolution must be at least 8, got 4"),
        ({"counts": {"train": 0, "val": 1, "test": 1}}, "data.counts.train must be at least 1, got 0"),
        ({"turn": -1.0}, "data.turn"),
        ({"labels_per_class": 11}, "class 0 has 10 images"),
    ],
)
def test_bad_settings(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drawn(**changed)


def test_a_matplotlib_without_fonts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matplotlib.get_data_path", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"fonts of matplotlib's wheel; there is no .*DejaVuSans\.ttf"):
        load_glyphs.__wrapped__()


def test_an_unknown_split(letters: Letters) -> None:
    with pytest.raises(ValueError, match="'valid'"):
        letters.split("valid")
