"""Decodes image files to RGB: the accepted formats, the size limits and the conversion of every pixel mode.

Files are untrusted. The same limits apply to training data and to uploads in the demo.
"""

import io
import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from igpt.data import metadata
from igpt.data.errors import DataError

# Pillow's format names, the most frequent first. All decode in this process and from bytes alone. Left out: EPS and
# WMF (start other programs), PDF and MPEG (no images), FITS, HDF5 and GRIB (no defined white). MPO is read as its
# first JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI", "ICO", "PCX", "TGA")
MOST_BYTES = 256 << 20  # of one encoded image: Pillow's limit of pixels takes 256 MiB as raw RGB


# file extensions of these formats: lower case, with the dot
EXTENSIONS = frozenset(end.lower() for end, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO"))

WHITE = (255, 255, 255)
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")
_EIGHT_BIT = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr")
_ORIENTATION = "orientation of the file"  # key in `Image.info`, set by `open_image`
_WHITE_IS_ZERO = 0  # value of a TIFF's PhotometricInterpretation
_COLOURS_OF_16_BITS = b"\x10\x02"  # bit depth and colour type in the header of a PNG

_UPRIGHT = {  # EXIF orientation → the transpose that turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImageError(DataError):
    """An image that cannot be read; the message names its row or file."""


def read_image_file(path: Path) -> bytes:
    """The bytes of an image file. Reads regular files only.

    Raises:
        BadImageError: a missing or unreadable file, a folder, pipe, socket or device, or too many bytes.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadImageError(f"{path}: it is no regular file")
            _check_size(f"{path}: it has", status.st_size)
            data = file.read(MOST_BYTES + 1)  # the file may have grown since fstat
    except BadImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise BadImageError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    _check_size(f"{path}: it has", len(data))
    return data


def _check_size(what: str, size: int) -> None:
    if size > MOST_BYTES:
        raise BadImageError(f"{what} {size:,} bytes, at most {MOST_BYTES:,} are read of one image")


def open_image(data: bytes) -> Image.Image:
    """Opens the image in `data`: reads the header, not yet the pixels.

    Raises:
        BadImageError: not an image in one of `FORMATS`, or too many bytes or pixels (a decompression bomb).
    """
    _check_size("it has", len(data))
    pixels, orientation = metadata.strip_metadata(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(pixels), formats=FORMATS)
        if image.format == "AVIF":  # its orientation is a container property, which Pillow reports as EXIF
            orientation = image.getexif().get(metadata.ORIENTATION, metadata.UPRIGHT)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImageError(f"it would unpack to more than {Image.MAX_IMAGE_PIXELS:,} pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise BadImageError(
            f"its {len(data):,} bytes are no image in one of the formats {', '.join(FORMATS)}"
        ) from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, RuntimeError, struct.error … on damage
        raise BadImageError(f"it is damaged: {error}") from error
    if image.format == "PNG" and pixels[24:26] == _COLOURS_OF_16_BITS and "transparency" in image.info:
        raise BadImageError("one of its 16-bit colours is transparent, which 8 bits cannot tell from its neighbours")
    image.info[_ORIENTATION] = orientation
    return image


def prepare_image(image: Image.Image) -> Image.Image:
    """An image of Pillow as `open_image` returns it: a copy; of a file that is not decoded yet, the file opened again.

    Raises:
        BadImageError: as `open_image`.
    """
    file = None if getattr(image, "is_animated", False) else getattr(image, "fp", None)  # None once it is decoded
    if file is not None:  # so that its pixels are those of the data, which may be decoded at a reduced size
        place = file.tell()
        file.seek(0)
        data = file.read(MOST_BYTES + 1)
        file.seek(place)
        return open_image(data)
    try:
        copy, orientation = image.copy(), image.getexif().get(metadata.ORIENTATION)
    except Exception as error:  # as in `open_image`
        raise BadImageError(f"it is damaged: {error}") from error
    copy.info[_ORIENTATION] = orientation if orientation in _UPRIGHT else metadata.UPRIGHT
    return copy


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an image from `open_image`, after applying its EXIF orientation."""
    width, height = image.size
    return (height, width) if image.info[_ORIENTATION] >= 5 else (width, height)


def decode_rgb(image: Image.Image, *, shrink: float = 1.0) -> Image.Image:
    """Decodes an image from `open_image` to upright RGB.

    Grey becomes three equal channels; palette indices become their colours; Pillow converts CMYK and YCbCr;
    transparent pixels are composited on white; 16-bit grey is divided by 257, so that 65,535 is white; Pillow keeps
    the upper 8 bits of 16-bit colours. An animation gives its first frame.

    With `shrink` below 1, a JPEG is decoded at 1/2, 1/4 or 1/8 size if at least `shrink` of each side remains. This
    is several times faster; docs/data.md measures the difference in colour.

    Raises:
        BadImageError: a damaged or truncated file, or a pixel mode without a defined conversion to 8 bits.
    """
    turn = _UPRIGHT.get(image.info[_ORIENTATION])
    try:
        if shrink < 1:
            width, height = image.size
            image.draft(None, (max(1, round(shrink * width)), max(1, round(shrink * height))))  # None: keep the mode
        image.load()
        image = _to_rgb(image)
        return image if turn is None else image.transpose(turn)
    except BadImageError:
        raise
    except Exception as error:  # as in `open_image`
        raise BadImageError(f"it is damaged or cut short: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _SIXTEEN_BIT or (image.mode == "I" and image.format == "PPM"):  # Pillow scales it to 16 bits
        return _convert_16_bit(image)
    if image.mode in ("F", "I"):
        kind = "floating-point" if image.mode == "F" else "32-bit whole"
        raise BadImageError(f"its pixels are {kind} numbers, whose white is not known: convert it to 8 or 16 bits")
    if image.mode not in _EIGHT_BIT:
        raise BadImageError(f"its pixels are {image.mode}, of which no conversion is stated: convert it to RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (*WHITE, 255))
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")


def _convert_16_bit(image: Image.Image) -> Image.Image:
    levels = np.asarray(image).astype(np.int64)
    pixels = np.rint(levels / 257).astype(np.uint8)
    if getattr(image, "tag_v2", {}).get(metadata.PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts 8-bit images only
        pixels = 255 - pixels
    clear = image.info.get("transparency")  # the transparent grey level of a PNG
    if clear is not None:
        pixels[levels == clear] = WHITE[0]
    return Image.fromarray(pixels).convert("RGB")
