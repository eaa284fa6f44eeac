"""The nearest right name to one that was misspelt."""

from collections.abc import Iterable
from difflib import SequenceMatcher

NEAR = 0.72  # of a name's letters that are to agree in their order (Ratcliff and Obershelp's measure)


def suggestion(name: str, known: Iterable[str]) -> str:
    """`, did you mean …?` with the nearest known name, or nothing where none is near.

    Names with dots are compared by their last part; of several that are as near, the whole name
    decides, then whether only the last letter differs.
    """

    def likeness(key: str) -> tuple[float, float, bool]:
        last, whole = _ratio(name.rpartition(".")[2], key.rpartition(".")[2]), _ratio(name, key)
        return last, whole, key.startswith(name[:-1])

    nearest = max(map(str, known), key=likeness, default=None)
    if nearest is None or likeness(nearest)[0] < NEAR:
        return ""
    return f", did you mean {nearest}?"


def _ratio(first: str, second: str) -> float:
    return SequenceMatcher(None, first, second).ratio()
