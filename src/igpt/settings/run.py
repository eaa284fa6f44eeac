"""Settings of a run that belong to no group: the keys of `conf/config.yaml`."""

from typing import Any

from igpt.settings.fields import Seed, Settings


class PathSettings(Settings):
    """Folders of this machine that are written."""

    runs: str
    cache: str


class RunSettings(Settings):
    """What a run starts from and where it goes."""

    seed: Seed
    init: str | None
    resume: str | None
    force: bool
    published: list[Any]
    paths: PathSettings
