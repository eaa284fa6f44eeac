"""The stages of a pipeline: the pipeline's config with another task and the stage's own settings."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf, open_dict

from igpt.report.folder import RunFolder, changes
from igpt.report.paper import check_paper_key
from igpt.run.run_config import CHECKPOINT, RunConfig, to_dict
from igpt.run.targets import task_settings
from igpt.settings.older_configs import answer
from igpt.settings.reading import FROM
from igpt.utils.overrides import escape_interpolation, suggest_name

GROUPS = ("model", "objective")  # config groups with an option of a stage's own
DATA = "data"  # key of a stage: overrides of its data settings
OPTION = re.compile(r"[\w-]+(/[\w-]+)*", re.ASCII)  # Hydra would also read `../../folder/file` and `/folder/file`
STAND_IN = "run"  # key of a stage: the directory of a finished run to use instead of running it


@dataclass(frozen=True)
class StageConfig:
    """The composed config of one stage, and the chosen option of each group."""

    name: str
    cfg: DictConfig
    choices: dict[str, Any]
    stand_in: Path | None  # the directory of a finished run to use instead

    @property
    def trains_tokenizer(self) -> bool:
        return "tokenizer" in self.cfg.task.requires

    @property
    def is_independent(self) -> bool:
        """Whether its config is known before the earlier stages have run: it takes no weights, and no runs."""
        of_weights = self.cfg.init is not None or CHECKPOINT in self.choices.values()
        return not of_weights and "runs" not in self.cfg.task

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
        requested = to_dict(cfg)
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
        if (FROM in settings and OmegaConf.is_list(settings[FROM])) != ("runs" in stage.cfg.task):
            raise ValueError(f"task.stages.{name}.from: a list of stages is for tasks with runs, and these need one")
        stage.check_stand_in()
        stages[stage.name] = stage
    return stages


def compose_stage(run: RunConfig, name: str, settings: Mapping[str, Any]) -> StageConfig:
    """The pipeline's config with the task, groups and settings of a stage.

    Raises:
        ValueError: an option that is no name, or a setting that the stage or its task does not have.
    """
    where = f"task.stages.{name}"
    chosen = {"task": settings.get("task", name)} | {group: settings[group] for group in GROUPS if group in settings}
    for group, option in chosen.items():
        if not isinstance(option, str) or not OPTION.fullmatch(option):
            raise ValueError(f"{where}.{group} must be the name of an option, as in conf/{group}/, got {option!r}")
    overrides = [f"{group}={option}" for group, option in chosen.items()]
    overrides += [f"variant={variant}"] if (variant := run.choices.get("variant")) else []  # of a stage's own model
    fresh = hydra.compose("config", overrides=overrides, return_hydra_config=True)
    choices = dict(fresh.hydra.runtime.choices)
    cfg = run.cfg.copy()
    with open_dict(cfg):
        cfg.task, cfg.published = fresh.task, []
        cfg.init = None if "tokenizer" in fresh.task.requires else cfg.init
        for group in ("model", "tokens", "objective"):
            if choices[group] == "checkpoint" or group in chosen:
                cfg[group] = fresh[group]
            else:
                choices[group] = run.choices[group]
        cfg.data = _merge(cfg.data, settings.get(DATA, {}), f"{where}.data")
    of_task = {str(key): value for key, value in settings.items() if key not in ("task", FROM, STAND_IN, DATA, *GROUPS)}
    cfg.task = _merge(cfg.task, of_task, where)
    OmegaConf.set_struct(cfg, True)
    stand_in = settings.get(STAND_IN)
    spec = to_dict(cfg.task)
    check_paper_key(spec, where)
    task_settings(spec["_target_"], spec, where)
    return StageConfig(name, cfg, choices, None if stand_in is None else Path(stand_in))


def _merge(config: DictConfig, settings: Mapping[Any, Any], where: str) -> DictConfig:
    """A copy of `config` with `settings` merged in, recursively. Raises ValueError for a key that `config` lacks."""
    merged = config.copy()
    for key, value in settings.items():
        if key not in config:
            near = suggest_name(str(key), map(str, config))
            raise ValueError(answer(f"{where}.{key}") or f"{where} has no setting {key!r}{near}")
        is_group = isinstance(value, dict) and OmegaConf.is_dict(config[key]) and len(config[key])
        merged[key] = _merge(config[key], value, f"{where}.{key}") if is_group else _escape(value)
    return merged


def _escape(value: Any) -> Any:
    """A resolved value whose texts OmegaConf reads as they are."""
    if isinstance(value, list):
        return [_escape(each) for each in value]
    if isinstance(value, dict):
        return {key: _escape(each) for key, each in value.items()}
    return escape_interpolation(value) if isinstance(value, str) else value
