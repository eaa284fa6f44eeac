"""What a stage of a pipeline is: the pipeline's config with another task, and settings of its own, checked at once."""

import importlib
from collections.abc import Mapping
from typing import Any

import hydra
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf, open_dict

from igpt.arguments import suggestion
from igpt.build import CHECKPOINT, Build
from igpt.older_configs import answer
from igpt.report.folder import RunFolder, changes
from igpt.settings import check_settings
from igpt.task.pipeline import FROM

CHOSEN = ("model", "objective")  # groups that a stage of a pipeline may choose from for itself
DATA = "data"  # of a stage: settings of the data that are its own
OF_LAUNCH = ("name", "needs", "run_folder")  # settings of a task that are no arguments of what it runs
RUN = "run"  # of a stage: the folder of a finished run that stands for it


def known_in(config: DictConfig, settings: DictConfig, where: str) -> DictConfig:
    """The settings themselves. Raises ValueError when there is one that `config` does not have."""
    for key, value in settings.items():
        if key not in config:
            raise ValueError(f"{where} has no setting {key!r}{suggestion(str(key), [str(k) for k in config])}")
        if isinstance(config[key], DictConfig) and isinstance(value, DictConfig):
            known_in(config[key], value, f"{where}.{key!s}")
    return settings


def stage_config(build: Build, name: str, settings: DictConfig) -> tuple[DictConfig, dict[str, Any]]:
    """The pipeline's config with a stage's task, what that takes from a checkpoint, and what the stage chooses."""
    chosen = {"task": settings.get("task", name)} | {group: settings[group] for group in CHOSEN if group in settings}
    overrides = [f"{group}={option}" for group, option in chosen.items()]
    fresh = hydra.compose("config", overrides=overrides, return_hydra_config=True)
    choices = dict(fresh.hydra.runtime.choices)
    cfg = build.cfg.copy()
    with open_dict(cfg):
        cfg.task, cfg.published = fresh.task, []
        for group in ("model", "tokens", "objective"):
            if choices[group] == CHECKPOINT or group in chosen:
                cfg[group] = fresh[group]
            else:
                choices[group] = build.choices[group]
        cfg.data = OmegaConf.merge(cfg.data, known_in(cfg.data, settings.get(DATA, {}), f"task.stages.{name}.data"))
    for key, value in settings.items():
        if key in ("task", FROM, RUN, DATA, *CHOSEN):
            continue
        if key not in cfg.task:
            raise ValueError(
                answer(f"task.stages.{name}.{key!s}")
                or f"task.stages.{name} has no setting {key!r}{suggestion(str(key), [str(k) for k in cfg.task])}"
            )
        if OmegaConf.is_dict(value) and OmegaConf.is_dict(cfg.task[key]) and len(cfg.task[key]):
            cfg.task[key] = OmegaConf.merge(
                cfg.task[key], known_in(cfg.task[key], value, f"task.stages.{name}.{key!s}")
            )
        else:
            cfg.task[key] = value
    spec = OmegaConf.to_container(cfg.task, resolve=True)
    assert isinstance(spec, dict)
    settled = {str(key): value for key, value in spec.items() if key not in OF_LAUNCH}
    check_settings(get_object(cfg.task["_target_"]), settled, f"task.stages.{name}")
    check_task(settled)
    OmegaConf.set_struct(cfg, True)
    return cfg, choices


def check_given(name: str, place: RunFolder, cfg: DictConfig) -> None:
    """Raises ValueError unless a run that stands for a stage is finished, and is what the stage would have been."""
    if not place.finished:
        raise ValueError(f"task.stages.{name}.run={place.path}: no finished run is there")
    asked = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(asked, dict)
    differs, _ = changes(place.read_run()["config"], {str(key): value for key, value in asked.items()})
    if differs:
        raise ValueError(f"task.stages.{name}.run={place.path}: that run is another: {'; '.join(differs)}")


def check_task(spec: Mapping[str, Any]) -> None:
    """Raises ValueError when a task's own `check` finds a setting that cannot be right; it builds nothing for that."""
    check = getattr(importlib.import_module(spec["_target_"].rpartition(".")[0]), "check", None)
    if check is not None:
        check(**{key: value for key, value in spec.items() if not key.startswith("_")})
