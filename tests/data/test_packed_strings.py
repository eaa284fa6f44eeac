"""Strings in one buffer, against pyarrow's own conversion."""

import pyarrow as pa
import pytest

from igpt.data.packed_strings import pack_strings


@pytest.mark.parametrize("strings", [[], [b""], [b"a", b"", "é\N{GRINNING FACE}".encode(), b"x" * 1000]])
def test_they_are_those_of_pyarrow(strings: list[bytes]) -> None:
    """Against an independent source: `pa.array` of the same strings, as bytes and as text."""
    for kind, values in ((pa.large_binary(), strings), (pa.large_string(), [each.decode() for each in strings])):
        packed = pack_strings(iter(strings), kind)
        packed.validate(full=True)
        assert packed.equals(pa.array(values, kind))
