"""What `init=` adds to a command: data, model, tokens and objective of the run it names, where nothing chooses others.

They are overrides, as if typed, so that the run is the same as with them typed. Of a record only an option of
`conf/data/` and plain values are taken, as by `resume=`.
"""

import os
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from igpt.run.recipes import CHECKPOINT
from igpt.run.saved_overrides import SEARCH_PATH, format_plain, is_plain, read_texts
from igpt.settings.data import OWN
from igpt.settings.older_configs import flat, read_record
from igpt.settings.paths import READ, is_local_path, resolve_nearest
from igpt.utils import files
from igpt.utils.overrides import escape_interpolations, escape_text, shorten, train_command

OF_WEIGHTS = ("model", "tokens", "objective")
LAUNCHER = "hydra/launcher"
DECIDING = ("init", "task", "task.runs", "experiment", "variant", "data", *OF_WEIGHTS)  # of what init= adds
LONGEST_CHAIN = 10  # imports of imports

Record = tuple[Path, dict[str, Any]]  # run directory, content of its run.json


def init_overrides(
    overrides: Sequence[Override],
    base: DictConfig,
    compose_options: Callable[[Sequence[Override]], DictConfig],
    where: Sequence[str],
) -> list[str]:
    """The overrides that `init=`, else the first of `task.runs`, adds to a command. Hydra is initialised.

    Of a sweep, those of all its jobs; where jobs differ, `complete_job` gives each its own. `base`: the config of the
    options that the overrides choose, as `compose_options` makes it. `where`: the search path, as overrides. A run that
    is resumed has recorded what was added.

    Raises:
        ValueError: data that would have to come from a run where no run is named, or its data are not known, need what
            is never taken from a file, or lie there no more; a sweep on a cluster whose jobs differ in this.
    """
    if any(each.key_or_group == "resume" and each.value() not in (None, "auto") for each in overrides):
        return []
    swept = [each for each in overrides if each.is_sweep_override() and each.key_or_group in DECIDING]
    if not swept:
        return _complete(base, overrides, where)
    is_listed = all(each.is_discrete_sweep() and each.value_type != ValueType.GLOB_CHOICE_SWEEP for each in swept)
    if not is_listed or not any(each.key_or_group in ("init", "task.runs") for each in overrides):
        return []
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    others = [each for each in overrides if each not in swept]
    (combinations,) = BasicSweeper.split_arguments(swept, None)
    jobs = [[*others, *OverridesParser.create().parse_overrides(texts)] for texts in combinations]
    added = [_complete(compose_options(job), job, where) for job in jobs]
    if all(each == added[0] for each in added):
        return added[0]
    if (launcher := _find_choices(jobs[0], where)[LAUNCHER]) != "processes":
        names = " ".join(each.key_or_group for each in swept)
        raise ValueError(f"{LAUNCHER}={launcher}: jobs of {names} take different data from init=: type data=…")
    return []


def complete_job(load: Callable[[list[str]], DictConfig], overrides: list[str]) -> DictConfig:
    """The config of a sweep's job, with what its own `init=` adds. `load`: the job's overrides → its config."""
    cfg = load(overrides)
    where = [text for text in cfg.hydra.overrides.hydra if text.startswith(SEARCH_PATH)]
    parsed = OverridesParser.create().parse_overrides(overrides)
    typed = [text for text, each in zip(overrides, parsed, strict=True) if not asks_for_data(each)]
    try:
        complete = [*_complete(cfg, parsed, where), *typed]
    except ValueError:  # which the job reports
        return cfg
    return cfg if complete == overrides else load(complete)


def asks_for_data(override: Override) -> bool:
    """Whether an override is `data=checkpoint`, which means the same as no choice of data."""
    is_choice = override.get_key_element() == "data" and not override.is_sweep_override()
    return is_choice and override.value() == CHECKPOINT


def describe_taken(cfg: DictConfig, overrides: Sequence[str]) -> str:
    """`data from RUN: cifar10, data.path=FOLDER`: which overrides are of the run of `init=`; "" without its data."""
    _, init = _find_init(cfg, ())
    record = None if init is None else _find_record(init)
    if record is None or f"data={(option := _find_option(record))}" not in overrides:
        return ""
    recorded = {_format_setting(key, value) for key, value in _flat_data(record[1]["config"]["data"]).items()}
    if any(text.startswith("data.path=") and text not in recorded for text in overrides):  # other images were typed
        return ""
    return ", ".join([f"data from {init}: {option}", *(text for text in overrides if text.lstrip("+") in recorded)])


def _complete(cfg: DictConfig, overrides: Sequence[Override], where: Sequence[str]) -> list[str]:
    """The overrides that `init=` adds to one command. `cfg`: composed, at least of its options."""
    setting, init = _find_init(cfg, overrides)
    typed = {each.get_key_element().lstrip("+~") for each in overrides}
    asks = cfg.data.get("name") == CHECKPOINT
    if init is None and asks:
        raise ValueError("data=checkpoint takes the data of the run that init= names: init=RUN_FOLDER")
    requires = {*cfg.task.get("requires", ())}
    if init is None or requires.isdisjoint({"tokens", "stages"}):
        return []
    choices = _find_choices(overrides, where)
    added = []
    if "network" in requires:
        free = (group for group in OF_WEIGHTS if not any(_is_at(key, group) for key in typed))
        added = [f"{group}={CHECKPOINT}" for group in free if group not in choices]
    if asks or "data" not in choices:
        if (record := _find_record(init)) is not None:
            added += _recorded_data(record, f"{setting}={init}", overrides, where)
        elif "tokens" in requires:
            raise ValueError(f"{setting}={init}: {_explain_unknown(init)}")
        return added
    takes_tokens = choices.get("tokens") == CHECKPOINT or f"tokens={CHECKPOINT}" in added
    if takes_tokens and choices["data"] == OWN and typed & {"data", "data.resolution"} == {"data"}:
        added.append(f"data.resolution={_find_resolution(init)}")
    return added


def _find_init(cfg: DictConfig, overrides: Sequence[Override]) -> tuple[str, str | None]:
    """(setting, path) of the weights that a command reads: `init`, else the first of `task.runs`; None: none."""
    reads_runs = "runs" in cfg.task and "finished_runs" not in cfg.task.requires
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    runs = raw["task"]["runs"] if reads_runs else []
    named = OmegaConf.create({"paths": raw["paths"], "init": raw["init"], "task": {"runs": runs}})
    for each in overrides:
        if each.key_or_group == "init" or (each.key_or_group == "task.runs" and reads_runs):
            OmegaConf.update(named, each.key_or_group, each.value())
    try:
        is_first = named.init is None and OmegaConf.is_list(named.task.runs) and len(named.task.runs) > 0
        init = named.task.runs[0] if is_first else named.init
    except OmegaConfBaseException:  # refused where the whole config is composed
        return "init", None
    return "task.runs" if is_first else "init", init if isinstance(init, str) else None


def _find_choices(overrides: Sequence[Override], where: Sequence[str]) -> dict[str, Any]:
    """Group → option, where the command or a file that it chooses makes a choice; of a swept group None."""
    lines = [str(each.input_line) for each in overrides if not (each.is_sweep_override() or each.is_delete())]
    loader = GlobalHydra.instance().config_loader()
    choices = loader.compute_defaults_list("config", [*where, *lines], RunMode.RUN).overrides.override_choices
    return {**choices, **{each.key_or_group: None for each in overrides if each.is_sweep_override()}}


def _find_record(init: str) -> Record | None:
    """The run whose images the weights at `init` have seen, or a probe of them: through imports and exports.

    Raises:
        ValueError: its record is damaged or of another version.
    """
    place = Path(os.path.expanduser(init)).absolute()
    for _ in range(LONGEST_CHAIN):
        folder = next((each for each in (place, *place.parents[:3]) if os.path.isfile(each / "run.json")), None)
        if folder is None:
            return None
        record = read_record(folder / "run.json")
        config = record.get("config", {})
        task, data = config.get("task"), config.get("data")
        if not (isinstance(task, dict) and isinstance(task.get("requires"), list) and isinstance(data, dict)):
            raise ValueError(f"{folder}/run.json is damaged (no task or data): restore it, or type data=…")
        if {"tokens", "stages"} & {*map(str, task["requires"])}:
            return folder, record
        before = resolve_nearest(folder, str(config.get("init")))
        if config.get("init") is None or before is None:
            return None
        place = before.absolute()
    return None


def _read_command(record: Record) -> dict[str, Any]:
    """The record of the command that made a run: of a pipeline's stage, the pipeline's."""
    folder, begun = record
    outer = folder.parent / "run.json"
    return read_record(outer) if begun.get("overrides") is None and outer.is_file() else begun


def _find_option(record: Record) -> str:
    """The option of `conf/data/` that a run chose; of the oldest records by its command or its name."""
    data = record[1]["config"]["data"]
    names = record[1].get("of")
    option = names.get("data_option") if isinstance(names, dict) else None
    typed = [text for text in _read_command(record).get("overrides") or () if str(text).startswith("data=")]
    return str(option or (typed[-1].partition("=")[2] if typed else data.get("name")))


def _recorded_data(record: Record, named: str, overrides: Sequence[Override], where: Sequence[str]) -> list[str]:
    """`data=OPTION` and the settings in which a run's data differ from that option, but for those of the command.

    `named`: the setting that named the run, for errors.
    """
    command, option = _read_command(record), _find_option(record)
    lines = [str(each.input_line) for each in overrides]
    loader = GlobalHydra.instance().config_loader()
    every = loader.get_group_options("data", config_name="config", overrides=list(where))
    needed = read_texts(command, "search_path", record[0] / "run.json")
    if option not in every or option.rpartition("/")[2].startswith("_"):
        how = f"; if you trust it, type it: {train_command(*needed, *lines)}" if needed else ", choose another: data=…"
        raise ValueError(f"{named}: its data={escape_text(option)} is no option of conf/data/{how}")
    default = compose("config", overrides=[*where, f"data={option}"]).data
    typed = {str(text).partition("=")[0].lstrip("+~") for text in command.get("overrides") or ()}
    settings = _changed_settings(record[1]["config"], default, typed)
    new = [each.key_or_group for each in overrides if each.key_or_group != "data"]
    settings = {key: value for key, value in settings.items() if not any(_is_at(key, other) for other in new)}
    for key, value in settings.items():
        if READ.fullmatch(key) and isinstance(value, str) and os.path.isabs(value) and not is_local_path(value):
            where_it_was = f"{escape_text(value)}, where nothing is now"
            raise ValueError(f"{named}: the images of its run were in {where_it_was}: type {key}=… of another place")
    known = _flat_data(OmegaConf.to_container(default, resolve=False))
    texts = [f"{'' if key in known else '++'}{_format_setting(key, value)}" for key, value in settings.items()]
    if bad := [text for text in texts if not is_plain(text, ())]:
        raise ValueError(
            f"{named}: its data={option} need {escape_text(' '.join(bad))}, which is never taken from a file; if "
            f"you trust it, type it: {train_command(*needed, f'data={option}', *bad, *lines)}"
        )
    return [f"data={option}", *texts]


def _changed_settings(config: Mapping[str, Any], default: DictConfig, typed: Container[str]) -> dict[str, Any]:
    """Dotted key → value of the settings of a recorded config's data that differ from those of an option.

    A setting of the option that refers to others, as `${recipe:pad}`, is compared as it was in the recorded task: what
    the recipes gave a pretraining is no choice for its fine-tuning. `typed`: settings of the run's own command.
    """
    raw = OmegaConf.to_container(default, resolve=False)
    cfg = OmegaConf.create({"task": {"name": escape_interpolations(config["task"].get("name"))}, "data": raw})
    refers = {key for key, value in _flat_data(raw).items() if "${" in str(value)}
    saved = _flat_data(config["data"])
    changed = {}
    for key in sorted(saved, key=refers.__contains__):  # what is referred to comes first
        if _select(cfg, key) != saved[key] or (key in refers and key in typed):
            changed[key] = saved[key]
            OmegaConf.update(cfg, key, escape_interpolations(saved[key]))
    return changed


def _select(cfg: DictConfig, key: str) -> Any:
    """The resolved value of a setting; None where there is none, or it refers to what is not there."""
    try:
        value = OmegaConf.select(cfg, key)
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException:
        return None


def _flat_data(data: Any) -> dict[str, Any]:
    """The settings of `data` by dotted key."""
    return {".".join(map(str, key)): value for key, value in flat({"data": data}).items()}


def _format_setting(key: str, value: Any) -> str:
    return f"{key}={format_plain(value)}"


def _is_at(key: str, other: str) -> bool:
    """Whether a setting is another one, or lies below it."""
    return f"{key}.".startswith(f"{other}.")


def _find_resolution(init: str) -> int:
    """Pixels a side of the images that weights read. Raises ValueError where there are none."""
    record = _find_record(init)
    side = None if record is None else record[1]["config"]["data"].get("resolution")
    if type(side) is int:
        return side
    from igpt.checkpoint.find import find_weights  # imports PyTorch

    return find_weights(init).tokenizer.side


def _explain_unknown(init: str) -> str:
    """Error message: no record tells the data of these weights. Raises ValueError where there are no weights."""
    place = Path(os.path.expanduser(init))
    name = ""
    for folder in (place, place / "model", place.parent):
        if (folder / "config.json").is_file():
            saved = files.read_json(folder / "config.json")
            name = str(saved.get("data", "")) if isinstance(saved, dict) else ""
            break
    else:
        from igpt.checkpoint.find import HUB_NAME, find_weights  # imports PyTorch

        if not is_local_path(init) and not HUB_NAME.fullmatch(init):
            find_weights(init)
    known = f" (their config.json names {escape_text(shorten(name, 60))})" if name else ""
    return f"no record tells which images these weights are of{known}: type data=OPTION, as data=cifar10"
