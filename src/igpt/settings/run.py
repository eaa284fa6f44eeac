"""Top-level settings of a run: the keys of `conf/config.yaml` outside the groups."""

from typing import Any

from igpt.settings.fields import Seed, Settings


class PathSettings(Settings):
    """Output folders."""

    runs: str
    cache: str


class RunSettings(Settings):
    """Seed, initial weights and output of a run."""

    seed: Seed
    init: str | None
    resume: str | None
    rerun: bool
    published: list[Any]
    paths: PathSettings
