"""An encoded image → RGB. What every kind of file becomes is stated here, and nothing is guessed."""

import io
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

WHITE = (255, 255, 255)
_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")


class BadImageError(ValueError):
    """An image that cannot be read; the message names its row or its file."""


def opened(data: bytes) -> Image.Image:
    """The image in `data`, its header read and its pixels not yet.

    Raises:
        BadImageError: no image, or one of more pixels than Pillow holds to be safe (a decompression bomb).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImageError(f"it would unpack to more than {Image.MAX_IMAGE_PIXELS:,} pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise BadImageError(f"its {len(data):,} bytes are no image that Pillow knows") from error
    except Exception as error:  # its readers answer damage with OSError, SyntaxError, RuntimeError, struct.error …
        raise BadImageError(f"it is damaged: {error}") from error


def size_of(image: Image.Image) -> tuple[int, int]:
    """Width and height as the image is to be seen, after the turn that its camera noted. Raises BadImageError."""
    width, height = image.size
    try:  # a PNG is read to its end for this
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except Exception as error:  # as in `opened`
        raise BadImageError(f"it is damaged or cut short: {error}") from error
    return (height, width) if turned else (width, height)


def rgb(image: Image.Image, *, shrink: float = 1.0) -> Image.Image:
    """The whole image in RGB, decoded and turned upright.

    Grey becomes three equal channels; a palette its colours; CMYK and YCbCr are converted by Pillow; what is
    transparent lies on white; 16-bit grey is divided by 257, so that 65,535 is white. Of an animation, the first image.

    A JPEG may be decoded at a half, a quarter or an eighth of its size, as long as `shrink` of it is left along each
    side: this is several times faster, and how its colours differ is measured in docs/data.md.

    Raises:
        BadImageError: damaged or cut short, or of a kind that has no stated meaning in 8 bits.
    """
    try:
        if shrink < 1:
            width, height = image.size
            image.draft(None, (max(1, round(shrink * width)), max(1, round(shrink * height))))  # None: keep the mode
        image.load()
        image = ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except BadImageError:
        raise
    except Exception as error:  # as in `opened`
        raise BadImageError(f"it is damaged or cut short: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in _SIXTEEN_BIT:
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise BadImageError(f"its grey levels reach {levels.min()} to {levels.max()}, outside 16 bits")
        image = Image.fromarray(np.rint(levels / 257).astype(np.uint8))
    if image.mode == "F":
        raise BadImageError("its pixels are floating-point numbers, whose white is not known: convert it to 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (*WHITE, 255))
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")
