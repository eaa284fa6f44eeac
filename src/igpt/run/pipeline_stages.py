"""The stages of a pipeline: the pipeline's config with another task and the stage's own settings."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict

from igpt.data.images import check_path
from igpt.report.folder import RunFolder
from igpt.report.identity import changes
from igpt.report.paper import check_paper_key
from igpt.run.recipes import CHECKPOINT
from igpt.run.run_config import RunConfig, resolve_config, to_dict
from igpt.run.targets import task_settings
from igpt.settings.older_configs import answer
from igpt.settings.reading import FROM, INIT
from igpt.utils.overrides import escape_interpolations, suggest_name

GROUPS = ("model", "objective")  # config groups with an option of a stage's own
DATA = "data"  # key of a stage: the name of an option, or overrides of its data settings, with the option as OWN
PROBE_DATA = "probe_data"  # setting of a task: a second dataset, as DATA
OWN = "option"  # key of these: an option of conf/data/ in place of the pipeline's
OPTION = re.compile(r"[\w-]+(/[\w-]+)*", re.ASCII)  # Hydra would also read `../../folder/file` and `/folder/file`
IMAGES = "igpt.data.images.Images"
STAND_IN = "run"  # key of a stage: the directory of a finished run to use instead of running it


@dataclass(frozen=True)
class StageConfig:
    """The composed config of one stage, and the chosen option of each group."""

    name: str
    cfg: DictConfig
    choices: dict[str, Any]
    stand_in: Path | None  # the directory of a finished run to use instead
    waits: bool = False  # for the weights of an earlier stage; else `cfg.init` names its own, if it takes any

    @property
    def writes_weights(self) -> bool:
        return "network" in self.cfg.task.requires or self.cfg.task.name == "import"

    @property
    def trains_tokenizer(self) -> bool:
        return "tokenizer" in self.cfg.task.requires

    @property
    def is_independent(self) -> bool:
        """Whether its config is known before the earlier stages have run: it takes none of their weights or runs."""
        return not self.waits and "runs" not in self.cfg.task

    def check_stand_in(self) -> None:
        """Raises ValueError unless the stand-in run is finished and has the config of this stage.

        Where its tokenizer is of an earlier stage, `check_stand_in_files` compares that.
        """
        if self.stand_in is None:
            return
        folder = RunFolder(self.stand_in)
        if not folder.is_finished:
            raise ValueError(f"task.stages.{self.name}.run={folder.path}: no finished run is there")
        saved, cfg = folder.read_run()["config"], self.cfg.copy()
        if cfg.init is None and Path(str(saved.get("init"))).exists():
            cfg.init = saved["init"]  # weights of an earlier stage, by whose size there is a recipe
        requested = resolve_config(cfg)
        if requested["tokens"].get("path", "") is None:
            saved = {**saved, "tokens": {**saved["tokens"], "path": None}}
        differs, _ = changes(saved, requested)
        if differs:
            raise ValueError(f"task.stages.{self.name}.run={folder.path}: that run is another: {'; '.join(differs)}")

    def check_stand_in_files(self, input_hashes: Mapping[str, str | None]) -> None:
        """Raises ValueError unless the stand-in run has the input files of this stage."""
        assert self.stand_in is not None
        saved = RunFolder(self.stand_in).read_run()["files_sha256"]
        if differs := [key for key in saved if saved[key] != input_hashes.get(key)]:
            raise ValueError(
                f"task.stages.{self.name}.run={self.stand_in}: it began from other files ({', '.join(differs)})"
            )


def stage_configs(run: RunConfig) -> dict[str, StageConfig]:
    """Name → config of every stage that is not null, all settings checked.

    Raises:
        ValueError: an unknown or invalid setting, a task without a run directory, a stand-in run of another config.
    """
    stages: dict[str, StageConfig] = {}
    written = False  # weights, by an earlier stage, for those that name none
    for name, settings in run.cfg.task.stages.items():
        if settings is None:
            continue
        stage = compose_stage(run, str(name), to_dict(settings))
        if not stage.cfg.task.get("run_folder", True):
            raise ValueError(
                f"task.stages.{name}: task={stage.cfg.task.name} leaves no run: it is no stage of a pipeline"
            )
        if isinstance(before := settings.get(FROM), str) and before in stages and stages[before].trains_tokenizer:
            raise ValueError(f"task.stages.{name}.from={before}: that stage trains a tokenizer, and no network")
        of_several = FROM in settings and OmegaConf.is_list(settings[FROM])
        if of_several != ("runs" in stage.cfg.task) and (of_several or "weights" not in stage.cfg.task.requires):
            raise ValueError(f"task.stages.{name}.from: a list of stages is for tasks with runs, and these need one")
        stage.check_stand_in()
        waits = written and settings.get(INIT) is None
        if FROM in settings:
            source = stages.get(before) if isinstance(before, str) else None
            waits = before is not None and (source is None or source.waits or source.writes_weights)
            stage.cfg.init = None if source is None else source.cfg.init
        stages[stage.name] = replace(stage, waits=waits)
        written |= FROM not in settings and stage.writes_weights
    return stages


def compose_stage(run: RunConfig, name: str, settings: Mapping[str, Any]) -> StageConfig:
    """The pipeline's config with the task, groups and settings of a stage.

    Raises:
        ValueError: an option that is no name, or a setting that the stage or its task does not have.
    """
    where = f"task.stages.{name}"
    data = _spell_out(settings.get(DATA, {}))
    chosen = {"task": settings.get("task", name)} | {group: settings[group] for group in GROUPS if group in settings}
    chosen |= {DATA: data.pop(OWN)} if OWN in data else {}
    for group, option in chosen.items():
        check_option(group, option, f"{where}.{group}")
    overrides = [f"{group}={option}" for group, option in chosen.items()]
    overrides += [f"variant={variant}"] if (variant := run.choices.get("variant")) else []  # of a stage's own model
    fresh = hydra.compose("config", overrides=overrides, return_hydra_config=True)
    if settings.get(PROBE_DATA) is not None and PROBE_DATA in fresh.task:
        probe_data = _spell_out(settings[PROBE_DATA])
        check_option(DATA, probe_option := probe_data.pop(OWN, None), f"{where}.{PROBE_DATA}")
        settings = {**settings, PROBE_DATA: probe_data}
        overrides += [f"data@task.{PROBE_DATA}={probe_option}"]
        fresh = hydra.compose("config", overrides=overrides, return_hydra_config=True)
    choices = dict(fresh.hydra.runtime.choices)
    cfg = run.cfg.copy()
    with open_dict(cfg):
        cfg.task, cfg.published = fresh.task, []
        own = settings.get(INIT)
        cfg.init = (
            None if "tokenizer" in fresh.task.requires else cfg.init if own is None else escape_interpolations(own)
        )
        for group in ("model", "tokens", "objective"):
            if choices[group] == "checkpoint" or group in chosen:
                cfg[group] = fresh[group]
            else:
                choices[group] = run.choices[group]
        if DATA in chosen:
            cfg.data = fresh.data
        else:
            choices[DATA] = run.choices[DATA]
        cfg.data = _merge(cfg.data, data, f"{where}.data")
        if (DATA in chosen or "path" in data) and cfg.data._target_ == IMAGES:
            check_path(cfg.data.path, cfg.data.name, f"{where}.data")
    of_stage = ("task", FROM, INIT, STAND_IN, DATA, *GROUPS)
    of_task = {str(key): value for key, value in settings.items() if key not in of_stage}
    cfg.task = _merge(cfg.task, of_task, where)
    if (probed := cfg.task.get(PROBE_DATA)) is not None and probed._target_ == IMAGES:
        check_path(probed.path, probed.name, f"{where}.{PROBE_DATA}")
    OmegaConf.set_struct(cfg, True)
    stand_in = settings.get(STAND_IN)
    spec = to_dict(cfg.task)
    check_paper_key(spec, where)
    task_settings(spec["_target_"], spec, where)
    return StageConfig(name, cfg, choices, None if stand_in is None else Path(stand_in))


def _spell_out(settings: Any) -> dict[str, Any]:
    """A stage's choice of images as `{option: NAME, setting: …}`, also where it is the option's name alone."""
    return dict(settings) if isinstance(settings, Mapping) else {OWN: settings}


def check_option(group: str, option: Any, where: str) -> None:
    """Raises ValueError unless the config group has an option of this name."""
    if not isinstance(option, str) or not OPTION.fullmatch(option):
        raise ValueError(f"{where} must be the name of an option, as in conf/{group}/, got {option!r}")
    if (group, option) == (DATA, CHECKPOINT):
        raise ValueError(f"{where}={option}: a stage has the pipeline's data where it names none: leave it out")
    every = GlobalHydra.instance().config_loader().get_group_options(group)
    options = [each for each in every if not each.rpartition("/")[2].startswith("_")]
    if option not in every:
        near = suggest_name(option, options)
        raise ValueError(f"{where}={option}: there is no such option{near}; there are {', '.join(options)}")


def _merge(config: DictConfig, settings: Mapping[Any, Any], where: str) -> DictConfig:
    """A copy of `config` with `settings` merged in, recursively. Raises ValueError for a key that `config` lacks."""
    merged = config.copy()
    for key, value in settings.items():
        if key not in config:
            near = suggest_name(str(key), map(str, config))
            raise ValueError(answer(f"{where}.{key}") or f"{where} has no setting {key!r}{near}")
        is_group = isinstance(value, dict) and OmegaConf.is_dict(config[key]) and len(config[key])
        merged[key] = _merge(config[key], value, f"{where}.{key}") if is_group else escape_interpolations(value)
    return merged
