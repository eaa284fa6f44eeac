"""Reads finished runs from their directories, and traces the history of their initial weights."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from igpt.metric.result import Result
from igpt.report.folder import RunFolder, parse_result
from igpt.settings.older_configs import read_record
from igpt.settings.paths import resolve_nearest
from igpt.utils import files

LONGEST_CHAIN = 9  # maximal runs in a chain of initial weights
STAGE = re.compile(r"\d+_(\w+)")  # directory of a stage
CHECKPOINT = re.compile(r"step_(\d+)(?:\.ckpt)?")


@dataclass(frozen=True, eq=False)
class RunRecord:
    """A finished run: its directory, the content of run.json and of result.json."""

    folder: Path
    begun: dict[str, Any]  # run.json; empty if that is missing
    record: dict[str, Any]  # result.json
    result: Result

    @property
    def task(self) -> str:
        return str(self.record["task"])

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.record["config"]
        return config

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The config, flat: `task.steps`."""
        return flatten(self.config)

    @cached_property
    def files_inside(self) -> dict[str, Path]:
        """Name → path of the result's files, relative to the directory; without those that lie outside of it."""
        every = self.result.files.items()
        return {key: path for key, path in every if files.resolve_below(self.folder, path) is not None}

    @property
    def is_stage(self) -> bool:
        """Whether it is a stage of a pipeline, whose directory is the parent."""
        return "overrides" in self.begun and self.begun["overrides"] is None

    @property
    def title(self) -> str:
        """The task, of a stage of a pipeline the stage's name: `scratch`."""
        named = STAGE.fullmatch(self.folder.absolute().name) if self.is_stage else None
        return named[1] if named else self.task

    @cached_property
    def command_record(self) -> dict[str, Any]:
        """The run.json of the command that made it; of a stage, that of its pipeline."""
        return _read_mapping(self.folder.absolute().parent / "run.json", read_record) if self.is_stage else self.begun

    @property
    def overrides(self) -> list[str] | None:
        """The overrides of the command that made it; None: not known."""
        overrides = self.command_record.get("overrides")
        return [str(override) for override in overrides] if isinstance(overrides, list) else None

    @property
    def search_path(self) -> list[str]:
        """The arguments of that command that named additional config folders."""
        arguments = self.command_record.get("search_path")
        return [str(argument) for argument in arguments] if isinstance(arguments, list) else []

    @cached_property
    def init_history(self) -> "InitHistory":
        """The history of its initial weights."""
        return trace_init(self)

    @cached_property
    def stages(self) -> list["Stage"]:
        """The stages of a pipeline, in order; empty for other tasks."""
        stages = self.config.get("task", {}).get("stages", {}) if self.task == "pipeline" else {}
        read = []
        active = {name: settings for name, settings in stages.items() if isinstance(settings, dict)}
        for position, (name, settings) in enumerate(active.items(), start=1):
            inside, given = f"{position}_{name}", settings.get("run")
            if given is None:
                place = files.resolve_below(self.folder, inside)
            else:
                beside = files.resolve_below(self.folder.absolute().parent, Path(str(given)).name)
                place = resolve_nearest(self.folder, str(given)) or beside
            if place is None:
                read.append(Stage(name, self.folder / inside, None, "it lies outside of the folder of runs"))
            else:
                read.append(Stage(name, place, *try_read_run(place)))
        return read


@dataclass(frozen=True)
class Stage:
    """A stage of a pipeline; `run` is None if it cannot be read, and `problem` is the reason."""

    name: str
    folder: Path
    run: RunRecord | None
    problem: str


@dataclass(frozen=True)
class InitHistory:
    """The initial weights of a run: their metadata, and the runs that made them, the last one first."""

    metadata: dict[str, Any] = field(default_factory=dict)  # as `summarize_metadata` shortens it
    runs: tuple[RunRecord, ...] = ()
    unknown: str = ""  # description of a gap in the history, and its reason

    @property
    def pretraining(self) -> RunRecord | None:
        """The pretraining run at the start of the history; None if its record is missing."""
        return self.runs[-1] if self.runs and self.runs[-1].task == "pretrain" else None


def flatten(settings: Any, key: str = "") -> dict[str, Any]:
    """Nested settings as a flat dict of dotted names; a list is one value."""
    if not isinstance(settings, dict) or not settings:
        return {key: settings}
    return {k: v for name, part in settings.items() for k, v in flatten(part, f"{key}.{name}".strip(".")).items()}


def read_run(folder: Path) -> RunRecord:
    """The finished run in a directory.

    Raises:
        ValueError: no run, an unfinished one, or a result.json that is damaged or of another version.
    """
    if not (folder / "result.json").is_file():
        begun = (folder / "run.json").is_file()
        raise ValueError("it is not finished: it has no result.json yet" if begun else "this is no run folder")
    try:
        record = RunFolder(folder).read_result()
    except OSError as error:
        raise ValueError(f"its result.json cannot be read ({error.strerror})") from error
    try:
        run = RunRecord(folder, _read_mapping(folder / "run.json", read_record), record, parse_result(record))
        _check(run)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"its result.json is damaged ({error!r:.80}): restore it, or repeat the run") from error
    return run


def read_finished(folder: Path) -> RunRecord:
    """As `read_run`; the error names the directory."""
    try:
        return read_run(folder)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _check(run: RunRecord) -> None:
    """Raises LookupError, TypeError, ValueError or AttributeError for a result not written by `RunFolder.finish`."""
    for number in run.result.numbers.values():
        spread = [x for x in (*(number.interval or ()), number.stderr, number.deviation) if x is not None]
        if not all(type(x) in (int, float) and math.isfinite(x) for x in (number.value, *spread)):
            raise ValueError("values that are no numbers")
        _ = f"{number.n:,}" + number.unit + number.features
    for curve in run.result.curves.values():
        if len(curve.x) != len(curve.y) or not all(map(math.isfinite, [*curve.x, *curve.y, *(curve.best or ())])):
            raise ValueError("a curve of other lengths, or of no numbers")
        for pairs in (curve.x_intervals, curve.y_intervals):
            if pairs is not None and (len(pairs) != len(curve.x) or not all(map(math.isfinite, chain(*pairs)))):
                raise ValueError("intervals of other lengths, or of no numbers")
        spreads = curve.y_deviations
        if spreads is not None and (len(spreads) != len(curve.x) or not all(map(math.isfinite, spreads))):
            raise ValueError("standard deviations of other lengths, or of no numbers")
        _ = curve.x_unit + curve.y_unit
    if not all(isinstance(part, dict) for part in (run.config, run.result.provenance, run.record["versions"])):
        raise ValueError("parts of another type")
    task = run.config.get("task", {})
    stages, inputs = task.get("stages", {}), task.get("runs")
    if not isinstance(stages, dict) or not isinstance(inputs, list | str | None):
        raise ValueError("a task of another type")
    if not all(isinstance(stage.get("run"), str | None) for stage in stages.values() if stage is not None):
        raise ValueError("stages of another type")
    _ = run.task, run.record["commit"] + "", float(run.record["seconds"])


def _read_mapping(path: Path, read: Callable[[Path], Any] = files.read_json) -> dict[str, Any]:
    """The object in a JSON file; {} if the file is missing, unreadable or no object."""
    try:
        content = read(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def try_read_run(folder: Path) -> tuple[RunRecord | None, str]:
    try:
        return read_run(folder), ""
    except (ValueError, OSError) as error:
        return None, str(error)


def trace_init(run: RunRecord, depth: int = 0) -> InitHistory:
    """The history of a run's initial weights, from its own record and from those of the runs that made them."""
    recorded = run.result.provenance.get("init")
    recorded = recorded if isinstance(recorded, dict) else {}
    init = run.config.get("init") or next(iter(run.config.get("task", {}).get("runs") or []), None)
    if not isinstance(init, str):
        return InitHistory(recorded)
    place = resolve_nearest(run.folder, init)
    around = [place, *place.parents[:3]] if place is not None else []
    before = next((folder for folder in around if (folder / "run.json").is_file()), None)
    if place is None or before is None or depth > LONGEST_CHAIN:
        why = "is not there any more, or not beside the run" if place is None else "is not a run's"
        return InitHistory(
            recorded or (_read_metadata(place) if place else {}), unknown=f"how its weights were trained ({init} {why})"
        )
    metadata = _read_metadata(before)
    began = run.result.provenance.get("from" if run.task == "finetune" else "weights")
    if step := next((m for folder in around[:3] if (m := CHECKPOINT.fullmatch(folder.name))), None):
        metadata["step"] = int(step[1])
    elif isinstance(began, str) and metadata.get("weights_sha256") not in (began, None):
        return InitHistory(recorded, unknown=f"how its weights were trained ({init} holds others now)")
    maker, problem = try_read_run(before)
    if maker is None:  # for example a checkpoint of an unfinished run
        return InitHistory(recorded or metadata, unknown=f"how its weights were trained ({before.name}: {problem})")
    earlier = trace_init(maker, depth + 1)
    makers = (maker,) if maker.task != "import" else ()
    return InitHistory(
        metadata | recorded, (*makers, *earlier.runs), "" if maker.task == "pretrain" else earlier.unknown
    )


def read_objective(run: RunRecord) -> str:
    """ar or bert; "" with `objective=checkpoint` and missing weights."""
    name = str(run.settings.get("objective.name"))
    saved = run.init_history.metadata.get("objective") or {"name": ""}
    return str(saved["name"]) if name == "checkpoint" else name


def _read_metadata(folder: Path) -> dict[str, Any]:
    """The shortened metadata of the weights in a run directory or a `model/`; {} without weights."""
    return summarize_metadata(_read_mapping(folder / "config.json") or _read_mapping(folder / "model" / "config.json"))


def summarize_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata of weights without the numbers in their tokenizer; `order` of its tokens: `raster` or `other`."""
    summary = {key: value for key, value in metadata.items() if key not in ("palette", "permutation", "tokenizer")}
    tokenizer = metadata.get("tokenizer")
    of_tokens = tokenizer if isinstance(tokenizer, dict) else {}
    if of_tokens:
        summary["tokenizer"] = {key: of_tokens[key] for key in ("kind", "hash", "patch", "config") if key in of_tokens}
    order = of_tokens.get("permutation", metadata.get("permutation"))
    return summary | ({"order": "raster" if order == sorted(order) else "other"} if isinstance(order, list) else {})
