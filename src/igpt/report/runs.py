"""Finished runs, read back from their folders; and where the weights came from that each began with."""

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any

from igpt.metric.result import Result
from igpt.report.folder import RunFolder, result_of
from igpt.settings.older_configs import read_record
from igpt.utils import files

COMPARE = "compare"  # the task whose own results are never compared
DEEPEST = 4  # folders between one that is given and a run in it
LONGEST_CHAIN = 9  # runs, each from the weights of the one before
CHECKPOINT = re.compile(r"step_(\d+)(?:\.ckpt)?")


@dataclass(frozen=True, eq=False)
class RunRecord:
    """A finished run: its folder, what it wrote when it began (run.json) and when it ended (result.json)."""

    folder: Path
    begun: dict[str, Any]  # run.json; empty where it is gone
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
        return flat(self.config)

    @property
    def is_stage(self) -> bool:
        """Whether it is part of a pipeline, whose folder is the one around it."""
        return "overrides" in self.begun and self.begun["overrides"] is None

    @cached_property
    def overrides(self) -> list[str] | None:
        """Those of the command that made it, a pipeline's where it is a stage of one; None: not known."""
        begun = _read_mapping(self.folder.absolute().parent / "run.json", read_record) if self.is_stage else self.begun
        overrides = begun.get("overrides")
        return [str(override) for override in overrides] if isinstance(overrides, list) else None

    @cached_property
    def init_history(self) -> "InitHistory":
        """Where its weights came from."""
        return init_history_of(self)

    @cached_property
    def stages(self) -> list["Stage"]:
        """The stages of a pipeline, in their order; of another task none."""
        asked = self.config.get("task", {}).get("stages", {}) if self.task == "pipeline" else {}
        folders = {}
        for position, (name, own) in enumerate(((n, own) for n, own in asked.items() if own is not None), start=1):
            given = own.get("run")
            beside = None if given is None else self.folder.absolute().parent / Path(given).name
            folders[name] = (given and nearest_path(self.folder, given)) or beside or self.folder / f"{position}_{name}"
        return [Stage(name, folder, *_read_or_reason(folder)) for name, folder in folders.items()]


@dataclass(frozen=True)
class Stage:
    """A stage of a pipeline; `run` is None where nothing finished is to be read, and `problem` is why."""

    name: str
    folder: Path
    run: RunRecord | None
    problem: str


@dataclass(frozen=True)
class InitHistory:
    """The weights that a run began with: what they are, and the runs that made them, the last one first."""

    metadata: dict[str, Any] = field(default_factory=dict)  # as `brief` shortens it
    runs: tuple[RunRecord, ...] = ()
    unknown: str = ""  # what is not known of them, and why

    @property
    def pretraining(self) -> RunRecord | None:
        """The run that made them from nothing, where its record is there."""
        return self.runs[-1] if self.runs and self.runs[-1].task == "pretrain" else None


@dataclass
class Found:
    """The runs at some places, and why there are not more."""

    runs: list[RunRecord] = field(default_factory=list)
    problems: dict[Path, str] = field(default_factory=dict)  # folder → what is wrong with it

    @property
    def input_hashes(self) -> dict[str, str | None]:
        """Folder → a hash of its result; also of stages in it and of the runs before it: all that is said of them."""
        hashes: dict[str, str | None] = {str(path): why for path, why in self.problems.items()}
        waiting = list(self.runs)
        while waiting:
            run = waiting.pop()
            for part in (run, *run.init_history.runs):
                hashes[str(part.folder)] = files.sha256(part.folder / "result.json")
            hashes[f"init of {run.folder}"] = run.init_history.unknown
            hashes |= {str(stage.folder): stage.problem for stage in run.stages if stage.run is None}
            waiting += [stage.run for stage in run.stages if stage.run is not None]
        return hashes


def flat(settings: Any, key: str = "") -> dict[str, Any]:
    """Nested settings under dotted names; a list is one value."""
    if not isinstance(settings, dict) or not settings:
        return {key: settings}
    return {k: v for name, part in settings.items() for k, v in flat(part, f"{key}.{name}".strip(".")).items()}


def read_run(folder: Path) -> RunRecord:
    """The finished run in a folder.

    Raises:
        ValueError: there is none, it is not finished, or its result.json is damaged or of another version.
    """
    if not (folder / "result.json").is_file():
        begun = (folder / "run.json").is_file()
        raise ValueError("it is not finished: it has no result.json yet" if begun else "this is no run folder")
    try:
        record = RunFolder(folder).read_result()
    except OSError as error:
        raise ValueError(f"its result.json cannot be read ({error.strerror})") from error
    try:
        run = RunRecord(folder, _read_mapping(folder / "run.json", read_record), record, result_of(record))
        _check(run)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"its result.json is damaged ({error!r:.80}): restore it, or repeat the run") from error
    return run


def _check(run: RunRecord) -> None:
    """Raises one of several errors where the result is not what `RunFolder.finish` writes."""
    for number in run.result.numbers.values():
        spread = [x for x in (*(number.interval or ()), number.stderr, number.deviation) if x is not None]
        if not all(type(x) in (int, float) and math.isfinite(x) for x in (number.value, *spread)):
            raise ValueError("values that are no numbers")
        _ = f"{number.n:,}" + number.unit
    for curve in run.result.curves.values():
        if len(curve.x) != len(curve.y) or not all(map(math.isfinite, [*curve.x, *curve.y])):
            raise ValueError("a curve of other lengths, or of no numbers")
        _ = curve.x_unit + curve.y_unit
    _ = run.task, dict(run.config), dict(run.result.provenance), dict(run.record["versions"])
    _ = run.record["commit"] + "", float(run.record["seconds"])


def _read_mapping(path: Path, read: Callable[[Path], Any] = files.read_json) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none, or none that can be read."""
    try:
        content = read(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_or_reason(folder: Path) -> tuple[RunRecord | None, str]:
    try:
        return read_run(folder), ""
    except ValueError as error:
        return None, str(error)


def found(places: Sequence[str]) -> Found:
    """Every finished run at some places, each once: run folders, globs, and folders that hold run folders.

    What cannot be used is noted, not fatal. Comparisons that were made before are passed over.

    Raises:
        ValueError: a place where there is nothing.
    """
    here: dict[Path, Path] = {}
    for place in places:
        pattern = str(Path(place).expanduser())
        named = [Path(pattern)] if os.path.exists(pattern) else [Path(path) for path in sorted(glob(pattern))]
        if not named:
            raise ValueError(f"there is nothing at {place}: give run folders, a glob, or a folder that holds them")
        for path in named:
            own = path.parent if path.name == "result.json" else path
            here |= {folder.resolve(): folder for folder in _run_folders(own)}
    all_found = Found()
    for folder in here.values():
        run, problem = _read_or_reason(folder)
        if run is None:
            all_found.problems[folder] = problem
        elif run.task != COMPARE:
            all_found.runs.append(run)
    return all_found


def _run_folders(place: Path, depth: int = 0) -> Iterator[Path]:
    """Folders of runs at or below a place; what is inside a run belongs to it."""
    if any((place / name).is_file() for name in ("run.json", "result.json")):
        if not place.name.startswith(f"{COMPARE}-") or (place / "result.json").is_file():
            yield place
    elif place.is_dir() and depth < DEEPEST:
        for inside in sorted(place.iterdir()):
            if inside.is_dir() and not inside.name.startswith("."):
                yield from _run_folders(inside, depth + 1)


def nearest_path(folder: Path, path: str) -> Path | None:
    """A path that a run was given, which may be from where that was started: here, or from a folder around the run's.

    None: it is not there.
    """
    place = Path(path).expanduser()
    tried = [place, *(around / place for around in folder.absolute().parents)]
    return next((candidate for candidate in tried if candidate.exists()), None)


def init_history_of(run: RunRecord, depth: int = 0) -> InitHistory:
    """Where a run's weights came from: by its own record, and by those of the runs before it."""
    told = run.result.provenance.get("init")
    told = told if isinstance(told, dict) else {}
    init = run.config.get("init") or next(iter(run.config.get("task", {}).get("runs") or []), None)
    if not isinstance(init, str):
        return InitHistory(told)
    place = nearest_path(run.folder, init)
    around = [place, *place.parents[:3]] if place is not None else []
    before = next((folder for folder in around if (folder / "run.json").is_file()), None)
    if place is None or before is None or depth > LONGEST_CHAIN:
        why = "is not there any more" if place is None else "is not a run's"
        return InitHistory(
            told or (_metadata(place) if place else {}), unknown=f"how its weights were trained ({init} {why})"
        )
    metadata = _metadata(before)
    began = run.result.provenance.get("from" if run.task == "finetune" else "weights")
    if step := next((m for folder in around[:3] if (m := CHECKPOINT.fullmatch(folder.name))), None):
        metadata["step"] = int(step[1])
    elif isinstance(began, str) and metadata.get("weights_sha256") not in (began, None):
        return InitHistory(told, unknown=f"how its weights were trained ({init} holds others now)")
    maker, problem = _read_or_reason(before)
    if maker is None:  # a checkpoint of a run that is not finished, say
        return InitHistory(told or metadata, unknown=f"how its weights were trained ({before.name}: {problem})")
    earlier = init_history_of(maker, depth + 1)
    made = (maker,) if maker.task != "import" else ()
    return InitHistory(metadata | told, (*made, *earlier.runs), "" if maker.task == "pretrain" else earlier.unknown)


def objective_of(run: RunRecord) -> str:
    """ar or bert; empty where it is that of weights that are not there any more."""
    own = str(run.settings.get("objective.name"))
    known = run.init_history.metadata.get("objective") or {"name": ""}
    return str(known["name"]) if own == "checkpoint" else own


def _metadata(folder: Path) -> dict[str, Any]:
    """What the weights in a run's folder, or in a `model/`, say of themselves; nothing where there are none."""
    return brief(_read_mapping(folder / "config.json") or _read_mapping(folder / "model" / "config.json"))


def brief(metadata: dict[str, Any]) -> dict[str, Any]:
    """What weights say of themselves, the order of the tokens as `raster` or `other`, without the colours."""
    said = {key: value for key, value in metadata.items() if key not in ("palette", "permutation", "tokenizer")}
    tokenizer = metadata.get("tokenizer")
    of_tokens = tokenizer if isinstance(tokenizer, dict) else {}
    if of_tokens:
        said["tokenizer"] = {key: of_tokens[key] for key in ("kind", "hash", "patch") if key in of_tokens}
    order = of_tokens.get("permutation", metadata.get("permutation"))
    return said | ({"order": "raster" if order == sorted(order) else "other"} if isinstance(order, list) else {})
