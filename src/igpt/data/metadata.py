"""Removes the metadata of an image file before decoding and returns the orientation.

Metadata (EXIF, XMP, comments, colour profiles, thumbnails) is damaged more often than pixels and may decompress to
much more than its size in the file. None of it changes a decoded pixel.
"""

import re
import struct
import zlib
from collections.abc import Iterator

UPRIGHT = 1  # the orientation of an image stored upright
ORIENTATION, PHOTOMETRIC, _XMP = 0x0112, 0x0106, 0x02BC  # TIFF and EXIF tags
_SHORT = 3  # TIFF type SHORT: 16 bits
_MOST_TEXT = 1 << 20  # most bytes of XMP or EXIF after decompression
_EXIF, _XMP_APP1, _XMP_TEXT = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"XML:com.adobe.xmp"
_TIFF_PIXELS = {  # TIFF tags that affect pixels, by TIFF 6.0 and its supplements
    *(254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332),
    *(338, 339, 340, 341, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532),
}


def separate(data: bytes) -> tuple[bytes, int]:
    """The image file without its metadata, and its orientation, 1 … 8 (EXIF's; 1: as stored).

    For JPEG, PNG, WebP, TIFF and AVIF; other or malformed files are returned unchanged. An EXIF orientation is valid
    if it is a single 16-bit integer in 1 … 8; XMP's is used if EXIF has none. An AVIF's orientation is a container
    property and not metadata: the result is 1.
    """
    if data[:2] == b"\xff\xd8":
        return _jpeg(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _tiff(data)
    if data[4:12] in (b"ftypavif", b"ftypavis", b"ftypmif1", b"ftypmsf1"):
        return _avif(data), UPRIGHT
    return data, UPRIGHT


def _jpeg(data: bytes) -> tuple[bytes, int]:
    """Drops APPn and comment segments except APP0 (JFIF) and APP14 (Adobe), which define the colour coding."""
    kept, place, exif, xmp = [data[:2]], 2, 0, 0
    while True:
        while data[place : place + 2] == b"\xff\xff":  # fill bytes
            place += 1
        head = data[place : place + 4]
        if len(head) < 4 or head[0] != 0xFF or head[1] < 0xC0:
            break
        marker, end = head[1], place + 2 + int.from_bytes(head[2:4], "big")
        if marker in (0xD8, 0xD9, 0xDA) or end < place + 4 or end > len(data):  # pixel data, or not a segment
            break
        if marker == 0xE1:
            content = data[place + 4 : end]
            exif = exif or (_exif(content) if content.startswith(_EXIF) else 0)
            xmp = xmp or (_xmp(content[len(_XMP_APP1) :]) if content.startswith(_XMP_APP1) else 0)
        short_adobe = marker == 0xEE and end - place < 16  # libjpeg ignores it, too
        if marker in (0xE0, 0xEE) or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept += [] if short_adobe else [data[place:end]]
        place = end
    kept.append(data[place:])
    return b"".join(kept), exif or xmp or UPRIGHT


def _png(data: bytes) -> tuple[bytes, int]:
    """Keeps the critical chunks and tRNS (transparency)."""
    kept, place, exif, text, xmp = [data[:8]], 8, 0, 0, 0
    while place + 12 <= len(data):
        kind, end = data[place + 4 : place + 8], place + 12 + int.from_bytes(data[place : place + 4], "big")
        if end > len(data) or not kind.isalpha():  # truncated or damaged: the decoder reports it
            kept.append(data[place:])
            break
        if kind == b"tRNS" or not kind[0] & 0x20:
            kept.append(data[place:end])
        else:
            content = data[place + 8 : end - 4]
            exif = exif or (_exif(content) if kind == b"eXIf" else 0)
            if kind in (b"tEXt", b"zTXt") and content.startswith(b"Raw profile type exif\0"):  # written by ImageMagick
                text = text or _raw_profile(content, packed=kind == b"zTXt")
            if kind == b"iTXt" and content.startswith(_XMP_TEXT + b"\0"):
                xmp = xmp or _xmp_chunk(content)
        place = end
        if kind == b"IEND":
            break
    else:
        kept.append(data[place:])
    return b"".join(kept), exif or text or xmp or UPRIGHT


def _raw_profile(content: bytes, *, packed: bool) -> int:
    """The orientation in EXIF as ImageMagick writes it: a line with its kind, its length, then hexadecimal digits."""
    _, _, text = content.partition(b"\0")
    digits = b"".join((_unpacked(text[1:]) if packed else text).split()[2:])
    try:
        return _exif(bytes.fromhex(digits.decode("ascii")))
    except ValueError:
        return 0


def _xmp_chunk(content: bytes) -> int:
    """The orientation in a PNG's iTXt chunk: keyword, compression flag, method, language, translated keyword, text."""
    fields = content[len(_XMP_TEXT) + 1 :]
    packed, rest = fields[:1] == b"\1", fields[2:].split(b"\0", 2)
    return 0 if len(rest) < 3 else _xmp(_unpacked(rest[2]) if packed else rest[2])


def _unpacked(text: bytes) -> bytes:
    """The first _MOST_TEXT bytes of a deflated text; empty if it is damaged."""
    try:
        return zlib.decompressobj().decompress(text, _MOST_TEXT)
    except zlib.error:
        return b""


def _webp(data: bytes) -> tuple[bytes, int]:
    kept, place, exif, xmp = [], 12, 0, 0
    data = data[: 8 + int.from_bytes(data[4:8], "little")]  # decoders ignore trailing bytes
    while place + 8 <= len(data):
        kind, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        end = place + 8 + size + size % 2
        content = data[place + 8 : place + 8 + size]
        if kind == b"EXIF":
            exif = exif or _exif(content)
        elif kind == b"XMP ":
            xmp = xmp or _xmp(content)
        elif kind == b"VP8X" and content:  # clear the flags of the ICCP, EXIF and XMP chunks
            kept.append(data[place : place + 8] + bytes([content[0] & ~0x2C]) + data[place + 9 : end])
        elif kind != b"ICCP":
            kept.append(data[place:end])
        place = end
    whole = b"WEBP" + b"".join(kept)
    return b"RIFF" + len(whole).to_bytes(4, "little") + whole, exif or xmp or UPRIGHT


def _tiff(data: bytes) -> tuple[bytes, int]:
    """Keeps the first page and its pixel tags only."""
    form = _Form.of(data)
    if form is None:
        return data, UPRIGHT
    exif, xmp, kept = 0, 0, []
    for tag, kind, count, value in form.entries(data):
        if tag == ORIENTATION:
            exif = exif or form.orientation(kind, count, value)
        elif tag == _XMP:
            place = int.from_bytes(value, "little" if form.order == "<" else "big")
            xmp = xmp or _xmp(data[place : place + min(count, _MOST_TEXT)])
        elif tag in _TIFF_PIXELS:
            kept.append(struct.pack(form.entry_format, tag, kind, count) + value)
    if not kept:
        return data, UPRIGHT
    directory = struct.pack(form.count_format, len(kept)) + b"".join(kept) + bytes(form.pointer)  # no next page
    out = bytearray(data)
    out[form.place : form.place + len(directory)] = directory
    return bytes(out), exif or xmp or UPRIGHT


def _avif(data: bytes) -> bytes:
    """The file with its EXIF and XMP items renamed to type `free`, in the `meta` box."""
    place = int.from_bytes(data[:4], "big")
    while place + 8 <= len(data):
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        if kind == b"meta":
            box = re.sub(rb"(?s)(infe(?:\x02.{7}|\x03.{9}))(?:Exif|mime)", rb"\1free", data[place : place + size])
            return data[:place] + box + data[place + size :]
        if size < 8:
            break
        place += size
    return data


def _exif(exif: bytes) -> int:
    """The orientation in EXIF data (TIFF layout); 0 if there is none."""
    exif = exif.removeprefix(_EXIF)
    form = _Form.of(exif)
    if form is None:
        return 0
    found = (form.orientation(kind, count, value) for tag, kind, count, value in form.entries(exif)
             if tag == ORIENTATION)  # fmt: skip
    return next(found, 0)


def _xmp(xmp: bytes) -> int:
    """The orientation in XMP; 0 if there is none or the text is not UTF-8."""
    try:
        text = xmp.decode()
    except UnicodeDecodeError:
        return 0
    found = re.search(r"""tiff:Orientation(?:\s*=\s*["']|>)\s*([1-8])\s*["'<]""", text)
    return int(found[1]) if found else 0


class _Form:
    """Byte order and integer widths of a TIFF, and the offset of its first directory."""

    def __init__(self, order: str, big: bool, place: int) -> None:
        self.order, self.place = order, place
        self.pointer = 8 if big else 4  # bytes of an offset, and of an inline value
        self.count_format, self.entry_format = (order + "Q", order + "HHQ") if big else (order + "H", order + "HHL")

    @staticmethod
    def of(data: bytes) -> "_Form | None":
        """From the header; None if it is damaged."""
        order = {b"II": "<", b"MM": ">"}.get(data[:2])
        if order is None or len(data) < 8:
            return None
        (magic,) = struct.unpack_from(order + "H", data, 2)
        if magic == 42:
            return _Form(order, False, struct.unpack_from(order + "L", data, 4)[0])
        if magic == 43 and len(data) >= 16:
            return _Form(order, True, struct.unpack_from(order + "Q", data, 8)[0])
        return None

    def entries(self, data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
        """Yields (tag, type, count, value or its offset) of the complete entries in the first directory."""
        head = struct.calcsize(self.count_format)
        if self.place < 8 or self.place + head > len(data):
            return
        (n,) = struct.unpack_from(self.count_format, data, self.place)
        size = struct.calcsize(self.entry_format)
        place = self.place + head
        for _ in range(n):
            if place + size + self.pointer > len(data):
                return
            tag, kind, count = struct.unpack_from(self.entry_format, data, place)
            yield tag, kind, count, data[place + size : place + size + self.pointer]
            place += size + self.pointer

    def orientation(self, kind: int, count: int, value: bytes) -> int:
        """The orientation in an entry; 0 if invalid."""
        (found,) = struct.unpack(self.order + "H", value[:2])
        return found if kind == _SHORT and count == 1 and 1 <= found <= 8 else 0
