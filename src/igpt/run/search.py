"""Adaptive sweeps: one value after another until the metric gets worse (`in_turn`), or Optuna's TPE (`optuna`)."""

import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, flag_override

from igpt.distributed.launcher import SWEEP
from igpt.distributed.process_state import environment
from igpt.report.bystanders import Bystander
from igpt.report.sweep_report import TABLE, report_sweep
from igpt.run.logs import refuse, set_up_logging
from igpt.utils import files
from igpt.utils.overrides import format_value
from igpt.utils.program import typed_command

log = logging.getLogger(__name__)

Launch = Callable[[Sequence[Sequence[str]], int], Sequence[JobReturn]]
Compose = Callable[[Sequence[str]], DictConfig]
LOWER, HIGHER = "minimize", "maximize"
FOLDER = "folder"  # user attribute of an ended trial: its run directory
INSTALL = "hydra/sweeper=optuna needs Optuna, which is not installed: pip install optuna"


def in_turn(
    config: DictConfig, arguments: list[str], *, launch: Launch, compose: Compose, key: str, values: list[Any],
    direction: str,
) -> list[JobReturn]:  # fmt: skip
    """Tries the values of a setting in order; stops at the first whose metric is no better than the best before it.

    Repeated for each combination of other swept settings. Values and stopping follow Chen et al. 2020, §3.3, who search
    the learning rate from large to small. A failed job counts as infinitely bad; it stops nothing before a success.

    Raises:
        SystemExit: code 2 for an invalid search.
    """
    set_up_logging()
    combinations = list_combinations(arguments, lambda name: name != key)
    swept = [text for texts in list_combinations(arguments, lambda name: name == key) for text in texts]
    values = [text.split("=", 1)[1] for text in swept] or values  # own: `task.learning_rate=0.01,0.003` as an argument
    if not values:
        refuse("hydra.sweeper.values names one value or more, from the first to be tried to the last")
    what = {"in_turn": [key, values, direction, arguments, config.hydra.launcher.metric]}
    returns: list[JobReturn] = []
    with search(config, what, direction, compose, [*combinations[0], f"{key}={values[0]}"]) as tried:
        for chosen in combinations:
            best = math.inf
            for value in values:
                log.info("%s=%s", key, value)
                returns += launch([[*chosen, f"{key}={value}"]], len(returns))
                loss = _loss(config, returns[-1], direction)
                tried.append(returns[-1].working_dir)
                if math.isfinite(best) and loss >= best:
                    log.info("%s=%s is no better than the last: what follows is not tried", key, value)
                    break
                best = min(best, loss)
    return returns


def optuna(
    config: DictConfig, arguments: list[str], *, launch: Launch, compose: Compose, space: Mapping[str, Any],
    n_trials: int, at_once: int, direction: str, seed: int,
) -> list[JobReturn]:  # fmt: skip
    """Runs `n_trials` trials proposed by Optuna's TPE, `at_once` in parallel.

    The study is `study.db` (SQLite) in the sweep's directory; the same command continues it, and resumes interrupted
    trials from their checkpoints.

    Raises:
        SystemExit: code 2 for an invalid search.
    """
    set_up_logging()
    try:
        import optuna as library
        from optuna.trial import Trial, TrialState
    except ImportError:
        refuse(INSTALL)
    fixed, *more = list_combinations(arguments)
    if more:
        refuse(f"{' '.join(arguments)}: Optuna proposes what is in hydra.sweeper.space, several values go there")
    distributions = {key: _distribution(library.distributions, key, spec) for key, spec in space.items()}
    if n_trials < 1 or at_once < 1 or not distributions:
        refuse("hydra.sweeper.n_trials and at_once start at 1, and space names one setting or more")
    example = [f"{key}={spec['choices'][0] if 'choices' in spec else spec['low']}" for key, spec in space.items()]
    what = {"optuna": [dict(space), direction, seed, fixed, config.hydra.launcher.metric]}
    library.logging.set_verbosity(library.logging.WARNING)
    returns: list[JobReturn] = []
    with search(config, what, direction, compose, [*fixed, *example]) as tried:
        folder = Path(config.hydra.sweep.dir)
        database = (folder / "study.db").absolute()
        try:
            study = library.create_study(
                storage=f"sqlite:///{database}", study_name=folder.name, load_if_exists=True,
                direction=cast(Any, direction),
            )  # fmt: skip
            study.get_trials()
        except Exception as error:  # SQLAlchemy's and Optuna's errors have no common base
            refuse(f"{database} cannot be read ({type(error).__name__}): it is damaged, restore or remove it")
        # another seed at each continuation: the same one would propose the same values again
        study.sampler = library.samplers.TPESampler(seed=seed + len(study.trials), constant_liar=True)
        begun = [Trial(study, trial._trial_id) for trial in study.get_trials(states=(TrialState.RUNNING,))]
        for trial in begun:  # its values become arguments of a command
            if not (set(trial.params) == set(space) and all(_is_in(space[key], trial.params[key]) for key in space)):
                refuse(f"{database}: trial {trial.number} has values outside hydra.sweeper.space: {trial.params}")
        ended = [trial.user_attrs[FOLDER] for trial in study.trials if FOLDER in trial.user_attrs]
        while (left := n_trials - len(ended)) > 0:
            trials = [begun.pop(0) if begun else study.ask(distributions) for _ in range(min(at_once, left))]
            jobs = [
                (*fixed, *(f"{key}={format_value(trial.params[key], quoted=False)}" for key in space))
                for trial in trials
            ]
            different = list(dict.fromkeys(jobs))  # identical proposals share a run
            returned = dict(zip(different, launch(different, trials[0].number), strict=True))
            for trial, job in zip(trials, [returned[job] for job in jobs], strict=True):
                good = math.isfinite(_loss(config, job, direction))
                trial.set_user_attr(FOLDER, job.working_dir)
                study.tell(trial, job.return_value if good else None, state=None if good else TrialState.FAIL)
                ended.append(job.working_dir)
                returns.append(job)
        tried += ended
    if study.get_trials(states=(TrialState.COMPLETE,)):
        best = study.best_trial
        log.info(
            "best of %d: %s %.4f with %s", len(ended), config.hydra.launcher.metric, best.value,
            " ".join(f"{key}={value}" for key, value in best.params.items()),
        )  # fmt: skip
    return returns


def _distribution(kinds: Any, key: str, spec: Mapping[str, Any]) -> Any:
    """Optuna's distribution of a setting: {choices: […]}, or {low: , high: } with `log`, `step`, `int`."""
    try:
        if set(spec) == {"choices"}:
            return kinds.CategoricalDistribution(list(spec["choices"]))
        kind = kinds.IntDistribution if spec.get("int") else kinds.FloatDistribution
        return kind(**{name: value for name, value in spec.items() if name != "int"})
    except (TypeError, ValueError) as error:
        expected = "{choices: […]} or {low: , high: } with log, step, int"
        refuse(f"hydra.sweeper.space.{key} is {expected}; got {dict(spec)} ({error})")


def _is_in(spec: Mapping[str, Any], value: Any) -> bool:
    """Whether a value that a study proposed is in the setting's space."""
    if "choices" in spec:
        return value in list(spec["choices"])
    return isinstance(value, int | float) and bool(spec["low"] <= value <= spec["high"])


def list_combinations(arguments: list[str], wanted: Callable[[str], bool] = lambda name: True) -> list[list[str]]:
    """Every combination (a list of `key=value`) of the swept settings whose name passes `wanted`; [[]] if none does."""
    parsed = OverridesParser.create().parse_overrides(arguments)
    (combinations,) = BasicSweeper.split_arguments([each for each in parsed if wanted(each.key_or_group)], None)
    return combinations


@contextmanager
def search(
    config: DictConfig,
    what: Mapping[str, Any],
    direction: str,
    compose: Compose,
    example: Sequence[str],
    pages: Sequence[Path] = (),
) -> Iterator[list[str | None]]:
    """Yields a list for the run directories of a search, and compares these runs after the block.

    The directory's name holds a hash of `what`, so that the same command continues the search. `example`, the overrides
    of one job, is composed first to find errors. In the block, the variable SWEEP names the search for its jobs.
    `pages`: run directories that the comparison links to, known after the block.
    """
    if direction not in (LOWER, HIGHER):
        refuse(f"hydra.sweeper.direction must be {LOWER} or {HIGHER}, got {direction!r}")
    try:
        compose(example)
    except HydraException as error:
        refuse(f"{' '.join(example)}: {str(error).splitlines()[0]}")
    (kind,) = what
    plain = OmegaConf.to_container(OmegaConf.create({"what": what}))
    place = Path(config.hydra.sweep.dir) / f"{kind}-{files.hash_json(plain, sort_keys=True, default=str)[:8]}"
    tried: list[str | None] = []
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / ".lock", timeout=0), environment(**{SWEEP: place.name}):
            files.remove_parts(place, ".*.part")
            with Bystander(place / "search.json"):
                files.write_json(place / "search.json", {"command": sys.argv, "example": list(example)})
            with flag_override(config, ["readonly", "struct"], False):
                config.hydra.sweep.dir = str(place)  # for the jobs' output
            yield tried
    except Timeout:
        refuse(f"{place} is in use: the same search is running")
    except OSError as error:
        refuse(str(error))
    folders = [Path(folder) for folder in tried if folder]
    launcher: Any = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    table = {key: launcher[key] for key in TABLE if key in launcher}
    report_sweep(place, folders, metric=launcher["metric"], command=typed_command(), pages=pages, **table)


def _loss(config: DictConfig, job: JobReturn, direction: str) -> float:
    """The job's metric, negated if higher is better; infinite for a failed job."""
    value = job.return_value
    if value is None:
        metric = config.hydra.launcher.metric
        refuse(f"{job.working_dir} has no {metric}: name one it has, hydra.launcher.metric=…")
    return math.inf if not math.isfinite(value) else float(value) if direction == LOWER else -float(value)
