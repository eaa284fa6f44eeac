"""`task=quality`: how close drawn images come to real ones, over checkpoints, against probe accuracy.

Drawn images are compared with held-out ones (val), not with those the network was trained on: the unbiased KID needs
independent sets, which a network that repeats training images breaks, and loss and probe accuracy are measured on the
same images. How far it repeats them is measured apart, by nearest images.
"""

import logging
from dataclasses import dataclass
from math import isnan
from pathlib import Path

import numpy as np
import torch

from igpt.checkpoint.igpt_format import Weights
from igpt.encoder.find_encoder import find_encoder
from igpt.metric.generative import FEW_FOR_FRECHET
from igpt.metric.result import Curve, Grid, Number, Result
from igpt.metric.statistics import rank_correlation, rank_correlation_interval
from igpt.run.components import Components
from igpt.settings.generation import QualitySettings
from igpt.settings.older_configs import read_record
from igpt.task.compared_images import SHOWN, Judge, RealImages, draw_kinds
from igpt.task.scaling import ACCURACY, check_data, collect_lines

log = logging.getLogger(__name__)

MEASURING = ("scaling", "probe", "evaluate")  # tasks whose finished runs give accuracies and losses of weights


@dataclass(frozen=True)
class Checkpoint:
    """Weights to measure, with the images they had seen in pretraining and what finished runs say of them."""

    weights: Weights
    prefix: str  # of its numbers' names
    seen: int | None  # images; None: not known
    measured: dict[str, Number]  # `accuracy` of a probe, `loss_gen`; empty if not known

    @property
    def title(self) -> str:
        """Of a column of a picture: narrow."""
        name = self.weights.metadata.model.removeprefix("igpt_")
        return name if self.seen is None else f"{name} {self.seen:,}"


def run(components: Components, settings: QualitySettings) -> Result:
    """Sample quality of the weights of `init=`, or over the checkpoints of `runs`, with reference rows.

    Numbers: `samples/kid` …; over checkpoints `NAME/N_images/samples/kid`; the same of `completions`. Reference rows:
    `real` (as many training images), `tokenized` (the same through the tokenizer), `untrained` (a network not trained).
    """
    trainings, warnings = list_trainings(components, settings)
    real = RealImages(components, settings)
    real.check()
    tokenizer, hardware, seed = components.tokenizer, components.hardware, components.seed
    judge = Judge(real, find_encoder(settings.encoder, device=hardware.device, resolution=tokenizer.side))
    reference = judge.compare_features(judge.training[: settings.samples])
    result = Result(numbers={f"real/{key}": number for key, number in reference.items()})
    if "tokenized" in settings.baselines:
        pixels = real.read("train", real.training[: settings.samples])
        tokens = components.build_datamodule().encode(torch.from_numpy(pixels))
        result.numbers |= judge.compare("tokenized", tokenizer.decode(tokens))[0]
    if "untrained" in settings.baselines:
        last = next(iter(trainings.values()))[-1].weights
        name = f"untrained, seed {seed}, {sorted(last.metadata.network.to_dict().items())}"
        drawn = draw_kinds(last, lambda net: net.init_weights(seed), tokenizer, real, name=name)
        result.numbers |= judge.compare("untrained", drawn["samples"])[0]
    shown = []
    for name, checkpoints in trainings.items():
        for checkpoint in checkpoints:
            weights, prefix = checkpoint.weights, checkpoint.prefix
            for kind, images in draw_kinds(weights, weights.load_into, tokenizer, real, name=weights.sha256).items():
                numbers, features = judge.compare(kind, images)
                result.numbers |= {f"{prefix}{key}": number for key, number in numbers.items()}
                result.grids[f"nearest_{kind}"] = judge.show_nearest(images, features)  # of the last weights
                kid = numbers[f"{kind}/kid"]
                log.info("%s%s: KID %.4f, standard error %.4f", prefix, kind, kid.value, kid.stderr)
                if kind == "samples":
                    shown.append((checkpoint.title, images))
        if settings.runs:
            add_curves(result, name, checkpoints, judge.encoder.name)
    result.grids["samples"] = (
        Grid(np.stack([images[:SHOWN] for _, images in shown], axis=1), tuple(title for title, _ in shown))
        if settings.runs
        else Grid.square(shown[0][1][: SHOWN**2])
    )
    hashes = {name: [each.weights.sha256 for each in checkpoints] for name, checkpoints in trainings.items()}
    encoder = {"name": judge.encoder.name, "hash": judge.encoder.hash, "input_size": judge.encoder.input_size}
    result.provenance = {
        "weights": hashes if settings.runs else components.trained_weights.sha256, "tokenizer": tokenizer.hash,
        "sampling": {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p},
        "encoder": encoder, "compared_with": "val", "seed": seed,
        "images": {"val": len(judge.held_out), "train": len(judge.training)},
    }  # fmt: skip
    if min(settings.samples, len(judge.held_out)) < FEW_FOR_FRECHET:
        warnings.append(
            f"fd_{judge.encoder.name} of {settings.samples:,} and {len(judge.held_out):,} images is mostly bias below "
            f"{FEW_FOR_FRECHET:,} of each: compare it with that of real images and of as many samples only; see KID"
        )
    if warnings:
        result.provenance["warning"] = "; ".join(warnings)
        log.warning("%s", result.provenance["warning"])
    return result


def list_trainings(components: Components, settings: QualitySettings) -> tuple[dict[str, list[Checkpoint]], list[str]]:
    """The weights to measure, by the name of their training; warnings.

    Raises:
        ValueError: no weights, weights that cannot draw images, or of other tokens or held-out images than the first.
    """
    if not settings.runs:
        weights = components.trained_weights
        check_draws(weights)
        return {weights.metadata.model: [Checkpoint(weights, "", None, {})]}, []
    measured: dict[str, dict[str, Number]] = {}
    places = []
    for run in settings.runs:
        record = Path(run) / "result.json"
        if not record.is_file() or read_record(record).get("task") not in MEASURING:
            places.append(run)
            continue
        for sha256, numbers in read_measured(record).items():
            measured[sha256] = measured.get(sha256, {}) | numbers
    if not places:
        raise ValueError(f"task.runs={settings.runs} measure weights: give the pretraining run as well, before them")
    data = components.cache_key["data"]
    lines = collect_lines(places, palette=data.get("clusters"))
    trainings: dict[str, list[Checkpoint]] = {line.name: [] for line in lines}
    for line in lines:
        check_draws(line.last)
        for weights in line.weights:
            seen = line.count_images_seen(weights)
            prefix = f"{line.name}/{weights.folder.name if seen is None else f'{seen}_images'}/"
            trainings[line.name].append(Checkpoint(weights, prefix, seen, measured.get(weights.sha256, {})))
    return trainings, check_data(lines, data, "val")


def check_draws(weights: Weights) -> None:
    """Raises ValueError for weights of a bidirectional objective."""
    metadata = weights.metadata
    if not metadata.network.causal:
        raise ValueError(
            f"{weights.folder} was trained to fill in masked tokens ({metadata.objective['name']}) and draws none: "
            "task=quality needs weights of objective=ar"
        )


def read_measured(path: Path) -> dict[str, dict[str, Number]]:
    """SHA-256 of weights → `accuracy` and `loss_gen`, from the result.json of a task of MEASURING."""
    record = read_record(path, oldest=1)
    numbers, weights = record["numbers"], record["provenance"]["weights"]
    if isinstance(weights, str):  # one network
        places = {"cv" if "cv/accuracy" in numbers else "val": weights}
    else:  # several trainings, each with the numbers of its checkpoints in the order of their hashes
        places = {}
        for name, hashes in weights.items():
            of_name = [key for key in numbers if key.startswith(f"{name}/") and key.endswith("/loss_gen")]
            places |= zip([key.rpartition("/")[0] for key in of_name], hashes, strict=True)
    return {
        sha256: {
            what: Number(**{**fields, "interval": fields.get("interval") and tuple(fields["interval"])})
            for what in ("accuracy", "loss_gen")
            if (fields := numbers.get(f"{place}/{what}")) is not None
        }
        for place, sha256 in places.items()
    }


def add_curves(result: Result, name: str, checkpoints: list[Checkpoint], encoder: str) -> None:
    """Adds a training's curves over the images seen, and of its probe accuracy over KID, with 95 % intervals."""
    kid, accuracy = f"KID, {encoder}", ACCURACY
    fd, seen = f"fd_{encoder}", "images seen"
    lines = {  # of a number: the line's name, the unit of its axis
        "samples/kid": ("KID", kid), "completions/kid": ("KID of completions", kid),
        f"samples/{fd}": (fd, f"Fréchet distance, {encoder}"),
        "samples/precision": ("precision", "precision, recall"), "samples/recall": ("recall", "precision, recall"),
        "loss_gen": ("loss", "val loss (nats/token)"), "accuracy": ("probe", accuracy),
    }  # fmt: skip
    table = []  # a row of numbers for each checkpoint
    for each in checkpoints:
        numbers = result.numbers.items()
        own = {key.removeprefix(each.prefix): number for key, number in numbers if key.startswith(each.prefix)}
        images = {} if each.seen is None else {seen: Number(float(each.seen), "images", 1)}
        table.append({**images, **each.measured, **own})
    for key, (label, unit) in lines.items():
        if rows := [row for row in table if key in row and seen in row]:
            result.curves[f"{name}: {label}"] = join_points(rows, seen, key, x_unit=seen, y_unit=unit)
    for key, label in (("kid", "KID"), (fd, fd)):
        rows = [{**row, "real": result.numbers[f"real/{key}"]} for row in table if seen in row]
        unit = lines[f"samples/{key}"][1]
        result.curves[f"real images: {label}"] = join_points(rows, seen, "real", x_unit=seen, y_unit=unit)
    if rows := [row for row in table if "accuracy" in row]:
        curve = join_points(rows, "samples/kid", "accuracy", x_unit=kid, y_unit=accuracy)
        result.curves[name] = curve
        better = [-x for x in curve.x]
        if not isnan(rank := rank_correlation(better, curve.y)):
            interval = rank_correlation_interval(better, curve.y)
            number = Number(rank, "Spearman, -KID and accuracy", len(rows), interval=interval)
            result.numbers[f"{name}/rank_correlation"] = number


def join_points(rows: list[dict[str, Number]], x: str, y: str, *, x_unit: str, y_unit: str) -> Curve:
    """The curve of one number of each row over another, with the intervals that all have."""
    columns = [[row[key] for row in rows] for key in (x, y)]
    values = [[number.value for number in column] for column in columns]
    ends = [[end for number in column if (end := number.confidence_interval)] for column in columns]
    known = [of_column if len(of_column) == len(rows) else None for of_column in ends]
    return Curve(values[0], values[1], x_unit, y_unit, x_intervals=known[0], y_intervals=known[1])
