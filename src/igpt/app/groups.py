"""Runs that differ in nothing but their seed are one thing, measured several times; what sets the others apart."""

from collections.abc import Mapping, Sequence
from typing import Any

from igpt.quoting import format_value
from igpt.report.folder import deciding
from igpt.report.runs import Run, flat

SEED = "seed"
INIT = "init"  # the weights a run began with: their run's settings stand under this name
OF_THE_CODE = ("_target_", "_partial_", "requires")
CHOSEN = {"model.name": "model", "objective.name": "objective"}  # as one chooses them
LONGEST = 48  # characters of a value that is shown


def settings_of(run: Run, *, deep: int = 3) -> dict[str, Any]:
    """What decides a run, flat, without seeds: its config, and under `init.` that of the runs its weights are of."""
    own = flat(deciding({"task": {}, "trainer": {"precision": None}} | run.config))
    found = {key: value for key, value in own.items() if key.rpartition(".")[2] not in OF_THE_CODE and key != SEED}
    if run.config.get(INIT) is not None:
        if run.start.runs and deep:
            before = settings_of(run.start.runs[0], deep=deep - 1)
            found |= {f"{INIT}.{key}": value for key, value in before.items()}
            found |= {f"{INIT}.step": run.start.origin.get("step")}
        else:
            found[INIT] = run.config[INIT]
    return found


def seeds_of(run: Run) -> tuple[Any, ...]:
    """The seed of a run and of those its weights are of: with these and `settings_of` it can be repeated."""
    return (run.config.get(SEED), *(before.config.get(SEED) for before in run.start.runs))


def grouped(runs: Sequence[Run]) -> tuple[list[list[Run]], dict[Run, Run]]:
    """Runs that differ in seeds alone, together, in the order they came; and repetitions, each with the run it repeats.

    A repetition says nothing new of the spread over seeds, so it is in no group. The newest of them counts.
    """
    groups: dict[str, dict[tuple[Any, ...], Run]] = {}
    repeated: list[tuple[Run, str, tuple[Any, ...]]] = []
    for run in runs:
        name, seeds = repr((run.task, sorted(settings_of(run).items(), key=lambda item: item[0]))), seeds_of(run)
        group = groups.setdefault(name, {})
        if seeds in group:
            newer, older = sorted([group[seeds], run], key=_written, reverse=True)
            repeated.append((older, name, seeds))
            run = newer
        group[seeds] = run
    return [list(group.values()) for group in groups.values()], {
        older: groups[name][seeds] for older, name, seeds in repeated
    }


def _written(run: Run) -> float:
    return (run.folder / "result.json").stat().st_mtime


def differing(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Of several settings those that are not the same everywhere, as they would be typed.

    What follows from a name that differs too (`model.n_layer` from `model.name`) is left out, and so is a palette's
    size that is the data's.
    """
    keys = list(dict.fromkeys(key for some in settings for key in some))
    values = {key: [_shown(some[key]) if key in some else "–" for some in settings] for key in keys}
    varied = [key for key in keys if len(set(values[key])) > 1]
    shown = [key for key in varied if not any(_follows(key, other, values) for other in varied)]
    return [{CHOSEN.get(key, key): values[key][row] for key in shown} for row in range(len(settings))]


def _follows(key: str, other: str, values: Mapping[str, Sequence[str]]) -> bool:
    """Whether `other` is the name of what `key` is a part of, and tells it."""
    names = other.endswith(".name") and key.startswith(other.removesuffix("name"))
    colours = key.endswith("tokens.palette.k") and other == f"{key.removesuffix('tokens.palette.k')}data.n_colour"
    if key == other or not (names or colours):
        return False
    return len(set(zip(values[other], values[key], strict=True))) == len(set(values[other]))


def _shown(value: Any) -> str:
    text = format_value(value, quoted=False)
    return text if len(text) <= LONGEST else f"…{text[-LONGEST:]}"
