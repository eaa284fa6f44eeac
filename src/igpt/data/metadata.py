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


def strip_metadata(data: bytes) -> tuple[bytes, int]:
    """The image file without its metadata, and its orientation, 1 … 8 (EXIF's; 1: as stored).

    For JPEG, PNG, WebP, TIFF and AVIF; other or malformed files are returned unchanged. An EXIF orientation is valid
    if it is a single 16-bit integer in 1 … 8; XMP's is used if EXIF has none. An AVIF's orientation is a container
    property and not metadata: the result is 1.
    """
    if data[:2] == b"\xff\xd8":
        return _strip_jpeg(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _strip_png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _strip_webp(data)
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _strip_tiff(data)
    if data[4:12] in (b"ftypavif", b"ftypavis", b"ftypmif1", b"ftypmsf1"):
        return _strip_avif(data), UPRIGHT
    return data, UPRIGHT


def _strip_jpeg(data: bytes) -> tuple[bytes, int]:
    """Drops APPn and comment segments except APP0 (JFIF) and APP14 (Adobe), which define the colour coding."""
    parts, offset, exif, xmp = [data[:2]], 2, 0, 0
    while True:
        while data[offset : offset + 2] == b"\xff\xff":  # fill bytes
            offset += 1
        head = data[offset : offset + 4]
        if len(head) < 4 or head[0] != 0xFF or head[1] < 0xC0:
            break
        marker, end = head[1], offset + 2 + int.from_bytes(head[2:4], "big")
        if marker in (0xD8, 0xD9, 0xDA) or end < offset + 4 or end > len(data):  # pixel data, or not a segment
            break
        if marker == 0xE1:
            content = data[offset + 4 : end]
            exif = exif or (_read_exif(content) if content.startswith(_EXIF) else 0)
            xmp = xmp or (_read_xmp(content[len(_XMP_APP1) :]) if content.startswith(_XMP_APP1) else 0)
        short_adobe = marker == 0xEE and end - offset < 16  # libjpeg ignores it, too
        if marker in (0xE0, 0xEE) or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            parts += [] if short_adobe else [data[offset:end]]
        offset = end
    parts.append(data[offset:])
    return b"".join(parts), exif or xmp or UPRIGHT


def _strip_png(data: bytes) -> tuple[bytes, int]:
    """Keeps the critical chunks and tRNS (transparency)."""
    parts, offset, exif, text, xmp = [data[:8]], 8, 0, 0, 0
    while offset + 12 <= len(data):
        kind, end = data[offset + 4 : offset + 8], offset + 12 + int.from_bytes(data[offset : offset + 4], "big")
        if end > len(data) or not kind.isalpha():  # truncated or damaged: the decoder reports it
            parts.append(data[offset:])
            break
        if kind == b"tRNS" or not kind[0] & 0x20:
            parts.append(data[offset:end])
        else:
            content = data[offset + 8 : end - 4]
            exif = exif or (_read_exif(content) if kind == b"eXIf" else 0)
            if kind in (b"tEXt", b"zTXt") and content.startswith(b"Raw profile type exif\0"):  # written by ImageMagick
                text = text or _read_raw_profile(content, packed=kind == b"zTXt")
            if kind == b"iTXt" and content.startswith(_XMP_TEXT + b"\0"):
                xmp = xmp or _read_xmp_chunk(content)
        offset = end
        if kind == b"IEND":
            break
    else:
        parts.append(data[offset:])
    return b"".join(parts), exif or text or xmp or UPRIGHT


def _read_raw_profile(content: bytes, *, packed: bool) -> int:
    """The orientation in EXIF as ImageMagick writes it: a line with its kind, its length, then hexadecimal digits."""
    _, _, text = content.partition(b"\0")
    digits = b"".join((_inflate(text[1:]) if packed else text).split()[2:])
    try:
        return _read_exif(bytes.fromhex(digits.decode("ascii")))
    except ValueError:
        return 0


def _read_xmp_chunk(content: bytes) -> int:
    """The orientation in a PNG's iTXt chunk: keyword, compression flag, method, language, translated keyword, text."""
    fields = content[len(_XMP_TEXT) + 1 :]
    packed, rest = fields[:1] == b"\1", fields[2:].split(b"\0", 2)
    return 0 if len(rest) < 3 else _read_xmp(_inflate(rest[2]) if packed else rest[2])


def _inflate(text: bytes) -> bytes:
    """The first _MOST_TEXT bytes of a deflated text; empty if it is damaged."""
    try:
        return zlib.decompressobj().decompress(text, _MOST_TEXT)
    except zlib.error:
        return b""


def _strip_webp(data: bytes) -> tuple[bytes, int]:
    parts, offset, exif, xmp = [], 12, 0, 0
    data = data[: 8 + int.from_bytes(data[4:8], "little")]  # decoders ignore trailing bytes
    while offset + 8 <= len(data):
        kind, size = data[offset : offset + 4], int.from_bytes(data[offset + 4 : offset + 8], "little")
        end = offset + 8 + size + size % 2
        content = data[offset + 8 : offset + 8 + size]
        if kind == b"EXIF":
            exif = exif or _read_exif(content)
        elif kind == b"XMP ":
            xmp = xmp or _read_xmp(content)
        elif kind == b"VP8X" and content:  # clear the flags of the ICCP, EXIF and XMP chunks
            parts.append(data[offset : offset + 8] + bytes([content[0] & ~0x2C]) + data[offset + 9 : end])
        elif kind != b"ICCP":
            parts.append(data[offset:end])
        offset = end
    chunks_bytes = b"WEBP" + b"".join(parts)
    return b"RIFF" + len(chunks_bytes).to_bytes(4, "little") + chunks_bytes, exif or xmp or UPRIGHT


def _strip_tiff(data: bytes) -> tuple[bytes, int]:
    """Keeps the first page and its pixel tags only."""
    form = _TIFFHeader.parse(data)
    if form is None:
        return data, UPRIGHT
    exif, xmp, parts = 0, 0, []
    for tag, kind, count, value in form.read_entries(data):
        if tag == ORIENTATION:
            exif = exif or form.read_orientation(kind, count, value)
        elif tag == _XMP:
            offset = int.from_bytes(value, "little" if form.order == "<" else "big")
            xmp = xmp or _read_xmp(data[offset : offset + min(count, _MOST_TEXT)])
        elif tag in _TIFF_PIXELS:
            parts.append(struct.pack(form.entry_format, tag, kind, count) + value)
    if not parts:
        return data, UPRIGHT
    directory = struct.pack(form.count_format, len(parts)) + b"".join(parts) + bytes(form.pointer)  # no next page
    out = bytearray(data)
    out[form.place : form.place + len(directory)] = directory
    return bytes(out), exif or xmp or UPRIGHT


def _strip_avif(data: bytes) -> bytes:
    """The file with its EXIF and XMP items renamed to type `free`, in the `meta` box."""
    offset = int.from_bytes(data[:4], "big")
    while offset + 8 <= len(data):
        size, kind = int.from_bytes(data[offset : offset + 4], "big"), data[offset + 4 : offset + 8]
        if kind == b"meta":
            box = re.sub(rb"(?s)(infe(?:\x02.{7}|\x03.{9}))(?:Exif|mime)", rb"\1free", data[offset : offset + size])
            return data[:offset] + box + data[offset + size :]
        if size < 8:
            break
        offset += size
    return data


def _read_exif(exif: bytes) -> int:
    """The orientation in EXIF data (TIFF layout); 0 if there is none."""
    exif = exif.removeprefix(_EXIF)
    form = _TIFFHeader.parse(exif)
    if form is None:
        return 0
    orientations = (form.read_orientation(kind, count, value) for tag, kind, count, value in form.read_entries(exif)
             if tag == ORIENTATION)  # fmt: skip
    return next(orientations, 0)


def _read_xmp(xmp: bytes) -> int:
    """The orientation in XMP; 0 if there is none or the text is not UTF-8."""
    try:
        text = xmp.decode()
    except UnicodeDecodeError:
        return 0
    match = re.search(r"""tiff:Orientation(?:\s*=\s*["']|>)\s*([1-8])\s*["'<]""", text)
    return int(match[1]) if match else 0


class _TIFFHeader:
    """Byte order and integer widths of a TIFF, and the offset of its first directory."""

    def __init__(self, order: str, big: bool, start: int) -> None:
        self.order, self.place = order, start
        self.pointer = 8 if big else 4  # bytes of an offset, and of an inline value
        self.count_format, self.entry_format = (order + "Q", order + "HHQ") if big else (order + "H", order + "HHL")

    @staticmethod
    def parse(data: bytes) -> "_TIFFHeader | None":
        """From the header; None if it is damaged."""
        order = {b"II": "<", b"MM": ">"}.get(data[:2])
        if order is None or len(data) < 8:
            return None
        (magic,) = struct.unpack_from(order + "H", data, 2)
        if magic == 42:
            return _TIFFHeader(order, False, struct.unpack_from(order + "L", data, 4)[0])
        if magic == 43 and len(data) >= 16:
            return _TIFFHeader(order, True, struct.unpack_from(order + "Q", data, 8)[0])
        return None

    def read_entries(self, data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
        """Yields (tag, type, count, value or its offset) of the complete entries in the first directory."""
        head = struct.calcsize(self.count_format)
        if self.place < 8 or self.place + head > len(data):
            return
        (n,) = struct.unpack_from(self.count_format, data, self.place)
        size = struct.calcsize(self.entry_format)
        offset = self.place + head
        for _ in range(n):
            if offset + size + self.pointer > len(data):
                return
            tag, kind, count = struct.unpack_from(self.entry_format, data, offset)
            yield tag, kind, count, data[offset + size : offset + size + self.pointer]
            offset += size + self.pointer

    def read_orientation(self, kind: int, count: int, value: bytes) -> int:
        """The orientation in an entry; 0 if invalid."""
        (orientation,) = struct.unpack(self.order + "H", value[:2])
        return orientation if kind == _SHORT and count == 1 and 1 <= orientation <= 8 else 0
