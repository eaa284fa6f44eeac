"""Field types and parsing of settings: typed, frozen Pydantic models with bounds, and one-line errors.

Nothing in this package imports PyTorch or Lightning.
"""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType, NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from igpt.utils.overrides import format_value, suggest_name

# Field types. NaN and infinity are refused everywhere.
Count = Annotated[int, Field(ge=1, le=10**12)]  # at least one
WholeNumber = Annotated[int, Field(ge=0, le=10**12)]
Positive = Annotated[float, Field(ge=1e-100, le=1e38)]
NonNegative = Annotated[float, Field(ge=0, le=1e38)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # of a moving average: beta1, beta2, momentum
WeightDecay = Annotated[float, Field(ge=0, le=100)]
Temperature = Annotated[float, Field(ge=0.001, le=1000)]  # softmax(logits / temperature)
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Split = Literal["train", "val", "test"]
Norm = Literal["ln_1", "raw"]  # of hidden states before pooling
FeatureDtype = Literal["float16", "float32"]  # of features on disk
Pooling = Literal["auto", "mean", "cls"]  # of an encoder's last layer


def check_layer(layer: Any) -> Any:
    """A value of `task.layer`, unchanged. Raises ValueError if it names no layer."""
    is_number = type(layer) is int and layer >= 0
    if not (is_number or (type(layer) is float and 0 < layer < 1) or layer in (None, "last")):
        raise ValueError(
            "task.layer must be a layer's number (0: the embedding), a fraction of the depth (0.5: its middle), last, "
            f"or null, got {format_setting(layer)}"
        )
    return layer


Layer = Annotated[float | Literal["last"] | None, BeforeValidator(check_layer)]  # `probe.depth.resolve_layer`
STRICT = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)

Model = TypeVar("Model", bound=BaseModel)


class Settings(BaseModel):
    """Base class of the settings of one part of a config."""

    model_config = STRICT


def parse_settings(model: type[Model], settings: Mapping[str, Any], where: str) -> Model:
    """Validates settings into an object of `model`; `where`: their key in the config, e.g. `task`.

    Raises:
        ValueError: one line on the first setting that is unknown, missing, of another type or out of bounds.
    """
    try:
        return model.model_validate(dict(settings))
    except ValidationError as error:
        raise ValueError(describe_error(error, model, settings, where)) from error


def parse_arguments(
    target: Callable[..., Any],
    settings: Mapping[str, Any],
    where: str,
    *,
    built: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Validates settings as arguments of `target`, by the types and bounds (`Annotated`) of its signature.

    Parameters missing in the settings are live objects, passed later. `built`: arguments already made from settings.

    Raises:
        ValueError: as `parse_settings`.
    """
    every = inspect.signature(target).parameters
    parameters = {key: each for key, each in every.items() if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
    takes_others = any(each.kind is each.VAR_KEYWORD for each in every.values())
    unknown = next((key for key in settings if key not in parameters), None)
    if unknown is not None and not takes_others:
        raise ValueError(f"{where} has no setting {unknown!r}{suggest_name(unknown, parameters)}")
    if inspect.isclass(target) and issubclass(target, BaseModel):  # with its own checks of several settings together
        return dict(parse_settings(target, {**settings, **built}, where))
    signature = target.__init__ if inspect.isclass(target) else target
    try:
        hints = get_type_hints(signature, include_extras=True)
    except NameError:  # a library's class that imports a type for type checkers only
        hints = {}
    plain = {key: value for key, value in settings.items() if key not in built}
    fields: dict[str, Any] = {key: (hints.get(key, Any), ...) for key in plain}
    arguments = parse_settings(create_model("Arguments", __config__=STRICT, **fields), plain, where)
    return {**{key: getattr(arguments, key) for key in plain}, **built}


def describe_error(error: ValidationError, model: type[BaseModel], settings: Mapping[str, Any], where: str) -> str:
    """One line: the first invalid setting, the expected value and the actual one."""
    details = error.errors(include_url=False)
    first = next((each for each in details if each["type"] == "extra_forbidden"), details[0])
    path, value = _locate(settings, first["loc"], missing=first["type"] == "missing")
    name = ".".join([where, *path] if where else path)
    if first["type"] == "extra_forbidden":
        known = getattr(_annotation_at(model, path[:-1]), "model_fields", {})
        return f"{'.'.join([where, *path[:-1]])} has no setting {path[-1]!r}{suggest_name(path[-1], known)}"
    if first["type"] == "missing":
        return f"{name} is not given"
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        if message.startswith("must be "):
            return f"{name} {message}"
        return message.replace("task.", f"{where}.") if where.startswith("task") else message
    expected = [_expectation(each) for each in details if _locate(settings, each["loc"])[0] == path]
    if value is not None and NoneType in get_args(_annotation_at(model, path)):
        expected.append("null")
    return f"{name} must be {' or '.join(dict.fromkeys(expected))}, got {format_setting(value)}"


def format_setting(value: Any) -> str:
    """A value as written in a config: null, true, 'text'."""
    return format_value(value) if isinstance(value, bool | None) else repr(value)


def _locate(settings: Any, location: tuple[int | str, ...], *, missing: bool = False) -> tuple[list[str], Any]:
    """Keys along an error's location, without Pydantic's names of union members, and the value there."""
    path: list[str] = []
    value: Any = settings
    for position, part in enumerate(location):
        if (isinstance(value, Mapping) and part in value) or (isinstance(value, list) and isinstance(part, int)):
            path.append(str(part))
            value = value[part]  # type: ignore[index]  # a list has an int index, checked above
        elif missing and position == len(location) - 1:
            path.append(str(part))
    return path, value


def _annotation_at(model: type[BaseModel], path: list[str]) -> Any:
    """The type of the field at a path of names; None if there is no such field."""
    annotation: Any = model
    for name in path:
        fields = getattr(annotation, "model_fields", {})
        annotation = fields[name].annotation if name in fields else None
    return annotation


MAPPING = "settings, as {name: value}"
_KINDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "list": "a list",
    "tuple": "a list", "dict": MAPPING, "mapping": MAPPING, "model": MAPPING, "none": "null",
    "finite": "a finite number", "path": "a path",
}  # fmt: skip
_BOUNDS = {
    "greater_than_equal": "at least {ge:g}", "greater_than": "above {gt:g}", "less_than_equal": "at most {le:g}",
    "less_than": "below {lt:g}", "too_short": "a list of at least {min_length}",
}  # fmt: skip


def _expectation(detail: Any) -> str:
    """The expected value, in words, from the details of a Pydantic error."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _BOUNDS:
        return _BOUNDS[kind].format(**context)
    if kind == "literal_error":
        options = context["expected"].replace("'", "").replace(" or ", ", ")
        return f"one of {options}" if ", " in options else options
    return _KINDS.get(kind.partition("_")[0], str(detail["msg"]))
