"""Records of saved runs (`run.json`, `result.json`), read by the names of now: one table of what older releases said.

`version` in a record says which lines of the table it needs: those of every later version, in turn.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from igpt.utils import files
from igpt.utils.overrides import format_value

Keys = tuple[str, ...]  # of one setting, from the outermost group to its name
Flat = dict[Keys, Any]

# Where the settings of a group stand; of any other, under its own name. *: any one name
PLACES: dict[str, tuple[Keys, ...]] = {
    "task": (("task",), ("task", "stages", "*")),
    "data": (
        ("data",),
        ("data", "streams", "*"),
        ("task", "stages", "*", "data"),
        ("task", "stages", "*", "data", "streams", "*"),
    ),
}


@dataclass(frozen=True)
class Joined:
    """Switches that became one list: entry → switch. What a stage of a pipeline does not say is on by `default`."""

    entries: Mapping[str, str]
    default: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # task → entries that were on unless said


@dataclass(frozen=True)
class Changes:
    """The settings that one version of the records names otherwise than those before it. Keys are dotted, and hold in
    stages of a pipeline, too (`PLACES`); values, targets and joined are looked up under the old keys, before `renamed`.
    """

    targets: Mapping[str, str] = field(default_factory=dict)  # `_target_`, or a module and all in it → the new name
    values: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)  # key → old value, or entry of a list → new
    joined: Mapping[str, Joined] = field(default_factory=dict)  # new list → the switches that became its entries
    renamed: Mapping[str, str | None] = field(default_factory=dict)  # old key → new key; None: there is none any more
    added: Mapping[str, tuple[str, Any, Any]] = field(default_factory=dict)
    # new key → (another key, its value or ..., what a config with that meant)


TABLE: dict[int, Changes] = {
    2: Changes(
        targets={
            "igpt.model.gpt.GPT": "igpt.model.config.GPTConfig",
            "igpt.tokens.kmeans.fitted": "igpt.tokens.kmeans.fit_cached",
            "igpt.tokens.palette.given": "igpt.tokens.palette.from_file",
            "igpt.probe.watch": "igpt.training.online_probe",
            "igpt.report.callbacks": "igpt.training.callbacks",
            "igpt.report.loggers": "igpt.training.loggers",
            "igpt.task.machine": "igpt.training.hardware",
            "igpt.task.palette": "igpt.task.evaluate_palette",
        },
        values={"task.needs": {"net": "network", "found": "finished_runs", "stage": "stages"}},
        renamed={
            "task.gen": "task.loss_weights.gen",
            "task.clf": "task.loss_weights.clf",
            "task.needs": "task.requires",
        },
        added={
            "tokens._target_": ("tokens.palette._target_", ..., "igpt.tokens.palette_tokenizer.PaletteSettings"),
            "model.positions": ("model._target_", "igpt.model.config.GPTConfig", "learned"),
            "data.layout": ("data._target_", "igpt.data.images.Images", "auto"),
        },
    ),
}
NOW_SCRIPTS = {"task=trace": "python benchmarks/trace_network.py INIT TOKENS.npy"}
VERSION = max(TABLE)  # of the records that this release writes


def read_record(path: Path, *, oldest: int = 0) -> dict[str, Any]:
    """A `run.json` or `result.json`, its settings named as now; `version` stays that of the file, 0 where it has none.

    Raises:
        ValueError: it is of a version before `oldest`, or of one that this release does not know yet.
    """
    record = files.read_json(path)
    version = record.get("version", 0) if isinstance(record, dict) else None
    if type(version) is not int or not oldest <= version <= VERSION:
        raise ValueError(f"{path} is of another version than {oldest} to {VERSION}: use the release that wrote it")
    return updated_record({**record, "version": version})


def updated_record(record: Mapping[str, Any], table: Mapping[int, Changes] = TABLE) -> dict[str, Any]:
    """A record with its config, overrides and hashes of files under the names of now; what is none of these stays."""
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
    """A run's config as this release would write it; one of this release is itself."""
    settings = flat(config)
    for changes in lines:
        settings = _changed(settings, changes)
    return nested(settings)


def updated_overrides(overrides: list[Any], config: Mapping[str, Any], lines: list[Changes]) -> list[str]:
    """The overrides of a run in the names of now: `config`, its updated one, says what is in a list that was switches.

    One that cannot be read, or names nothing that has changed, stays as it was typed.
    """
    known = flat(config)
    now: list[str] = []
    for text in map(str, overrides):
        head, equals, typed = text.partition("=")
        key = head.lstrip("+~")
        sign, keys = head.removesuffix(key), tuple(key.split("."))
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
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
        if len(after) == 1 and [*after.values()] == [*before.values()]:
            now.append(f"{sign}{'.'.join(*after)}{equals}{refers}")
            continue
        after = {path: known.get(path, part) if isinstance(part, list) else part for path, part in after.items()}
        if after and all(path[: len(keys)] == keys != path for path in after):
            after = {keys: nested({path[len(keys) :]: part for path, part in after.items()})}
        now += [f"{sign}{'.'.join(path)}={format_value(part)}" for path, part in after.items()]
    return now


def answer(key: str, table: Mapping[int, Changes] = TABLE) -> str | None:
    """What to say to who types a key that an older release had, in one sentence; None: none had it."""
    new = key
    for version in sorted(table):
        for name, joined in table[version].joined.items():
            for entry, switch in joined.entries.items():
                if found := _found(tuple(new.split(".")), switch):
                    return f"the setting {key} is an entry of {'.'.join(_beside(switch, name, found[0]))} now: {entry}"
        if (renamed := _renamed_key(new, [table[version]])) is None:
            return f"the setting {key} is none any more: leave it out"
        new = renamed
    return None if new == key else f"the setting {key} is called {new} now"


def flat(settings: Any, keys: Keys = ()) -> Flat:
    """Nested settings, each under all of its keys; an empty group is a value."""
    if not isinstance(settings, dict) or (keys and not settings):
        return {keys: settings}
    return {path: value for key, part in settings.items() for path, value in flat(part, (*keys, key)).items()}


def nested(settings: Flat) -> dict[str, Any]:
    """The inverse of `flat`."""
    whole: dict[str, Any] = {}
    for (*groups, name), value in settings.items():
        place = whole
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return whole


def _changed(settings: Flat, changes: Changes) -> Flat:
    """The settings after one version's changes, which leave those that are named as now as they are."""
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
            if (found := _found(path, other)) and not found[1] and expected in (..., value):
                now.setdefault(_beside(other, key, found[0]), meant)
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
    """The lists of which a switch is said, wherever one is."""
    for name, joined in changes.joined.items():
        found = [(key, at[0]) for path in settings for key in joined.entries.values() if (at := _found(path, key))]
        for switch, place in {place: (key, place) for key, place in found}.values():
            task = settings.get((*place, "task"), place[-1])  # of a stage, which says no more than what is its own
            unsaid = () if (*place, "_target_") in settings else joined.default.get(task, ())
            is_on = {
                entry: settings.get(_beside(switch, key, place), entry in unsaid)
                for entry, key in joined.entries.items()
            }
            yield _beside(switch, name, place), [entry for entry, on in is_on.items() if on]


def _renamed(path: Keys, renamed: Mapping[str, str | None]) -> Keys | None:
    for old, new in renamed.items():
        if found := _found(path, old):
            return None if new is None else (*_beside(old, new, found[0]), *found[1])
    return path


def _renamed_key(key: str, lines: Iterable[Changes]) -> str | None:
    path: Keys | None = tuple(key.split("."))
    for changes in lines:
        path = None if path is None else _renamed(path, changes.renamed)
    return None if path is None else ".".join(path)


def _renamed_file(name: str, lines: Iterable[Changes]) -> str:
    """The name of a file's hash, `task.palette` or `task.runs NAME`, which begins with the key that names the file."""
    key, space, rest = name.partition(" ")
    return f"{_renamed_key(key, lines)}{space}{rest}"


def _found(path: Keys, key: str) -> tuple[Keys, Keys] | None:
    """Where the group of a dotted key stands in a path, and what of the path is inside that setting, if it is."""
    group, *names = key.split(".")
    for place in PLACES.get(group, ((group,),)):
        whole = (*place, *names)
        if len(path) >= len(whole) and all(each in ("*", part) for each, part in zip(whole, path, strict=False)):
            return path[: len(place)], path[len(whole) :]
    return None


def _is(path: Keys, key: str) -> bool:
    return (found := _found(path, key)) is not None and not found[1]


def _beside(key: str, other: str, place: Keys) -> Keys:
    """Where another dotted key stands that is of the same group as one whose group is at `place`; else at its own."""
    group, *names = other.split(".")
    return (*(place if group == key.split(".")[0] else (group,)), *names)
