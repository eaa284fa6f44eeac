"""The stages of a pipeline: each is the pipeline's config with another task, and settings of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf, open_dict

from igpt.report.folder import RunFolder, changes
from igpt.report.paper import check_paper_key
from igpt.run.run_config import OF_LAUNCH, RunConfig
from igpt.run.targets import task_settings
from igpt.settings.older_configs import answer
from igpt.settings.reading import FROM
from igpt.utils.overrides import suggestion

GROUPS = ("model", "objective")  # that a stage may choose from for itself
DATA = "data"  # of a stage: settings of the data that are its own
STAND_IN = "run"  # of a stage: the folder of a finished run that stands in for it


@dataclass(frozen=True)
class StageConfig:
    """The composed config of one stage, and the options it chose."""

    name: str
    cfg: DictConfig
    choices: dict[str, Any]
    stand_in: Path | None  # the folder of a finished run

    def check_stand_in(self) -> None:
        """Raises ValueError unless the run that stands in is finished, and is what the stage would have been."""
        if self.stand_in is None:
            return
        folder = RunFolder(self.stand_in)
        if not folder.finished:
            raise ValueError(f"task.stages.{self.name}.run={folder.path}: no finished run is there")
        config = OmegaConf.to_container(self.cfg, resolve=True)
        assert isinstance(config, dict)
        differs, _ = changes(folder.read_run()["config"], {str(key): value for key, value in config.items()})
        if differs:
            raise ValueError(f"task.stages.{self.name}.run={folder.path}: that run is another: {'; '.join(differs)}")

    def check_stand_in_files(self, input_hashes: Mapping[str, str | None]) -> None:
        """Raises ValueError unless the run that stands in began from the files that the stage would begin from."""
        assert self.stand_in is not None
        saved = RunFolder(self.stand_in).read_run()["files_sha256"]
        if differs := [key for key in saved if saved[key] != input_hashes.get(key)]:
            raise ValueError(
                f"task.stages.{self.name}.run={self.stand_in}: it began from other files ({', '.join(differs)})"
            )


def stage_configs(run: RunConfig) -> dict[str, StageConfig]:
    """Every stage that is to run, by its name, all of their settings checked.

    Raises:
        ValueError: settings that a stage does not have or take, a stage that leaves no run, a stand-in that is another.
    """
    stages = {}
    for name, settings in run.cfg.task.stages.items():
        if settings is None:
            continue
        stage = compose_stage(run, str(name), settings)
        if not stage.cfg.task.get("run_folder", True):
            raise ValueError(
                f"task.stages.{name}: task={stage.cfg.task.name} leaves no run: it is no stage of a pipeline"
            )
        if (FROM in settings and OmegaConf.is_list(settings[FROM])) != ("runs" in stage.cfg.task):
            raise ValueError(f"task.stages.{name}.from: a list of stages is for tasks with runs, and these need one")
        stage.check_stand_in()
        stages[stage.name] = stage
    return stages


def compose_stage(run: RunConfig, name: str, settings: DictConfig) -> StageConfig:
    """The pipeline's config with a stage's task, what that takes from a checkpoint, and what the stage chooses.

    Raises:
        ValueError: a setting that the stage does not have, or that its task does not take.
    """
    where = f"task.stages.{name}"
    chosen = {"task": settings.get("task", name)} | {group: settings[group] for group in GROUPS if group in settings}
    overrides = [f"{group}={option}" for group, option in chosen.items()]
    fresh = hydra.compose("config", overrides=overrides, return_hydra_config=True)
    choices = dict(fresh.hydra.runtime.choices)
    cfg = run.cfg.copy()
    with open_dict(cfg):
        cfg.task, cfg.published = fresh.task, []
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
    stage = StageConfig(name, cfg, choices, None if stand_in is None else Path(stand_in))
    spec = OmegaConf.to_container(cfg.task, resolve=True)
    assert isinstance(spec, dict)
    check_paper_key(spec, where)
    task_settings(cfg.task["_target_"], {str(k): v for k, v in spec.items() if k not in OF_LAUNCH}, where)
    return stage


def _merge(config: DictConfig, settings: Mapping[Any, Any], where: str) -> DictConfig:
    """A copy of `config` with other values; a mapping that is not empty is merged. Raises ValueError for a new name."""
    merged = config.copy()
    for key, value in settings.items():
        if key not in config:
            near = suggestion(str(key), map(str, config))
            raise ValueError(answer(f"{where}.{key}") or f"{where} has no setting {key!r}{near}")
        if OmegaConf.is_dict(value) and OmegaConf.is_dict(config[key]) and len(config[key]):
            merged[key] = _merge(config[key], value, f"{where}.{key}")
        else:
            merged[key] = value
    return merged
