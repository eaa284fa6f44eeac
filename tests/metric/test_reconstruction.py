"""Figures of reconstructions against their formulas, and code use by hand."""

import numpy as np
import pytest
import torch

from igpt.metric.reconstruction import code_numbers, code_use_histogram, image_figures, reconstruction_numbers
from tests.task.conftest import smooth_pictures


def test_figures_of_an_image() -> None:
    """Independent source: the formulas of Wang et al. 2004 and of PSNR and MAE in NumPy; an exact image is finite."""
    rng = np.random.default_rng(0)
    pixels = smooth_pictures(2, side=16)
    other = np.clip(pixels + rng.integers(-20, 20, pixels.shape), 0, 255).astype(np.uint8)
    figures = image_figures(torch.from_numpy(pixels), torch.from_numpy(other))
    at = np.arange(11) - 5
    window = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(levels: np.ndarray) -> np.ndarray:  # (R, R, 3) → the same; torchmetrics reflects the borders
        mirrored = np.pad(levels, ((5, 5), (5, 5), (0, 0)), mode="reflect")
        patches = np.lib.stride_tricks.sliding_window_view(mirrored, (11, 11), axis=(0, 1))
        return (patches * window).sum((-2, -1))

    for i, (x, y) in enumerate(zip(pixels.astype(float), other.astype(float), strict=True)):
        mx, my = mean(x), mean(y)
        sx, sy, sxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        ssim = (2 * mx * my + c1) * (2 * sxy + c2) / ((mx**2 + my**2 + c1) * (sx + sy + c2))
        assert float(figures["ssim"][i]) == pytest.approx(ssim.mean(), abs=4e-5)
        assert float(figures["psnr"][i]) == pytest.approx(10 * np.log10(255**2 / ((x - y) ** 2).mean()), abs=1e-5)
        assert float(figures["mae"][i]) == pytest.approx(np.abs(x - y).mean(), abs=1e-9)
    same = image_figures(torch.from_numpy(pixels), torch.from_numpy(pixels))
    assert same["psnr"].tolist() == pytest.approx([10 * np.log10(255**2 * 3 * 16**2)] * 2)
    assert "ssim" not in image_figures(torch.zeros(1, 8, 8, 3), torch.zeros(1, 8, 8, 3))
    assert reconstruction_numbers("val", {"psnr": torch.tensor([1.0, 3.0])})["val/psnr"].stderr == pytest.approx(1.0)


def test_code_use_by_hand() -> None:
    """By hand: uses of 2, 0, 1 and 1 have the entropy 1.5 bits, so a perplexity of 2√2, of four codes."""
    numbers = code_numbers("val", torch.tensor([2, 0, 1, 1]))
    assert numbers["val/codes_used"].value == 0.75
    assert numbers["val/perplexity_share"].value == pytest.approx(2**0.5 / 2)
    assert numbers["val/perplexity_share"].n == 4
    histogram = code_use_histogram(torch.tensor([2, 0, 1, 1]))
    assert {x: y for x, y in zip(histogram.x, histogram.y, strict=True) if y} == {0.0: 0.5, 1.0: 0.25}
    assert sum(code_use_histogram(torch.arange(5000)).y) == pytest.approx(4999 / 5000)
