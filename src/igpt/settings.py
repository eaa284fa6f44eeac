"""From the settings of a config to what they configure: every name and type is checked before anything is called."""

import inspect
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object, instantiate

from igpt.arguments import suggestion
from igpt.older_configs import answer


def factory(spec: Mapping[str, Any], where: str) -> Callable[..., Any]:
    """What a `_target_` names, with its settings given, their names and types checked: call it with live objects.

    Raises:
        ValueError: a setting that the target does not have, or of another type than it takes.
    """
    settings = {str(key): value for key, value in spec.items()}
    check_settings(get_object(settings["_target_"]), settings, where)
    made: Callable[..., Any] = instantiate({**settings, "_partial_": True, "_convert_": "all"})
    return made


def check_settings(target: Any, settings: Mapping[str, Any], where: str) -> None:
    """Raises ValueError, naming the setting in `where`, unless `target` takes every one of them as it is."""
    parameters = inspect.signature(target).parameters
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key, value in settings.items():
        if key.startswith("_"):
            continue
        if key not in parameters and not takes_any:
            raise ValueError(answer(f"{where}.{key}") or f"{where} has no setting {key!r}{suggestion(key, parameters)}")
        for name, part in value.items() if isinstance(value, Mapping) else ():
            if isinstance(part, Mapping) and "_target_" in part:
                check_settings(get_object(part["_target_"]), part, f"{where}.{key}.{name}")
        if key in hints and not _fits(value, hints[key]):
            name = getattr(hints[key], "__name__", str(hints[key])) if not get_args(hints[key]) else str(hints[key])
            raise ValueError(f"{where}.{key} must be {name}, got {value!r}")


def without(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings, and those nested in them, but for one name."""
    return {
        key: without(value, name) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key != name
    }


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    if hint in (str, bool, NoneType):
        return isinstance(value, hint)
    return True  # a container or a live object: its own code looks at it
