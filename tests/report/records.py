"""Finished runs as `launch` leaves them, written without running."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from igpt.metric.result import Curve, Number, Result
from igpt.report.folder import RunFolder

RUNS = "runs"
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \"quoted\" 'single' & {{ 7 * 7 }}"
LINKING = {"src", "href", "srcset", "data", "action", "poster", "xlink:href", "background"}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    full: dict[str, Any] = {}
    for key, value in flat.items():
        *groups, name = key.split(".")
        place = full
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return full


def made(
    folder: Path,
    numbers: dict[str, Number],
    *,
    provenance: Any = None,
    of: dict[str, str] | None = None,
    curves: dict[str, Curve] | None = None,
    **settings: Any,
) -> Path:
    """A finished run as `launch` leaves one; settings by dotted name, with `__` for the dots."""
    plain = {
        "seed": 0, "init": None, "task.name": "pretrain", "task.requires": ["network"], "data.name": "digits",
        "data.resolution": 8, "data.palette_size": 17, "tokens.order": "raster", "model.name": "igpt_nano",
        "objective.name": "ar", "trainer.precision": "32-true",
    }  # fmt: skip
    config = nested({**plain, **{key.replace("__", "."): value for key, value in settings.items()}})
    run = RunFolder(folder)
    run.start(config, [], {}, of)
    run.finish(config["task"]["name"], Result(numbers, curves or {}, provenance=provenance or {}), seconds=1.0)
    return folder


def loss(value: float, stderr: float | None = None) -> dict[str, Number]:
    return {"val/loss_gen": Number(value, "nats/token", 100, stderr), "val/accuracy": Number(1 / value, "share", 100)}


class Page(HTMLParser):
    """The tags of a page with their attributes, and all its text outside of script and style."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text, self.inside = "", ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def finished(path: Path, result: Result, config: dict[str, Any] | None = None, task: str = "sample") -> RunFolder:
    """A run folder as a run that found `result` leaves it."""
    folder = RunFolder(path)
    plain: dict[str, Any] = {
        "seed": 0,
        "model": {"name": "igpt_nano"},
        "data": {"name": "digits", "resolution": 8},
        "objective": {"name": "ar"},
        "task": {"name": task, "requires": ["tokens"], "count": 4},
    }
    folder.start(plain | (config or {}), [f"task={task}", "seed=0"], {})
    folder.finish(task, result, seconds=235.6)
    return folder


NAMES = (HOSTILE, "כלב", "two\nlines", "\u202eevil", "x" * 300, "👩\u200d🌾", "\udcff", "$x$")


def classified(path: Path, names: tuple[str, ...] | None) -> RunFolder:
    """A run that took 8 · (row + 1) + column images of each class of eight for each other."""
    result = Result()
    result.add_confusion(8 * np.arange(1, 9)[:, None] + np.arange(8), names)
    return finished(path, result, task="evaluate")
