"""How well a tokenizer gives images back, and how evenly it uses its codes."""

import math

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from igpt.metric.result import Curve, Number

LEVELS = 255.0  # range of a pixel
SSIM_WINDOW = 11  # pixels a side (Wang et al. 2004), Gaussian of σ 1.5, borders reflected; smaller images have no SSIM
UNITS = {
    "psnr": "dB", "ssim": "SSIM index", "mae": "grey levels", "tokens_returned": "share",
    "reconstruction": "error in [-1, 1]",
}  # fmt: skip
OCTAVES, PER_OCTAVE = 6, 2  # of the histogram of code use: from 2⁻⁶ to 2⁶ times the mean


def image_figures(pixels: Tensor, reconstructed: Tensor) -> dict[str, Tensor]:
    """`psnr`, `ssim` (none below SSIM_WINDOW pixels a side) and `mae` of each image: 2 × (B, R, R, 3) uint8 → (B,).

    The PSNR of an image without error is that of one grey level of error in a single value.
    """
    target, image = (levels.permute(0, 3, 1, 2).double() for levels in (pixels, reconstructed))
    psnr = peak_signal_noise_ratio(image, target, data_range=LEVELS, reduction="none", dim=(1, 2, 3))
    figures = {"psnr": psnr.clamp(max=10 * math.log10(LEVELS**2 * target[0].numel()))}
    if target.shape[-1] >= SSIM_WINDOW:
        ssim = structural_similarity_index_measure(
            image.float(), target.float(), data_range=LEVELS, kernel_size=SSIM_WINDOW, reduction="none"
        )  # 80 times as fast as in float64, within 4e-5 of it on photographs
        assert isinstance(ssim, Tensor)
        figures["ssim"] = ssim.view(len(target))
    return figures | {"mae": (image - target).abs().mean((1, 2, 3))}


def reconstruction_numbers(split: str, figures: dict[str, Tensor]) -> dict[str, Number]:
    """`split/psnr` …: means over images with standard errors; each figure (N,)."""
    numbers = {}
    for name, values in figures.items():
        n = len(values)
        stderr = float(values.std()) / math.sqrt(n) if n > 1 else None
        numbers[f"{split}/{name}"] = Number(float(values.mean()), UNITS[name], n, stderr)
    return numbers


def code_numbers(split: str, counts: Tensor) -> dict[str, Number]:
    """Share of codes used and perplexity ÷ K, 1 if all are used alike, from the uses of each code: (K,)."""
    total, k = int(counts.sum()), len(counts)
    shares = counts[counts > 0].double() / total
    perplexity = float((-(shares * shares.log()).sum()).exp())
    return {
        f"{split}/codes_used": Number(len(shares) / k, "share", total),
        f"{split}/perplexity_share": Number(perplexity / k, "share", total),
    }


def code_use_histogram(counts: Tensor) -> Curve:
    """Share of the K codes by their uses ÷ the mean, in bins of half an octave; from the uses of each code, (K,).

    Codes without a use are left out, rarer and more frequent ones than the bins lie in the outermost.
    """
    used = counts[counts > 0].double()
    octaves = (used / counts.double().mean()).log2().clamp(-OCTAVES, OCTAVES)  # (U,)
    index = ((octaves + OCTAVES) * PER_OCTAVE).round().long()
    shares = torch.bincount(index, minlength=2 * OCTAVES * PER_OCTAVE + 1).double() / len(counts)
    places = [i / PER_OCTAVE - OCTAVES for i in range(len(shares))]
    return Curve(places, shares.tolist(), "uses of a code ÷ their mean, log₂", "share of codes")
