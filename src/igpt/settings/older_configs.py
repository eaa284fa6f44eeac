"""Reads records of saved runs (`run.json`, `result.json`) and updates older setting names by one table.

A record is updated by the table's entries for all versions after its own `version`, in turn.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from igpt.settings.config_changes import TABLE, Changes
from igpt.settings.paths import absolute_path
from igpt.utils import files
from igpt.utils.overrides import format_value

Keys = tuple[str, ...]  # path of a setting, from the outermost group to its name
Flat = dict[Keys, Any]

# Paths at which the settings of a group occur; other groups occur under their own name. *: any name
PLACES: dict[str, tuple[Keys, ...]] = {
    "task": (("task",), ("task", "stages", "*")),
    "data": (
        ("data",),
        ("data", "streams", "*"),
        ("task", "stages", "*", "data"),
        ("task", "stages", "*", "data", "streams", "*"),
        *(("task", *of, "probe_data", *streams) for of in ((), ("stages", "*")) for streams in ((), ("streams", "*"))),
    ),
}

NOW_SCRIPTS = {"task=trace": "python benchmarks/trace_network.py INIT TOKENS.npy"}
ABSOLUTE_PATHS = 3  # first version with absolute paths in the config
VERSION = max(TABLE)  # of records written by this release


def read_record(path: Path, *, oldest: int = 0) -> dict[str, Any]:
    """A `run.json` or `result.json` with current setting names; `version` stays that of the file, 0 if it has none.

    Raises:
        ValueError: the version is below `oldest` or above `VERSION`, or the content is no record.
    """
    record = files.read_json(path)
    version = record.get("version", 0) if isinstance(record, dict) else None
    if type(version) is not int or not oldest <= version <= VERSION:
        raise ValueError(f"{path} is of another version than {oldest} to {VERSION}: use the release that wrote it")
    kinds = {"config": dict, "overrides": list | None, "files_sha256": dict}
    if bad := [key for key, kind in kinds.items() if key in record and not isinstance(record[key], kind)]:
        raise ValueError(f"{path} is damaged ({bad[0]} is of another type): restore it, or start the run anew")
    try:
        record = _with_precision(updated_record({**record, "version": version}))
        return record if version >= ABSOLUTE_PATHS else _with_absolute_paths(record, path.absolute().parent)
    except (RecursionError, TypeError, AttributeError) as error:  # nested too deeply, or otherwise than any config
        raise ValueError(f"{path} is damaged ({error}): restore it, or start the run anew") from error


def _with_precision(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the precision that `trainer.precision=auto` was in its run."""
    trainer = record.get("config", {}).get("trainer", {})
    if trainer.get("precision") != "auto" or "precision" not in record:
        return record
    return {**record, "config": {**record["config"], "trainer": {**trainer, "precision": record["precision"]}}}


def _with_absolute_paths(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """An older record of the run in `folder` with absolute paths in its config, where its starting folder is known.

    That is where `paths.runs` is relative to, unless the run folder was moved; overrides were recorded absolute.
    """
    if "config" not in record:
        return record
    settings = flat(record["config"])
    runs = str(settings.get(("paths", "runs")))
    start = next((parent for parent in folder.parents if folder.is_relative_to(parent / runs)), None)
    typed = dict(_plain_overrides(record.get("overrides") or []))
    for path, value in settings.items():
        key = ".".join(path)
        if isinstance(absolute := typed.get(key), str) and os.path.isabs(absolute):
            settings[path] = absolute_path(key, absolute)
        elif start is not None and not os.path.isabs(runs):
            settings[path] = absolute_path(key, value, start)
    return {**record, "config": nested(settings)}


def _plain_overrides(overrides: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for text in map(str, overrides):
        try:
            override = OverridesParser.create().parse_override(text)
        except (HydraException, RecursionError):
            continue
        if not (override.is_delete() or override.is_sweep_override()):
            yield override.key_or_group, override.value()


def updated_record(record: Mapping[str, Any], table: Mapping[int, Changes] = TABLE) -> dict[str, Any]:
    """A record with config, overrides and file hashes under current names; other entries are unchanged."""
    lines = [table[version] for version in sorted(table) if version > record["version"]]
    now = dict(record)
    if isinstance(config := record.get("config"), dict):
        now["config"] = updated(config, lines)
        if isinstance(overrides := record.get("overrides"), list):
            now["overrides"] = updated_overrides(overrides, now["config"], lines)
    if isinstance(hashes := record.get("files_sha256"), dict):
        now["files_sha256"] = {_renamed_file(name, lines): sha for name, sha in hashes.items()}
    return now


def updated(config: Mapping[str, Any], lines: Iterable[Changes] = tuple(TABLE.values())) -> dict[str, Any]:
    """A run's config under current names; a current config is unchanged."""
    settings = flat(config)
    for changes in lines:
        settings = _changed(settings, changes)
    return nested(settings)


def updated_overrides(overrides: list[Any], config: Mapping[str, Any], lines: list[Changes]) -> list[str]:
    """A run's overrides under current names; `config`: its updated config, with the values of lists that were switches.

    An override that cannot be parsed, or whose setting is unchanged, stays as it was typed.
    """
    known = flat(config)
    now: list[str] = []
    for text in map(str, overrides):
        head, equals, typed = text.partition("=")
        key = head.lstrip("+~")
        sign, keys = head.removesuffix(key), tuple(key.split("."))
        try:
            override = OverridesParser.create().parse_override(text)
        except (HydraException, RecursionError):
            now.append(text)
            continue
        value = None if override.is_delete() or override.is_sweep_override() else override.value()
        before = after = flat(value, keys)
        for changes in lines:
            after = _changed(after, changes)
        refers = re.sub(r"\$\{([\w.]+)\}", lambda m: f"${{{_renamed_key(m[1], lines)}}}", typed)  # ${data.name}
        if after == before:
            now.append(f"{head}{equals}{refers}")
            continue
        if [*after.values()] == [value]:
            now.append(f"{sign}{'.'.join(*after)}{equals}{refers}")
            continue
        after = {path: known.get(path, part) if isinstance(part, list) else part for path, part in after.items()}
        if after and all(path[: len(keys)] == keys != path for path in after):
            after = {keys: nested({path[len(keys) :]: part for path, part in after.items()})}
        now += [f"{sign}{'.'.join(path)}={format_value(part)}" for path, part in after.items()]
    return now


def answer(key: str, table: Mapping[int, Changes] = TABLE) -> str | None:
    """One sentence on the current name of an older key; None if no older release had that key."""
    new = key
    for version in sorted(table):
        for name, joined in table[version].joined.items():
            for entry, switch in joined.entries.items():
                if match := _match(tuple(new.split(".")), switch):
                    return f"the setting {key} is an entry of {'.'.join(_beside(switch, name, match[0]))} now: {entry}"
        if (renamed := _renamed_key(new, [table[version]])) is None:
            return f"the setting {key} is none any more: leave it out"
        new = renamed
    return None if new == key else f"the setting {key} is called {new} now"


def flat(settings: Any, keys: Keys = ()) -> Flat:
    """Nested settings as path → value; an empty group is a value."""
    if not isinstance(settings, dict) or (keys and not settings):
        return {keys: settings}
    return {path: value for key, part in settings.items() for path, value in flat(part, (*keys, key)).items()}


def nested(settings: Flat) -> dict[str, Any]:
    """The inverse of `flat`."""
    config: dict[str, Any] = {}
    for (*groups, name), value in settings.items():
        place = config
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return config


def _changed(settings: Flat, changes: Changes) -> Flat:
    """The settings after one version's changes; settings under current names are unchanged."""
    joined = dict(_joined(settings, changes))
    switches = [switch for each in changes.joined.values() for switch in each.entries.values()]
    kept = {path: value for path, value in settings.items() if not any(_is(path, switch) for switch in switches)}
    now = {
        new: _value(path, value, changes)
        for path, value in (kept | joined).items()
        if (new := _renamed(path, changes.renamed)) is not None
    }
    for key, (other, expected, meant) in changes.added.items():
        for path, value in list(now.items()):
            values = expected if isinstance(expected, tuple) else (expected,)
            if (match := _match(path, other)) and not match[1] and (... in values or value in values):
                now.setdefault(_beside(other, key, match[0]), meant)
    return now


def _value(path: Keys, value: Any, changes: Changes) -> Any:
    if path[-1:] == ("_target_",) and isinstance(value, str):
        for old in sorted(changes.targets, key=len, reverse=True):
            if value == old or value.startswith(f"{old}."):
                return changes.targets[old] + value.removeprefix(old)
    for key, new in changes.values.items():
        if _is(path, key):
            return [_one(each, new) for each in value] if isinstance(value, list) else _one(value, new)
    return value


def _one(value: Any, new: Mapping[Any, Any]) -> Any:
    return new.get(value, value) if isinstance(value, str | int | float | None) else value


def _joined(settings: Flat, changes: Changes) -> Iterator[tuple[Keys, list[str]]]:
    """Path and entries of every list that has an old switch in the settings."""
    for name, joined in changes.joined.items():
        matches = [(key, at[0]) for path in settings for key in joined.entries.values() if (at := _match(path, key))]
        for switch, place in {place: (key, place) for key, place in matches}.values():
            task = settings.get((*place, "task"), place[-1])  # a stage lists only its own settings
            unsaid = () if (*place, "_target_") in settings else joined.default.get(task, ())
            is_on = {
                entry: settings.get(_beside(switch, key, place), entry in unsaid)
                for entry, key in joined.entries.items()
            }
            yield _beside(switch, name, place), [entry for entry, on in is_on.items() if on]


def _renamed(path: Keys, renamed: Mapping[str, str | None]) -> Keys | None:
    for old, new in renamed.items():
        if match := _match(path, old):
            return None if new is None else (*_beside(old, new, match[0]), *match[1])
    return path


def _renamed_key(key: str, lines: Iterable[Changes]) -> str | None:
    path: Keys | None = tuple(key.split("."))
    for changes in lines:
        path = None if path is None else _renamed(path, changes.renamed)
    return None if path is None else ".".join(path)


def _renamed_file(name: str, lines: Iterable[Changes]) -> str:
    """The current name of a file hash, `KEY` or `KEY NAME` (`task.palette`, `task.runs NAME`)."""
    key, space, rest = name.partition(" ")
    return f"{_renamed_key(key, lines)}{space}{rest}"


def _match(path: Keys, key: str) -> tuple[Keys, Keys] | None:
    """Splits a path that lies at or below a dotted key: (path of the key's group, path below the key); else None."""
    group, *names = key.split(".")
    for place in PLACES.get(group, ((group,),)):
        expected = (*place, *names)
        if len(path) >= len(expected) and all(each in ("*", part) for each, part in zip(expected, path, strict=False)):
            return path[: len(place)], path[len(expected) :]
    return None


def _is(path: Keys, key: str) -> bool:
    return (found := _match(path, key)) is not None and not found[1]


def _beside(key: str, other: str, place: Keys) -> Keys:
    """The path of dotted key `other`: below `place`, the group of `key`, if both have one group, else at its own."""
    group, *names = other.split(".")
    return (*(place if group == key.split(".")[0] else (group,)), *names)
