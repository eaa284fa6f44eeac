"""Hostile datasets: each function writes one into a folder and returns what `data.path` is."""

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.conftest import claimed_png, encoded, photo, png_chunk
from tests.hostile.weights import Make

GOOD = encoded(photo(0), "PNG")


def image(content: bytes | Callable[[Path], object], name: str = "a.png") -> Make:
    """A good image and a hostile one; a function gets the path of the second."""

    def make(folder: Path) -> Path:
        (folder / "good.png").write_bytes(GOOD)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            content(folder / name)
        return folder

    return make


def png_with(*chunks: bytes) -> bytes:
    """A good PNG with these chunks before its pixels."""
    at = GOOD.index(b"IDAT") - 4
    return GOOD[:at] + b"".join(chunks) + GOOD[at:]


def deflated(size: int) -> bytes:
    """So many zeros, deflated."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()


def tiff(width: int, height: int, n_byte: int) -> bytes:
    """An uncompressed TIFF whose strip has so many bytes, of which none follow."""
    entries = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1),
               (278, 4, height), (279, 4, n_byte)]  # fmt: skip
    fields = b"".join(struct.pack("<HHLL", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<L", 8) + struct.pack("<H", len(entries)) + fields + bytes(4)


def metadata(name: str, text: str) -> Make:
    return image(lambda path: path.write_text(text), name)


def parquet(cells: list[bytes], *, dictionary: bool = False) -> Make:
    def make(folder: Path) -> Path:
        table = pa.table({"image": pa.array(cells, pa.binary()), "label": list(range(len(cells)))})
        pq.write_table(table, folder / "train.parquet", compression="zstd", use_dictionary=dictionary)
        return folder

    return make


def many_of_one(folder: Path) -> Path:
    """500 cells that are one value of 48 MB in the dictionary of the column: 24 GB of a file of some kilobytes."""
    values = pa.array([bytes(48 << 20)], pa.binary())
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 500, pa.int32()), values)
    pq.write_table(pa.table({"image": column, "label": [0] * 500}), folder / "train.parquet", compression="zstd")
    return folder


def shared_beginnings(folder: Path) -> Path:
    """Cells of which each repeats the one before: an encoding in which a page of some bytes may unpack to any size."""
    table = pa.table({"image": [GOOD] * 3})
    how = {"image": "DELTA_BYTE_ARRAY"}
    pq.write_table(table, folder / "train.parquet", use_dictionary=False, column_encoding=how)
    return folder


def empty_rows(folder: Path) -> Path:
    """30 million rows without an image, in some kilobytes."""
    n = 10_000_000
    with pq.ParquetWriter(folder / "train.parquet", pa.schema({"image": pa.binary()})) as writer:
        for _ in range(3):
            writer.write_table(pa.table({"image": pa.nulls(n, pa.binary())}))
    return folder


def parquet_path(cell: str) -> Make:
    """A cell that names a file."""

    def make(folder: Path) -> Path:
        cells = [{"bytes": None, "path": cell.format(folder.parents[1])}]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        pq.write_table(pa.table({"image": pa.array(cells, kind)}), folder / "train.parquet")
        return folder

    return make


def tar(*members: tarfile.TarInfo, good: bool = True) -> Make:
    """A tar file with these headers and nothing behind them, after a good image."""

    def make(folder: Path) -> Path:
        with (folder / "train.tar").open("wb") as file:
            if good:
                first = tarfile.TarInfo("0.png")
                first.size = len(GOOD)
                file.write(first.tobuf() + GOOD + bytes(-len(GOOD) % tarfile.BLOCKSIZE))
            for member in members:
                file.write(member.tobuf(tarfile.PAX_FORMAT))
            file.write(bytes(2 * tarfile.BLOCKSIZE))
        return folder

    return make


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "", **pax: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname, info.pax_headers = kind, size, link, pax
    return info


def long_name(folder: Path) -> Path:
    """A header that says that the name of the next member has 8 GB."""
    header = member("././@LongLink", tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.GNU_FORMAT)
    size = b"\x80" + (8 << 30).to_bytes(11, "big")
    changed = bytearray(header)
    changed[124:136] = size
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    (folder / "train.tar").write_bytes(bytes(changed) + bytes(1024))
    return folder


def saved_elsewhere(folder: Path) -> Path:
    """A dataset of `save_to_disk` whose state.json names a file of another folder."""
    row = {"image": {"bytes": GOOD, "path": None}, "label": 0}
    datasets.Dataset.from_list([row]).cast_column("image", datasets.Image()).save_to_disk(folder)
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] = [{"filename": "../../outside/private.arrow"}]
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def pipe(path: Path) -> None:
    os.mkfifo(path)


def zeros(path: Path) -> None:
    """A link to a device without end."""
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    """An image of 8 GB, a hole in the file."""
    with path.open("wb") as file:
        file.write(GOOD)
        file.truncate(8 << 30)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touched) (w) file closefile\n"
PDF = b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF"
WMF = b"\xd7\xcd\xc6\x9a" + bytes(40)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/hostname"/></svg>'
BOMB = claimed_png(50_000, 50_000)


def unpacking(width: int = 6_000, height: int = 6_000) -> bytes:
    """A PNG of 108 MB of pixels in 100 kB."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(3 * width + 1)) for _ in range(height)) + rows.flush()
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def gif_frames() -> bytes:
    """50,000 frames, of which the first is read."""
    buffer = io.BytesIO()
    photo(0).convert("P").save(buffer, "GIF")
    content = buffer.getvalue()
    at = content.index(b"\x2c")
    return content[:at] + content[at:-1] * 50_000 + b"\x3b"
