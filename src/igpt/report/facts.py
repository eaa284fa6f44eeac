"""The contents of a run's page: names, main numbers, pictures, and the commands that repeat or continue the run."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from igpt.metric.result import Number, find_key
from igpt.report.folder import RunFolder
from igpt.report.runs import RunRecord
from igpt.settings.data import name_dataset, name_images
from igpt.settings.paths import resolve_nearest
from igpt.utils.overrides import format_text, train_command

MAIN = (
    "test/accuracy", "val/loss_gen", "val/accuracy", "all/accuracy", "knn_accuracy", "loss_gen", "_as_original", "psnr",
    "patches/psnr", "codes_used", "perplexity_share", "mse", "parameters",
)  # fmt: skip
N_MAIN = 4  # numbers shown large: the first of each kind in MAIN
KINDS = {  # suffix of a picture's name → (heading, caption)
    "samples": ("Samples", "Drawn from the network, token by token."),
    "completions": (
        "Completions",
        "A held-out image as its tokens show it, the part that was given, and how the network went on.",
    ),
    "reconstructed_images": (
        "Reconstructions",
        "Held-out images, and what each tokenizer draws from its tokens, with the error, amplified: black is none.",
    ),
    "palette_images": ("Palette", "Images, and the same in the colours of the palette."),
    "attention": (
        "Attention",
        "What one pixel, in green, attends to: a row for each image, pixel and head, a column for each layer. The "
        "largest weight is the brightest, what it cannot see is dark.",
    ),
    "loss_per_pixel": ("Loss per pixel", "Where the network is surprised: images, and the loss at every pixel."),
    "neighbours": (
        "Nearest training images",
        "Images, and the training images of the most similar features, whose mean is subtracted.",
    ),
    "feature_map": ("Map of features", "The two directions in which the features of images differ most."),
    "colours": ("Palette", "Every colour of the palette, in the order of the tokens."),
    "confusion": ("Confusion matrix", "Row: the true class. Column: what it was taken for. Images counted."),
    "loss_by_position": (
        "Loss by position",
        "Nats per token over the image, and row by row along it: where the network is surprised.",
    ),
    "predictions": ("Pictures", "What the images are taken for, and how sure the head is."),
    "mistakes": ("Pictures", "The most confident mistakes: what each image is taken for, and what it is."),
    "_curves": ("Pictures", "Curves of training and validation, means over seeds, with ± one standard deviation."),
    "_swept": ("Pictures", "The number compared, against the setting that was swept."),
    "": ("Pictures", ""),
}
OF_RUNS = {"compare": "Runs compared", "isoflop": "Scaling study"}  # tasks without a network → headings of their pages
TOKENS = {  # settings of a tokenizer → what one of its tokens stands for, and several
    "PatchSettings": ("patch", "patches"),
    "RGBSettings": ("RGB value", "RGB values"),
    "VQVAESettings": ("code of a VQ-VAE", "codes of a VQ-VAE"),
}
OTHERS = ("data=folder", "data.path=PHOTOS")  # images of the reader's
GROUPS = ("model", "data", "objective")
NAME = re.compile(r"\w+?-(?P<model>.+)-(?P<data>[^-]*[^-\d][^-]*(-\d+)?)-(?P<objective>[a-z]+)-s\d+-[0-9a-f]{8}(-\d+)?")


def read_names(run: RunRecord) -> dict[str, str]:
    """The names of model, data and objective; of older runs, parsed from the directory's name."""
    folder = run.folder.absolute()
    named = NAME.fullmatch(folder.name) or NAME.fullmatch(folder.parent.name)
    chosen = {group: run.config.get(group, {}).get("name", "") for group in GROUPS}
    names = run.begun.get("of") or (named.groupdict() if named else chosen)
    return {group: str(names[group]) for group in GROUPS}


def read_stage_names(run: RunRecord) -> dict[str, str]:
    """The names of model, data and objective; of a pipeline, those of all its stages."""
    each = [read_names(stage.run) for stage in run.stages if stage.run is not None] or [read_names(run)]
    return {group: ", ".join(dict.fromkeys(names[group] for names in each)) for group in GROUPS}


def describe_images(run: RunRecord) -> str:
    """The dataset and its resolution, or the name of the option of `data`."""
    data, option = run.config.get("data", {}), read_names(run)["data"]
    name, side = data.get("name"), data.get("resolution")
    known = (name_images(data), f"{name}{side}", name)  # of this release, of older ones, without names
    return f"{name_dataset(data)} at {side}×{side}" if option in known else option


def describe_predicted(run: RunRecord) -> str:
    """What the network of the run learns to predict: `the next pixel`, `masked codes of a VQ-VAE`."""
    settings = str(run.config.get("tokens", {}).get("_target_")).rpartition(".")[2]
    one, several = TOKENS.get(settings, ("pixel", "pixels"))
    return {"ar": f"the next {one}", "bert": f"masked {several}"}.get(read_names(run)["objective"], several)


def main_numbers(run: RunRecord) -> list[tuple[str, Number]]:
    """The numbers to show large: of a pipeline the test accuracies of its stages, at most all but one, then others."""
    numbers = run.result.numbers
    tested = [key for key in numbers if key.endswith(MAIN[0])][: N_MAIN - 1 if run.stages else 1]
    first = [next((key for key in numbers if key.endswith(kind)), None) for kind in MAIN[1:]]
    return [(key, numbers[key]) for key in dict.fromkeys([*tested, *first]) if key is not None][:N_MAIN]


def find_number(run: RunRecord, name: str) -> Number | None:
    """The number of that name, of a pipeline's stage where only one has it; None without one."""
    key = find_key(run.result.numbers, name)
    return None if key is None else run.result.numbers[key]


def list_pictures(run: RunRecord) -> dict[str, Path]:
    """Name → path in the run directory of every picture but `curves`, which the page draws itself."""
    files = run.files_inside.items()
    return {key: path for key, path in files if path.suffix == ".png" and key.rpartition("/")[2] != "curves"}


def find_run_weights(run: RunRecord) -> str | None:
    """The value of `init=` to use this run's weights: its own, a stage's, or its initial ones; None without weights."""
    folders = [run.folder, *(stage.folder for stage in run.stages if stage.run is not None)]
    saved = [str(folder) for folder in folders if (folder / "model" / "config.json").is_file()]
    init = run.config.get("init")
    return next(iter(saved), None if init is None else str(init))


def repeat_command(run: RunRecord) -> str:
    """The command that repeats the run."""
    overrides = run.overrides
    if overrides is None:
        return str(run.record.get("command", ""))
    return train_command(*run.search_path, *overrides)


def data_overrides(run: RunRecord) -> list[str]:
    """The overrides that give another task the same images."""
    data = run.config.get("data", {})
    own = [override for override in run.overrides or [] if override.startswith("data.")]
    chosen = {override.partition("=")[0] for override in own}
    option = run.begun.get("of", {}).get("data_option", data.get("name"))
    known = {f"data.{key}": data[key] for key in ("path", "resolution") if data.get(key) is not None}
    return [f"data={option}", *(format_setting(key, value) for key, value in known.items() if key not in chosen), *own]


def _other_data(run: RunRecord) -> list[str]:
    """As `data_overrides`, where `init=` with the weights of the run would take other images, or it is not known."""
    init = run.config.get("init")
    if not isinstance(init, str) or find_run_weights(run) != init:  # its own weights, or a stage's
        return []
    beside = run.folder.absolute().parent / Path(init).name  # also where both were moved
    place = beside if beside.is_dir() else resolve_nearest(run.folder, init)
    around = () if place is None else (place, *place.parents[:2])
    try:
        trained = next(RunFolder(folder).read_run() for folder in around if (folder / "run.json").is_file())
    except (StopIteration, ValueError, OSError):
        return data_overrides(run)
    return [] if trained["config"].get("data") == run.config.get("data") else data_overrides(run)


def next_commands(run: RunRecord) -> list[tuple[str, str]]:
    """Commands that continue from a run: (description, command)."""
    weights, run_dir = find_run_weights(run), run.folder.parent if run.is_stage else run.folder
    command = partial(train_command, *run.search_path)
    following = [("show the result again; where it was stopped, go on", command(format_setting("resume", run_dir)))]
    if run.task == "tokenizer":
        taken = ["tokens=vqvae", format_setting("tokens.path", run.folder), *data_overrides(run)]
        return [("train a network on its tokens", command("task=pretrain", *taken)), *following]
    if weights is None:
        return following
    init, reading, draws = format_setting("init", weights), _other_data(run), read_names(run)["objective"] != "bert"
    samples = [("draw images", command("task=sample", init, "task.count=16", "task.temperature=0.9"))]
    if run.task != "pipeline" and "tokens" not in run.config["task"]["requires"]:  # a task without images
        return [*samples, *following] if draws else following
    has_head = run.task in ("probe", "finetune")
    own = format_setting("init", run.folder)
    completions = ("complete images from their upper half", command("task=complete", init, *reading))
    return [
        *([*samples, completions] if draws else []),
        ("probe every layer", command("task=probe", init, *reading)),
        ("fine-tune", command("task=finetune", init, *reading)),
        ("evaluate on the test split", command("task=evaluate", init, *reading, "task.split=test")),
        ("look inside: attention, loss per pixel, neighbours", command("task=inspect", init, *reading)),
        *([("classify other photographs", command("task=predict", own, *OTHERS))] if has_head else []),
        *following,
    ]


def find_heading(picture: str) -> tuple[str, str]:
    """(heading, caption) of a picture, by its name."""
    return next(kind for end, kind in KINDS.items() if picture.endswith(end))


def format_setting(key: str, value: Any) -> str:
    """`key=value`, quoted for Hydra."""
    return f"{key}={format_text(str(value)) if isinstance(value, str | Path) else value}"


def format_typed(value: Any) -> str:
    """The value as text: a string unquoted, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
