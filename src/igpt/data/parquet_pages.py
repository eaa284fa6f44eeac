"""Page headers of parquet files, read before the pages: what each unpacks to, and how its values are encoded.

Arrow allocates what a header says, and the sums in a file's footer need not be true. Format: parquet.thrift of
`apache/parquet-format`, in Thrift's compact protocol.
"""

from collections.abc import Iterator
from typing import IO, Any, NamedTuple

_TYPE, _UNPACKED, _PACKED, _DATA, _DICTIONARY, _DATA_2 = 1, 2, 3, 5, 7, 8  # field numbers of PageHeader
_NUM_VALUES = 1  # of the three headers within
_ENCODING = {_DATA: 2, _DICTIONARY: 2, _DATA_2: 4}
_MOST_FIELDS = 1 << 16  # of a header, nested ones included


class Page(NamedTuple):
    """One page of a column chunk."""

    unpacked: int  # bytes
    encoding: int | None  # parquet.thrift's Encoding; None: an index page


def read_pages(file: IO[bytes], start: int, length: int, num_values: int) -> Iterator[Page]:
    """Yields the pages of a column chunk at byte `start`, until they have `num_values` values as Arrow reads them.

    Raises:
        ValueError: a damaged header, or one that leads out of the chunk.
    """
    position, seen = start, 0
    while seen < num_values:
        file.seek(position)
        header = _CompactReader(file).read_struct()
        kind = next((kind for kind in (_DATA, _DICTIONARY, _DATA_2) if isinstance(header.get(kind), dict)), None)
        unpacked, packed = header.get(_UNPACKED), header.get(_PACKED)
        if type(unpacked) is not int or type(packed) is not int or unpacked < 0 or packed < 0:
            raise ValueError("a page has no size")
        position = file.tell() + packed
        if position > start + length:
            raise ValueError("a page leads out of its column")
        yield Page(unpacked, None if kind is None else header[kind].get(_ENCODING[kind]))
        if kind in (_DATA, _DATA_2):
            count = header[kind].get(_NUM_VALUES)
            if type(count) is not int or count < 0:
                raise ValueError("a page does not say how many values it has")
            seen += count


class _CompactReader:
    """Thrift's compact protocol: structs as dictionaries from field number to value; texts are skipped, as None."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.left = file, _MOST_FIELDS

    def read_struct(self) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._read_byte():
            number = number + (head >> 4) if head >> 4 else self._read_int()
            fields[number] = self._read_value(head & 15)
        return fields

    def _read_value(self, kind: int, *, in_list: bool = False) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError("a page's header is too long")
        if kind in (1, 2):  # a boolean: in a struct, its kind is its value
            return self._read_byte() == 1 if in_list else kind == 1
        if kind == 3:
            return self._read_byte()
        if kind in (4, 5, 6):
            return self._read_int()
        if kind == 7:
            return self.file.read(8)
        if kind == 8:
            self.file.seek(self._read_unsigned(), 1)
            return None
        if kind in (9, 10):
            head = self._read_byte()
            size = head >> 4 if head >> 4 < 15 else self._read_unsigned()
            return [self._read_value(head & 15, in_list=True) for _ in range(size)]
        if kind == 12:
            return self.read_struct()
        raise ValueError("a page's header is damaged")  # the format has no maps here

    def _read_byte(self) -> int:
        byte = self.file.read(1)
        if not byte:
            raise ValueError("it ends in the header of a page")
        return byte[0]

    def _read_unsigned(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._read_byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a page's header is damaged")

    def _read_int(self) -> int:
        value = self._read_unsigned()
        return (value >> 1) ^ -(value & 1)  # zigzag
