"""Top-level settings of a run: the keys of `conf/config.yaml` outside the groups."""

import math
from collections.abc import Mapping
from typing import Any

from igpt.settings.fields import MAPPING, Seed, Settings, format_setting

GROUPS = ("data", "tokens", "model", "objective", "trainer", "task", "paths")  # parts that every config has
OF_LAUNCH = ("_target_", "name", "requires", "run_folder", "paper")  # keys of a task read by `launch`, not by the task
ENTRIES = ("logger", "callbacks")  # groups of entries, each with settings of its own; groups and entries may be null


class PathSettings(Settings):
    """Output folders."""

    runs: str
    cache: str


class RunSettings(Settings):
    """Seed, initial weights and output of a run."""

    seed: Seed
    init: str | None
    resume: str | None
    rerun: bool
    published: list[Any]
    paths: PathSettings


def check_structure(config: Mapping[Any, Any]) -> None:
    """Checks what the typed settings take for granted: groups and their entries are mappings, numbers finite.

    Raises:
        ValueError: one line that names the setting.
    """
    for name in GROUPS:
        _check_mapping(config.get(name), name)
    for name in ENTRIES:
        if (entries := config.get(name)) is not None and entries != []:
            _check_mapping(entries, name)
            for key, entry in entries.items():
                if entry is not None:
                    _check_mapping(entry, f"{name}.{key}")
    task = config["task"]
    if not isinstance(task.get("name"), str) or not isinstance(task.get("_target_"), str):
        raise ValueError("task.name and task._target_ must be text, as in conf/task/")
    for group in ("data", "model", "objective", "task"):
        name = config[group].get("name")
        if isinstance(name, str) and (set(name) & set("/\0") or name in ("", ".", "..")):
            raise ValueError(f"{group}.name must be the name of a file, as it becomes part of one, got {name!r}")
    requires = task.get("requires")
    if not isinstance(requires, list) or not all(isinstance(part, str) for part in requires):
        raise ValueError(f"task.requires must be a list of text, got {format_setting(requires)}")
    _check_finite(config, "")


def _check_mapping(value: Any, name: str) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be {MAPPING}, got {format_setting(value)}")


def _check_finite(value: Any, name: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, part in pairs:
        _check_finite(part, f"{name}.{key}".removeprefix("."))
