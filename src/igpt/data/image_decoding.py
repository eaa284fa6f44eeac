"""An encoded image → RGB. What every kind of file becomes is stated here, and nothing is guessed.

Files may come from anywhere: which formats are decoded, and how much one image may take, is stated here, too, for
training data and for what is uploaded to the demo.
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

# By Pillow's names, the likeliest first. All are decoded in this process, of bytes alone: EPS and WMF start other
# programs, PDF and MPEG are no images, FITS, HDF5 and GRIB hold measurements without a white. MPO is read as the JPEG
# it begins with.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI", "ICO", "PCX", "TGA")
MOST_BYTES = 256 << 20  # of one encoded image: the most pixels that are decoded (below) take 256 MiB as raw RGB


def _endings() -> frozenset[str]:
    registered = Image.registered_extensions()
    return frozenset(ending.lower() for ending, of in registered.items() if of in (*FORMATS, "MPO"))


ENDINGS = _endings()  # of the names of files in these formats, in lower case, each with its dot

WHITE = (255, 255, 255)
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")
_EIGHT_BIT = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr")
_ORIENTATION = "orientation of the file"  # where an image that was opened carries it, in its `info`
_WHITE_IS_ZERO = 0  # a TIFF's photometric interpretation
_COLOURS_OF_16_BITS = b"\x10\x02"  # bit depth and colour type in the header of a PNG

_UPRIGHT = {  # what turns an image of each orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImageError(DataError):
    """An image that cannot be read; the message names its row or its file."""


def read_image_file(path: Path) -> bytes:
    """The content of an image file; of one that is no regular file, nothing is read.

    Raises:
        BadImageError: there is none, it cannot be read, is a folder, pipe, socket or device, or has too many bytes.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadImageError(f"{path}: it is no regular file")
            _check_size(f"{path}: it has", status.st_size)
            data = file.read(MOST_BYTES + 1)  # it may have grown
    except BadImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that holds a zero byte
        raise BadImageError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    _check_size(f"{path}: it has", len(data))
    return data


def _check_size(what: str, size: int) -> None:
    if size > MOST_BYTES:
        raise BadImageError(f"{what} {size:,} bytes, at most {MOST_BYTES:,} are read of one image")


def opened(data: bytes) -> Image.Image:
    """The image in `data`, its header read and its pixels not yet.

    Raises:
        BadImageError: no image in one of `FORMATS`, or one of more bytes or pixels than are safe to decode (a
            decompression bomb).
    """
    _check_size("it has", len(data))
    pixels, orientation = metadata.separate(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(pixels), formats=FORMATS)
        if image.format == "AVIF":  # which is laid out so: Pillow knows it from the box that says it
            orientation = image.getexif().get(metadata.ORIENTATION, metadata.UPRIGHT)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImageError(f"it would unpack to more than {Image.MAX_IMAGE_PIXELS:,} pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise BadImageError(
            f"its {len(data):,} bytes are no image in one of the formats {', '.join(FORMATS)}"
        ) from error
    except Exception as error:  # its readers answer damage with OSError, SyntaxError, RuntimeError, struct.error …
        raise BadImageError(f"it is damaged: {error}") from error
    if image.format == "PNG" and pixels[24:26] == _COLOURS_OF_16_BITS and "transparency" in image.info:
        raise BadImageError("one of its 16-bit colours is transparent, which 8 bits cannot tell from its neighbours")
    image.info[_ORIENTATION] = orientation
    return image


def size_of(image: Image.Image) -> tuple[int, int]:
    """Width and height of what `opened` gave, as it is to be seen, after the turn that its camera noted."""
    width, height = image.size
    return (height, width) if image.info[_ORIENTATION] >= 5 else (width, height)


def rgb(image: Image.Image, *, shrink: float = 1.0) -> Image.Image:
    """What `opened` gave, whole, in RGB, decoded and turned upright.

    Grey becomes three equal channels; a palette its colours; CMYK and YCbCr are converted by Pillow; what is
    transparent lies on white; 16-bit grey is divided by 257, so that 65,535 is white; of 16-bit colours Pillow takes
    the upper 8 bits. Of an animation, the first image.

    A JPEG may be decoded at a half, a quarter or an eighth of its size, as long as `shrink` of it is left along each
    side: this is several times faster, and how its colours differ is measured in docs/data.md.

    Raises:
        BadImageError: damaged or cut short, or of a kind that has no stated meaning in 8 bits.
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
    except Exception as error:  # as in `opened`
        raise BadImageError(f"it is damaged or cut short: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _SIXTEEN_BIT or (image.mode == "I" and image.format == "PPM"):  # whose largest number is white
        return _of_sixteen_bits(image)
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


def _of_sixteen_bits(image: Image.Image) -> Image.Image:
    levels = np.asarray(image).astype(np.int64)
    pixels = np.rint(levels / 257).astype(np.uint8)
    if getattr(image, "tag_v2", {}).get(metadata.PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts 8 bits alone
        pixels = 255 - pixels
    clear = image.info.get("transparency")  # of a PNG: the level that is
    if clear is not None:
        pixels[levels == clear] = WHITE[0]
    return Image.fromarray(pixels).convert("RGB")
