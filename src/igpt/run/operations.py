"""Optimiser steps of a training whose length is given in floating-point operations: `task.operations`."""

from collections.abc import Iterator, Sequence

from omegaconf import DictConfig, OmegaConf, open_dict

from igpt.metric.throughput import count_steps, train_flops_per_image
from igpt.run.components import Components
from igpt.run.pipeline_stages import compose_stage
from igpt.run.recipes import CHECKPOINT
from igpt.run.run_config import RunConfig, to_dict


def resolve_steps(run: RunConfig, overrides: Sequence[str] = ()) -> list[str]:
    """Replaces `operations` by the `steps` they make, in the task of a run and in its stages; returns a line on each.

    So the run is the one, by name and by identity, that states these steps. `overrides`: those of the command.

    Raises:
        ValueError: steps that were typed as well; a network that is known only after an earlier stage.
    """
    lines = []
    for stage_name, settings in list_trainings(run):
        place = "task" if stage_name is None else f"task.stages.{stage_name}"
        operations = settings.operations
        if type(operations) not in (int, float) or operations <= 0:
            continue  # refused when the settings are checked
        if any(text.lstrip("+").startswith(f"{place}.steps=") for text in overrides):
            raise ValueError(
                f"{place}.operations={operations:g} decides the steps, and {place}.steps is given, too: leave one out"
            )
        of_task = compose_training(run, stage_name, settings)
        batch_size = of_task.cfg.task.batch_size
        if type(batch_size) is not int or batch_size <= 0:
            continue
        components = Components(of_task)
        components.check_parts()
        flops = train_flops_per_image(components.planned_network)
        with open_dict(settings):
            settings.steps = count_steps(operations, flops, batch_size)
            if stage_name is None:
                settings.operations = None  # as conf/task/pretrain.yaml has it
            else:
                del settings.operations
        lines.append(f"{place}.operations={operations:g}: {settings.steps:,} steps of {batch_size:,} images, "
                     f"{flops:.4g} operations an image")  # fmt: skip
    if lines:
        del run.config  # which is cached
    return lines


def compose_training(run: RunConfig, stage_name: str | None, settings: DictConfig) -> RunConfig:
    """The config of a training: the run's own, or that of a stage, whose settings are given.

    Raises:
        ValueError: a network that is known only after an earlier stage.
    """
    if stage_name is None:
        return run
    own = {key: value for key, value in to_dict(settings).items() if key != "steps"}  # which are not known yet
    stage = compose_stage(run, stage_name, own)
    if CHECKPOINT in stage.choices.values():
        place = f"task.stages.{stage_name}"
        raise ValueError(f"{place}.operations: the network of an earlier stage is not known yet: give {place}.steps")
    return RunConfig(stage.cfg, stage.choices)


def list_trainings(run: RunConfig) -> Iterator[tuple[str | None, DictConfig]]:
    """The settings with `operations`: of the task, or of a pipeline's stages, with the stage's name."""
    task = run.cfg.task
    stages = task.stages.items() if "stages" in run.requires and OmegaConf.is_dict(task.get("stages")) else ()
    own = [(None, task)] if "network" in run.requires else []  # task=advise has operations, too
    for name, settings in (*own, *stages):
        if OmegaConf.is_dict(settings) and settings.get("operations") is not None:
            yield name, settings
