"""What a run folder says of its run: who it is, its main numbers, its pictures, its stages, the commands around it."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from igpt.metric.result import Number, Result
from igpt.older_configs import read_record
from igpt.quoting import quote_for_shell, quote_text
from igpt.report.folder import RunFolder, result_of
from igpt.report.text import shown

MAIN = ("test/accuracy", "val/loss_gen", "val/accuracy", "loss_gen", "pixels_as_original", "psnr", "mse", "parameters")
N_MAIN = 4  # numbers shown large: of each of these kinds the first there is
KINDS = {  # how the name of a picture ends → the heading above it, what is seen
    "samples": ("Samples", "Drawn from the network, pixel by pixel."),
    "completions": ("Completions", "A held-out image, the part of it that was given, and how the network went on."),
    "palette_images": ("Palette", "Images, and the same in the colours of the palette."),
    "colours": ("Palette", "Every colour of the palette, in the order of the tokens."),
    "confusion": ("Confusion matrix", "Row: the true class. Column: what it was taken for. Images counted."),
    "": ("Pictures", ""),
}
GROUPS = ("model", "data", "objective")
NAME = re.compile(r"\w+?-(?P<model>.+)-(?P<data>[^-]+)-(?P<objective>[a-z]+)-s\d+-[0-9a-f]{8}(-\d+)?")


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: its folder, what it wrote when it began (run.json) and when it ended (result.json)."""

    folder: Path
    task: str
    config: Mapping[str, Any]
    begun: Mapping[str, Any]
    record: Mapping[str, Any]
    result: Result

    @property
    def is_stage(self) -> bool:
        """Whether it is part of a pipeline, whose folder is the one around it."""
        return "overrides" in self.begun and self.begun["overrides"] is None

    @property
    def overrides(self) -> list[str] | None:
        """What was typed: of a stage, for the pipeline. None: that is not known."""
        begun = begun_of(self.folder.absolute().parent) if self.is_stage else self.begun
        overrides = begun.get("overrides")
        return None if overrides is None else [str(override) for override in overrides]

    @cached_property
    def of(self) -> dict[str, str]:
        """Model, data and objective. Of older runs, what the folder's name says."""
        folder = self.folder.absolute()
        named = NAME.fullmatch(folder.name) or NAME.fullmatch(folder.parent.name)
        chosen = {group: self.config.get(group, {}).get("name", "") for group in GROUPS}
        found = self.begun.get("of") or (named.groupdict() if named else chosen)
        return {group: str(found[group]) for group in GROUPS}

    @cached_property
    def of_stages(self) -> dict[str, str]:
        """The same, of a pipeline that of all its stages."""
        each = [stage.run.of for stage in self.stages if stage.run is not None] or [self.of]
        return {group: ", ".join(dict.fromkeys(of[group] for of in each)) for group in GROUPS}

    @property
    def images(self) -> str:
        """The data in words."""
        data = self.config.get("data", {})
        name, side = data.get("name"), data.get("resolution")
        return f"{name} at {side}×{side}" if self.of["data"] in (f"{name}{side}", name) else self.of["data"]

    @property
    def main(self) -> list[tuple[str, Number]]:
        """The numbers to show large."""
        numbers = self.result.numbers
        first = [next((key for key in numbers if key.endswith(kind)), None) for kind in MAIN]
        return [(key, numbers[key]) for key in dict.fromkeys(first) if key is not None][:N_MAIN]

    @property
    def pictures(self) -> dict[str, Path]:
        """Every picture it names, as a path from its folder; curves are drawn anew."""
        files = self.result.files.items()
        return {key: path for key, path in files if path.suffix == ".png" and key.rpartition("/")[2] != "curves"}

    @cached_property
    def stages(self) -> list["Stage"]:
        """The stages of a pipeline, in their order."""
        asked = self.config.get("task", {}).get("stages", {}) if self.task == "pipeline" else {}
        chosen = [(name, own.get("run")) for name, own in asked.items() if own is not None]
        found = []
        for position, (name, given) in enumerate(chosen, start=1):
            near = [self.folder / f"{position}_{name}"]
            if given is not None:
                near = [Path(given), self.folder.absolute().parent / Path(given).name]
            place = next((path for path in near if path.is_dir()), near[0])
            try:
                found.append(Stage(name, place, read_run(place)))
            except ValueError as error:
                found.append(Stage(name, place, None, str(error)))
        return found

    @property
    def weights(self) -> str | None:
        """What `init=` is to say to go on from it: its own weights, a stage's, or those it began from."""
        folders = [self.folder, *(stage.folder for stage in self.stages)]
        saved = [str(folder) for folder in folders if (folder / "model" / "config.json").is_file()]
        init = self.config.get("init")
        return next(iter(saved), None if init is None else str(init))

    @property
    def repeat(self) -> str:
        """The command that made it."""
        return str(self.record.get("command", "")) if self.overrides is None else command(*self.overrides)

    @property
    def reading(self) -> list[str]:
        """The settings that have another task read the same images."""
        data = self.config.get("data", {})
        own = [override for override in self.overrides or [] if override.startswith("data.")]
        chosen = {override.partition("=")[0] for override in own}
        option = self.begun.get("of", {}).get("data_option", data.get("name"))
        known = {f"data.{key}": data[key] for key in ("path", "resolution") if data.get(key) is not None}
        return [f"data={option}", *(setting(key, value) for key, value in known.items() if key not in chosen), *own]

    @property
    def next_commands(self) -> list[tuple[str, str]]:
        """What to type to go on from it: (what it does, the command)."""
        whole = self.folder.parent if self.is_stage else self.folder
        following = [("show the result again; where it was stopped, go on", command(setting("resume", whole)))]
        if self.weights is None:
            return following
        init, draws = setting("init", self.weights), self.of["objective"] != "bert"
        samples = [("draw images", command("task=sample", init, "task.count=16", "task.temperature=0.9"))]
        if self.task != "pipeline" and "tokens" not in self.config["task"]["requires"]:  # it read no images
            return [*samples, *following] if draws else following
        same = [f"{group}=checkpoint" for group in ("model", "tokens", "objective")]
        completions = ("complete images from their upper half", command("task=complete", init, *self.reading))
        return [
            *([*samples, completions] if draws else []),
            ("probe every layer", command("task=probe", init, *self.reading)),
            ("fine-tune", command("task=finetune", init, *same, *self.reading)),
            ("evaluate on the test split", command("task=evaluate", init, *self.reading, "task.split=test")),
            *following,
        ]


@dataclass(frozen=True)
class Stage:
    """A stage of a pipeline; `run` is None where nothing finished is to be read, and `said` is why."""

    name: str
    folder: Path
    run: FinishedRun | None
    said: str = ""


def read_run(folder: Path) -> FinishedRun:
    """A finished run's folder. Raises ValueError when it holds none, or one that is damaged or of another version."""
    place = RunFolder(folder)
    if not place.finished:
        raise ValueError(f"{folder} holds no finished run: it has no result.json")
    record = place.read_result()
    try:
        run = FinishedRun(folder, record["task"], record["config"], begun_of(folder), record, result_of(record))
        _check(run)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'result.json'} is damaged ({error!r}): restore or remove it") from error
    return run


def _check(run: FinishedRun) -> None:
    """Raises one of several errors where the result is not what `RunFolder.finish` writes."""
    for number in run.result.numbers.values():
        _ = f"{shown(number)} {number.n:,}" + number.unit
    for curve in run.result.curves.values():
        if len(curve.x) != len(curve.y) or not all(map(math.isfinite, [*curve.x, *curve.y])):
            raise ValueError("a curve of other lengths, or of no numbers")
        _ = curve.x_unit + curve.y_unit
    _ = (
        run.task + "",
        dict(run.config),
        dict(run.record["versions"]),
        run.record["commit"] + "",
        float(run.record["seconds"]),
    )


def begun_of(folder: Path) -> dict[str, Any]:
    """What run.json says; nothing where there is none, or none that can be read."""
    try:
        return read_record(folder / "run.json")
    except (OSError, ValueError):
        return {}


def heading_of(picture: str) -> tuple[str, str]:
    """The heading that a picture belongs under, and what is seen in it."""
    return next(kind for end, kind in KINDS.items() if picture.endswith(end))


def command(*overrides: str) -> str:
    """`python train.py …`, as a shell reads it."""
    return " ".join(["python train.py", *map(quote_for_shell, overrides)])


def setting(key: str, value: Any) -> str:
    """`key=value`, as Hydra reads it back."""
    text = str(value)
    return f"{key}={text if re.fullmatch(r'[A-Za-z0-9_./-]+', text) else quote_text(text)}"


def as_typed(value: Any) -> str:
    """A setting's value as it would be typed."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
