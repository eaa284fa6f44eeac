"""Crops and augmentations from an encoded image to (R, R, 3) uint8. Random choices are keyed by image."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from igpt.data.image_decoding import BadImageError, decode_rgb, open_image, upright_size
from igpt.settings.data import AugmentSettings, CropSettings, Resize
from igpt.settings.fields import parse_settings
from igpt.utils import keyed


@dataclass(frozen=True)
class Crop:
    """A square of an image, at R pixels a side.

    The shorter side is resized to `short_side` pixels (a random length when the two numbers differ, both included), a
    square of `size` pixels is cut out (in the centre, or at random when the length is), and resized to R. Without
    `size`, the largest square in the centre is taken.

    Source: Chen et al. 2020, §3.1. They do not state the filter. With `resize="once"` the same square is resampled
    from the file's pixels in one pass instead of by way of `size` pixels.
    """

    resolution: int  # R
    short_side: tuple[int, int] | None  # pixels, shortest and longest
    size: int | None  # pixels
    filter: str  # of Pillow, in lower case
    resize: Resize
    draft: float | None  # JPEG scaled decoding: source pixels per pixel of the next resize, at least; None: full size

    @property
    def is_random(self) -> bool:
        return self.short_side is not None and self.short_side[0] < self.short_side[1]

    def __call__(self, data: bytes, key: int) -> np.ndarray:
        """Decodes `data` and crops it, at random by `key`: → (R, R, 3) uint8. Raises BadImageError."""
        return self.crop_image(open_image(data), key)

    def crop_image(self, image: Image.Image, key: int) -> np.ndarray:
        """As a call, of an image from `open_image` or `prepare_image`."""
        box, scale = self.box(*upright_size(image), key)
        side = box[2] - box[0]
        between = self.size if self.resize == "twice" else None  # pixels a side of the first of two steps
        shrink = 1.0 if self.draft is None else self.draft * (between or self.resolution) / side
        image = decode_rgb(image, shrink=shrink)
        across, down = image.size[0] / scale[0], image.size[1] / scale[1]  # 1; below 1 after JPEG scaled decoding
        right, bottom = min(box[2] * across, image.size[0]), min(box[3] * down, image.size[1])  # against rounding
        within = (box[0] * across, box[1] * down, right, bottom)
        method = Image.Resampling[self.filter.upper()]
        if between is not None:
            image = image.resize((between, between), method, box=within)
            within = (0, 0, between, between)
        return np.asarray(image.resize((self.resolution, self.resolution), method, box=within))

    def crop_named(self, data: bytes, key: int, where: str) -> np.ndarray:
        """As a call; the error of an unreadable image names it, `where`, and the setting that leaves it out."""
        try:
            return self(data, key)
        except BadImageError as error:
            raise BadImageError(f"{where}: {error}; data.on_corrupt=skip leaves such images out") from error

    def box(self, width: int, height: int, key: int) -> tuple[tuple[float, float, float, float], tuple[int, int]]:
        """The crop (left, top, right, bottom) in pixels of the original image, and the size (width, height).

        Its edges are whole pixels of the image resized to `short_side`.
        """
        short = min(width, height)
        if self.short_side is None or self.size is None:
            left, top = (width - short) / 2, (height - short) / 2
            return (left, top, left + short, top + short), (width, height)
        low, high = self.short_side
        u = keyed.uniform(keyed.fold_in(torch.tensor([key]), 2), 3)[0].tolist() if self.is_random else None
        side = low + math.floor(u[0] * (high - low + 1)) if u else low
        wide, tall = max(self.size, round(width * side / short)), max(self.size, round(height * side / short))
        if u:
            x, y = math.floor(u[1] * (wide - self.size + 1)), math.floor(u[2] * (tall - self.size + 1))
        else:
            x, y = (wide - self.size) // 2, (tall - self.size) // 2
        across, down = width / wide, height / tall
        return (x * across, y * down, (x + self.size) * across, (y + self.size) * down), (width, height)


@dataclass(frozen=True)
class CropPlan:
    """The crops of a dataset for evaluation and for training, and the augmentation of the training pixels."""

    evaluation: Crop
    training: Crop
    pad: int  # pixels of reflection padding before a random R×R crop; 0: no such crop
    flip: bool  # mirror images with probability 1/2

    @staticmethod
    def from_settings(resolution: int, crop: CropSettings, augment: AugmentSettings) -> "CropPlan":
        """From the settings `data.crop` and `data.augment`.

        Raises:
            ValueError: padding as large as the image or larger.
        """
        if augment.pad >= resolution:
            raise ValueError(
                f"data.augment.pad must lie in 0 … {resolution - 1}, below data.resolution; got {augment.pad}"
            )
        build_crop = partial(Crop, resolution, size=crop.size, filter=crop.filter, resize=crop.resize, draft=crop.draft)
        side, sides = crop.eval_short_side, crop.short_side
        return CropPlan(
            evaluation=build_crop(None if side is None else (side, side)),
            training=build_crop(None if sides is None else (sides[0], sides[1])),
            pad=augment.pad,
            flip=augment.flip,
        )


def evaluation_crop(data: Mapping[str, Any]) -> Crop:
    """The evaluation crop of a dataset's settings; by default the central square."""
    data = data["streams"][data["held_out"]] if "held_out" in data else data
    if "crop" in data:
        crop = parse_settings(CropSettings, data["crop"], "data.crop")
        augment = parse_settings(AugmentSettings, data["augment"], "data.augment")
        return CropPlan.from_settings(data["resolution"], crop, augment).evaluation
    return Crop(data["resolution"], short_side=None, size=None, filter="bilinear", resize="once", draft=None)


def padded_crop(pixels: np.ndarray, rng_keys: Sequence[int], *, pad: int, flip: bool) -> np.ndarray:
    """A random R×R crop of each image after reflection padding by `pad` pixels: (B, R, R, 3) → the same shape.

    With `flip`, images are mirrored first with probability 1/2. Source: Chen et al. 2020, §3.1 (CIFAR fine-tuning).
    """
    u = keyed.uniform(keyed.fold_in(torch.tensor(list(rng_keys), dtype=torch.int64), 3), 3).numpy()  # (B, 3)
    if flip:
        pixels = np.where((u[:, 0] < 0.5)[:, None, None, None], pixels[:, :, ::-1], pixels)
    if not pad:
        return pixels
    padded = np.pad(pixels, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
    top, left = np.floor(u[:, 1:] * (2 * pad + 1)).astype(np.int64).T  # (B,) in 0 … 2·pad
    return _cut_windows(padded, top, left, pixels.shape[1])


def shift_images(pixels: np.ndarray, rng_keys: Sequence[int], *, by: int, share: float) -> np.ndarray:
    """Translates a `share` of the images by up to `by` pixels per axis: (B, R, R, 3) → the same shape.

    All (2·by + 1)² translations are equally likely, the identity included. Uncovered pixels are 0.
    """
    u = keyed.uniform(keyed.fold_in(torch.tensor(rng_keys, dtype=torch.int64), 1), 3).numpy()  # (B, 3)
    moves = np.floor(u[:, 1:] * (2 * by + 1)).astype(np.int64)  # (B, 2) in 0 … 2·by
    top, left = np.where(u[:, :1] < share, moves, by).T  # (B,)
    return _cut_windows(np.pad(pixels, ((0, 0), (by, by), (by, by), (0, 0))), top, left, pixels.shape[1])


def _cut_windows(pixels: np.ndarray, top: np.ndarray, left: np.ndarray, side: int) -> np.ndarray:
    """One side×side window of each image: (B, H, W, 3), (B,), (B,) → (B, side, side, 3)."""
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (side, side), axis=(1, 2))  # (B, …, …, 3, side, side)
    return np.moveaxis(windows[np.arange(len(pixels)), top, left], 1, -1)
