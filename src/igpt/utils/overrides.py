"""Quoting of override values for Hydra and for a shell; suggestions for misspelt names."""

import re
import shlex
from collections.abc import Iterable
from difflib import SequenceMatcher
from typing import Any

from igpt.utils.program import program_name

NEAR = 0.72  # least similarity of a suggestion (Ratcliff-Obershelp ratio)


BARE = re.compile(r"[\w./-]*/[\w./-]*|(?!(null|true|false|nan|inf)\Z)[a-z_][\w.-]*", re.ASCII | re.IGNORECASE)


def format_text(text: str) -> str:
    """A text as the value of an override; quoted if needed."""
    return text if BARE.fullmatch(text) else quote_text(text)


def quote_text(text: str) -> str:
    """A text in quotes, which Hydra and OmegaConf parse back to itself, whatever its characters."""
    return quote_for_hydra(escape_interpolation(text))


def escape_interpolation(text: str) -> str:
    """A text that OmegaConf reads as it is."""
    # `${` starts an interpolation unless a backslash precedes it; backslashes before it are doubled
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def escape_interpolations(value: Any) -> Any:
    """A resolved value whose texts OmegaConf reads as they are."""
    if isinstance(value, list):
        return [escape_interpolations(each) for each in value]
    if isinstance(value, dict):
        return {key: escape_interpolations(each) for key, each in value.items()}
    return escape_interpolation(value) if isinstance(value, str) else value


def quote_for_hydra(value: str) -> str:
    """A text in quotes for Hydra's grammar, in which a backslash escapes only before a quote."""
    quote = "'" if '"' in value and "'" not in value else '"'
    text = re.sub(rf"(\\*){quote}", rf"\1\1\\{quote}", value)
    return quote + re.sub(r"(\\+)\Z", r"\1\1", text) + quote


def format_value(value: Any, *, quoted: bool = True) -> str:
    """A value of `override.value()` in override syntax; interpolations are preserved.

    Without `quoted`, texts are not quoted: for display, and for names without special characters.
    """
    if isinstance(value, list):
        return "[" + ",".join(format_value(each, quoted=quoted) for each in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{format_value(each, quoted=quoted)}" for key, each in value.items()) + "}"
    if isinstance(value, str):
        return quote_for_hydra(value) if quoted else value
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def quote_for_shell(argument: str) -> str:
    """An argument quoted for a shell, in one line; unprintable characters as $'…' of bash and zsh."""
    if argument.isprintable():
        return shlex.quote(argument)
    escaped = re.sub(r"([\\'])", r"\\\1", argument)
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in escaped)
    return f"$'{''.join(shown)}'"


def train_command(*arguments: str) -> str:
    """`python train.py …`, or `igpt …` where that is the program, quoted for a shell."""
    return " ".join([program_name(), *map(quote_for_shell, arguments)])


def escape_text(text: str) -> str:
    """A text for a one-line error: its repr if it has unprintable characters."""
    return text if text.isprintable() else repr(text)


def shorten(text: str, most: int) -> str:
    """The text, or its first `most` characters and "…"."""
    return text if len(text) <= most else f"{text[:most]}…"


def suggest_name(name: str, names: Iterable[str]) -> str:
    """`, did you mean …?` with the most similar known name, or an empty text if none is similar.

    Dotted names are compared by their last part; ties by the whole name, then by whether only the last letter differs.
    """

    def likeness(key: str) -> tuple[float, float, bool]:
        last, full = _ratio(name.rpartition(".")[2], key.rpartition(".")[2]), _ratio(name, key)
        return last, full, key.startswith(name[:-1])

    nearest = max(map(str, names), key=likeness, default=None)
    if nearest is None or likeness(nearest)[0] < NEAR:
        return ""
    return f", did you mean {nearest}?"


def _ratio(first: str, second: str) -> float:
    return SequenceMatcher(None, first, second).ratio()
