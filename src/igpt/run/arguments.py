"""Command-line arguments before Hydra composes: expands `~` and `resume=`, finds misspelt keys, explains quoting."""

import os
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from igpt.run.deletions import replace_deletions
from igpt.run.early_checks import check_one_trainer
from igpt.run.init_defaults import asks_for_data, init_overrides
from igpt.run.recipes import CHECKPOINT, register_recipes
from igpt.run.saved_overrides import SEARCH_PATH, format_plain, list_options, resume_overrides
from igpt.settings.lightning_arguments import answer_argument
from igpt.settings.older_configs import NOW_SCRIPTS, answer
from igpt.settings.paths import LISTS, READ, absolute_path, is_path
from igpt.utils.overrides import (
    escape_interpolation,
    escape_text,
    format_value,
    quote_for_hydra,
    quote_for_shell,
    quote_text,
    suggest_name,
)
from igpt.utils.program import default_cache, program_name

AUTO = "resume=auto"
OF_LIGHTNING = "trainer.lightning."  # arguments of Lightning's Trainer, which conf/ does not list: no + is needed
SHOW = (("--cfg", "job"), ("-c", "job"))
WITH_VALUE = (  # Hydra's flags
    "--cfg", "-c", "--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p",
)  # fmt: skip

register_recipes()  # before Hydra composes anything
OmegaConf.register_new_resolver("default_cache", default_cache, replace=True)
OmegaConf.register_new_resolver("as_typed", lambda text: text.replace("python train.py", program_name()), replace=True)


def prepare_arguments(arguments: list[str], conf: Path) -> list[str]:
    """The arguments for Hydra: flags, the plain overrides of the run that `resume=` names, then the new overrides.

    Raises:
        ValueError: a group, option or key that does not exist, with the nearest that does; a `resume=` that is no run,
            or needs what is not taken from a file; a path that needs quotes, with the quoted form.
    """
    flags, overrides = split_flags([_expand_home_in_argument(argument) for argument in arguments])
    overrides = [re.sub(rf"^\+?(?={re.escape(OF_LIGHTNING)})", "++", override) for override in overrides]
    if any(pair in SHOW for pair in pairwise([*flags, ""])) or "--cfg=job" in flags:
        flags = [*flags, "--resolve"]  # the values, also those of the recipe
    overrides = replace_deletions(overrides, conf)
    several = {"-m", "--multirun"} & {*flags}
    if several and not any(override.startswith(("resume=", "rerun=")) for override in overrides):
        overrides = [*overrides, AUTO]  # a sweep that was interrupted goes on
    typed = parse_overrides(overrides)
    folders = [conf, *find_config_dirs(flags, typed)]
    resumed = [override.value() for override in typed if override.key_or_group == "resume"]
    if resumed and resumed[-1] not in (None, "auto"):
        overrides = [*resume_overrides(Path(str(resumed[-1])), typed, flags, folders), *overrides]
    sweeps = bool(several) or any("hydra.mode" in override for override in overrides)
    _check_paths(overrides, sweeps=sweeps)
    overrides, cfg = complete_overrides(overrides, folders)
    lists = [each for each in typed if each.is_sweep_override() and not each.key_or_group.startswith("hydra")]
    if lists and not sweeps:
        raise ValueError(f"{escape_text(str(lists[0].input_line))}: this is several values, for a sweep (-m)")
    paths = cfg.paths
    if not OmegaConf.is_dict(paths):
        raise ValueError(f"paths must be settings, as {{name: value}}, got {format_value(paths)}")
    resolved: Any = OmegaConf.to_container(paths)  # once: a text in it that looks like an interpolation is none
    at_home = {key: home for key, path in resolved.items() if (home := expand_home_paths(path)) != path}
    # also a `~` from a config file: Hydra creates the directory of a sweep before the config reaches `resolve_paths`
    return [*flags, *overrides, *(f"paths.{key}={format_plain(path)}" for key, path in at_home.items())]


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(flags with their values, overrides)."""
    flags: list[str] = []
    overrides: list[str] = []
    takes_value = False
    for argument in arguments:
        (flags if takes_value or argument.startswith("-") else overrides).append(argument)
        takes_value = not takes_value and argument in WITH_VALUE
    return flags, overrides


def _expand_home_in_argument(argument: str) -> str:
    """The argument with `~` expanded at the start of its value, or of the items of its list."""
    name, _, value = argument.partition("=")
    if "~" not in value or (name.startswith("-") and name != "--config-dir"):
        return argument
    if name == "--config-dir":
        return f"{name}={expand_home_paths(value)}"
    typed: Any = value
    if not re.fullmatch(r"~[^/,\[\]{}()'\"=\s]*(/[^,\[\]{}()'\"]*)?", value):  # else unquoted: Hydra cannot parse it
        (override,) = parse_overrides([argument])
        typed = None if override.is_sweep_override() else override.value()  # a sweep's values: expanded in each job
    home = expand_home_paths(typed)
    return argument if home == typed else f"{name}={format_value(home)}"


def expand_home_paths(value: Any) -> Any:
    """The value with `~`, `~/` and `~USER/` expanded at the start of every string in it, also in lists and dicts."""
    if isinstance(value, str):
        return os.path.expanduser(value) if re.match(r"~[^/]*/|~$", value) else value
    if isinstance(value, list):
        return [expand_home_paths(each) for each in value]
    return {key: expand_home_paths(each) for key, each in value.items()} if isinstance(value, dict) else value


def resolve_paths(cfg: DictConfig | ListConfig, group: str = "") -> None:
    """Expands `~` in every value of a composed config, in place, and makes its paths to read absolute.

    Also values that come from config files. `group`: the dotted key of `cfg` in the whole config.
    """
    for key in list(cfg) if isinstance(cfg, DictConfig) else range(len(cfg)):
        name = f"{group}.{key}".lstrip(".") if isinstance(cfg, DictConfig) else group  # a list is one setting
        if OmegaConf.is_missing(cfg, key) or (OmegaConf.is_interpolation(cfg, key) and not READ.fullmatch(name)):
            continue
        value = cfg[key]
        if OmegaConf.is_config(value):
            resolve_paths(value, name)
        elif isinstance(value, str) and (place := absolute_path(name, expand_home_paths(value))) != value:
            cfg[key] = escape_interpolation(place)


def search_path_as_override(arguments: Sequence[str]) -> list[str]:
    """The arguments of `prepare_arguments` as overrides alone, for Hydra's Python interface."""
    flags, overrides = split_flags(arguments)
    folders = [quote_for_hydra(f"file://{folder.absolute()}") for folder in find_config_dirs(flags, ())]
    return [*overrides, *([f"{SEARCH_PATH}=[{','.join(folders)}]"] if folders else [])]


def find_config_dirs(flags: Sequence[str], typed: Sequence[Override]) -> list[Path]:
    """Additional config folders: `--config-dir FOLDER`, `-cd FOLDER`, `--config-dir=FOLDER`, `hydra.searchpath=[…]`."""
    named = [value for flag, value in pairwise([*flags, ""]) if flag in ("--config-dir", "-cd")]
    named += [flag.partition("=")[2] for flag in flags if flag.startswith("--config-dir=")]
    for override in typed:
        if override.key_or_group == SEARCH_PATH and isinstance(value := override.value(), list):
            named += [str(each).removeprefix("file://") for each in value if not str(each).startswith("pkg://")]
    return [Path(name) for name in named]


def parse_overrides(overrides: list[str]) -> list[Override]:
    """The parsed overrides. Raises ValueError when Hydra cannot parse one."""
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        if len(overrides) > 1:
            for override in overrides:
                parse_overrides([override])
        (text,) = overrides
        reason = str(error).splitlines()[0]
        if not reason.isprintable() or "Lexer" in reason:
            reason = "some character of it has a meaning of its own there"
        raise ValueError(f"cannot read the arguments: {escape_text(text)}: {reason}{_quoting_hint(text)}") from error


def complete_overrides(overrides: list[str], folders: list[Path]) -> tuple[list[str], DictConfig]:
    """(overrides with those that `init=` adds in front, their resolved config), from these config folders.

    Raises:
        ValueError: an override of a group, option or key that does not exist, with the nearest that does; data that
            `init=` cannot tell.
    """
    parsed = parse_overrides(overrides)
    conf, *config_dirs = folders
    for folder in config_dirs:
        if not folder.is_dir():
            raise ValueError(f"--config-dir {folder}: there is no such folder")
    named = [override.value() for override in parsed if override.key_or_group == SEARCH_PATH]
    packages = [str(each) for values in named if isinstance(values, list) for each in values]
    search = [quote_for_hydra(f"file://{folder.resolve()}") for folder in config_dirs]
    search += [quote_for_hydra(each) for each in packages if each.startswith("pkg://")]
    parsed = [override for override in parsed if override.key_or_group != SEARCH_PATH]
    parsed += parse_overrides([f"{SEARCH_PATH}=[{','.join(search)}]"] if search else [])
    groups = sorted({path.name for folder in folders for path in folder.iterdir() if path.is_dir()})
    chosen = [override for override in parsed if override.key_or_group in groups and not override.is_delete()]
    for override in chosen:
        _check_options(override, folders)
    check_one_trainer(chosen)
    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        where = [override for override in parsed if override.key_or_group == SEARCH_PATH]

        def compose_options(overrides: Sequence[Override]) -> DictConfig:
            options = (each for each in overrides if each.key_or_group in groups and not each.is_delete())
            return _compose_config([*where, *options])

        base = compose_options(parsed)
        added = init_overrides(parsed, base, compose_options, [str(override.input_line) for override in where])
        if added or any(map(asks_for_data, parsed)):
            overrides = [*added, *(text for text in overrides if not asks_for_data(*parse_overrides([text])))]
            parsed = [*parse_overrides(added), *(each for each in parsed if not asks_for_data(each))]
            if any(each.key_or_group.startswith("data.") for each in parsed):  # of which other keys are there now
                base = compose_options(parsed)
        keys = list(_flat_keys(OmegaConf.to_container(base)))
        for override in parsed:
            key = override.key_or_group
            if key in groups or key.startswith("hydra") or key in keys:
                continue
            if instead := answer(key) or answer_argument(key):
                raise ValueError(instead)
            if not (override.is_add() or override.is_force_add()):
                near = suggest_name(key, [*groups, *keys])
                new = "" if override.is_delete() else "; a new key needs a + in front"
                raise ValueError(f"there is no setting or group {key!r}{near}{new}")
        return overrides, _compose_config(parsed)


def _compose_config(overrides: list[Override]) -> DictConfig:
    """The resolved config, sweep overrides left out. Raises ValueError where Hydra or OmegaConf cannot compose it."""
    lines = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
    try:
        cfg = compose("config", overrides=lines)
        OmegaConf.resolve(cfg)
    except (HydraException, OmegaConfBaseException, AttributeError, TypeError) as error:
        reason = " ".join(str(error).splitlines()[0].split())
        if (key := re.search(r"full_key: (\S+)", str(error))) and key[1] not in reason:
            reason = f"{key[1]}: {reason}"
        paths = [line for line in lines if "${" in line and is_path(line.lstrip("+").partition("=")[0])]
        how = _quoting_hint(re.sub(r"=(['\"])(.*)\1$", r"=\2", paths[0])) if paths else ""
        raise ValueError(f"these settings do not fit together: {reason}{how}") from error
    return cfg


def _check_options(override: Override, folders: list[Path]) -> None:
    group = override.key_or_group
    if override.is_force_add() or (override.is_add() and group != "logger"):  # of which there may be several
        text = str(override.input_line)
        raise ValueError(
            f"{escape_text(text)}: {text.lstrip('+')} chooses it, in place of the default: leave out the +"
        )
    options = list_options(group, folders)
    requested: list[Any] = []
    if override.value_type in (ValueType.CHOICE_SWEEP, ValueType.SIMPLE_CHOICE_SWEEP):
        requested = list(override.sweep_string_iterator())
    elif override.is_sweep_override():
        return  # a glob or a range: Hydra expands it
    elif (value := override.value()) is None:
        raise ValueError(f"{group}=null: choose an option; there are {', '.join(options)}")
    else:
        requested = value if isinstance(value, list) else [value]
    for option in requested:
        name = str(option).strip("'\"")
        if group == "data" and name == CHECKPOINT and override.package is not None:
            raise ValueError(f"{group}@{override.package}={name}: choose an option, init= is of data= alone")
        if name not in ("null", "[]") and not name.startswith("[") and name not in options:
            if f"{group}={name}" in NOW_SCRIPTS:
                raise ValueError(f"{group}={name} is a script now: {NOW_SCRIPTS[f'{group}={name}']}")
            near = suggest_name(name, options)
            raise ValueError(f"{group}={name}: there is no such option{near}; there are {', '.join(options)}")


def _check_paths(overrides: list[str], *, sweeps: bool) -> None:
    """Raises ValueError, with the quoted form, for a path that Hydra parses as another type."""
    for text, override in zip(overrides, parse_overrides(overrides), strict=True):
        key = override.key_or_group
        if override.is_delete() or not is_path(key):
            continue
        if override.is_sweep_override():
            if override.value_type == ValueType.SIMPLE_CHOICE_SWEEP and not sweeps:
                raise ValueError(f"{escape_text(text)}: this is several values, for a sweep (-m){_quoting_hint(text)}")
            continue
        value = override.value()
        values = value if isinstance(value, list) and LISTS.fullmatch(key) else [value]
        if not all(each is None or isinstance(each, str) for each in values):
            kind = next(type(each).__name__ for each in values if not isinstance(each, str))
            raise ValueError(f"{escape_text(text)}: a path is expected, this is read as {kind}{_quoting_hint(text)}")


def _quoting_hint(text: str) -> str:
    """`; …` with the override quoted for a shell, as the end of an error message; "" where quotes would not help."""
    key, _, value = text.partition("=")
    if not value or not re.fullmatch(r"[+~]*[\w.@/:-]+", key):
        return ""
    listed = re.fullmatch(r"\[(.*)\]", value, re.DOTALL)
    if listed and LISTS.fullmatch(key.lstrip("+")):
        override = f"{key}=[{','.join(quote_text(each.strip()) for each in listed[1].split(','))}]"
    else:
        override = f"{key}={quote_text(value)}"
    return f"; where that is the name of something, quote it: {quote_for_shell(override)}"


def _flat_keys(settings: Any, prefix: str = "") -> Iterable[str]:
    for key, value in settings.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat_keys(value, f"{prefix}{key}.")
