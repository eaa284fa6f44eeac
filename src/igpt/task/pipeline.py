"""Several tasks in turn, each starting from the weights of the one before."""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from igpt.metric.result import Result

log = logging.getLogger(__name__)


def run(
    *,
    stage: Callable[..., Result],
    folder: Path,
    init: str | None,
    stages: Mapping[str, Mapping[str, Any]],
) -> Result:
    """Runs every stage in a folder of its own inside the run's, and gathers what they found out.

    `stage(name, settings, folder=, init=)` builds and runs one; it returns at once when that folder holds its result.
    """
    whole = Result()
    for position, (name, settings) in enumerate(stages.items(), start=1):
        place = folder / f"{position}_{name}"
        log.info("stage %d of %d: %s", position, len(stages), name)
        result = stage(name, settings, folder=place, init=init)
        if (place / "model").is_dir():
            init = str(place)
        for key, number in result.numbers.items():  # a later stage of the same kind does not hide an earlier one
            known = whole.numbers.get(key)
            same = known is None or math.isclose(known.value, number.value, rel_tol=1e-6)
            whole.numbers[key if same else f"{name}/{key}"] = number
        for key, curve in result.curves.items():
            whole.curves[key if key not in whole.curves else f"{name}/{key}"] = curve
        for key, path in result.files.items():
            whole.files[key if key not in whole.files else f"{name}/{key}"] = Path(place.name) / path
        whole.provenance[name] = result.provenance
    return whole
