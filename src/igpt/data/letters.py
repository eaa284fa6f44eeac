"""Capital letters A to Z, drawn from the fonts that matplotlib ships: a dataset without a download."""

from functools import cache as cached
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFont
from pydantic import Field

from igpt.data.listing import ListFiles
from igpt.data.source import SPLITS, ArraySplit, JoinedSplit, Split, check_split_name
from igpt.data.split import balanced_subset
from igpt.settings.data import LabelsPerClass
from igpt.settings.fields import Count, Seed, Settings
from igpt.utils import keyed

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FONTS = (  # all that have these letters, except cmsy10's calligraphic ones
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
    "cmb10", "cmmi10", "cmr10", "cmss10", "cmti10", "cmtt10",
)  # fmt: skip
EM = 72  # font size in pixels of a glyph's mask: so large that hinting hardly moves its edges
MASK = 128  # side of a mask in pixels, the glyph in its centre
FINER = 4  # an image is drawn so many times as large, then averaged
LEVELS = 15  # the largest grey level: 0 … 15
CHANGES = f"{LEVELS + 1} grey levels spread over 0 … 255, in three equal channels"

Height = Annotated[float, Field(ge=0.2, le=1.2)]


class LetterCounts(Settings):
    """Images of each split."""

    train: Count
    val: Count
    test: Count


class Letters:
    """Drawn letters as a `Source`: white on black, grey level g is the pixel 17 g in three equal channels.

    Image i of a split shows letter i mod 26, in a font, size, turn, shear and place that are a function of
    (`split_seed`, split, i). So all splits have the same fonts and no draw in common, and the number of images of one
    does not change those of another. `labels_per_class` keeps that many training images per letter, drawn by
    `subset_seed`.

    Raises:
        ValueError: font sizes in the wrong order.
    """

    n_class: int | None = len(LETTERS)
    class_names: tuple[str, ...] | None = tuple(LETTERS)

    def __init__(
        self,
        *,
        cache: Path | None = None,  # unused: drawn and held in memory
        list_files: ListFiles | None = None,  # unused: no files
        name: str,
        resolution: Annotated[int, Field(ge=8, le=64)],
        counts: LetterCounts,
        height: Annotated[list[Height], Field(min_length=2, max_length=2)],  # of an em, in shares of the side
        turn: Annotated[float, Field(ge=0, le=180)],  # degrees
        shear: Annotated[float, Field(ge=0, le=1)],
        split_seed: Seed,
        labels_per_class: LabelsPerClass = None,
        subset_seed: Seed = 0,
    ) -> None:
        if height[0] > height[1]:
            raise ValueError(f"data.height must be the smallest, then the largest font size, got {height}")
        self.name, self.resolution, self.labels_per_class = name, resolution, labels_per_class
        draw = partial(_draw, resolution=resolution, height=(height[0], height[1]), turn=turn, shear=shear)
        self._splits = {
            split: draw(getattr(counts, split), keyed.key(split_seed, f"letters/{split}")) for split in SPLITS
        }
        if labels_per_class is not None:
            pixels, labels = (train := self._splits["train"]).pixels, train.labels
            rows = balanced_subset(labels, per_class=labels_per_class, seed=subset_seed, where="letters")
            self._splits["train"] = ArraySplit(pixels[rows], labels[rows], CHANGES)

    def split(self, name: str) -> ArraySplit:
        check_split_name(name)
        return self._splits[name]

    def training(self, *, with_val: bool = False) -> Split:
        train, val = self._splits["train"], self._splits["val"]
        return JoinedSplit(train, val) if with_val else train


class Glyph(NamedTuple):
    """A letter of a font, drawn once."""

    mask: Image.Image  # (MASK, MASK), L
    width: int  # of the letter, in pixels
    height: int


@cached
def load_glyphs() -> list[list[Glyph]]:
    """All letters of all fonts: by font, then by letter.

    Raises:
        ValueError: a matplotlib without its fonts, as some distributions package it.
    """
    from matplotlib import get_data_path  # slow to import, for this data alone

    files = [Path(get_data_path()) / "fonts" / "ttf" / f"{font}.ttf" for font in FONTS]
    if missing := [file for file in files if not file.is_file()]:
        raise ValueError(f"data=letters draws with the fonts of matplotlib's wheel; there is no {missing[0]}")
    return [[_draw_glyph(file, letter) for letter in LETTERS] for file in files]


def _draw_glyph(file: Path, letter: str) -> Glyph:
    font = ImageFont.truetype(str(file), EM, layout_engine=ImageFont.Layout.BASIC)
    drawn = font.getmask(letter, "L")
    ink = Image.frombytes("L", drawn.size, bytes(drawn))
    ink = ink.crop(ink.getbbox())
    mask = Image.new("L", (MASK, MASK))
    mask.paste(ink, ((MASK - ink.width) // 2, (MASK - ink.height) // 2))
    return Glyph(mask, ink.width, ink.height)


@lru_cache(maxsize=2 * len(SPLITS))  # the stages of a pipeline read the same ones
def _draw(
    n: int, stream_key: int, *, resolution: int, height: tuple[float, float], turn: float, shear: float
) -> ArraySplit:
    """`n` images, each by its own key of the stream; shared by all that read them."""
    labels = np.arange(n) % len(LETTERS)
    font, size, angle, lean, *place = keyed.uniform(keyed.per_example_keys(stream_key, torch.arange(n)), 6).numpy().T
    glyphs = load_glyphs()
    chosen = [glyphs[k][letter] for k, letter in zip((font * len(FONTS)).astype(int), labels, strict=True)]
    forward = _transforms(
        scale=np.interp(size, (0, 1), height) * resolution * FINER / EM,
        angle=np.deg2rad(np.interp(angle, (0, 1), (-turn, turn))),
        shear=np.interp(lean, (0, 1), (-shear, shear)),
    )
    extent = np.einsum("nij,nj->ni", np.abs(forward), [(glyph.width, glyph.height) for glyph in chosen])  # (N, 2)
    side = resolution * FINER
    centre = side / 2 + np.maximum(side - extent, 0) * (np.stack(place, 1) - 0.5)  # wherever the letter fits, else 0
    back = np.linalg.inv(forward)  # Pillow maps pixels of the image to those of the mask
    offset = MASK / 2 - np.einsum("nij,nj->ni", back, centre)
    affine = np.concatenate([back, offset[..., None]], axis=2).reshape(n, 6).tolist()
    grey = np.empty((n, resolution, resolution), np.uint8)
    for i, (glyph, coefficients) in enumerate(zip(chosen, affine, strict=True)):
        fine = glyph.mask.transform((side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
        grey[i] = np.asarray(fine.reduce(FINER))
    pixels = np.rint(grey * (LEVELS / 255)).astype(np.uint8) * np.uint8(255 // LEVELS)
    return ArraySplit(np.repeat(pixels[..., None], 3, axis=3), labels, CHANGES)


def _transforms(scale: np.ndarray, angle: np.ndarray, shear: np.ndarray) -> np.ndarray:
    """Matrices that shear horizontally, scale, then turn: three arrays (N,) → (N, 2, 2)."""
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    return np.stack([cos, shear * cos - sin, sin, shear * sin + cos], 1).reshape(-1, 2, 2)
