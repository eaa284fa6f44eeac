"""What the record of a run says of it: who it is, its main numbers, its pictures, the commands around it."""

import re
import shlex
from pathlib import Path
from typing import Any

from igpt.metric.result import Number
from igpt.report.runs import RunRecord
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


def names_of(run: RunRecord) -> dict[str, str]:
    """Model, data and objective. Of older runs, what the folder's name says."""
    if "of" in run.begun:
        return {str(key): str(value) for key, value in run.begun["of"].items()}
    folder = run.folder.absolute()
    for name in (folder.name, folder.parent.name):
        if match := _NAME.fullmatch(name):
            return {key: match[key] for key in ("model", "data", "objective")}
    return {key: str(run.config.get(key, {}).get("name", "")) for key in ("model", "data", "objective")}


def names_of_stages(run: RunRecord) -> dict[str, str]:
    """The same, of a pipeline that of all its stages."""
    each = [names_of(stage.run) for stage in run.stages if stage.run is not None] or [names_of(run)]
    return {key: ", ".join(dict.fromkeys(names[key] for names in each)) for key in ("model", "data", "objective")}


def images_of(run: RunRecord) -> str:
    """The data in words."""
    data, option = run.config.get("data", {}), names_of(run)["data"]
    name, side = data.get("name"), data.get("resolution")
    return f"{name} at {side}×{side}" if option in (f"{name}{side}", name) else option


def describe(run: RunRecord) -> str:
    """What it did, in a sentence."""
    names = names_of(run)
    known = {**run.config.get("task", {}), **names, "images": images_of(run), "n_stage": len(run.stages)}
    known["listed"] = ", ".join(stage.name for stage in run.stages)
    known["predicted"] = PREDICTED.get(names["objective"], "pixels")
    try:
        return SENTENCES[run.task].format(**known)
    except (KeyError, ValueError, TypeError):  # a task that came later, or settings of another release
        return f"A run of task={run.task}."


def main_numbers(run: RunRecord) -> list[tuple[str, Number]]:
    """The numbers to show large."""
    numbers = run.result.numbers.items()
    first = [next(((key, of) for key, of in numbers if key.endswith(kind)), None) for kind in MAIN]
    return list({key: (key, of) for key, of in filter(None, first)}.values())[:N_MAIN]


def pictures_of(run: RunRecord) -> dict[str, Path]:
    """Every picture it names, as a path from its folder; curves are drawn anew."""
    found = {key: path for key, path in run.result.files.items() if path.suffix == ".png"}
    return {key: path for key, path in found.items() if key.rpartition("/")[2] != "curves"}


def published_numbers(run: RunRecord) -> list[tuple[str, str]]:
    """What others report, and this run's number where the line begins with its name."""
    lines = [str(line) for line in run.config.get("published", [])]
    ours = [run.result.numbers.get(line.partition(" ")[0]) for line in lines]
    return [(line, f"{shown(of)} {of.unit}" if of else "") for line, of in zip(lines, ours, strict=True)]


def weights_of(run: RunRecord) -> str | None:
    """What `init=` is to say to go on from it: its own weights, a stage's, or those it began from."""
    for folder in (run.folder, *(stage.folder for stage in run.stages)):
        if (folder / "model" / "config.json").is_file():
            return str(folder)
    init = run.config.get("init")
    return None if init is None else str(init)


def repeat_command(run: RunRecord) -> str:
    """The command that made it."""
    return str(run.record.get("command", "")) if run.overrides is None else command(*run.overrides)


def data_overrides(run: RunRecord) -> list[str]:
    """The settings that have another task read the same images."""
    data = run.config.get("data", {})
    own = [override for override in run.overrides or [] if override.startswith("data.")]
    option = run.begun.get("of", {}).get("data_option", data.get("name"))
    keys = {override.partition("=")[0] for override in own}
    known = {f"data.{key}": data[key] for key in ("path", "resolution") if data.get(key) is not None}
    return [f"data={option}", *(setting(key, value) for key, value in known.items() if key not in keys), *own]


def next_commands(run: RunRecord) -> list[tuple[str, str]]:
    """What to type to go on from it: (what it does, the command)."""
    weights = weights_of(run)
    whole = run.folder.parent if run.is_stage else run.folder
    following = [("show the result again; where it was stopped, go on", command(setting("resume", whole)))]
    if weights is None:
        return following
    init, reading = setting("init", weights), data_overrides(run)
    draws = names_of(run)["objective"] != "bert"
    samples = ("draw images", command("task=sample", init, "task.count=16", "task.temperature=0.9"))
    if run.task != "pipeline" and "tokens" not in run.config["task"]["needs"]:  # it read no images
        return [samples, *following] if draws else following
    same = [f"{group}=checkpoint" for group in ("model", "tokens", "objective")]
    completions = ("complete images from their upper half", command("task=complete", init, *reading))
    return [
        *([samples, completions] if draws else []),
        ("probe every layer", command("task=probe", init, *reading)),
        ("fine-tune", command("task=finetune", init, *same, *reading)),
        ("evaluate on the test split", command("task=evaluate", init, *reading, "task.split=test")),
        *following,
    ]


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
