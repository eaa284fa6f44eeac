"""Several tasks in turn, each starting from the weights of the one before."""

import logging
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
    for number, (name, settings) in enumerate(stages.items(), start=1):
        place = folder / f"{number}_{name}"
        log.info("stage %d of %d: %s", number, len(stages), name)
        result = stage(name, settings, folder=place, init=init)
        if (place / "model").is_dir():
            init = str(place)
        whole.numbers.update(result.numbers)
        whole.curves.update(result.curves)
        whole.files.update({key: Path(place.name) / path for key, path in result.files.items()})
        whole.provenance[name] = result.provenance
    return whole
