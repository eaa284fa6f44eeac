"""Names of numbers, curves and units for people: `val/loss_gen` → "validation loss". Files keep the keys.

The tables are in the order in which people ask: what a run ends with shows the first of them.
"""

import re
from collections.abc import Iterable
from functools import cache

SUBJECTS = {  # what stands before the last "/" of a key → {} in FIGURES
    "all": "", "test": "test", "val": "validation", "cv": "cross-validation", "train": "training",
    "refit": "training (with validation images)", "samples": "samples", "completions": "completions",
    "real": "real images", "tokenized": "real images as tokens", "untrained": "samples of an untrained network",
}  # fmt: skip
FIGURES = {  # the end of a key, * for any text, → its name; {} is the subject, {0} the text of *
    "accuracy": "{} accuracy",
    "accuracy_*_per_class": "{} accuracy, {0} labels a class",
    "loss_gen": "{} loss",
    "loss_gen_ema": "{} loss of averaged weights",
    "bits_per_dim": "{} bits per dimension",
    "kid": "KID of {}",
    "psnr": "{} PSNR",
    "*/pixels_as_original": "completed pixels equal to the original",
    "*/tokens_as_original": "completed tokens equal to the original",
    "knn_accuracy": "{} accuracy by nearest neighbours (k-NN)",
    "knn_raw_pixels": "{} k-NN accuracy from raw pixels",
    "shown/loss_gen": "loss of the images shown",
    "inspect/layer": "layer of neighbours and map",
    "dashboard/panels": "panels",
    "features/width": "features of an image",
    "probe/layer": "layer of the probe",
    "layer": "layer of the probe",
    "untrained": "{} accuracy of an untrained network",
    "raw_pixels": "{} accuracy from raw pixels",
    "raw_pixels_*_per_class": "{} accuracy from raw pixels, {0} labels a class",
    "gain_over_raw_pixels_*_per_class": "{} accuracy gained over raw pixels, {0} labels a class",
    "gain_over_*_*_per_class": "{} accuracy gained over {0}, {1} labels a class",
    "*_*_per_class": "{} accuracy from {0}, {1} labels a class",
    "position_histogram": "{} loss of a histogram for each position",
    "unigram": "{} loss of one histogram",
    "embedding": "{} accuracy of the embedding",
    "last_layer": "{} accuracy of the last layer",
    "best_layer": "{} accuracy of the best layer alone",
    "fall_to_last_layer": "{} accuracy lost from the best to the last layer",
    "rank_correlation": "rank correlation",
    "equal_loss/*": "accuracy at equal loss, {0}",
    "top_5": "{} top-5 accuracy",
    "calibration_error": "{} calibration error",
    "accuracy_one_mask": "{} accuracy under one mask",
    "gain_by_vote": "{} accuracy gained by the vote over masks",
    "predict/images": "images",
    "predict/unreadable": "images that cannot be read",
    "loss_clf": "{} classification loss",
    "ssim": "{} SSIM",
    "mae": "{} mean absolute error",
    "codes_used": "{} share of codes used",
    "perplexity_share": "{} perplexity of the codes ÷ their number",
    "tokens_returned": "{} tokens that come back from their image",
    "reconstruction": "{} reconstruction loss",
    "commitment": "{} commitment loss",
    "rate": "rate",
    "*_psnr": "PSNR of {} images in the colours of {0}",
    "*_remainder": "code length of the original colours of {} images, given those of {0}",
    "*_mse": "squared error of {} images in the colours of {0}",
    "*/colours": "colours of {0}",
    "fd_*": "Fréchet distance of {} ({0})",
    "precision": "precision of {}",
    "recall": "recall of {}",
    "nearest_excess": "{} closer to training images than chance has it",
    "nearest_in_train": "{} closest to a training image",
    "nearest_distance_ratio": "distance of {} to training images ÷ that of held-out ones",
    "bits_per_token": "{} bits per token",
    "bits_per_pixel": "{} bits per pixel",
    "bits_per_dim_of_these_pixels": "{} bits per dimension of these pixels",
    "probe/C": "strength C of the probe",
    "probe/rate": "learning rate of the probe",
    "best_step": "best step",
    "parameters": "weights",
    "weights": "weights",
    "images_seen": "images seen",
    "tokens_seen": "tokens seen",
    "operations": "operations of training",
    "step_seconds": "time of a step",
    "peak_memory": "peak memory",
    "planned_memory": "peak memory by trainer.plan",
    "flop_utilisation": "share of the peak FLOP/s",
    "device_days": "time of all devices",
    "images_per_s": "speed",
    "tokens_per_s": "speed in tokens",
    "sample/pixels_per_s": "speed of sampling",
    "grad_norm": "gradient norm",
    "grad_norm_max": "largest gradient norm",
    "lr": "learning rate",
    "probe/layer_*/accuracy": "accuracy of a linear probe of layer {0}",
    "train/rate_*/loss_clf": "training classification loss at rate {0}",
    "train/rate_*/accuracy": "training accuracy at rate {0}",
    "val/rate_*/accuracy": "validation accuracy at rate {0}",
    "compare/runs": "runs",
    "compare/left_out": "folders left out",
    "compare/published": "published numbers beside them",
    "a": "exponent of the weights, parabolas",
    "b": "exponent of the tokens, parabolas",
    "surface_*": "{0} of the fitted surface",
    "tokens_per_weight": "tokens for each weight",
    "weights_by_*": "compute-optimal weights, {0}",
    "expected": "expected value",
    "n_layer": "layers",
    "n_embd": "width",
    "images": "{} images",
    "steps": "steps",
}
LINES = {  # names of curves, before ", split"
    "probe": "linear probe", "low-data probe": "the network's features", "untrained network": "untrained network",
    "raw pixels": "raw pixels", "chance": "chance", "k-NN": "k-NN",
}  # fmt: skip
UNITS = {
    "nats/token": "nats per token", "nats/image": "nats per image", "bits/token": "bits per token",
    "bits/pixel": "bits per pixel", "bits/dim": "bits per dimension", "share": "%",
}  # fmt: skip
KEY = re.compile(r"[\w/ .,-]+")
COUNT = re.compile(r"^(\d+)_(images)$")


def display_name(key: str) -> str:
    """The name of a number or curve; before it, with a colon, what stands before the known part of the key.

    A key that no table knows is given with blanks, `new_figure/of_mine` → "new figure: of mine"; the name of a line
    that is no key, as `igpt_s: loss`, as it is.
    """
    known = find_name(key)
    if known is not None:
        lead, name, _ = known
        return ": ".join([*lead, name])
    return key.replace("_", " ").replace("/", ": ") if "/" in key and KEY.fullmatch(key) else key


def name_lines(keys: Iterable[str]) -> dict[str, str]:
    """Key → name of the curves of one plot; the stage of a pipeline is left out where all are of one."""
    known = {key: find_name(key) for key in keys}
    is_one = len({name and name[0] for name in known.values()}) == 1
    return {key: name[1] if name is not None and is_one else display_name(key) for key, name in known.items()}


def display_unit(unit: str) -> str:
    """A unit in words: `nats/token` → "nats per token"; unknown ones as they are."""
    return UNITS.get(unit, unit)


def name_with_unit(key: str, unit: str, *, of_axis: bool = False) -> str:
    """The title of a column or an axis: "validation loss, nats per token"; of an axis of shares, in percent, the name.

    "share" stands in titles of columns, whose values are no percents.
    """
    words = unit if unit == "share" else display_unit(unit)
    return ", ".join([display_name(key), *([words] if words and not (of_axis and unit == "share") else [])])


def is_share(unit: str) -> bool:
    """Whether values of a unit, or along an axis of this name, are shares, to be shown in percent."""
    return unit.startswith(("share", "precision")) or unit.endswith(("accuracy", ", share"))


def split_key(key: str) -> str:
    """The known part of a key: without the stage of a pipeline, the name of a line."""
    known = find_name(key)
    return key if known is None else "/".join(key.split("/")[len(known[0]) :])


def rank_key(key: str) -> int:
    """The place of a number in the order in which people ask, 0 first; test before val; unknown ones last."""
    known = find_name(key)
    return len(SUBJECTS) * len(FIGURES) if known is None else known[2]


def name_figure(key: str) -> str | None:
    """What a number or curve shows, whatever its split: "loss"; None for a key that no table knows."""
    for pattern, text, _ in _patterns():
        if (found := pattern.fullmatch(key.rpartition("/")[2])) is not None:
            return text.replace("{}", "").format(*found.groups()).strip()
    return None


def axis_name(unit: str, keys: Iterable[str] = ()) -> str:
    """The title of an axis of this unit: of several curves with what all of them show, "loss, nats per token"."""
    figures = {name_figure(key) for key in keys}
    one = figures.pop() if len(figures) == 1 else None
    if unit == "share":
        return one or unit
    if unit in UNITS:
        return f"{one}, {UNITS[unit]}" if one else UNITS[unit]
    return display_name(unit) if "/" in unit and find_name(unit) else unit


@cache
def find_name(key: str) -> tuple[tuple[str, ...], str, int] | None:
    """(what stands before, name, place in the order) of a key; None if no table knows it."""
    parts = key.split("/")
    for i in range(len(parts)):
        lead, rest = tuple(COUNT.sub(_format_count, part) for part in parts[:i]), "/".join(parts[i:])
        line, _, split = rest.partition(", ")
        if line in LINES:
            named = f"{LINES[line]}, {SUBJECTS[split]}" if split in SUBJECTS else LINES[line]
            return lead, named, len(SUBJECTS) * len(FIGURES)
        subject, _, figure = rest.rpartition("/")
        of_subject = subject in SUBJECTS
        for pattern, text, place in _patterns():
            found = pattern.fullmatch(rest) or (pattern.fullmatch(figure) if of_subject else None)
            if found is None:
                continue
            named = text.replace("{}", SUBJECTS.get(subject, "")).format(*found.groups()).strip()
            order = [*SUBJECTS].index(subject) if of_subject else 0
            return lead, named, place * len(SUBJECTS) + order
    return None


@cache
def _patterns() -> list[tuple[re.Pattern[str], str, int]]:
    return [
        (re.compile(re.escape(pattern).replace(r"\*", "([^/]+)")), text, place)
        for place, (pattern, text) in enumerate(FIGURES.items())
    ]


def _format_count(found: re.Match[str]) -> str:
    return f"{int(found[1]):,} {found[2]}"
