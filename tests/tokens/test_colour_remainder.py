"""The code length of colours given a palette: a probability, a normal one, and 0 where nothing is lost."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from igpt.tokens import colour_remainder
from igpt.tokens.colour_remainder import ColourRemainder
from igpt.tokens.palette import Palette

COVARIANCE = np.array([[9.0, 5.0, -2.0], [5.0, 7.0, 1.0], [-2.0, 1.0, 4.0]])
FAR = (225, 30, 215)  # the other colour of the palette


def build_palette(colour: tuple[int, int, int]) -> Palette:
    return Palette((np.array([colour, FAR]) / 127.5 - 1).astype(np.float32))


def draw_pixels(around: tuple[int, int, int], n: int, covariance: np.ndarray = COVARIANCE) -> np.ndarray:
    drawn = np.random.default_rng(0).multivariate_normal(np.add(around, [1.0, -2.0, 0.5]), covariance, size=n)
    return np.rint(drawn).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "colour", [(100, 120, 140), (0, 120, 30), (255, 120, 250)], ids=["inside", "at black", "at white"]
)
def test_probabilities_of_all_colours_sum_to_one(colour: tuple[int, int, int]) -> None:
    """Over a block of 60³ colours around one of the palette's, twenty deviations wide, chained channels and edges."""
    remainder = ColourRemainder.fit(build_palette(colour), draw_pixels(colour, 5000))
    axes = [np.arange(max(0, value - 30), min(255, value + 30) + 1) for value in colour]
    block = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).astype(np.uint8)
    assert (2 ** -remainder.bits(block)).sum() == pytest.approx(1, abs=1e-5)


def test_many_pixels_are_measured_as_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: the code lengths do not depend on how many pixels are in memory together."""
    pixels = draw_pixels((100, 120, 140), 1000).reshape(10, 10, 10, 3)
    remainder = ColourRemainder.fit(build_palette((100, 120, 140)), pixels)
    together = remainder.bits(pixels)
    monkeypatch.setattr(colour_remainder, "CHUNK", 300)
    assert np.array_equal(remainder.bits(pixels), together)


def test_code_length_is_the_entropy_of_the_normal_distribution() -> None:
    """Independent source: SciPy's differential entropy, which is the code length of whole grey levels."""
    pixels = draw_pixels((100, 120, 140), 200_000).reshape(400, 500, 3)
    bits = ColourRemainder.fit(build_palette((100, 120, 140)), pixels).bits(pixels)
    assert bits.shape == (400, 500)
    rounding = np.eye(3) / 12
    entropy = multivariate_normal(cov=COVARIANCE + rounding).entropy() / np.log(2)
    assert bits.mean() == pytest.approx(entropy, abs=0.02)


def test_an_exact_palette_leaves_nothing_out() -> None:
    colours = np.array([(100, 120, 140), FAR], dtype=np.uint8)
    pixels = colours[np.random.default_rng(0).integers(0, 2, size=(5, 8, 8))]
    assert ColourRemainder.fit(build_palette((100, 120, 140)), pixels).bits(pixels) == pytest.approx(0, abs=1e-4)


def test_a_colour_without_pixels_leans_on_the_others() -> None:
    """The palette's second colour has no pixel to fit: its own is short, and no colour is impossible."""
    palette = build_palette((100, 120, 140))
    remainder = ColourRemainder.fit(palette, draw_pixels((100, 120, 140), 1000))
    exact, other = remainder.bits(np.array([FAR, (0, 0, 255)], dtype=np.uint8))
    assert 4 < exact < 10
    assert 10 < other < 3 * 28.1
