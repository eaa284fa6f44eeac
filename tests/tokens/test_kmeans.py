"""Fitting a palette."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.cluster import KMeans

from igpt.data.digits import Digits
from igpt.settings.fields import parse_arguments
from igpt.tokens.kmeans import colour_distances, count_colours, fit_cached, fit_palette

RNG = np.random.default_rng(0)


def test_colours_are_counted_in_ascending_order() -> None:
    """Independent source: NumPy's `unique` of rows; the order decides where k-means starts."""
    pixels = RNG.choice(np.array([0, 1, 127, 128, 254, 255], dtype=np.uint8), (2000, 3))
    colours, counts = count_colours(pixels)
    expected, expected_counts = np.unique(pixels, axis=0, return_counts=True)
    assert colours.dtype == expected.dtype
    assert np.array_equal(colours, expected)
    assert np.array_equal(counts, expected_counts)


def test_distinct_colours_are_their_own_palette() -> None:
    """Invariant: k distinct colours are kept exactly, so nothing is lost; and grey stays grey."""
    grey = np.repeat(RNG.integers(0, 17, (500, 1)) * 15, 3, axis=1).astype(np.uint8)
    palette = fit_palette(grey, k=17, iterations=10, restarts=1, seed=0)
    assert not colour_distances(palette, grey).any()
    assert palette.colours[:, 0].tolist() == sorted(set(grey[:, 0].tolist()))


def test_grey_data_gives_a_grey_palette() -> None:
    """Invariant: three equal channels, to the bit."""
    grey = np.repeat(RNG.integers(0, 256, (5000, 1)), 3, axis=1).astype(np.uint8)
    centres = fit_palette(grey, k=16, iterations=50, restarts=1, seed=0).centres
    assert (centres == centres[:, :1]).all()
    assert (np.diff(centres[:, 0]) > 0).all()


def test_distinct_colours_with_weights_equal_all_pixels() -> None:
    """Independent source: scikit-learn on every pixel reaches the same inertia, within 2 %."""
    means = RNG.integers(20, 235, (12, 3))
    pixels = np.clip(means[RNG.integers(0, 12, 6000)] + RNG.normal(0, 6, (6000, 3)), 0, 255).astype(np.uint8)
    palette = fit_palette(pixels, k=12, iterations=100, restarts=8, seed=0)
    points = pixels / 127.5 - 1
    inertia = ((points[:, None] - palette.centres) ** 2).sum(-1).min(-1).sum()
    reference = min(KMeans(12, n_init=4, random_state=s).fit(points).inertia_ for s in range(2))
    assert inertia < 1.02 * reference


@pytest.mark.parametrize(("k", "message"), [(1, "at least 2, got 1"), (5000, "at most 4096, got 5000")])
def test_bad_k(k: int, message: str) -> None:
    settings = {"k": k, "n_pixels": 10, "iterations": 10, "restarts": 1, "seed": 0}
    with pytest.raises(ValueError, match=rf"tokens\.palette\.k must be {message}"):
        parse_arguments(fit_cached, settings, "tokens.palette")


def test_fewer_colours_than_asked_for_are_taken() -> None:
    """Round trip: 8 corners of the cube of colours for k = 512, each itself again; k = 8 gives the same palette."""
    corners = np.array([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)], dtype=np.uint8)
    palette = fit_palette(np.repeat(corners, 5, axis=0), k=512, iterations=10, restarts=1, seed=0)
    assert sorted(palette.colours.tolist()) == corners.tolist()
    assert palette.hash == fit_palette(corners, k=8, iterations=10, restarts=1, seed=0).hash


@pytest.mark.parametrize(
    ("colour", "second"), [((7, 7, 7), (255, 255, 255)), ((255, 255, 255), (0, 0, 0)), ((9, 200, 99), (255, 0, 255))]
)
@pytest.mark.parametrize("k", [2, 512])
def test_one_colour_stands_beside_the_furthest(
    colour: tuple[int, int, int], second: tuple[int, int, int], k: int
) -> None:
    """By hand: each channel is 0 or 255, whichever is further; the order is from dark to light."""
    palette = fit_palette(np.full((50, 3), colour, dtype=np.uint8), k=k, iterations=10, restarts=1, seed=0)
    assert palette.colours.tolist() == [list(c) for c in sorted((colour, second), key=sum)]


def test_how_many_colours_were_found_is_said_each_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By hand: the digits have 17 grey levels; also where the palette is read from the cache."""
    source = Digits(
        name="digits", resolution=8, val_fraction=0.1, test_fraction=0.1, split_seed=0, shift=0, shift_share=0.0
    )
    settings = {"n_pixels": 10**6, "iterations": 20, "restarts": 1, "seed": 0}
    for _ in range(2):
        caplog.clear()
        assert fit_cached(source, tmp_path, k=512, **settings).k == 17
        assert "tokens.palette.k asks for 512 colours, and the" in caplog.text
        assert "hold 17: these are taken" in caplog.text
    caplog.clear()
    assert fit_cached(source, tmp_path, k=17, **settings).k == 17
    assert "asks for" not in caplog.text


def test_a_fitted_palette_is_read_again(tmp_path: Path) -> None:
    """Invariant: the second call reads the first one's file; another k has a file of its own."""
    source = Digits(
        name="digits", resolution=8, val_fraction=0.1, test_fraction=0.1, split_seed=0, shift=1, shift_share=0.5
    )
    settings = {"n_pixels": 10**6, "iterations": 20, "restarts": 1, "seed": 0}
    first = fit_cached(source, tmp_path, k=8, **settings)
    (path,) = (tmp_path / "palettes").glob("*.npy")
    written = path.stat().st_mtime_ns
    assert fit_cached(source, tmp_path, k=8, **settings).hash == first.hash
    assert path.stat().st_mtime_ns == written
    assert fit_cached(source, tmp_path, k=17, **settings).k == 17
    assert len(list((tmp_path / "palettes").glob("*.npy"))) == 2
