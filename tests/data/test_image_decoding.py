"""Every kind of image becomes RGB in a stated way, and what is no image is refused by name."""

import io
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from igpt.data import image_decoding
from igpt.data.crop import Crop
from igpt.data.image_decoding import (
    EXTENSIONS,
    FORMATS,
    BadImageError,
    decode_rgb,
    open_image,
    read_image_file,
    upright_size,
)
from tests.data.conftest import claimed_png, encoded, photo, png_chunk


def read(data: bytes) -> np.ndarray:
    return np.asarray(decode_rgb(open_image(data)))


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


def png_of_16_bits(levels: list[int], colour_type: int, clear: bytes = b"") -> bytes:
    """A PNG of 16 bits, one pixel high, written by hand; `clear`: what is transparent (tRNS)."""
    n = {0: 1, 2: 3}[colour_type]
    header = struct.pack(">IIBBBBB", len(levels) // n, 1, 16, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"\0" + struct.pack(f">{len(levels)}H", *levels))
    chunks = [(b"IHDR", header), *([(b"tRNS", clear)] if clear else []), (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, content) for kind, content in chunks)


def test_the_clear_level_of_sixteen_bit_grey_is_white() -> None:
    """By hand: tRNS names 0x1234; its neighbour 0x1235 has the same upper 8 bits, and is 4,661 / 257 = 18."""
    data = png_of_16_bits([0x1234, 0x1235, 0xFFFF], 0, struct.pack(">H", 0x1234))
    assert read(data)[0].tolist() == [[255] * 3, [18] * 3, [255] * 3]


def test_sixteen_bit_colours() -> None:
    """The upper 8 bits, 1 level from n / 257 at most; a clear colour cannot be told from its neighbours there."""
    levels = np.random.default_rng(0).integers(0, 65536, 300)
    assert np.abs(read(png_of_16_bits(levels.tolist(), 2)).reshape(-1) - levels / 257).max() <= 1
    with pytest.raises(BadImageError, match="16-bit colours is transparent"):
        read(png_of_16_bits([1, 2, 3], 2, struct.pack(">HHH", 1, 2, 3)))


def test_a_clear_colour_is_white() -> None:
    """By hand: 8-bit tRNS of one colour, and of one grey level."""
    pixels = Image.fromarray(np.array([[[9, 99, 199], [9, 99, 198]]], dtype=np.uint8))
    assert read(encoded(pixels, "PNG", transparency=(9, 99, 199)))[0].tolist() == [[255] * 3, [9, 99, 198]]
    grey = Image.fromarray(np.array([[77, 78]], dtype=np.uint8))
    assert read(encoded(grey, "PNG", transparency=77))[0].tolist() == [[255] * 3, [78] * 3]


def test_sixteen_bits_of_other_formats() -> None:
    """By hand: a PGM says which level is white; a TIFF may say that 0 is."""
    assert read(b"P5 3 1 1000\n" + struct.pack(">3H", 0, 500, 1000))[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]
    levels = np.array([[0, 257, 65535]], dtype=np.uint16)
    inverted = encoded(Image.fromarray(levels), "TIFF", tiffinfo={262: 0})
    assert read(inverted)[0].tolist() == [[255] * 3, [254] * 3, [0] * 3]
    assert read(encoded(Image.fromarray(levels), "JPEG2000"))[0].tolist() == [[0] * 3, [1] * 3, [255] * 3]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((2, 2), 200, np.int32), "32-bit whole numbers, whose white is not known"),
        (np.full((2, 2), 40000, np.int32), "32-bit whole numbers"),
        (np.ones((2, 2), np.float32), "floating-point numbers, whose white is not known"),
    ],
)
def test_numbers_without_a_known_white_are_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(BadImageError, match=message):
        read(encoded(Image.fromarray(array), "TIFF"))


def test_colour_spaces_without_a_stated_conversion_are_refused() -> None:
    with pytest.raises(BadImageError, match="its pixels are LAB"):
        read(encoded(Image.new("LAB", (4, 4)), "TIFF"))


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


ORIENTED = {  # what an image is to be seen as, by EXIF 2.32: where row 0 and column 0 of the file belong
    1: lambda a: a,  # top, left
    2: lambda a: a[:, ::-1],  # top, right
    3: lambda a: a[::-1, ::-1],  # bottom, right
    4: lambda a: a[::-1],  # bottom, left
    5: lambda a: a.swapaxes(0, 1),  # left, top
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],  # right, top
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda a: a.swapaxes(0, 1)[::-1],  # left, bottom
}
KINDS = {
    "PNG": {},
    "TIFF": {},
    "TIFF, deflated": {"compression": "tiff_adobe_deflate"},
    "TIFF, big": {"big_tiff": True},
    "WEBP": {"lossless": True},
    "JPEG": {"quality": 100, "subsampling": 0},
    "MPO": {"quality": 100, "subsampling": 0, "save_all": True, "append_images": [photo(9)]},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_turned_upright(kind: str) -> None:
    """Independent source: numpy, for every orientation; size, pixels and crop are those of an upright PNG."""
    name, lossy = kind.partition(",")[0], kind in ("JPEG", "MPO", "AVIF")
    crop = Crop(resolution=8, short_side=None, size=None, filter="bilinear", resize="once", draft=None)
    stored = photo(2, 64, 48)
    for orientation, seen in ORIENTED.items():
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        data = encoded(stored, name, exif=exif, **KINDS[kind])
        expected = seen(np.asarray(stored).astype(int))
        upright = encoded(Image.fromarray(expected.astype(np.uint8)), "PNG")
        assert upright_size(open_image(data)) == expected.shape[1::-1]
        assert np.abs(read(data) - expected).max() <= (8 if lossy else 0)
        assert np.abs(crop(data, 0).astype(int) - crop(upright, 0)).max() <= (4 if lossy else 0)


def test_a_drafted_jpeg_is_turned_upright() -> None:
    """Invariant: decoded at a half, it is what it is whole, within what the smaller decoding changes."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = encoded(photo(2, 640, 480), exif=exif, quality=100)
    half = decode_rgb(open_image(data), shrink=0.5)
    assert half.size == (240, 320)
    assert (
        np.abs(np.asarray(half).astype(float) - np.asarray(decode_rgb(open_image(data)).resize((240, 320)))).mean() < 4
    )


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'


def with_metadata(kind: str, exif: bytes | None, xmp: bytes | None) -> bytes:
    """A file of one and the same photograph with these bytes for its EXIF and XMP."""
    options: dict[str, object] = {"exif": b"Exif\0\0" + exif} if exif is not None else {}
    if xmp is not None and kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
        options["pnginfo"] = info
    elif xmp is not None:
        options["xmp"] = xmp
    return encoded(photo(6), kind, **({"lossless": True} if kind == "WEBP" else {}), **options)


def some_exif() -> bytes:
    """EXIF as cameras write it, without a note of the orientation."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.DateTime] = "maker", "2020:01:01 00:00:00"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] = 0.01
    exif.get_ifd(ExifTags.IFD.GPSInfo)[1] = "N"
    return exif.tobytes().removeprefix(b"Exif\0\0")


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut short, or with some bytes turned over (lengths and offsets among them), or noise."""
    how = rng.integers(3)
    if how == 0:
        return data[: rng.integers(len(data))]
    out = np.frombuffer(data if how == 1 else rng.bytes(len(data)), dtype=np.uint8).copy()
    out[rng.integers(0, len(out), 6)] = rng.integers(0, 256, 6)
    return out.tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_metadata_changes_no_pixel(kind: str, recwarn: pytest.WarningsRecorder) -> None:
    """Invariant: whatever stands for EXIF and XMP, the image is that of the file without them."""
    rng = np.random.default_rng(0)
    plain = read(with_metadata(kind, None, None))
    exif, xmp = some_exif(), XMP.format("").encode()
    for _ in range(60):
        data = with_metadata(kind, damaged(exif, rng), damaged(xmp, rng) if rng.random() < 0.5 else None)
        image = open_image(data)
        assert upright_size(image) == plain.shape[1::-1]
        assert np.array_equal(np.asarray(decode_rgb(image)), plain)
    assert not [warning for warning in recwarn if "PIL" in warning.filename]


def test_damaged_metadata_of_an_avif_changes_no_pixel() -> None:
    """Invariant, as above; Pillow writes no damaged EXIF there, so that it is turned over in the file."""
    rng = np.random.default_rng(0)
    exif = some_exif()
    body = with_metadata("AVIF", exif, XMP.format(1).encode())
    place = body.index(exif[:40])
    for how in (exif[:40], rng.bytes(40), bytes(40)):
        data = body[:place] + how + body[place + 40 :]
        assert np.array_equal(read(data), read(with_metadata("AVIF", None, None)))


def test_damaged_metadata_of_a_tiff_changes_no_pixel() -> None:
    """Invariant, as above: every tag that decides no pixel, turned over in its type, count and value."""
    exif = Image.Exif()
    exif.load(b"Exif\0\0" + some_exif())
    exif[ExifTags.Base.ImageDescription], exif[700] = "a description", XMP.format(6).encode()
    body = encoded(photo(6), "TIFF", exif=exif)
    (directory,) = struct.unpack_from("<I", body, 4)
    (n,) = struct.unpack_from("<H", body, directory)
    entries = [directory + 2 + 12 * i for i in range(n)]
    beside = [place for place in entries if struct.unpack_from("<H", body, place)[0] in (270, 271, 700, 34665, 34853)]
    assert len(beside) == 5
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(body)
        for place in beside:
            data[place + 2 : place + 12] = rng.bytes(10)
        data[beside[0] + 2 : beside[0] + 4] = b"\2\0"  # a text of 2³⁰ letters, say
        assert np.array_equal(read(bytes(data)), np.asarray(photo(6)))


def test_which_notes_of_the_orientation_count() -> None:
    """By hand: one whole number of 16 bits in 1 … 8, as EXIF says; XMP's in UTF-8 where EXIF has none."""

    def noted(kind: int, count: int, value: bytes) -> bytes:
        return b"II*\0\x08\0\0\0" + struct.pack("<HHHI", 1, 0x0112, kind, count) + value + bytes(4)

    six = noted(3, 1, b"\6\0\0\0")
    cases = [
        (six, None, True),
        (six, XMP.format(1).encode(), True),
        (noted(3, 1, b"\x09\0\0\0"), None, False),
        (noted(3, 1, bytes(4)), None, False),
        (noted(2, 2, b"6\0\0\0"), None, False),
        (noted(3, 2, b"\6\0\6\0"), None, False),
        (noted(5, 1, b"\x1a\0\0\0") + struct.pack("<II", 6, 1), None, False),
        (None, XMP.format(6).encode(), True),
        (None, XMP.format(6).encode() + b"\xa8\xff", False),
        (noted(3, 0, bytes(4)), XMP.format(8).encode(), True),
    ]
    for kind in ("JPEG", "PNG", "WEBP"):
        for exif, xmp, turned in cases:
            assert upright_size(open_image(with_metadata(kind, exif, xmp))) == ((48, 64) if turned else (64, 48)), (
                kind,
                exif,
            )


def test_chunks_of_a_png_that_are_damaged_or_unpack_to_much() -> None:
    """Invariant: the image is the same; 100 MB of text in 100 kB take no memory. The pixels' own damage is told."""
    body = encoded(photo(6), "PNG")
    place = body.index(b"IDAT") - 4
    for kind, content in (
        (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000), 1)),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(100_000_000), 1)),
        (b"zTXt", b"Comment\0\0notzlib"),
        (b"tEXt", b"Raw profile type exif\0\nexif\n      12\nzzzz"),
        (b"iCCP", b"x\0\0notzlib"),
        (b"eXIf", bytes(range(60))),
    ):
        data = body[:place] + png_chunk(kind, content) + body[place:]
        assert np.array_equal(read(data), np.asarray(photo(6)))
    bad_sum = body[:place] + png_chunk(b"tEXt", b"a\0b")[:-4] + bytes(4) + body[place:]
    assert np.array_equal(read(bad_sum), np.asarray(photo(6)))
    for cut in (place + 20, len(body) // 2, len(body) - 40):
        with pytest.raises(BadImageError, match="damaged or cut short"):
            read(body[:cut])


def test_segments_of_a_jpeg_that_are_damaged() -> None:
    """Invariant: as without them."""
    body = encoded(photo(6))
    for marker, content in (
        (0xED, b"Photoshop 3.0\x008BIM\x04\x04"),
        (0xEE, b"Adobe"),
        (0xE2, b"MPF\0" + bytes(range(60))),
        (0xE2, b"ICC_PROFILE\0\1\2" + bytes(100)),
    ):
        segment = bytes([0xFF, 0xFF, marker]) + struct.pack(">H", len(content) + 2) + content
        assert np.array_equal(read(body[:2] + segment + body[2:]), read(body))


def test_an_animation_gives_its_first_image() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    assert read(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))[0, 0].tolist() == [255, 0, 0]


def test_a_decompression_bomb_is_refused_before_it_unpacks() -> None:
    """A PNG of some dozen bytes that says it has 30,000 × 30,000 pixels, and one that Pillow would only warn of."""
    for side in (30_000, 10_000):
        with pytest.raises(BadImageError, match="unpack to more than"):
            open_image(claimed_png(side, side))


def test_what_is_no_image_or_damaged_is_refused() -> None:
    body = encoded(photo(3))
    with pytest.raises(BadImageError, match="no image in one of the formats"):
        open_image(b"<html>404</html>")
    with pytest.raises(BadImageError, match="cut short"):
        read(body[: len(body) // 2])
    png = bytearray(encoded(photo(3), "PNG"))
    png[60:80] = bytes(20)
    with pytest.raises(BadImageError, match="damaged"):
        read(bytes(png))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "AVIF", "BMP"])
def test_any_damage_is_told_as_such(kind: str) -> None:
    """Cut short, or with bytes turned over, every kind of file is an image or a BadImageError, nothing else."""
    rng = np.random.default_rng(0)
    body = encoded(photo(5), kind)
    crop = Crop(resolution=8, short_side=None, size=None, filter="bilinear", resize="once", draft=None)
    refused = 0
    for trial in range(60):
        data = bytearray(body[: rng.integers(1, len(body))] if trial % 2 else body)
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
    assert decode_rgb(open_image(data), shrink=0.5).size == (320, 240)
    assert decode_rgb(open_image(data), shrink=0.51).size == (640, 480)
    assert decode_rgb(open_image(data), shrink=0.2).size == (160, 120)


def test_content_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EPS is drawn by Ghostscript: a `gs` that leaves a mark is not started, whatever name the content has."""
    gs, mark = tmp_path / "gs", tmp_path / "started"
    gs.write_text(f"#!/bin/sh\ntouch {mark}\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # it is looked for once
    eps = encoded(photo(0), "EPS")
    with pytest.raises(BadImageError, match="no image in one of the formats"):
        Crop(resolution=8, short_side=None, size=None, filter="bilinear", resize="once", draft=None)(eps, 0)
    assert not mark.exists()
    with pytest.raises(OSError, match=r"truncated|cannot|identify|No such"):  # what Pillow itself does of it
        Image.open(io.BytesIO(eps)).load()
    assert mark.exists()  # so that the mark is one


def test_formats_and_endings() -> None:
    """Every format opens in this build of Pillow; the usual endings are known, and none of another kind."""
    Image.init()
    assert set(FORMATS) <= set(Image.OPEN)
    usual = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".avif"}
    assert usual <= EXTENSIONS
    assert not EXTENSIONS & {".eps", ".ps", ".pdf", ".psd", ".wmf", ".emf", ".mpg", ".h5", ".fits", ".grib", ".icns"}
    for ending in sorted(usual - {".apng"}):
        buffer = io.BytesIO()
        photo(0).save(buffer, Image.registered_extensions()[ending])
        assert open_image(buffer.getvalue()).format in FORMATS


def test_a_file_is_read_only_if_it_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe, a socket, a device, a folder, nothing, a link to nothing or to itself: named, and nobody waits."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        for name, reason in {
            "pipe": "no regular file",
            "folder": "directory|no regular file",
            "socket": "No such device",
            "dangling.png": "No such file",
            "loop": "symbolic links",
            "none": "No such file",
        }.items():
            with pytest.raises(BadImageError, match=f"{name}: .*({reason})"):
                read_image_file(tmp_path / name)
    with pytest.raises(BadImageError, match="/dev/zero: it is no regular file"):
        read_image_file(Path("/dev/zero"))
    with pytest.raises(BadImageError, match="null byte"):
        read_image_file(Path("a\0b"))
    (tmp_path / "image").write_bytes(encoded(photo(0)))
    assert read_image_file(tmp_path / "image") == encoded(photo(0))


def test_a_file_of_too_many_bytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 GB that take no room on the disk are refused before any is read; so are bytes that are in memory."""
    with (tmp_path / "sparse.jpg").open("wb") as file:
        file.truncate(20 << 30)
    with pytest.raises(BadImageError, match=r"sparse.jpg: it has 21,474,836,480 bytes, at most 268,435,456"):
        read_image_file(tmp_path / "sparse.jpg")
    monkeypatch.setattr(image_decoding, "MOST_BYTES", 1000)
    with pytest.raises(BadImageError, match="at most 1,000"):
        open_image(encoded(photo(0)))
