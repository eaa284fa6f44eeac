"""Whether the pixels of a split are those that were stored: lossless 8-bit RGB, neither cropped nor resized."""

from collections.abc import Iterable, Iterator

from PIL import Image

from igpt.data.crop import Crop
from igpt.data.image_decoding import open_image, upright_size

LOSSLESS = ("PNG", "BMP", "DIB", "PPM", "QOI", "TGA", "PCX", "ICO")  # Pillow's format names
LOOKED_AT = 256  # images of a split, at most


def describe_changes(images: Iterable[tuple[bytes, Crop]]) -> str:
    """What sets the cropped pixels of encoded images, each with its crop, apart from the stored ones; "": nothing.

    Reads the headers only. JPEG files that were converted to PNG are not recognised.

    Raises:
        BadImageError: no image.
    """
    changes: dict[str, str] = {}  # kind of change → the first of its kind
    for data, crop in images:
        for kind, change in _list_changes(data, open_image(data), crop):
            changes.setdefault(kind, change)
    return "; ".join(changes.values())


def _list_changes(data: bytes, image: Image.Image, crop: Crop) -> Iterator[tuple[str, str]]:
    if not _is_lossless(data, image):
        yield "format", f"{image.format} files"
    if image.mode != "RGB" or "transparency" in image.info:
        yield "mode", f"converted to RGB from {image.mode}"
    (width, height), side = upright_size(image), crop.resolution
    if crop.box(width, height, 0)[0] != (0, 0, width, height):
        yield "size", f"cropped from {width}×{height}"
    elif {width, height, (crop.resize == "twice" and crop.size) or side} != {side}:
        yield "size", f"resized from {width}×{height}"


def _is_lossless(data: bytes, image: Image.Image) -> bool:
    if image.format == "WEBP":
        return _has_lossless_webp(data)
    if image.format == "TIFF":
        return image.info.get("compression") in ("raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate")
    return image.format in LOSSLESS


def _has_lossless_webp(data: bytes) -> bool:
    """Whether a WebP's image is in a chunk VP8L; a lossy one is in a chunk `VP8 `, an animation in `ANMF`."""
    offset = 12
    while offset + 8 <= len(data):
        if data[offset : offset + 4] == b"VP8L":
            return True
        size = int.from_bytes(data[offset + 4 : offset + 8], "little")
        offset += 8 + size + size % 2
    return False
