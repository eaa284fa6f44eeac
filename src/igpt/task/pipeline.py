"""`task=pipeline`: runs several tasks in turn, each starting from the weights of an earlier one."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from igpt.distributed import ranks
from igpt.metric.result import Bars, Number, Result
from igpt.run.components import Components
from igpt.settings.reading import FROM, PipelineSettings
from igpt.tokens.tokenizer_registry import TOKENIZER
from igpt.utils import files

log = logging.getLogger(__name__)

Value = TypeVar("Value")

COPIED = (".png", ".txt", ".npy")  # files of a stage elsewhere that are copied, for the page


def run(components: Components, settings: PipelineSettings) -> Result:
    """Runs every stage in its own folder inside the run directory; returns all their results as `stage/name`.

    A stage starts from the weights of the stage named in `from`; by default from those of the last that wrote some. Its
    images become the tokens of the last tokenizer that was trained before it, unless its weights have their own.
    """
    folder, init, stages = components.run_dir, components.init, settings.active_stages
    tokenizer: str | None = None
    results: dict[str, Result] = {}
    places: dict[str, Path] = {}
    for position, (name, stage_settings) in enumerate(stages.items(), start=1):
        start: str | list[str] | None = init
        if isinstance(source := stage_settings.get(FROM), list):
            start = [str(places[each]) for each in source]
        elif FROM in stage_settings:
            start = None if source is None else str(places[source])
        log.info("stage %d of %d: %s", position, len(stages), name)
        stage_dir = folder / f"{position}_{name}"
        results[name], places[name] = components.run_stage(name, folder=stage_dir, init=start, tokenizer=tokenizer)
        if (places[name] / "model" / TOKENIZER).is_file():
            tokenizer = str(places[name])
        elif FROM not in stage_settings and (places[name] / "model").is_dir():
            init = str(places[name])
    merged = Result(provenance={name: result.provenance for name, result in results.items()})
    for position, (name, result) in enumerate(results.items(), start=1):
        merged.numbers |= _name_by_stage(name, result.numbers)
        merged.curves |= _name_by_stage(name, result.curves)
        merged.class_names |= _name_by_stage(name, result.class_names)
        merged.files |= _name_by_stage(name, gather_files(result, places[name], folder, f"{position}_{name}"))
    for picture, groups in settings.bars.items():
        heights = {
            group: {which: _find_number(results, key) for which, key in series.items()}
            for group, series in groups.items()
        }
        units = [number.unit for series in heights.values() for number in series.values()]
        merged.bars[picture] = Bars(heights, units[0])
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


def _find_number(results: Mapping[str, Result], key: str) -> Number:
    stage, _, name = key.partition("/")
    numbers = results[stage].numbers
    if name not in numbers:
        raise ValueError(f"task.bars: stage {stage} has found no {name}, but {', '.join(numbers)}")
    return numbers[name]
