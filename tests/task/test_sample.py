"""Samples and completions of trained weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

from igpt.checkpoint.native import Weights, find
from igpt.model.generate import Sampling
from igpt.task.complete import HIDDEN, prompt_rows
from igpt.task.complete import run as complete
from igpt.task.fit import Runner
from igpt.task.sample import as_grid, draw
from igpt.task.sample import run as sample
from tests.task.conftest import Lab, machine

WHOLE = {"temperature": 1.0, "top_k": None, "top_p": None}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits, palette) -> Weights:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("trained")
    Lab(digits, palette).pretrain(folder)
    return find(str(folder))


def test_samples_do_not_depend_on_the_batch(tmp_path: Path, trained: Weights) -> None:
    """Invariant: and another seed draws others."""
    runner = Runner(machine=machine(), folder=tmp_path)
    drawn = [
        sample(runner=runner, weights=trained, seed=seed, count=7, batch_size=size, **WHOLE).arrays["samples"]
        for seed, size in [(0, 7), (0, 3), (1, 7)]
    ]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert drawn[0].shape == (7, 64)


def test_completions_keep_what_was_given(tmp_path: Path, lab: Lab, trained: Weights) -> None:
    """Invariant: the original stands beside what was given, and every completion begins with it."""
    runner = Runner(machine=machine(), folder=tmp_path)
    settings = {"split": "val", "count": 3, "completions": 2, "fraction": 0.5, "rows": None, "batch_size": 4}
    result = complete(runner=runner, weights=trained, tokens=lab.tokens, seed=0, **settings, **WHOLE)
    grid = result.grids["completions"]
    assert grid.images.shape == (3, 4, 8, 8, 3)
    assert grid.titles == ("original", "given", "completion 1", "completion 2")
    original, given = grid.images[:, 0], grid.images[:, 1]
    chosen = result.provenance["images"]
    assert np.array_equal(original, lab.digits.split("val").pixels[chosen])
    assert (given[:, 4:] == HIDDEN).all()
    for column in range(1, 4):
        assert np.array_equal(grid.images[:, column, :4], original[:, :4])
    assert not np.array_equal(grid.images[:, 2], grid.images[:, 3])


def test_all_rows_given_is_the_image(tmp_path: Path, lab: Lab, trained: Weights) -> None:
    """By hand: nothing is left to draw."""
    runner = Runner(machine=machine(), folder=tmp_path)
    settings = {"split": "val", "count": 1, "completions": 1, "fraction": 0.5, "rows": 8, "batch_size": 4}
    result = complete(runner=runner, weights=trained, tokens=lab.tokens, seed=0, **settings, **WHOLE)
    assert np.array_equal(result.grids["completions"].images[0, 2], result.grids["completions"].images[0, 0])


def test_rows_of_a_fraction() -> None:
    """By hand."""
    assert [prompt_rows(f, None, 32) for f in (0, 0.5, 0.25, 1)] == [0, 16, 8, 32]
    assert prompt_rows(0.5, 3, 32) == 3
    with pytest.raises(ValueError, match="0 … 32, the image's height; got 33"):
        prompt_rows(0.5, 33, 32)
    with pytest.raises(ValueError, match="fraction"):
        prompt_rows(1.5, None, 32)


def test_bad_counts(tmp_path: Path, lab: Lab, trained: Weights) -> None:
    runner = Runner(machine=machine(), folder=tmp_path)
    with pytest.raises(ValueError, match=r"task\.count"):
        sample(runner=runner, weights=trained, seed=0, count=0, batch_size=1, **WHOLE)
    settings = {"split": "val", "count": 500, "completions": 1, "fraction": 0.5, "rows": None, "batch_size": 4}
    with pytest.raises(ValueError, match="500 images asked for, the val split has 18"):
        complete(runner=runner, weights=trained, tokens=lab.tokens, seed=0, **settings, **WHOLE)
    with pytest.raises(ValueError, match="batch_size"):
        draw(trained.net(), Sampling(1.0, None, None), keys=torch.zeros(1, dtype=torch.int64), batch_size=0)


def test_a_grid_is_filled_with_white() -> None:
    """By hand: five images in 2 × 3."""
    grid = as_grid(np.zeros((5, 4, 4, 3), np.uint8))
    assert grid.shape == (2, 3, 4, 4, 3)
    assert grid[1, 1].max() == 0
    assert grid[1, 2].min() == 255
