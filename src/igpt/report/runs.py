"""Finished runs, read back from their folders; and where the weights came from that each began with."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any

from igpt import files
from igpt.metric.result import Number, Result
from igpt.report.folder import RunFolder, result_of

COMPARE = "compare"  # the task whose own results are never compared
DEEPEST = 4  # folders between one that is given and a run in it
CHECKPOINT = re.compile(r"step_(\d+)(?:\.ckpt)?")


@dataclass(frozen=True, eq=False)
class Run:
    """A run that ended well, and what it says of itself."""

    folder: Path
    record: dict[str, Any]  # result.json
    result: Result

    @property
    def task(self) -> str:
        return str(self.record["task"])

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.record["config"]
        return config

    @property
    def numbers(self) -> dict[str, Number]:
        return self.result.numbers

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The config, flat: `task.steps`."""
        return flat(self.config)

    @cached_property
    def start(self) -> "Start":
        return start_of(self)

    @property
    def stages(self) -> "Found":
        """The runs that a pipeline was made of, also those that were made before it; of another task none."""
        stages = self.config["task"].get("stages")
        listed = stages if isinstance(stages, dict) else {}
        given = [own["run"] for own in listed.values() if isinstance(own, dict) and own.get("run")]
        inside = sorted(path for path in self.folder.glob("*_*") if (path / "run.json").is_file())
        told = [place for path in given if (place := nearest_path(self.folder, str(path))) is not None]
        return found([str(path) for path in (*inside, *told)]) if listed else Found()


@dataclass
class Found:
    """The runs at some places, and why there are not more."""

    runs: list[Run] = field(default_factory=list)
    problems: dict[Path, str] = field(default_factory=dict)  # folder → what is wrong with it

    @property
    def said(self) -> list[str]:
        """One line for each folder that could not be read."""
        return [f"{path}: {why}" for path, why in self.problems.items()]

    @property
    def input_hashes(self) -> dict[str, str | None]:
        """Folder → a hash of its result; also of stages in it and of the runs before it: all that is said of them."""
        hashes: dict[str, str | None] = {str(path): why for path, why in self.problems.items()}
        for run in self.runs:
            for part in (run, *run.start.runs):
                hashes[str(part.folder)] = files.sha256(part.folder / "result.json")
            hashes[f"init of {run.folder}"] = run.start.unknown
            hashes |= run.stages.input_hashes
        return hashes


def flat(settings: Any, key: str = "") -> dict[str, Any]:
    """Nested settings under dotted names; a list is one value."""
    if not isinstance(settings, dict) or not settings:
        return {key: settings}
    return {k: v for name, part in settings.items() for k, v in flat(part, f"{key}.{name}".strip(".")).items()}


def read_run(folder: Path) -> Run:
    """The finished run in a folder.

    Raises:
        ValueError: there is none, it is not finished, or its result.json is damaged or of another version.
    """
    if not (folder / "result.json").is_file():
        begun = (folder / "run.json").is_file()
        raise ValueError("it is not finished: it has no result.json yet" if begun else "this is no run folder")
    try:
        record = RunFolder(folder).read_result()
        result = result_of(record)
        task, config = record["task"], record["config"]
        groups = [isinstance(config[group], dict) for group in ("task", "data", "model", "trainer")]
        if not (isinstance(task, str) and isinstance(result.provenance, dict) and all(groups)):
            raise TypeError("settings that are none")
        if not all(_is_number(number) for number in result.numbers.values()):
            raise TypeError("values that are no numbers")
    except OSError as error:
        raise ValueError(f"its result.json cannot be read ({error.strerror})") from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"its result.json is damaged ({error!r:.80}): restore it, or repeat the run") from error
    return Run(folder, record, result)


def _is_number(number: Number) -> bool:
    measured = (
        number.value,
        *(number.interval or ()),
        *(x for x in (number.stderr, number.deviation) if x is not None),
    )
    finite = all(type(value) in (int, float) and math.isfinite(value) for value in measured)
    return finite and type(number.n) is int and isinstance(number.unit, str)


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
        try:
            run = read_run(folder)
        except ValueError as error:
            all_found.problems[folder] = str(error)
            continue
        if run.task != COMPARE:
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


@dataclass(frozen=True)
class Start:
    """The weights that a run began with: what they are, and the runs that made them, the last one first."""

    origin: dict[str, Any] = field(default_factory=dict)  # as in `checkpoint.native.Origin`, without the long lists
    runs: tuple[Run, ...] = ()
    unknown: str = ""  # what is not known of them, and why

    @property
    def pretraining(self) -> Run | None:
        """The run that made them from nothing, where its record is there."""
        return self.runs[-1] if self.runs and self.runs[-1].task == "pretrain" else None


def nearest_path(folder: Path, path: str) -> Path | None:
    """A path that a run was given, which may be from where that was started: here, or from a folder around the run's.

    None: it is not there, or is no path.
    """
    place = Path(path).expanduser()
    tried = [place, *(around / place for around in folder.absolute().parents)]
    return next((candidate for candidate in tried if candidate.exists()), None)


def start_of(run: Run, depth: int = 0) -> Start:
    """Where a run's weights came from: by its own record, and by those of the runs before it."""
    said = run.result.provenance.get("init")
    told: dict[str, Any] = said if isinstance(said, dict) else {}
    init = run.config.get("init") or next(iter(run.config["task"].get("runs") or []), None)
    if not isinstance(init, str):
        return Start(told)
    place = nearest_path(run.folder, init)
    before = place and next((p for p in (place, *place.parents[:3]) if (p / "run.json").is_file()), None)
    if place is None or before is None or depth > 9:
        there = place and next((p for p in (place / "config.json", place / "model/config.json") if p.is_file()), None)
        origin = told or (_origin(there) if there else {})
        why = "is not there any more" if place is None else "is not a run's"
        return Start(origin, unknown=f"how its weights were trained ({init} {why})")
    origin = _origin(before / "model" / "config.json")
    began = run.result.provenance.get("from" if run.task == "finetune" else "weights")
    step = next((int(m[1]) for p in (place, *place.parents[:2]) if (m := CHECKPOINT.fullmatch(p.name))), None)
    if step is not None:
        origin["step"] = step
    elif isinstance(began, str) and origin.get("weights_sha256") not in (began, None):
        return Start(told, unknown=f"how its weights were trained ({init} holds others now)")
    try:
        maker = read_run(before)
    except ValueError as error:  # a checkpoint of a run that is not finished, say
        return Start(told or origin, unknown=f"how its weights were trained ({before.name}: {error})")
    earlier = start_of(maker, depth + 1)
    made = (maker,) if maker.task != "import" else ()
    return Start(origin | told, (*made, *earlier.runs), "" if maker.task == "pretrain" else earlier.unknown)


def objective_of(run: Run) -> str:
    """ar or bert; empty where it is that of weights that are not there any more."""
    own = str(run.config.get("objective", {}).get("name"))
    known = run.start.origin.get("objective") or {"name": ""}
    return str(known["name"]) if own == "checkpoint" else own


def _origin(path: Path) -> dict[str, Any]:
    """What a `config.json` of weights says of them, without colours and order; nothing where it is not there."""
    try:
        config = files.read_json(path)
    except (OSError, ValueError):
        return {}
    return brief(config) if isinstance(config, dict) else {}


def brief(origin: dict[str, Any]) -> dict[str, Any]:
    """What weights say of themselves, the order of the tokens as `raster` or `other`, without the colours."""
    said = {key: value for key, value in origin.items() if key not in ("palette", "permutation", "tokenizer")}
    tokenizer = origin.get("tokenizer")
    of_tokens = tokenizer if isinstance(tokenizer, dict) else {}
    if of_tokens:
        said["tokenizer"] = {key: of_tokens[key] for key in ("kind", "hash", "patch") if key in of_tokens}
    order = of_tokens.get("permutation", origin.get("permutation"))
    return said | ({"order": "raster" if order == sorted(order) else "other"} if isinstance(order, list) else {})
