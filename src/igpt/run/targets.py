"""Config sections with a `_target_` → partials, with their settings checked against the target's signature."""

import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_type_hints

from igpt.metric.result import Result
from igpt.settings.fields import Settings, format_setting, parse_arguments, parse_settings
from igpt.settings.older_configs import answer
from igpt.settings.run import OF_LAUNCH
from igpt.utils.overrides import suggest_name


def checked_partial(spec: Mapping[str, Any], where: str) -> partial[Any]:
    """A partial of the `_target_` with its settings, to be called with live objects.

    A nested `_target_` is built first; with `_partial_: true` it stays a partial.

    Raises:
        ValueError: a setting that the target does not have, of a wrong type, or out of bounds.
    """
    target = find_target(spec.get("_target_"), where)
    settings = {str(key): value for key, value in spec.items() if not str(key).startswith("_")}
    _refuse_renamed(settings, inspect.signature(target).parameters, where)
    nested = {key: _build_nested(value, f"{where}.{key}") for key, value in settings.items() if _has_target(value)}
    return partial(target, **parse_arguments(target, settings, where, built=nested))


def find_target(name: Any, where: str) -> Callable[..., Any]:
    """The class or function that a `_target_` names. Raises ValueError if there is none."""
    try:
        target = pkgutil.resolve_name(name) if isinstance(name, str) else None
    except (ImportError, AttributeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{where}._target_={name} cannot be imported: {why}{_suggest_target(name)}") from error
    if not callable(target):
        raise ValueError(f"{where}._target_ must name a class or function, got {format_setting(name)}")
    found: Callable[..., Any] = target
    return found


def _suggest_target(name: str) -> str:
    """A suggestion for a `_target_` that cannot be imported; an empty text if there is none."""
    module = sys.modules.get(name.rpartition(".")[0])
    return suggest_name(name, [f"{module.__name__}.{key}" for key in dir(module)] if module else ())


def checked_task(spec: Mapping[str, Any]) -> Callable[..., Result]:
    """A partial of a task's `run` with its settings, to be called with the components unless it requires none."""
    return partial(find_target(spec["_target_"], "task"), settings=task_settings(spec["_target_"], spec))


def task_settings(target: str, settings: Mapping[str, Any], where: str = "task") -> Settings:
    """The typed `settings` argument of a task's `run`, without OF_LAUNCH. Raises ValueError as `parse_settings`."""
    model: type[Settings] | None = get_type_hints(find_target(target, where)).get("settings")
    if model is None:
        raise ValueError(f"{where}._target_ must be the run of a task, with settings, got {target!r}")
    settings = {key: value for key, value in settings.items() if key not in OF_LAUNCH}
    _refuse_renamed(settings, model.model_fields, where)
    return parse_settings(model, settings, where)


def without(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy of the settings without the key `name`, at any depth."""
    return {
        key: without(value, name) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key != name
    }


def _refuse_renamed(settings: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Raises ValueError, with the new name, for a setting that was renamed."""
    for key in settings.keys() - known.keys():
        if message := answer(f"{where}.{key}"):
            raise ValueError(message)


def _has_target(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    return "_target_" in value or any(_has_target(part) for part in value.values())


def _build_nested(value: Mapping[str, Any], where: str) -> Any:
    if "_target_" not in value:
        return {key: _build_nested(part, f"{where}.{key}") for key, part in value.items()}
    result = checked_partial(value, where)
    if value.get("_partial_"):
        return result
    try:
        return result()
    except TypeError as error:  # an argument that is missing
        raise ValueError(f"{where} cannot be built from its settings: {' '.join(str(error).split())}") from error
