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
    folder, init, stages = components.run_dir, components.init, settings.active_stages
    results: dict[str, Result] = {}
    places: dict[str, Path] = {}
    for position, (name, stage_settings) in enumerate(stages.items(), start=1):
        start: str | list[str] | None = init
        if isinstance(source := stage_settings.get(FROM), list):
            start = [str(places[each]) for each in source]
        elif FROM in stage_settings:
            start = None if source is None else str(places[source])
        log.info("stage %d of %d: %s", position, len(stages), name)
        results[name], places[name] = components.run_stage(name, folder=folder / f"{position}_{name}", init=start)
        if FROM not in stage_settings and (places[name] / "model").is_dir():
            init = str(places[name])
    merged = Result(numbers=merge({name: result.numbers for name, result in results.items()}, is_same_value))
    merged.curves = merge({name: result.curves for name, result in results.items()}, lambda a, b: False)
    merged.files = merge(
        {name: {key: _relative_to(folder, places[name] / path) for key, path in result.files.items()}
         for name, result in results.items()}, lambda a, b: False
    )  # fmt: skip
    merged.class_names = {
        of_stage if (of_stage := f"{name}/{key}") in merged.files else key: names
        for name, result in results.items()
        for key, names in result.class_names.items()
    }
    merged.provenance = {name: result.provenance for name, result in results.items()}
    for picture, groups in settings.bars.items():
        heights = {
            group: {which: _find_number(results, key) for which, key in series.items()}
            for group, series in groups.items()
        }
        units = [number.unit for series in heights.values() for number in series.values()]
        merged.bars[picture] = Bars(heights, units[0])
    return merged


def merge(of_stages: Mapping[str, Mapping[str, Value]], same: Callable[[Value, Value], bool]) -> dict[str, Value]:
    """The values of all stages by name; a name with different values becomes `stage/name` for each of them."""
    by_name: dict[str, list[tuple[str, Value]]] = {}
    for stage, values in of_stages.items():
        for key, value in values.items():
            different = by_name.setdefault(key, [])
            if not any(same(value, other) for _, other in different):
                different.append((stage, value))
    return {
        key if len(different) == 1 else f"{stage}/{key}": value
        for key, different in by_name.items()
        for stage, value in different
    }


def is_same_value(a: Number, b: Number) -> bool:
    """Whether two numbers are one measurement: equal but for rounding. Shares can be equal by chance: never."""
    return a.unit != "share" and math.isclose(a.value, b.value, rel_tol=1e-6)


def _find_number(results: Mapping[str, Result], key: str) -> Number:
    stage, _, name = key.partition("/")
    numbers = results[stage].numbers
    if name not in numbers:
        raise ValueError(f"task.bars: stage {stage} has found no {name}, but {', '.join(numbers)}")
    return numbers[name]


def _relative_to(folder: Path, path: Path) -> Path:
    return path.relative_to(folder) if path.is_relative_to(folder) else path.absolute()
