"""`variant=NAME`: a named set of settings of the network (`model`) and of every pretraining (`pretraining`)."""

from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from igpt.run.recipes import CHECKPOINT

RECIPE = "pretraining"  # key of conf/variant/: settings of conf/task/pretrain.yaml
TASK = "pretrain"  # the task that has them, alone or as the stages of a pipeline


def apply_variant(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Moves a variant's settings in `pretraining` into the task, or into each stage of a pipeline, that pretrains.

    In place; `pretraining` is removed, so that a run with the same settings given singly is the same run. Settings in
    `overrides` stand. A variant's settings of the network are in `model` already.

    Raises:
        ValueError: a variant with such settings for a run that pretrains nothing, or settings of the network for
            `model=checkpoint`, of a variant or typed.
    """
    if cfg.model.get("name") == CHECKPOINT and (more := [str(key) for key in cfg.model if key != "name"]):
        raise ValueError(
            f"model.{more[0]} is set (by the command or its variant), and model=checkpoint is the network of init=: "
            "leave it out"
        )
    if RECIPE not in cfg:
        return
    with open_dict(cfg):
        recipe: Any = OmegaConf.to_container(cfg.pop(RECIPE))
    targets = dict(_list_pretrainings(cfg))
    if not targets:
        raise ValueError(
            f"this variant sets the pretraining's {', '.join(recipe)}, and task={cfg.task.name} pretrains nothing: "
            "leave it out"
        )
    typed = {OverridesParser.create().parse_override(text).key_or_group for text in overrides}
    for where, settings in targets.items():
        with open_dict(settings):
            settings.update({key: value for key, value in recipe.items() if f"{where}.{key}" not in typed})


def _list_pretrainings(cfg: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """Yields (dotted key, settings) of the task if it pretrains, and of every stage that does."""
    if cfg.task.get("name") == TASK:
        yield "task", cfg.task
    stages = cfg.task.get("stages")
    for name, settings in stages.items() if OmegaConf.is_dict(stages) else ():
        if OmegaConf.is_dict(settings) and settings.get("task", name) == TASK:
            yield f"task.stages.{name}", settings
