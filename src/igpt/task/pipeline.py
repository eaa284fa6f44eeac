"""`task=pipeline`: runs several tasks in turn, each starting from the weights of an earlier one."""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from igpt.metric.result import Bars, Number, Result
from igpt.run.components import Components
from igpt.settings.reading import FROM, PipelineSettings

log = logging.getLogger(__name__)

Value = TypeVar("Value")


def run(components: Components, settings: PipelineSettings) -> Result:
    """Runs every stage in its own folder inside the run directory and merges their results.

    A stage starts from the weights of the stage named in `from`; by default from those of the last that wrote some.
    """
    folder, init, stages = components.run_dir, components.init, settings.listed
    results: dict[str, Result] = {}
    places: dict[str, Path] = {}
    for position, (name, own) in enumerate(stages.items(), start=1):
        start: str | list[str] | None = init
        if FROM in own:
            asked = own[FROM]
            if isinstance(asked, list):
                start = [str(places[source]) for source in asked]
            else:
                start = None if asked is None else str(places[asked])
        log.info("stage %d of %d: %s", position, len(stages), name)
        results[name], places[name] = components.run_stage(name, folder=folder / f"{position}_{name}", init=start)
        if FROM not in own and (places[name] / "model").is_dir():
            init = str(places[name])
    whole = Result(numbers=named({name: result.numbers for name, result in results.items()}, same))
    whole.curves = named({name: result.curves for name, result in results.items()}, lambda ours, theirs: False)
    whole.files = named(
        {name: {key: _inside(folder, places[name] / path) for key, path in result.files.items()}
         for name, result in results.items()}, lambda ours, theirs: False
    )  # fmt: skip
    whole.class_names = {
        of_stage if (of_stage := f"{name}/{key}") in whole.files else key: names
        for name, result in results.items()
        for key, names in result.class_names.items()
    }
    whole.provenance = {name: result.provenance for name, result in results.items()}
    for picture, groups in settings.bars.items():
        heights = {
            group: {which: _number(results, key) for which, key in series.items()} for group, series in groups.items()
        }
        units = [number.unit for series in heights.values() for number in series.values()]
        whole.bars[picture] = Bars(heights, units[0])
    return whole


def named(of_stages: Mapping[str, Mapping[str, Value]], same: Callable[[Value, Value], bool]) -> dict[str, Value]:
    """The values of all stages by name; a name with different values becomes `stage/name` for each of them."""
    found: dict[str, list[tuple[str, Value]]] = {}
    for stage, values in of_stages.items():
        for key, value in values.items():
            known = found.setdefault(key, [])
            if not any(same(value, other) for _, other in known):
                known.append((stage, value))
    return {
        key if len(known) == 1 else f"{stage}/{key}": value for key, known in found.items() for stage, value in known
    }


def same(ours: Number, theirs: Number) -> bool:
    """Whether two numbers are one measurement: equal but for rounding. Shares can be equal by chance: never."""
    return ours.unit != "share" and math.isclose(ours.value, theirs.value, rel_tol=1e-6)


def _number(results: Mapping[str, Result], key: str) -> Number:
    stage, _, name = key.partition("/")
    numbers = results[stage].numbers
    if name not in numbers:
        raise ValueError(f"task.bars: stage {stage} has found no {name}, but {', '.join(numbers)}")
    return numbers[name]


def _inside(folder: Path, path: Path) -> Path:
    return path.relative_to(folder) if path.is_relative_to(folder) else path.absolute()
