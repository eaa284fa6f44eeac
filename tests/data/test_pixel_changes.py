"""Whether pixels are those that were stored, by how the files were made."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from igpt.data.crop import Crop
from igpt.data.digits import Digits
from igpt.data.pixel_changes import describe_changes
from tests.data.conftest import Shop, encoded, photo

ORIENTED = Image.Exif()
ORIENTED[274] = 6  # turned by 90°


def crop(side: int, **changed: Any) -> Crop:
    plain: dict[str, Any] = {"short_side": None, "size": None, "filter": "bilinear", "resize": "twice", "draft": 3}
    return Crop(side, **plain | changed)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}), ("BMP", {}), ("PPM", {}), ("QOI", {}), ("TGA", {}), ("TIFF", {}), ("PNG", {"exif": ORIENTED}),
        ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True}),
        ("WEBP", {"lossless": True, "exif": ORIENTED}),
    ],
)  # fmt: skip
def test_lossless_files_are_not_changed(kind: str, options: dict[str, Any]) -> None:
    """Round trip: what is said to be unchanged comes back to the bit, turned upright."""
    image = photo(0, 32, 32)
    data = encoded(image, kind, **options)
    assert describe_changes([(data, crop(32))]) == ""
    upright = image.transpose(Image.Transpose.ROTATE_270) if "exif" in options else image
    assert np.array_equal(crop(32)(data, 0), np.asarray(upright))


@pytest.mark.parametrize(
    ("kind", "options", "size", "cut", "changes"),
    [
        ("JPEG", {}, (32, 32), {}, "JPEG files"),
        ("JPEG", {"quality": 100, "subsampling": 0}, (32, 32), {}, "JPEG files"),
        ("WEBP", {}, (32, 32), {}, "WEBP files"),
        ("WEBP", {"exif": ORIENTED}, (32, 32), {}, "WEBP files"),
        ("TIFF", {"compression": "jpeg"}, (32, 32), {}, "TIFF files"),
        ("PNG", {}, (64, 64), {}, "resized from 64×64"),
        ("PNG", {}, (16, 16), {}, "resized from 16×16"),
        ("PNG", {}, (40, 32), {}, "cropped from 40×32"),
        ("PNG", {}, (32, 32), {"short_side": (40, 40), "size": 32}, "cropped from 32×32"),
        ("PNG", {}, (32, 32), {"short_side": (40, 40), "size": 40}, "resized from 32×32"),
        ("JPEG", {}, (64, 48), {}, "JPEG files; cropped from 64×48"),
    ],
)
def test_what_was_changed_is_said(
    kind: str, options: dict[str, Any], size: tuple[int, int], cut: dict[str, Any], changes: str
) -> None:
    """By construction; and the pixels are others than those that were written, or of another size."""
    image = photo(0, *size)
    data = encoded(image, kind, **options)
    assert describe_changes([(data, crop(32, **cut))]) == changes
    pixels = crop(32, **cut)(data, 0)
    assert image.size != (32, 32) or not np.array_equal(pixels, np.asarray(image))


def test_grey_and_transparent_pixels_are_converted() -> None:
    """By construction."""
    for mode in ("L", "P", "RGBA"):
        data = encoded(photo(0, 32, 32).convert(mode), "PNG")
        assert describe_changes([(data, crop(32))]) == f"converted to RGB from {mode}"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_says_what_its_files_are(images: Shop, tmp_path: Path, streaming: bool) -> None:
    """By construction: PNG files to train on, one JPEG among those of test; at another size all are resized."""
    for split, kinds in (("train", ["PNG"] * 8), ("test", ["PNG", "PNG", "JPEG"])):
        folder = tmp_path / "made" / split
        folder.mkdir(parents=True)
        for i, kind in enumerate(kinds):
            (folder / f"{i}.{kind.lower()}").write_bytes(encoded(photo(i, 16, 16), kind))
    for resolution, changes in ((16, set()), (8, {"resized from 16×16"})):
        source = images(tmp_path / "made", resolution=resolution, streaming=streaming)
        found = {split: source.split(split) for split in ("train", "val", "test")}
        for split in found.values():
            split.prepare()  # the pixels are cached, the files are looked at nevertheless
        of_each = {name: {*split.pixel_changes.split("; ")} - {""} for name, split in found.items()}
        assert of_each == {"train": changes, "val": changes, "test": changes | {"JPEG files"}}


def test_sources_without_files() -> None:
    """Grey levels of the digits are spread over 0 … 255; augmentation is no change of the evaluation's pixels."""
    settings = {"name": "digits", "resolution": 8, "val_fraction": 0.1, "test_fraction": 0.1, "split_seed": 0}
    digits = Digits(**settings, shift=1, shift_share=0.5)
    assert digits.split("test").pixel_changes.startswith("17 grey levels spread over 0 … 255")
    assert digits.training().pixel_changes == digits.split("train").pixel_changes
