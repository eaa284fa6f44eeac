"""Runs that differ in nothing but their seed are one thing, measured several times; what sets the others apart."""

from collections.abc import Mapping, Sequence
from typing import Any

from igpt.report.folder import deciding
from igpt.report.runs import RunRecord, flat
from igpt.utils.overrides import format_value

OF_THE_CODE = ("_target_", "_partial_")
CHOSEN = {"model.name": "model", "objective.name": "objective"}  # as one chooses them
LONGEST = 48  # characters of a value that is shown


def settings_of(run: RunRecord, *, deep: int = 3) -> dict[str, Any]:
    """What decides a run, flat, without seeds: its config, and under `init.` that of the runs its weights are of."""
    own = flat(deciding({"task": {}, "trainer": {"precision": None}} | run.config))
    found = {key: value for key, value in own.items() if key.rpartition(".")[2] not in OF_THE_CODE and key != "seed"}
    history = run.init_history
    if run.config.get("init") is None:
        return found
    if not history.runs or not deep:
        return found | {"init": run.config["init"]}
    before = settings_of(history.runs[0], deep=deep - 1) | {"step": history.metadata.get("step")}
    return found | {f"init.{key}": value for key, value in before.items()}


def grouped(runs: Sequence[RunRecord]) -> tuple[list[list[RunRecord]], dict[RunRecord, RunRecord]]:
    """Runs that differ in seeds alone, together, in the order they came; and repetitions, each with the run it repeats.

    A repetition says nothing new of the spread over seeds, so it is in no group. The newest of them counts.
    """
    same: dict[str, dict[tuple[Any, ...], list[RunRecord]]] = {}  # settings → seeds → repetitions
    for run in runs:
        settings = repr((run.task, sorted(settings_of(run).items(), key=lambda item: item[0])))
        seeds = tuple(of.config.get("seed") for of in (run, *run.init_history.runs))
        same.setdefault(settings, {}).setdefault(seeds, []).append(run)
    groups: list[list[RunRecord]] = []
    repeated: dict[RunRecord, RunRecord] = {}
    for group in same.values():
        newest = [max(again, key=lambda run: (run.folder / "result.json").stat().st_mtime) for again in group.values()]
        groups.append(newest)
        repeated |= {
            run: new for again, new in zip(group.values(), newest, strict=True) for run in again if run is not new
        }
    return groups, repeated


def differing(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Of several settings those that are not the same everywhere, as they would be typed.

    What follows from a name that differs too (`model.n_layer` from `model.name`) is left out, and so is a palette's
    size that is the data's.
    """
    keys = list(dict.fromkeys(key for some in settings for key in some))
    values = {key: [typed(some[key]) if key in some else "–" for some in settings] for key in keys}
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


def typed(value: Any) -> str:
    """A setting as one would type it; of a long one the end."""
    text = format_value(value, quoted=False)
    return text if len(text) <= LONGEST else f"…{text[-LONGEST:]}"
