"""Entries of the groups `callbacks` and `logger` → callbacks and started loggers, or an error in one line."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any

import lightning as L
from lightning.fabric.loggers.logger import Logger

from igpt.distributed.process_state import restore_environment
from igpt.report.bystanders import describe_error
from igpt.report.folder import RunFolder
from igpt.run.run_config import RunConfig
from igpt.run.targets import checked_partial, find_target
from igpt.training import lightning_callbacks, loggers
from igpt.training.loggers import RunInfo


def callback_builder(spec: Mapping[str, Any], where: str) -> Callable[[], L.Callback]:
    """A function that builds a callback of checked settings; `where`: its key, as `callbacks.stop`.

    Raises:
        ValueError: a class that does not fit into a run, or a setting that it does not have. So does the function, for
            what is refused when it is built, or is no callback.
    """
    target = _check_target(spec, where, L.Callback)
    if inspect.isclass(target):
        lightning_callbacks.check_class(target, where)
    build = checked_partial(spec, where)

    def call() -> L.Callback:
        callback = _build(build, spec, where, L.Callback)
        lightning_callbacks.check_class(type(callback), where)
        return lightning_callbacks.guard(callback, where)

    return call


def logger_builder(spec: Mapping[str, Any], where: str) -> Callable[[Path, RunInfo, dict[str, Any]], Logger | None]:
    """A function of the run's folder, its description and config that starts a logger, or returns None.

    A function of this package, or like one of it, is called with folder and description; a class of loggers with its
    own settings, and with what `own_settings` fills in. Its errors from here on end no run.

    Raises:
        ValueError: as `callback_builder`; the function, too, where the logger cannot be started.
    """
    target = _check_target(spec, where, Logger)
    build = checked_partial(spec, where)

    def call(folder: Path, about: RunInfo, config: dict[str, Any]) -> Logger | None:
        if inspect.isclass(target) and issubclass(target, Logger):
            start = partial(build, **loggers.own_settings(target, spec, folder, about))
        else:
            start = partial(build, folder, about)
        with restore_environment("WANDB_MODE"):  # Lightning sets it when offline, which would affect later runs
            logger = _build(start, spec, where, Logger | None)
            if logger is None:
                return None
            try:
                _ = getattr(logger, "experiment", None)  # starts it
                logger.log_hyperparams(config)
            except Exception as error:  # of anybody's logger
                raise ValueError(f"{where} cannot be started: {describe_error(error)}") from error
        return loggers.guard(logger)

    return call


def list_builders(config: Mapping[str, Any], group: str) -> list[Callable[..., Any]]:
    """A builder of every entry of `callbacks` or `logger` that is not null."""
    build = callback_builder if group == "callbacks" else logger_builder
    entries = config.get(group) or {}
    return [build(spec, f"{group}.{key}") for key, spec in entries.items() if spec is not None]


def build_callbacks(config: Mapping[str, Any]) -> list[L.Callback]:
    """The callbacks of a training, those of the group `callbacks` that it takes."""
    return lightning_callbacks.select([build() for build in list_builders(config, "callbacks")])


def describe_run(run: RunConfig, run_dir: Path, *, first_step: int) -> RunInfo:
    """The description of a run for its loggers. `first_step`: the optimiser step this process resumes from."""
    begun = RunFolder(run_dir).read_run()
    names = run.subject | (begun.get("of") or {})  # of the release that began it, for the same W&B run
    return RunInfo(
        task=run.task,
        model=run.model_name,
        data=run.data_name,
        objective=run.objective_settings["name"],
        run_id=f"{run.format_name(names)}-{begun['id']}",
        first_step=first_step,
        trains=run.trains,
        pipeline=run_dir.parent.name if (run_dir.parent / "run.json").is_file() else None,
    )


def _check_target(spec: Mapping[str, Any], where: str, kind: type) -> Callable[..., Any]:
    """The `_target_`: a function, or a class of this kind. Raises ValueError for anything else."""
    name = spec.get("_target_")
    target = find_target(name, where)
    if inspect.isclass(target) and not issubclass(target, kind):
        package, _, rest = str(name).partition(".")
        other = f", did you mean lightning.pytorch.{rest}?" if package == "pytorch_lightning" else ""
        raise ValueError(f"{where}._target_={name} is no {kind.__name__} of Lightning{other}")
    return target


def _build(build: Callable[[], Any], spec: Mapping[str, Any], where: str, kind: type | UnionType) -> Any:
    try:
        part = build()
    except Exception as error:  # of anybody's class
        if isinstance(error, ValueError) and str(spec["_target_"]).startswith("igpt."):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{where} cannot be built from its settings: {reason}") from error
    if not isinstance(part, kind):
        expected = getattr(kind, "__name__", kind)  # a union has no name
        raise ValueError(f"{where}._target_={spec['_target_']} builds a {type(part).__name__}, expected {expected}")
    return part
