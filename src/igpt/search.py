"""Sweeps that choose what to try next: one value after another until it gets worse, or what Optuna proposes."""

import hashlib
import itertools
import json
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, flag_override

from igpt import files
from igpt.app.ending import side_by_side
from igpt.global_state import environment
from igpt.processes import SWEEP
from igpt.report.logs import set_up_logging
from igpt.sweep import typed

log = logging.getLogger(__name__)

_held: list[FileLock] = []  # of the searches of this process
Launch = Callable[[Sequence[Sequence[str]], int], Sequence[JobReturn]]
Compose = Callable[[Sequence[str]], DictConfig]
LOWER, HIGHER = "minimize", "maximize"
FOLDER = "folder"  # of a trial's run, noted when it has ended
INSTALL = "hydra/sweeper=optuna needs Optuna, which is not installed: pip install optuna"


def in_turn(
    config: DictConfig, arguments: list[str], *, launch: Launch, compose: Compose, key: str, values: list[Any],
    direction: str,
) -> list[JobReturn]:  # fmt: skip
    """Tries the values of a setting in their order, and stops where the sweep's metric is worse than at the last.

    With other settings swept, does so for each combination of them. Source of the values and of stopping: Chen et al.
    2020, §3.3, who search the learning rate from large to small. A job that failed counts as worse than any, and as no
    reason to stop before one has succeeded.

    Raises:
        SystemExit: 2 when the search cannot begin.
    """
    set_up_logging()
    fixed = [override for override in _read(arguments) if override.key_or_group != key]
    own = [override for override in _read(arguments) if override.key_or_group == key]
    if own:  # `task.learning_rate=0.01,0.003` on the command line
        values = [v.split("=", 1)[1] for v in _choices(own)]
    if not values:
        _refuse("hydra.sweeper.values names one value or more, from the first to be tried to the last")
    place = _place(config, {"in_turn": [key, values, direction, arguments, config.hydra.launcher.metric]})
    _begin(config, place, direction, compose, [*(_choices([override])[0] for override in fixed), f"{key}={values[0]}"])
    found: list[JobReturn] = []
    for chosen in itertools.product(*[_choices([override]) for override in fixed]):
        best: float | None = None
        for value in values:
            log.info("%s=%s", key, value)
            (job,) = _naming(launch, place)([[*chosen, f"{key}={value}"]], len(found))
            found.append(job)
            reached = _reached(job, direction)
            if job.return_value is None:
                _refuse(
                    f"{job.working_dir} has no {config.hydra.launcher.metric}: name one it has, hydra.launcher.metric=…"
                )
            if best is not None and reached >= best:
                log.info("%s=%s is no better than the last: what follows is not tried", key, value)
                break
            best = reached if math.isfinite(reached) else best
    tried = [Path(job.working_dir) for job in found if job.working_dir]
    side_by_side(place, tried, metric=config.hydra.launcher.metric, command=typed())
    return found


def optuna(
    config: DictConfig, arguments: list[str], *, launch: Launch, compose: Compose, space: Mapping[str, Any],
    n_trials: int, at_once: int, direction: str, seed: int,
) -> list[JobReturn]:  # fmt: skip
    """Tries what Optuna's TPE proposes, `at_once` jobs side by side, until `n_trials` are done.

    The study is `study.db` (SQLite) in the sweep's folder; the same command goes on with it. A trial that was
    interrupted is taken up again, its run goes on where it was.

    Raises:
        SystemExit: 2 when the search cannot begin.
    """
    set_up_logging()
    try:
        import optuna as library
    except ImportError:
        _refuse(INSTALL)
    overrides = _read(arguments)
    if swept := [override.key_or_group for override in overrides if override.is_sweep_override()]:
        _refuse(f"{', '.join(swept)}: Optuna proposes what is in hydra.sweeper.space, several values go there")
    fixed = _choices(overrides)
    distributions = {key: _distribution(library, key, spec) for key, spec in space.items()}
    if n_trials < 1 or at_once < 1 or not distributions:
        _refuse("hydra.sweeper.n_trials and at_once start at 1, and space names one setting or more")
    example = [f"{key}={_example(distribution)}" for key, distribution in distributions.items()]
    place = _place(config, {"optuna": [dict(space), direction, seed, fixed, config.hydra.launcher.metric]})
    _begin(config, place, direction, compose, [*fixed, *example])
    library.logging.set_verbosity(library.logging.WARNING)
    study = library.create_study(
        storage=f"sqlite:///{(place / 'study.db').absolute()}", study_name=place.name, load_if_exists=True,
        direction=cast(Any, direction),
    )  # fmt: skip
    # another seed whenever it goes on: the same would propose the same again
    study.sampler = library.samplers.TPESampler(seed=seed + len(study.trials), constant_liar=True)
    states = library.trial.TrialState
    for begun in study.get_trials(states=(states.RUNNING,)):  # whoever ran it is gone
        study.tell(begun.number, state=states.FAIL)
        study.enqueue_trial(begun.params)
    found: list[JobReturn] = []
    while (left := n_trials - len(_ended(study))) > 0:
        trials = [study.ask(distributions) for _ in range(min(at_once, left))]
        jobs = [(*fixed, *(f"{key}={_typed(value)}" for key, value in trial.params.items())) for trial in trials]
        different = list(dict.fromkeys(jobs))  # what it proposes twice is one run
        returned = dict(zip(different, _naming(launch, place)(different, trials[0].number), strict=True))
        for trial, job in zip(trials, jobs, strict=True):
            found.append(returned[job])
            if returned[job].return_value is None:
                _refuse(f"{returned[job].working_dir} has no {config.hydra.launcher.metric}: name one it has")
            trial.set_user_attr(FOLDER, returned[job].working_dir)
            good = math.isfinite(_reached(returned[job], direction))
            value = returned[job].return_value if good else None
            study.tell(trial.number, value, state=states.COMPLETE if good else states.FAIL)
    ended = _ended(study)
    tried = [Path(trial.user_attrs[FOLDER]) for trial in ended if trial.user_attrs[FOLDER]]
    side_by_side(place, tried, metric=config.hydra.launcher.metric, command=typed())
    if any(trial.state == states.COMPLETE for trial in ended):
        best = study.best_trial
        log.info(
            "best of %d: %s %.4f with %s", len(ended), config.hydra.launcher.metric, best.value,
            " ".join(f"{key}={value}" for key, value in best.params.items()),
        )  # fmt: skip
    return found


def _ended(study: Any) -> list[Any]:
    """The trials whose run came to an end, good or bad."""
    return [trial for trial in study.trials if FOLDER in trial.user_attrs]


def _distribution(library: Any, key: str, spec: Any) -> Any:
    """What Optuna draws a setting from: {choices: […]}, or {low: , high: } with `log` and, of whole numbers, `int`."""
    kinds = library.distributions
    try:
        if set(spec) == {"choices"}:
            return kinds.CategoricalDistribution(list(spec["choices"]))
        known = {"low", "high", "log", "int", "step"}
        if {"low", "high"} <= set(spec) <= known:
            kind = kinds.IntDistribution if spec.get("int") else kinds.FloatDistribution
            return kind(**{name: value for name, value in spec.items() if name != "int"})
    except (TypeError, ValueError) as error:
        _refuse(f"hydra.sweeper.space.{key}: {error}")
    _refuse(f"hydra.sweeper.space.{key} is {{choices: […]}} or {{low: , high: }} with log, step, int; got {spec!r}")


def _typed(value: Any) -> str:
    """A value as Hydra reads it."""
    return "null" if value is None else str(value)


def _example(distribution: Any) -> Any:
    return distribution.choices[0] if hasattr(distribution, "choices") else distribution.low


def _read(arguments: list[str]) -> list[Override]:
    parsed: list[Override] = OverridesParser.create().parse_overrides(arguments)
    return parsed


def _choices(overrides: Sequence[Override]) -> list[str]:
    """Every `key=value` of some overrides that are swept or not."""
    lines = []
    for override in overrides:
        key = override.get_key_element()
        if override.is_discrete_sweep():
            lines += [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            lines.append(f"{key}={override.get_value_element_as_str()}")
    return lines


def _place(config: DictConfig, what: Mapping[str, Any]) -> Path:
    """The folder of one search: what it searches names it, so that the same command goes on with it."""
    (kind,) = what
    text = json.dumps(OmegaConf.to_container(OmegaConf.create({"what": what})), sort_keys=True, default=str)
    return Path(config.hydra.sweep.dir) / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _begin(config: DictConfig, place: Path, direction: str, compose: Compose, example: Sequence[str]) -> None:
    """Looks at one of the jobs to come before the first begins, and prepares their folder."""
    if direction not in (LOWER, HIGHER):
        _refuse(f"hydra.sweeper.direction must be {LOWER} or {HIGHER}, got {direction!r}")
    try:
        compose(example)
    except HydraException as error:
        _refuse(f"{' '.join(example)}: {str(error).splitlines()[0]}")
    place.mkdir(parents=True, exist_ok=True)
    while _held:  # of a search that this process has ended
        _held.pop().release()
    lock = FileLock(place / ".lock")
    try:
        lock.acquire(timeout=0)  # let go when this process ends
    except Timeout:
        _refuse(f"{place} is in use: the same search is running")
    _held.append(lock)
    files.write_json(place / "search.json", {"command": sys.argv, "example": list(example)})
    with flag_override(config, ["readonly", "struct"], False):
        config.hydra.sweep.dir = str(place)  # where the jobs leave what they say


def _naming(launch: Launch, place: Path) -> Launch:
    """`launch`, telling the jobs which search they are of."""

    def launch_named(jobs: Sequence[Sequence[str]], number: int) -> Sequence[JobReturn]:
        with environment(**{SWEEP: place.name}):
            return launch(jobs, number)

    return launch_named


def _reached(job: JobReturn, direction: str) -> float:
    """What a job has come to, lower is better; infinite where it has failed."""
    value = job.return_value
    if value is None or not math.isfinite(value):
        return math.inf
    return float(value) if direction == LOWER else -float(value)


def _refuse(message: str) -> NoReturn:
    log.error("error: %s", message)
    sys.exit(2)
