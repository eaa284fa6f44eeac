"""Overrides that delete (`~logger`) or hold no value (`++x`), before Hydra's grammar sees them."""

from collections.abc import Sequence
from pathlib import Path

from igpt.run.saved_overrides import list_options
from igpt.utils.overrides import escape_text

NONE = "none"  # option of a group that may be left out, as `logger`
NOTHING_CHOSEN = ("experiment", "variant", "sweep", "debug")  # groups without a choice unless one is typed
ALWAYS = ("seed", "init", "resume", "rerun", "published", "paths")  # settings that every run has


def replace_deletions(overrides: Sequence[str], conf: Path) -> list[str]:
    """The overrides with `~GROUP` as `GROUP=none` where the group has that option; deletions of settings stay.

    Raises:
        ValueError: a deletion of what every run needs or of several, or an argument that is no KEY=VALUE.
    """
    return [_replace(override, conf) for override in overrides]


def _replace(override: str, conf: Path) -> str:
    key, equals, value = override.partition("=")
    if not key.lstrip("+~") or (not equals and not key.startswith("~")):
        raise ValueError(f"{escape_text(override)}: an argument is KEY=VALUE, +KEY=VALUE, or ~KEY to leave KEY out")
    if not key.startswith("~"):
        return override
    key, comma, more = key[1:].partition(",")
    is_group = key != "hydra" and "." not in key and (conf / key).is_dir()
    options = list_options(key, [conf]) if is_group else []
    if comma:
        how = f": for a sweep, -m {key}={NONE},{more}" if NONE in options else ", and one at a time"
        raise ValueError(f"{escape_text(override)}: a deletion is ~KEY{how}")
    if not is_group:
        if key.partition(".")[0] in ALWAYS:
            raise ValueError(f"~{key}: every run has {key}: change it, {key}=VALUE, or leave the argument out")
        return override
    if key in NOTHING_CHOSEN:
        raise ValueError(f"~{key}: no {key} is chosen unless one is typed: leave the argument out")
    if NONE not in options:
        raise ValueError(f"~{key}: every run has {key}: choose another, {key}=OPTION; there are {', '.join(options)}")
    if equals:
        raise ValueError(f"{escape_text(override)}: {key}={NONE} leaves all out, {key}=OPTION chooses; not {value!r}")
    return f"{key}={NONE}"
