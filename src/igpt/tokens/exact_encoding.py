"""Tokens of a VQ-VAE as its encoder in float64 would give them, mostly by its encoder in float32.

Convolutions in float32 differ in the last bits between devices, libraries, batch sizes, memory formats and numbers of
threads. So the token is defined as the nearest code in float64. Where the float32 vector is closer to another code's
than `ERROR`, the vector is computed again in float64, by the pixels around it that the encoder sees.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from igpt.tokens.vqvae import VQVAE, scale_pixels

# Bound of |z₃₂ - z₆₄| over the longest vector of the image: over 20 times the greatest measured, 7e-7 of trained networks
# (docs/tokens.md) and 1.1e-6 of untrained ones of up to 256 channels, AVX2 or AVX-512, of photographs and noise.
ERROR = 2.5e-5
ALARM = 10  # an error above ERROR / ALARM is a sign that the bound may not hold: the image is encoded in float64


class Encoded(NamedTuple):
    """The tokens of a batch of images, and how many vectors were computed again."""

    tokens: Tensor  # (B, h, w) int64
    n_recomputed: int


def encode_exactly(network: VQVAE, exact: VQVAE, pixels: Tensor) -> Encoded:
    """The tokens of images: (B, H, W, 3) uint8 → (B, H/f, W/f) int64. `exact`: the same network in float64.

    Raises:
        ValueError: the encoder's numbers overflow.
    """
    latents = network.encoder(scale_pixels(pixels)).permute(0, 2, 3, 1)  # (B, h, w, D)
    b, h, w, d = latents.shape
    vectors = latents.reshape(b, h * w, d)
    lengths = vectors.norm(dim=2)
    bounds = ERROR * lengths.amax(1)  # (B,)
    nearest = network.quantizer.nearest(vectors.flatten(0, 1), bounds.repeat_interleave(h * w))
    found, doubtful = nearest.tokens.view(b, h * w), ~nearest.is_certain.view(b, h * w)
    doubtful.scatter_(1, lengths.argmax(1, keepdim=True), True)  # one vector of every image checks the bound
    size = [min(2 * exact.config.encoder_reach + 1, n) for n in (h, w)]
    too_many = doubtful.sum(1) * size[0] * size[1] > h * w
    image, place = (doubtful & ~too_many[:, None]).nonzero(as_tuple=True)
    if len(image):
        again = encode_windows(exact, pixels, image, place // w, place % w)  # (N, D) float64
        found[image, place] = exact.quantizer.nearest_in_float64(again)
        errors = (vectors[image, place] - again).norm(dim=1)
        too_many[image[~(errors <= bounds[image] / ALARM)]] = True
    for index in too_many.nonzero().flatten().tolist():
        vector = exact.encoder(scale_pixels(pixels[index : index + 1], torch.float64)).permute(0, 2, 3, 1)
        check_finite(vector)
        found[index] = exact.quantizer.nearest_in_float64(vector.reshape(h * w, d))
    return Encoded(found.view(b, h, w), len(image) + int(too_many.sum()) * h * w)


def encode_windows(exact: VQVAE, pixels: Tensor, image: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """The vectors at N places of the latent grid, from the pixels that each depends on: (N,) each → (N, D) float64.

    All windows have one size; at a border of the image they are moved inwards, so that zeros stand outside a window
    only where they stand outside the image.
    """
    f, reach = exact.config.factor, exact.config.encoder_reach
    starts, pixel_index = [], []
    for place, n in ((row, pixels.shape[1] // f), (column, pixels.shape[2] // f)):
        size = min(2 * reach + 1, n)
        start = (place - reach).clamp(0, n - size)  # (N,)
        starts.append(start)
        pixel_index.append(start[:, None] * f + torch.arange(size * f, device=place.device))
    windows = pixels[image[:, None, None], pixel_index[0][:, :, None], pixel_index[1][:, None, :]]  # (N, f·s, f·s, 3)
    latents = exact.encoder(scale_pixels(windows, torch.float64))  # (N, D, s, s)
    index = torch.arange(len(image), device=image.device)
    vectors: Tensor = latents[index, :, row - starts[0], column - starts[1]]
    check_finite(vectors)
    return vectors


def check_finite(vectors: Tensor) -> None:
    """Raises ValueError unless all vectors are finite."""
    if not vectors.isfinite().all():
        raise ValueError("the VQ-VAE's encoder gives numbers that are not finite: train it again")
