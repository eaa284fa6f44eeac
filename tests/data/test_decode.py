"""Every kind of image becomes RGB in a stated way, and what is no image is refused by name."""

import numpy as np
import pytest
from PIL import ExifTags, Image

from igpt.data.crop import Crop
from igpt.data.decode import BadImageError, opened, rgb, size_of
from tests.data.conftest import claimed_png, encoded, photo


def read(data: bytes) -> np.ndarray:
    return np.asarray(rgb(opened(data)))


def test_rgb_comes_back_exactly() -> None:
    """Round trip through a lossless file."""
    assert np.array_equal(read(encoded(photo(0), "PNG")), np.asarray(photo(0)))


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_becomes_three_equal_channels(mode: str) -> None:
    grey = photo(1).convert(mode)
    expected = np.asarray(grey.convert("L"))
    assert np.array_equal(read(encoded(grey, "PNG")), np.stack([expected] * 3, axis=-1))


def test_sixteen_bit_grey_is_divided_by_257() -> None:
    """By hand: 0 → 0, 257 → 1, 32,896 → 128, 65,535 → 255; Pillow's own conversion makes all but the first white."""
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        assert read(encoded(Image.fromarray(levels), kind))[0].tolist() == [[g] * 3 for g in (0, 1, 128, 255)]


def test_levels_beyond_sixteen_bits_and_floats_are_refused() -> None:
    for array, message in (
        (np.full((2, 2), 70000, np.int32), "outside 16 bits"),
        (np.ones((2, 2), np.float32), "float"),
    ):
        with pytest.raises(BadImageError, match=message):
            read(encoded(Image.fromarray(array), "TIFF"))


def test_what_is_transparent_lies_on_white() -> None:
    """By hand: red at full, half and no opacity on white, as RGBA; grey with alpha; a palette with a clear colour."""
    red = np.array([[[255, 0, 0, 255], [255, 0, 0, 128], [255, 0, 0, 0]]], dtype=np.uint8)
    assert read(encoded(Image.fromarray(red), "PNG"))[0].tolist() == [[255, 0, 0], [255, 127, 127], [255, 255, 255]]
    grey = np.array([[[0, 255], [0, 0]]], dtype=np.uint8)
    assert read(encoded(Image.fromarray(grey, "LA"), "PNG"))[0].tolist() == [[0, 0, 0], [255, 255, 255]]
    indexed = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    indexed.putpalette([10, 20, 30, 40, 50, 60])
    assert read(encoded(indexed, "PNG"))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert read(encoded(indexed, "PNG", transparency=0))[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_cmyk() -> None:
    """By hand: no ink is white, all black ink is black, cyan ink takes red away."""
    inks = np.zeros((16, 48, 4), dtype=np.uint8)
    inks[:, 16:32, 3] = 255
    inks[:, 32:, 0] = 255
    pixels = read(encoded(Image.fromarray(inks, "CMYK"), "JPEG", quality=100)).astype(int)
    for column, expected in ((8, (255, 255, 255)), (24, (0, 0, 0)), (40, (0, 255, 255))):
        assert np.abs(pixels[8, column] - expected).max() <= 4


def test_it_is_turned_upright() -> None:
    """Independent source: numpy. Orientation 6 says that the file's top row is the picture's right column."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = opened(encoded(photo(2, 64, 48), "PNG", exif=exif))
    assert size_of(image) == (48, 64)
    assert np.array_equal(np.asarray(rgb(image)), np.rot90(np.asarray(photo(2, 64, 48)), -1))


def test_an_animation_gives_its_first_image() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    assert read(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))[0, 0].tolist() == [255, 0, 0]


def test_a_decompression_bomb_is_refused_before_it_unpacks() -> None:
    """A PNG of some dozen bytes that says it has 30,000 × 30,000 pixels, and one that Pillow would only warn of."""
    for side in (30_000, 10_000):
        with pytest.raises(BadImageError, match="unpack to more than"):
            opened(claimed_png(side, side))


def test_what_is_no_image_or_damaged_is_refused() -> None:
    whole = encoded(photo(3))
    with pytest.raises(BadImageError, match="no image that Pillow knows"):
        opened(b"<html>404</html>")
    with pytest.raises(BadImageError, match="cut short"):
        read(whole[: len(whole) // 2])
    png = bytearray(encoded(photo(3), "PNG"))
    png[60:80] = bytes(20)
    with pytest.raises(BadImageError, match="damaged"):
        read(bytes(png))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "AVIF", "BMP"])
def test_any_damage_is_told_as_such(kind: str) -> None:
    """Cut short, or with bytes turned over, every kind of file is an image or a BadImageError, nothing else."""
    rng = np.random.default_rng(0)
    whole = encoded(photo(5), kind)
    crop = Crop(resolution=8, short_side=None, size=None, filter="bilinear", resize="once", draft=None)
    refused = 0
    for trial in range(60):
        data = bytearray(whole[: rng.integers(1, len(whole))] if trial % 2 else whole)
        for place in rng.integers(0, len(data), 8):
            data[place] = rng.integers(256)
        try:
            crop(bytes(data), 0)
        except BadImageError:
            refused += 1
    assert refused > 10


def test_a_drafted_jpeg_keeps_what_was_asked_for() -> None:
    """Invariant: never smaller than asked, and half of it when half is enough."""
    data = encoded(photo(4, 640, 480))
    assert rgb(opened(data), shrink=0.5).size == (320, 240)
    assert rgb(opened(data), shrink=0.51).size == (640, 480)
    assert rgb(opened(data), shrink=0.2).size == (160, 120)
