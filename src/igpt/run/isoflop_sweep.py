"""`hydra/sweeper=isoflop`: lays out a scaling study, runs it through the launcher, and fits it at the end."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from igpt.data.source import Stream
from igpt.report.closing_table import align_columns
from igpt.run.arguments import resolve_paths
from igpt.run.components import Components
from igpt.run.logs import refuse, set_up_logging
from igpt.run.operations import compose_training, list_trainings
from igpt.run.run_config import RunConfig
from igpt.run.search import LOWER, Compose, Launch, list_combinations, search
from igpt.run.variants import apply_variant
from igpt.scaling_law.study_layout import StudySize, list_plan, plan_study
from igpt.utils.overrides import format_value, quote_for_hydra

log = logging.getLogger(__name__)

SIZES = ("n_layer", "n_embd", "n_head")


def isoflop(
    config: DictConfig, arguments: list[str], *, launch: Launch, compose: Compose, budgets: list[Any],
    sizes: list[Any], tokens_per_weight: list[float] | None, fit: dict[str, Any],
) -> list[JobReturn]:  # fmt: skip
    """Pretrains every size at every budget, for each combination of other swept settings, and fits the study.

    The plan is logged before the first job. Jobs go through the launcher: finished ones are skipped, failed ones run
    again with the same command. The fit is a run of task=isoflop, over the runs that have finished.

    Raises:
        SystemExit: code 2 for an invalid study.
    """
    set_up_logging()
    combinations = list_combinations(arguments)
    first = combinations[0]
    try:
        place, training = find_pretraining(compose_run(compose, first))
        named = name_sizes(sizes, place)
        budgets = read_budgets(budgets)
        trainings = {name: find_pretraining(compose_run(compose, [*first, *own]))[1] for name, own in named.items()}
        window = read_window(tokens_per_weight)
        known = {name: read_size(of) for name, of in trainings.items()}
        planned = plan_study(budgets, known, tokens_per_weight=window)
        n_train = count_train_images(training)
    except HydraException as error:
        refuse(str(error).splitlines()[0])
    except (ValueError, TypeError, OSError) as error:
        refuse(str(error))
    operations = math.fsum(run.operations for run in planned) * len(combinations)
    log.info("%s", align_columns(list_plan(planned, n_train)))
    log.info("%d pretrainings, %.3g operations together", len(planned) * len(combinations), operations)
    jobs = [
        [*chosen, *named[run.name], f"++{place}.operations={np.format_float_scientific(run.budget, trim='-')}"]
        for run in planned
        for chosen in combinations
    ]
    what = {"isoflop": [budgets, sizes, window, arguments]}
    pages: list[Path] = []
    with search(config, what, LOWER, compose, jobs[0], pages=pages) as tried:
        returns = list(launch(jobs, 0))
        tried += [job.working_dir for job in returns]
        finished = [job.working_dir for job in returns if job.working_dir and not _has_failed(job)]
        if not finished:
            refuse("no run of the study has finished: nothing is fitted")
        if len(finished) < len(returns):
            failed = len(returns) - len(finished)
            log.warning("%d of %d runs failed: the fit is that of the others", failed, len(returns))
        outside = [text for text in first if text.startswith("paths.")]
        settings = [f"task.{key}={format_value(value, quoted=False)}" for key, value in fit.items()]
        runs = ",".join(map(quote_for_hydra, finished))
        fitting = ["hydra/sweeper=isoflop", "task=isoflop", f"task.runs=[{runs}]"]  # this command sets hydra.sweeper.…
        (fitted,) = launch([[*fitting, *settings, *outside]], len(jobs))
        pages += [Path(fitted.working_dir)] if fitted.working_dir else []
    return [*returns, fitted]


def read_budgets(given: Any) -> list[float]:
    """Operations of each budget. Raises ValueError for anything but a list of finite numbers."""
    if isinstance(given, list) and all(type(each) in (int, float) and math.isfinite(each) for each in given):
        return [float(budget) for budget in given]
    raise ValueError(f"hydra.sweeper.budgets must be a list of operations, as [1e12,1e13], got {given!r}")


def read_window(given: Any) -> tuple[float, float] | None:
    """(low, high) of tokens_per_weight; None: all. Raises ValueError for anything else."""
    if given is None:
        return None
    if isinstance(given, list) and len(given) == 2 and all(type(end) in (int, float) for end in given):
        return float(given[0]), float(given[1])
    raise ValueError(f"hydra.sweeper.tokens_per_weight must be [low, high] or null, got {given!r}")


def _has_failed(job: JobReturn) -> bool:
    return isinstance(job.return_value, float) and math.isnan(job.return_value)


def name_sizes(sizes: Sequence[Any], place: str) -> dict[str, list[str]]:
    """Name → overrides of each size. `place`: key of the pretraining's settings.

    Raises:
        ValueError: a size that is neither [n_layer, n_embd, n_head], nor an option, nor settings; or stands twice.
    """
    named: dict[str, list[str]] = {}
    for size in sizes:
        if isinstance(size, str):
            name, overrides = size, [f"model={size}"]
        else:
            settings = dict(zip(SIZES, size, strict=False)) if isinstance(size, list) and len(size) == 3 else size
            if not isinstance(settings, dict) or not all(type(settings.get(key)) is int for key in SIZES):
                raise ValueError(
                    "hydra.sweeper.sizes: a size is [n_layer, n_embd, n_head], an option of conf/model/, or "
                    f"{{n_layer: , n_embd: , n_head: , learning_rate: …}}, got {size!r}"
                )
            name = str(settings.get("name", f"igpt_{settings['n_layer']}x{settings['n_embd']}"))
            overrides = [f"model.name={name}", *(f"model.{key}={settings[key]}" for key in SIZES)]
            of_training = {key: value for key, value in settings.items() if key not in (*SIZES, "name")}
            overrides += [f"++{place}.{key}={format_value(value)}" for key, value in of_training.items()]
        if name in named:
            raise ValueError(f"hydra.sweeper.sizes: {name} stands twice: leave one out, or give one another name")
        named[name] = overrides
    return named


def compose_run(compose: Compose, overrides: Sequence[str]) -> RunConfig:
    """The config of a job."""
    cfg = compose(overrides)
    resolve_paths(cfg)
    config = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    apply_variant(config, overrides)
    return RunConfig(config, dict(cfg.hydra.runtime.choices))


def find_pretraining(run: RunConfig) -> tuple[str, RunConfig]:
    """(key of its settings, its config) of the pretraining of a run.

    Raises:
        ValueError: not exactly one has `operations`.
    """
    trainings = list(list_trainings(run))
    if len(trainings) != 1:
        raise ValueError(
            "hydra/sweeper=isoflop needs one pretraining with operations, as experiment=isoflop has, "
            f"got {len(trainings)}"
        )
    ((stage, settings),) = trainings
    return "task" if stage is None else f"task.stages.{stage}", compose_training(run, stage, settings)


def read_size(training: RunConfig) -> StudySize:
    """The network and the recipe of a pretraining. Raises ValueError for an invalid setting."""
    components, task = Components(training), training.cfg.task
    components.check_parts()
    return StudySize(components.planned_network, batch_size=task.batch_size, warmup_steps=task.warmup_steps)


def count_train_images(training: RunConfig) -> int | None:
    """Training images of a run; None for a stream."""
    images = Components(training).source.training()
    return None if isinstance(images, Stream) else len(images)
