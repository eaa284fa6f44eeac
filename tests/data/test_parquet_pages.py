"""Pages of parquet files, against Arrow's own account of them."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from igpt.data.parquet_pages import read_pages

PLAIN, RLE_DICTIONARY, DELTA_BYTE_ARRAY = 0, 8, 7  # parquet.thrift


def pages(path: Path) -> tuple[list[Any], Any]:
    """The pages of the first column, and Arrow's metadata of it."""
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
    start = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
    with path.open("rb") as file:
        return list(read_pages(file, start, chunk.total_compressed_size, chunk.num_values)), chunk


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_sizes_add_up(tmp_path: Path, version: str, compression: str) -> None:
    """Independent source: Arrow's sum for the column, which counts each page's header, too: some 20 to 80 bytes."""
    table = pa.table({"image": [bytes([i % 7]) * 1000 for i in range(3000)]})
    for use_dictionary in (False, True):
        pq.write_table(
            table, tmp_path / "a.parquet", compression=compression, data_page_version=version, data_page_size=10_000,
            use_dictionary=use_dictionary, write_batch_size=100, write_statistics=False,
        )  # fmt: skip
        found, chunk = pages(tmp_path / "a.parquet")
        headers = chunk.total_uncompressed_size - sum(page.unpacked for page in found)
        assert len(found) >= 2
        assert 10 * len(found) <= headers <= 100 * len(found)
        assert {page.encoding for page in found} == ({PLAIN, RLE_DICTIONARY} if use_dictionary else {PLAIN})


def test_encodings_and_damage(tmp_path: Path) -> None:
    """By hand: values that share their beginnings; a header that claims the rest of the file, or ends nowhere."""
    table = pa.table({"image": [b"a" * 100 + bytes([i]) for i in range(100)]})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, use_dictionary=False, column_encoding={"image": "DELTA_BYTE_ARRAY"}, compression="none")
    found, chunk = pages(path)
    assert [page.encoding for page in found] == [DELTA_BYTE_ARRAY]
    content = path.read_bytes()
    at = chunk.data_page_offset
    for bad in (
        b"\x15\x00\x15\x02\x15\xfe\xff\xff\xff\x0f\x00",
        b"\x15\x00\x00",
        b"\xff" * 64,
        b"\x1c" * 2000,
        b"\x1b",
    ):
        path.write_bytes(content[:at] + bad)
        with path.open("rb") as file, pytest.raises((ValueError, RecursionError)):
            list(read_pages(file, at, chunk.total_compressed_size, chunk.num_values))
