"""What a run folder says of its run: who it is, its main numbers, its pictures, its stages, the commands around it."""

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from igpt.metric.result import Number, Result
from igpt.older_configs import read_record
from igpt.report.folder import RunFolder, result_of
from igpt.report.table import shown

PREDICTED = {"ar": "the next pixel", "bert": "masked pixels"}
SENTENCES = {
    "pipeline": "{n_stage} tasks in turn: {listed}.",
    "palette": "The colours that images of {images} are shown to a network in, and the error of showing them so.",
    "pretrain": "{model} learns to predict {predicted} of {images}, in {steps:,} steps of {batch_size:,} images.",
    "evaluate": "The loss of {model} on the {split} images of {images}.",
    "sample": "{count:,} images drawn from {model}, which was trained on {data}.",
    "complete": "{count:,} {split} images of {images}, each continued {completions} times by {model} from its top.",
    "probe": "What a linear classifier reads from every layer of {model} about the classes of {images}.",
    "low_data": "What a linear classifier on features of {model} learns from few labels of {images}.",
    "finetune": "{model} learns the classes of {images}, in at most {steps:,} steps of {batch_size:,} images.",
    "scaling": "Validation loss against what a linear probe reads, checkpoint by checkpoint, on {images}.",
    "import": "Weights from elsewhere, in this repository's format: {model}.",
    "export": "Weights of {model}, in a format that other programs open.",
    "trace": "What {model} computes for given tokens, to hold against another program's.",
}
MAIN = ("test/accuracy", "val/loss_gen", "val/accuracy", "loss_gen", "pixels_as_original", "psnr", "mse", "parameters")
N_MAIN = 4  # numbers shown large: of each of these kinds the first there is
KINDS = {  # how the name of a picture ends → the heading above it, what is seen
    "samples": ("Samples", "Drawn from the network, pixel by pixel."),
    "completions": ("Completions", "A held-out image, the part of it that was given, and how the network went on."),
    "palette_images": ("Palette", "Images, and the same in the colours of the palette."),
    "colours": ("Palette", "Every colour of the palette, in the order of the tokens."),
    "confusion": ("Confusion matrix", "Row: the true class. Column: what it was taken for. Images counted."),
}
OTHER = ("Pictures", "")
_NAME = re.compile(r"\w+?-(?P<model>.+)-(?P<data>[^-]+)-(?P<objective>[a-z]+)-s\d+-[0-9a-f]{8}(-\d+)?")


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, what it wrote when it began (run.json) and when it ended (result.json)."""

    folder: Path
    begun: Mapping[str, Any]
    record: Mapping[str, Any]
    result: Result

    @property
    def task(self) -> str:
        return str(self.record["task"])

    @property
    def config(self) -> Mapping[str, Any]:
        config: Mapping[str, Any] = self.record["config"]
        return config

    @property
    def is_stage(self) -> bool:
        """Whether it is part of a pipeline, whose folder is the one around it."""
        return "overrides" in self.begun and self.begun["overrides"] is None

    @cached_property
    def whole(self) -> Mapping[str, Any]:
        """What was written when the command began: the pipeline's where this is a stage of one."""
        above = self.folder.absolute().parent
        return begun_of(above) if self.is_stage else self.begun

    @cached_property
    def of(self) -> dict[str, str]:
        """Model, data and objective. Of older runs, what the folder's name says."""
        if "of" in self.begun:
            return {str(key): str(value) for key, value in self.begun["of"].items()}
        folder = self.folder.absolute()
        for name in (folder.name, folder.parent.name):
            if match := _NAME.fullmatch(name):
                return {key: match[key] for key in ("model", "data", "objective")}
        return {key: str(self.config.get(key, {}).get("name", "")) for key in ("model", "data", "objective")}

    @cached_property
    def of_stages(self) -> dict[str, str]:
        """The same, of a pipeline that of all its stages."""
        each = [stage.run.of for stage in self.stages if stage.run is not None] or [self.of]
        return {key: ", ".join(dict.fromkeys(of[key] for of in each)) for key in ("model", "data", "objective")}

    @property
    def images(self) -> str:
        """The data in words."""
        data = self.config.get("data", {})
        name, side = data.get("name"), data.get("resolution")
        return f"{name} at {side}×{side}" if self.of["data"] in (f"{name}{side}", name) else self.of["data"]

    @property
    def sentence(self) -> str:
        settings = self.config.get("task", {})
        known = {**settings, **self.of, "images": self.images, "n_stage": len(self.stages)}
        known["listed"] = ", ".join(stage.name for stage in self.stages)
        known["predicted"] = PREDICTED.get(self.of["objective"], "pixels")
        try:
            return SENTENCES[self.task].format(**known)
        except (KeyError, ValueError, TypeError):  # a task that came later, or settings of another release
            return f"A run of task={self.task}."

    @property
    def main(self) -> list[tuple[str, Number]]:
        """The numbers to show large."""
        numbers = self.result.numbers.items()
        first = [next(((key, of) for key, of in numbers if key.endswith(kind)), None) for kind in MAIN]
        return list({key: (key, of) for key, of in filter(None, first)}.values())[:N_MAIN]

    @property
    def pictures(self) -> dict[str, Path]:
        """Every picture it names, as a path from its folder; curves are drawn anew."""
        found = {key: path for key, path in self.result.files.items() if path.suffix == ".png"}
        return {key: path for key, path in found.items() if key.rpartition("/")[2] != "curves"}

    @property
    def published(self) -> list[tuple[str, str]]:
        """What others report, and this run's number where the line begins with its name."""
        lines = [str(line) for line in self.config.get("published", [])]
        ours = [self.result.numbers.get(line.partition(" ")[0]) for line in lines]
        return [
            (line, f"{shown(number)} {number.unit}" if number else "") for line, number in zip(lines, ours, strict=True)
        ]

    @cached_property
    def stages(self) -> list["Stage"]:
        """The stages of a pipeline, in their order."""
        asked = self.config.get("task", {}).get("stages", {}) if self.task == "pipeline" else {}
        names = [(name, own) for name, own in asked.items() if own is not None]
        found = []
        for position, (name, own) in enumerate(names, start=1):
            place, given = self.folder / f"{position}_{name}", own.get("run")
            if given is not None:
                near = (Path(given), self.folder.absolute().parent / Path(given).name)
                place = next((path for path in near if path.is_dir()), near[0])
            try:
                found.append(Stage(name, place, read_run(place), ""))
            except ValueError as error:
                found.append(Stage(name, place, None, str(error)))
        return found

    @property
    def weights(self) -> str | None:
        """What `init=` is to say to go on from it: its own weights, a stage's, or those it began from."""
        if (self.folder / "model" / "config.json").is_file():
            return str(self.folder)
        for stage in self.stages:
            if (stage.folder / "model" / "config.json").is_file():
                return str(stage.folder)
        init = self.config.get("init")
        return None if init is None else str(init)

    @property
    def repeat(self) -> str:
        """The command that made it."""
        overrides = self.whole.get("overrides")
        if overrides is None:
            return str(self.record.get("command", ""))
        return command(*overrides)

    @property
    def reading(self) -> list[str]:
        """The settings that have another task read the same images."""
        data, asked = self.config.get("data", {}), self.whole.get("overrides") or []
        own = [str(override) for override in asked if str(override).startswith("data.")]
        option = self.begun.get("of", {}).get("data_option", data.get("name"))
        known = {key: data[key] for key in ("path", "resolution") if data.get(key) is not None}
        stated = [setting(f"data.{key}", value) for key, value in known.items() if not _says(own, f"data.{key}")]
        return [f"data={option}", *stated, *own]

    @property
    def next_commands(self) -> list[tuple[str, str]]:
        """What to type to go on from it: (what it does, the command)."""
        weights = self.weights
        whole = self.folder.parent if self.is_stage else self.folder
        following = [("show the result again; where it was stopped, go on", command(setting("resume", whole)))]
        if weights is None:
            return following
        init = setting("init", weights)
        draws = self.of["objective"] != "bert"
        samples = ("draw images", command("task=sample", init, "task.count=16", "task.temperature=0.9"))
        if self.task != "pipeline" and "tokens" not in self.config["task"]["needs"]:  # it read no images
            return [samples, *following] if draws else following
        same = [f"{group}=checkpoint" for group in ("model", "tokens", "objective")]
        completions = ("complete images from their upper half", command("task=complete", init, *self.reading))
        return [
            *([samples, completions] if draws else []),
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
    run: Run | None
    said: str


def read_run(folder: Path) -> Run:
    """A finished run's folder. Raises ValueError when it holds none, or one that is damaged or of another version."""
    place = RunFolder(folder)
    if not place.finished:
        raise ValueError(f"{folder} holds no finished run: it has no result.json")
    record = place.read_result()
    try:
        run = Run(folder, begun_of(folder), record, result_of(record))
        _check(run)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'result.json'} is damaged ({error!r}): restore or remove it") from error
    return run


def _check(run: Run) -> None:
    """Raises one of several errors where the result is not what `RunFolder.finish` writes."""
    for number in run.result.numbers.values():
        _ = f"{shown(number)} {number.n:,}" + number.unit
    for curve in run.result.curves.values():
        if len(curve.x) != len(curve.y) or not all(map(math.isfinite, [*curve.x, *curve.y])):
            raise ValueError("a curve of other lengths, or of no numbers")
        _ = curve.x_unit + curve.y_unit
    _ = dict(run.config), dict(run.record["versions"]), run.record["commit"] + "", float(run.record["seconds"])


def begun_of(folder: Path) -> dict[str, Any]:
    """What run.json says; nothing where there is none, or none that can be read."""
    try:
        return read_record(folder / "run.json")
    except (OSError, ValueError):
        return {}


def kind_of(picture: str) -> tuple[str, str]:
    """The heading that a picture belongs under, and what is seen in it."""
    return next((kind for end, kind in KINDS.items() if picture.endswith(end)), OTHER)


def command(*overrides: str) -> str:
    """`python train.py …`, as a shell reads it."""
    return " ".join(["python train.py", *(shlex.quote(str(override)) for override in overrides)])


def setting(key: str, value: Any) -> str:
    """`key=value`, as Hydra reads it back."""
    text = str(value)
    return f"{key}={text}" if re.fullmatch(r"[\w./-]+", text) else f"{key}='" + text.replace("'", "\\'") + "'"


def flat(settings: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every setting of a config by its full key, values as they would be typed."""
    if isinstance(settings, Mapping) and settings:
        for name, value in settings.items():
            yield from flat(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, settings if isinstance(settings, str) else json.dumps(settings, ensure_ascii=False)


def _says(overrides: list[str], key: str) -> bool:
    return any(override.partition("=")[0] == key for override in overrides)
