"""`task=pipeline`: runs several tasks in turn, each starting from the weights of an earlier one."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from igpt.distributed import ranks
from igpt.metric.result import Bars, Number, Result
from igpt.run.components import Components
from igpt.settings.reading import FROM, INIT, HeightKey, PipelineSettings
from igpt.tokens.tokenizer_registry import TOKENIZER
from igpt.utils import files

log = logging.getLogger(__name__)

Value = TypeVar("Value")

COPIED = (".png", ".txt", ".npy")  # files of a stage elsewhere that are copied, for the page


def run(components: Components, settings: PipelineSettings) -> Result:
    """Runs every stage in its own folder inside the run directory; returns all their results as `stage/name`.

    A stage starts from its own weights, `init`, or from those of the stage named in `from` (that it wrote or, if it
    writes none, started from); by default from those of the last that wrote some. Its images become the tokens of the
    last tokenizer that was trained before it, unless its weights have their own.
    """
    folder, init, stages = components.run_dir, components.init, settings.active_stages
    tokenizer: str | None = None
    results: dict[str, Result] = {}
    places: dict[str, Path] = {}
    weights: dict[str, str | None] = {}  # stage → those it wrote, else those it started from
    for position, (name, stage_settings) in enumerate(stages.items(), start=1):
        start: str | list[str] | None = init
        if (own := stage_settings.get(INIT)) is not None:
            start = own
        elif isinstance(source := stage_settings.get(FROM), list):
            start = [str(places[each]) for each in source]
        elif FROM in stage_settings:
            start = None if source is None else weights[source]
        log.info("stage %d of %d: %s", position, len(stages), name)
        stage_dir = folder / f"{position}_{name}"
        results[name], places[name] = components.run_stage(name, folder=stage_dir, init=start, tokenizer=tokenizer)
        has_weights = (places[name] / "model").is_dir()
        weights[name] = start if isinstance(start, str) and not has_weights else str(places[name])
        if (places[name] / "model" / TOKENIZER).is_file():
            tokenizer = str(places[name])
        elif FROM not in stage_settings and has_weights:
            init = str(places[name])
    merged = Result(provenance={name: result.provenance for name, result in results.items()})
    for position, (name, result) in enumerate(results.items(), start=1):
        merged.numbers |= _name_by_stage(name, result.numbers)
        merged.curves |= _name_by_stage(name, result.curves)
        merged.class_names |= _name_by_stage(name, result.class_names)
        merged.files |= _name_by_stage(name, gather_files(result, places[name], folder, f"{position}_{name}"))
    for picture, groups in settings.bars.items():
        if bars := _collect_bars(results, groups):
            merged.bars[picture] = bars
    for picture, lines in settings.curves.items():
        found = {name: _find(results, key, "curves") for name, key in lines.items() if _stage_name(key) in results}
        if found:
            merged.charts[picture] = found
    return merged


def gather_files(result: Result, place: Path, folder: Path, inside: str) -> dict[str, Path]:
    """The files of a stage, relative to the pipeline's `folder`.

    Of a stage elsewhere (`run=`), pictures, texts and counts are copied to `folder / inside`; others are left out.
    """
    if place.is_relative_to(folder):
        return {key: place.relative_to(folder) / path for key, path in result.files.items()}
    gathered = {}
    for key, path in result.files.items():
        source = files.resolve_below(place, path)
        if source is not None and source.is_file() and source.suffix in COPIED:
            gathered[key] = Path(inside) / path
            if ranks.this_rank().is_first:
                with files.atomic_path(folder / gathered[key]) as temporary:
                    shutil.copyfile(source, temporary)
    return gathered


def _name_by_stage(stage: str, values: Mapping[str, Value]) -> dict[str, Value]:
    return {f"{stage}/{key}": value for key, value in values.items()}


def _collect_bars(results: Mapping[str, Result], groups: Mapping[str, Mapping[str, HeightKey]]) -> Bars | None:
    """The bars of the stages that were run; None without one."""
    heights: dict[str, dict[str, Number]] = {}
    parts: dict[str, dict[str, Number]] = {}
    part_name = ""
    for group, series in groups.items():
        for which, keys in series.items():
            key, *inside = [keys] if isinstance(keys, str) else keys
            if _stage_name(key) in results:
                heights.setdefault(group, {})[which] = _find(results, key, "numbers")
                for part in inside:
                    parts.setdefault(group, {})[which] = _find(results, part, "numbers")
                    part_name = part.rpartition("/")[2].replace("_", " ")
    units = [number.unit for series in heights.values() for number in series.values()]
    return Bars(heights, units[0], parts, part_name) if units else None


def _stage_name(key: str) -> str:
    return key.partition("/")[0]


def _find(results: Mapping[str, Result], key: str, kind: Literal["numbers", "curves"]) -> Any:
    stage, _, name = key.partition("/")
    found: Mapping[str, Any] = getattr(results[stage], kind)
    if name not in found:
        where = "bars" if kind == "numbers" else "curves"
        raise ValueError(f"task.{where}: stage {stage} has found no {name}, but {', '.join(found)}")
    return found[name]
