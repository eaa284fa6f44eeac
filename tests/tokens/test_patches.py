"""Patches as tokens, against a slow rewrite, and from training to every task that reads the weights."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from igpt.data.digits import Digits
from igpt.run.launch import run
from igpt.settings.fields import parse_settings
from igpt.tokens.patches import PatchSettings, PatchTokenizer, cut_patches
from igpt.tokens.pixel_order import PixelOrder
from igpt.tokens.tokenizer_registry import tokenizer_from_dict, tokenizer_to_dict
from tests.configs import CONF
from tests.data.conftest import photo

SETTINGS: dict[str, Any] = {"patch": 2, "k": 24, "n_patches": 4000, "iterations": 5, "order": "raster", "seed": 0}


@pytest.fixture(scope="module")
def tokenizer() -> PatchTokenizer:
    centres = np.random.default_rng(0).uniform(-1, 1, (24, 12)).astype(np.float32)
    return PatchTokenizer(centres, 2, PixelOrder.from_name(4, "random:1"))


def make_pixels(n: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(photo(seed, 8, 8)) for seed in range(n)]))


def test_every_patch_is_that_of_the_nearest_centre(tokenizer: PatchTokenizer) -> None:
    """Independent source: a loop over patches and centres in float64, in the order of the permutation."""
    pixels = make_pixels(5)
    tokens = tokenizer.encode(pixels)
    for image, row in zip(pixels.numpy(), tokens.tolist(), strict=True):
        for place, token in zip(tokenizer.order.permutation, row, strict=True):
            y, x = divmod(place, 4)
            patch = image[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].reshape(12) / 127.5 - 1
            assert token == int(((tokenizer.centres.astype(float) - patch) ** 2).sum(1).argmin())
    assert torch.equal(tokenizer.encode(pixels[3:4]), tokens[3:4])


def test_a_tie_goes_to_the_lowest_index() -> None:
    """Invariant: two centres that are equally far, in any batch."""
    centres = np.zeros((4, 12), np.float32)
    centres[0], centres[1, 0], centres[2, 0] = 1, 0.5, -0.5
    twins = PatchTokenizer(
        np.stack([centres[0], centres[1], centres[1], centres[2]]), 2, PixelOrder.from_name(1, "raster")
    )
    grey = torch.full((3, 2, 2, 3), 128, dtype=torch.uint8)
    assert twins.encode(grey).flatten().tolist() == [1, 1, 1]


def test_many_ties_at_once() -> None:
    """By hand: the first and the third centre are the same, and the nearest of half the patches."""
    ends = np.stack([np.full(12, 0.2, np.float32), np.full(12, -0.2, np.float32), np.full(12, 0.2, np.float32)])
    tied = PatchTokenizer(np.concatenate([ends, np.ones((1, 12), np.float32)]), 2, PixelOrder.from_name(4, "raster"))
    pixels = torch.full((64, 8, 8, 3), 255, dtype=torch.uint8)
    pixels[:, :, :4] = 153  # 0.2 in [-1, 1]: the first and the third centre
    assert tied.encode(pixels).view(64, 4, 4).unique(dim=0).tolist() == [[[0, 0, 3, 3]] * 4]


def test_what_is_known_of_some_rows(tokenizer: PatchTokenizer) -> None:
    """By hand: of 5 rows of pixels, two rows of patches are known, which show 4 rows of pixels."""
    known = tokenizer.known_tokens(5)
    assert [tokenizer.order.permutation[i] for i in known.nonzero().flatten().tolist()] != list(range(8))
    assert sorted(tokenizer.order.permutation[i] for i in known.nonzero().flatten().tolist()) == list(range(8))
    visible = tokenizer.visible_pixels(known)
    assert visible[:4].all()
    assert not visible[4:].any()
    with pytest.raises(ValueError, match="a prompt has 0 to 8 rows"):
        tokenizer.known_tokens(9)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hash": "0" * 12}, "the patches' hash is"),
        ({"patch": 3}, r"patches of 3 pixels a side are float32 \(2 … 4096, 27\)"),
        ({"patch": 2.0}, "size is no whole number"),
        ({"permutation": [0, 0, 1, 2]}, "must hold 0 … 3 once"),
        ({"centres": [[9.0] * 12] * 24}, "finite numbers in"),
        ({"centres": None}, "float32"),
    ],
)
def test_a_description_that_is_none(tokenizer: PatchTokenizer, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer_from_dict(tokenizer_to_dict(tokenizer) | changed)


def test_it_is_fitted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Invariant: the same from the cache; another seed or size is another; fewer patches than k are said."""
    digits = Digits(
        name="digits", resolution=8, val_fraction=0.1, test_fraction=0.1, split_seed=0, shift=0, shift_share=0.0
    )
    first = PatchSettings(**SETTINGS).build(digits, tmp_path)
    assert (first.n_vocab, first.grid.n_ctx, first.side) == (24, 16, 8)
    result = list((tmp_path / "patches").iterdir())
    assert PatchSettings(**SETTINGS).build(digits, tmp_path) == first
    assert list((tmp_path / "patches").iterdir()) == result
    other = PatchSettings(**{**SETTINGS, "patch": 4}).build(digits, tmp_path)
    assert (other.grid.n_ctx, other.centres.shape[1]) == (4, 48)
    distinct = len(np.unique(cut_patches(torch.from_numpy(digits.split("train").pixels), 1).flatten(0, 1), axis=0))
    with caplog.at_level(logging.WARNING):
        every = PatchSettings(**{**SETTINGS, "patch": 1, "k": 512, "n_patches": 10**6}).build(digits, tmp_path)
    assert every.n_vocab == distinct == 17
    assert "hold 17 distinct ones, tokens.k=512" in caplog.text
    with pytest.raises(ValueError, match=r"tokens\.patch=3 does not divide data\.resolution=8"):
        PatchSettings(**{**SETTINGS, "patch": 3}).sizes(8)
    for name, value in (("k", 1), ("n_patches", 0), ("iterations", 0)):
        with pytest.raises(ValueError, match=rf"tokens\.{name} must be at least {value + 1}, got {value}"):
            parse_settings(PatchSettings, {**SETTINGS, name: value}, "tokens")


def test_what_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    places = (f"paths.cache={tmp_path / 'cache'}", f"paths.runs={tmp_path / 'runs'}", "trainer=cpu")
    for overrides, message in (
        (("task=pretrain", "tokens.iterations=0"), r"tokens\.iterations must be at least 1, got 0"),
        (("task=palette", "tokens.k=24"), "task=palette looks at colours, this run's tokens are 24 patches"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*overrides, "tokens=patches", *places, conf=CONF)
        assert not list(tmp_path.glob("runs/*"))
