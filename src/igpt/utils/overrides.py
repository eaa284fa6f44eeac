"""Overrides as they are typed: values written so that Hydra, or a shell, reads them back; the nearest right name."""

import re
import shlex
from collections.abc import Iterable
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

NEAR = 0.72  # of a name's letters that are to agree in their order (Ratcliff and Obershelp's measure)


def quote_path(path: str) -> str:
    """A path, absolute, as Hydra reads it back."""
    path = str(Path(path).absolute())
    return path if re.fullmatch(r"[\w./-]+", path, re.ASCII) else quote_text(path)


def quote_text(text: str) -> str:
    """A text, any characters, in quotes: Hydra and OmegaConf read it back as it is."""
    # `${` refers to another setting, but for a backslash before it; then two are read as one
    return in_quotes(re.sub(r"(\\*)\$\{", r"\1\1\\${", text))


def in_quotes(value: str) -> str:
    """A text in quotes of Hydra's grammar, where a backslash counts before a quote alone."""
    quote = "'" if '"' in value and "'" not in value else '"'
    text = re.sub(rf"(\\*){quote}", rf"\1\1\\{quote}", value)
    return quote + re.sub(r"(\\+)\Z", r"\1\1", text) + quote


def format_value(value: Any, *, quoted: bool = True) -> str:
    """A value as `override.value()` gives it, as an override is written: what refers to another setting still does.

    Without `quoted`, texts are as they are: what is read by people, and names without special characters.
    """
    if isinstance(value, list):
        return "[" + ",".join(format_value(each, quoted=quoted) for each in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{format_value(each, quoted=quoted)}" for key, each in value.items()) + "}"
    if isinstance(value, str):
        return in_quotes(value) if quoted else value
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def quote_for_shell(argument: str) -> str:
    """An argument as it is typed in a shell, in one line; with a line end in it, as bash and zsh read it."""
    if argument.isprintable():
        return shlex.quote(argument)
    shown = (
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in re.sub(r"([\\'])", r"\\\1", argument)
    )
    return f"$'{''.join(shown)}'"


def printable(text: str) -> str:
    """A text, in one line of an error whatever is in it."""
    return text if text.isprintable() else repr(text)


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
