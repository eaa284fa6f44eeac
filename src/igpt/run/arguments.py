"""Command-line arguments before Hydra composes: expands `~` and `resume=`, finds misspelt keys, explains quoting."""

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from igpt.settings.older_configs import NOW_SCRIPTS, answer, read_record
from igpt.utils.overrides import escape_text, format_value, quote_for_shell, quote_path, quote_text, suggest_name

AUTO = "resume=auto"


def prepare_arguments(arguments: list[str], conf: Path) -> list[str]:
    """The arguments for Hydra: the saved overrides of a resumed run first, then the new ones.

    Raises:
        ValueError: a group, option or key that does not exist, with the nearest that does; a `resume=` that is no run;
            a path that needs quotes, with the quoted form.
    """
    arguments = [_expand_home_in_argument(argument) for argument in arguments]
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    several = {"-m", "--multirun"} & {*arguments}
    if several and not any(override.startswith(("resume=", "rerun=")) for override in overrides):
        arguments, overrides = [*arguments, AUTO], [*overrides, AUTO]  # a sweep that was interrupted goes on
    resumed = [override.value() for override in parse_overrides(overrides) if override.key_or_group == "resume"]
    if resumed and resumed[-1] not in (None, "auto"):
        saved = saved_overrides(Path(str(resumed[-1])))
        arguments = [*saved, *arguments]
        overrides = [*saved, *overrides]
    _check_paths(overrides, sweeps=bool(several) or any("hydra.mode" in override for override in overrides))
    paths = check_overrides(overrides, [conf, *_find_config_dirs(arguments)]).paths
    if not OmegaConf.is_dict(paths):
        raise ValueError(f"paths must be settings, as {{name: value}}, got {paths}")
    at_home = {key: expand_home_paths(paths[key]) for key in paths if expand_home_paths(paths[key]) != paths[key]}
    # also a `~` from a config file: Hydra creates the directory of a sweep before the config reaches
    # `expand_home_in_config`
    return [*arguments, *(f"paths.{key}={format_value(path)}" for key, path in at_home.items())]


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


def expand_home_in_config(cfg: DictConfig | ListConfig) -> None:
    """Expands `~` in every value of a composed config, in place; also in values that come from config files."""
    for key in list(cfg) if isinstance(cfg, DictConfig) else range(len(cfg)):
        if OmegaConf.is_missing(cfg, key) or OmegaConf.is_interpolation(cfg, key):
            continue
        value = cfg[key]
        if OmegaConf.is_config(value):
            expand_home_in_config(value)
        elif (home := expand_home_paths(value)) != value:
            cfg[key] = home


def _find_config_dirs(arguments: list[str]) -> list[Path]:
    """Additional config folders: `--config-dir FOLDER`, `-cd FOLDER`, `--config-dir=FOLDER`."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    named = [after for argument, after in pairs if argument in ("--config-dir", "-cd")]
    named += [a.partition("=")[2] for a in arguments if a.startswith("--config-dir=")]
    return [Path(name) for name in named]


def saved_overrides(folder: Path) -> list[str]:
    """The overrides that started a run. Raises ValueError when `folder` is no run folder."""
    record = folder / "run.json"
    if not record.is_file():
        raise ValueError(f"resume={folder}: no run.json there; give the folder of a run, as in runs/pretrain-…")
    try:
        overrides = read_record(record)["overrides"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{record} is damaged ({error!r}): restore it, or start the run anew") from error
    if overrides is None:
        raise ValueError(f"resume={folder}: this is a stage of a pipeline; continue that: resume={folder.parent}")
    return [str(override) for override in overrides if not str(override).startswith(("resume=", "rerun="))]


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


def check_overrides(overrides: list[str], folders: list[Path]) -> DictConfig:
    """The resolved config of these overrides, from these config folders.

    Raises:
        ValueError: an override of a group, option or key that does not exist; with the nearest that does.
    """
    parsed = parse_overrides(overrides)
    conf, *config_dirs = folders
    for folder in config_dirs:
        if not folder.is_dir():
            raise ValueError(f"--config-dir {folder}: there is no such folder")
        parsed += parse_overrides([f"hydra.searchpath=[file://{folder.resolve()}]"])
    groups = sorted({path.name for folder in folders for path in folder.iterdir() if path.is_dir()})
    chosen = [override for override in parsed if override.key_or_group in groups and not override.is_delete()]
    for override in chosen:
        _check_options(override, folders)
    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        where = [override for override in parsed if override.key_or_group == "hydra.searchpath"]
        keys = list(_flat_keys(OmegaConf.to_container(_compose_config([*where, *chosen]))))
        for override in parsed:
            key = override.key_or_group
            if override in chosen or key.startswith("hydra") or key in keys:
                continue
            if renamed := answer(key):
                raise ValueError(renamed)
            if not (override.is_add() or override.is_force_add()):
                near = suggest_name(key, [*groups, *keys])
                raise ValueError(f"there is no setting or group {key!r}{near}; a new key needs a + in front")
        return _compose_config(parsed)


def _compose_config(overrides: list[Override]) -> DictConfig:
    """The resolved config, sweep overrides left out. Raises ValueError where Hydra cannot compose it."""
    lines = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
    try:
        cfg = compose("config", overrides=lines)
        OmegaConf.resolve(cfg)
    except (
        HydraException,
        OmegaConfBaseException,
        AttributeError,
        TypeError,
    ) as error:  # the last two: OmegaConf's own
        reason = " ".join(str(error).splitlines()[0].split())
        if (key := re.search(r"full_key: (\S+)", str(error))) and key[1] not in reason:
            reason = f"{key[1]}: {reason}"
        paths = [line for line in lines if "${" in line and _is_path(line.lstrip("+").partition("=")[0])]
        how = _quoting_hint(re.sub(r"=(['\"])(.*)\1$", r"=\2", paths[0])) if paths else ""
        raise ValueError(f"these settings do not fit together: {reason}{how}") from error
    return cfg


def _check_options(override: Override, folders: list[Path]) -> None:
    group = override.key_or_group
    places = [folder / group for folder in folders]
    groups = {p.relative_to(root).with_suffix("").as_posix() for root in places for p in root.rglob("*.yaml")}
    options = sorted(name for name in groups if not name.rpartition("/")[2].startswith("_"))
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
        if name not in ("null", "[]") and not name.startswith("[") and name not in options:
            if f"{group}={name}" in NOW_SCRIPTS:
                raise ValueError(f"{group}={name} is a script now: {NOW_SCRIPTS[f'{group}={name}']}")
            near = suggest_name(name, options)
            raise ValueError(f"{group}={name}: there is no such option{near}; there are {', '.join(options)}")


READ = re.compile(  # settings that are paths to read
    r"init|resume|tokens\.path|data(\.streams\.\w+)?\.(path|clusters)|task\.(palette|runs|compare_with)|"
    r"task\.stages\.\w+\.(run|palette|compare_with|data\.path)"
)
HUB = re.compile(r"init|data(\.streams\.\w+)?\.path|task\.stages\.\w+\.data\.path")  # also accept a name on the Hub
LISTS = re.compile(r"task\.(stages\.\w+\.)?(runs|compare_with)")  # also accept a list
WRITTEN = re.compile(r"paths\.(runs|cache)")


def _is_path(key: str) -> bool:
    return bool(READ.fullmatch(key) or WRITTEN.fullmatch(key))


def _check_paths(overrides: list[str], *, sweeps: bool) -> None:
    """Raises ValueError, with the quoted form, for a path that Hydra parses as another type."""
    for text, override in zip(overrides, parse_overrides(overrides), strict=True):
        key = override.key_or_group
        if override.is_delete() or not _is_path(key):
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


def make_paths_absolute(overrides: list[str]) -> list[str]:
    """The overrides, independent of the working directory: paths to read become absolute.

    Unchanged: interpolations (`${…}`), and names that may be on the Hub and do not exist on this machine.
    """
    rewritten = []
    for text, override in zip(overrides, parse_overrides(overrides), strict=True):
        key, value = override.key_or_group, None if override.is_sweep_override() else override.value()
        plain = [_plain_text(each) for each in (value if isinstance(value, list) else [value])]
        paths = [
            quote_path(path) for path in plain if path is not None and (is_local_path(path) or not HUB.fullmatch(key))
        ]
        if READ.fullmatch(key) and key != "resume" and paths and len(paths) == len(plain):
            text = f"{text.partition('=')[0]}=" + (f"[{','.join(paths)}]" if isinstance(value, list) else paths[0])
        rewritten.append(text)
    return rewritten


def _plain_text(value: Any) -> str | None:
    """The value as a string; None where it is no string, or an interpolation of another setting."""
    if not isinstance(value, str):
        return None
    try:
        text = OmegaConf.create({"value": value})["value"] if "${" in value else value
    except OmegaConfBaseException:
        return None
    return str(text)


def is_local_path(path: str) -> bool:
    """Whether a file of this path exists, or of this prefix (OpenAI's checkpoints: `model.ckpt-1000000.*`)."""
    local = Path(path)
    return local.exists() or next(local.parent.glob(f"{glob.escape(local.name)}.*"), None) is not None


def _flat_keys(settings: Any, prefix: str = "") -> Iterable[str]:
    for key, value in settings.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat_keys(value, f"{prefix}{key}.")
