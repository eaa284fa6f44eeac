"""`task=scaling`: generative loss against probe accuracy, over the steps of several pretrainings."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from igpt.checkpoint.igpt_format import Weights
from igpt.checkpoint.kept import list_weights
from igpt.data.split import split_differences
from igpt.metric.result import Curve, MarkedLines, Number, Result
from igpt.metric.statistics import mean_interval, rank_correlation, rank_correlation_interval, weigh_gap_at_equal_x
from igpt.probe.selection import FittedHead, GridScores, grid_search, report_convergence, select_best
from igpt.run.components import Components
from igpt.run.fingerprint import compare_splits, read_training_config
from igpt.run.probe_data import build_probe_components
from igpt.settings.probing import ScalingSettings
from igpt.task.class_score import check_classes
from igpt.task.evaluate import EvaluateModule
from igpt.task.feature_reader import FeatureReader
from igpt.training.hardware import matmul_precision

log = logging.getLogger(__name__)

BATCH_SIZE = 128  # of pretraining, where no run says it: OpenAI's (Chen et al. 2020, §3.1)
ACCURACY = "best layer's val accuracy"


@dataclass(frozen=True)
class ScalingLine:
    """The steps of one pretraining, or of one size among weights from elsewhere."""

    place: str  # in task.runs, of the first
    weights: list[Weights]  # by step
    config: dict[str, Any]  # of the pretraining run; {}: unknown
    name: str = ""

    @property
    def last(self) -> Weights:
        return self.weights[-1]

    @property
    def is_run(self) -> bool:
        """Whether it is a whole pretraining run, as opposed to weights that were named one by one."""
        return bool(self.config) and (Path(self.place) / "run.json").is_file()

    def takes(self, other: "ScalingLine") -> bool:
        """Whether another line is a further step of this one: both named one by one, of one size, data and seed."""
        mine, its = ((of.model, of.data, of.seed) for of in (self.last.metadata, other.last.metadata))
        steps = {weights.metadata.step for weights in self.weights}
        is_single = len(other.weights) == 1 and other.last.metadata.step not in steps
        return is_single and not (self.is_run or other.is_run) and (mine, self.config) == (its, other.config)

    def count_images_seen(self, weights: Weights) -> int | None:
        """Images seen in pretraining up to these weights; None where they do not say their step."""
        return weights.metadata.step * int(self.config.get("task", {}).get("batch_size", BATCH_SIZE)) or None


def collect_lines(places: Sequence[str], *, palette: str | None = None) -> list[ScalingLine]:
    """The lines of the figure, named: one for each run or folder of steps; single weights are joined by their size.

    Of a run that cools down on the way, the cooled steps: the rate of the others was high.

    Raises:
        ValueError: no weights at a place, or weights with other tokens or another objective than the first.
    """
    lines: list[ScalingLine] = []
    for place in dict.fromkeys(places):  # one that is named twice counts once
        steps = list_weights(place, palette=palette)
        config = read_training_config(steps[-1].folder.parent)
        if cooled := config.get("task", {}).get("cooled_at"):
            ends = {*cooled, config["task"]["steps"]}
            steps = [each for each in steps if each.metadata.step in ends] or steps
        line = ScalingLine(place, steps, config)
        peer = next((peer for peer in lines if peer.takes(line)), None)
        if peer is None:
            lines.append(line)
        else:
            joined = sorted([*peer.weights, *steps], key=lambda weights: weights.metadata.step)
            lines[lines.index(peer)] = replace(peer, weights=joined)
    first = lines[0].last
    for line in lines:
        for weights in line.weights:
            _check_comparable(weights, first)
    return _name_lines(lines)


def _check_comparable(weights: Weights, first: Weights) -> None:
    """Raises ValueError unless the losses of both are of the same tokens and objective."""
    one, other = weights.metadata, first.metadata
    sides = (f"{of.tokenizer.side}×{of.tokenizer.side} pixels" for of in (one, other))
    tokens = (f"{of.tokenizer.describe()}, {of.tokenizer.hash}" for of in (one, other))
    for what, mine, its in (
        ("resolution", *sides),
        ("tokens", *tokens),
        ("objective", *(" ".join(str(value) for value in of.objective.values()) for of in (one, other))),
    ):
        if mine != its:
            raise ValueError(
                f"task.runs: {weights.path} has another {what} ({mine}) than {first.path} ({its}): their losses cannot "
                "be compared, give them figures of their own"
            )


def _name_lines(lines: list[ScalingLine]) -> list[ScalingLine]:
    """The lines named by size; several of one size also by seed, or else by their place."""
    for name in (
        lambda line: line.last.metadata.model,
        lambda line: f"{line.last.metadata.model}, seed {line.last.metadata.seed}",
        lambda line: Path(line.place).name,
    ):
        named = [replace(line, name=name(line)) for line in lines]
        if max(Counter(line.name for line in named).values()) == 1:
            return named
    return [replace(line, name=line.place) for line in lines]


def check_data(lines: Sequence[ScalingLine], data: dict[str, Any], split: str) -> list[str]:
    """Warnings on weights whose held-out images nobody knows. `data`: the settings of the images of the loss.

    Raises:
        ValueError: a run that was pretrained on another dataset, or held out other images.
    """
    warnings = []
    for line in lines:
        trained_on = line.config.get("data", {})
        if trained_on and trained_on.get("name") != data.get("name"):
            raise ValueError(
                f"task.runs: {line.place} was pretrained on {trained_on.get('name')}, and the loss would be that of "
                f"{data.get('name')}: choose data={trained_on.get('name')}, and {data.get('name')} for the probe, "
                "data@task.probe_data=OPTION"
            )
        if other := split_differences(data, trained_on) if trained_on else []:
            raise ValueError(f"task.runs: {line.place} held out other images (data.{', data.'.join(other)})")
        if not line.config and split != "test":
            warnings.append(
                f"{line.place} ({line.last.metadata.data}) does not say which images it held out: it may have been "
                f"trained on the {split} images of data={data.get('name')}; task.split=test has others"
            )
    return warnings


def run(components: Components, settings: ScalingSettings) -> Result:
    """Loss and best-layer probe accuracy on val, for each step of each pretraining (Chen et al. 2020, Figure 3).

    The loss is that of `task=evaluate`, the accuracy that of `task=probe`, on the images of `probe_data` if given.
    """
    runner, hardware, source, seed = components.runner, components.hardware, components.source, components.seed
    lines = collect_lines(settings.runs, palette=components.cache_key["data"].get("clusters"))
    warnings = check_data(lines, components.cache_key["data"], settings.split)
    for warning in warnings:
        log.warning("%s", warning)
    probed = components if settings.probe_data is None else build_probe_components(components)
    if probed is not components:
        for line in lines:
            compare_splits(probed.run.config["data"], line.last.folder.parent)
    n_class = check_classes(probed.source, ["val"])
    reader = FeatureReader(probed, settings)
    loss_axis, masks = f"{settings.split} loss (nats/token)", 1 if components.objective.causal else settings.eval_masks
    result, points = Result(), dict[str, list[tuple[float, Number]]]()
    right: dict[str, list[np.ndarray]] = {}  # of each point the val images that the best layer's probe is right on
    fits: dict[str, GridScores | FittedHead] = {}
    for line in lines:
        name, points[line.name], right[line.name] = line.name, [], []
        images: list[float] = []
        for weights in line.weights:
            net = hardware.build_frozen(weights.build_network, weights.load_into)
            scored = EvaluateModule(components, net, split=settings.split)
            plan = hardware.eval_batch_layout(settings.batch_size)
            runner.validate(scored, components.build_datamodule(plan=plan, eval_split=settings.split))
            train, val = (reader.read_masked(net, weights.sha256, part, eval_masks=masks) for part in ("train", "val"))
            with matmul_precision(hardware.matmul_precision, hardware.device):
                table = grid_search(train, val, settings.C_grid, n_class=n_class, device=hardware.device, seed=seed)
            best = select_best(table, layer=None)
            loss, share = scored.numbers[f"{settings.split}/loss_gen"], table.number(best)
            seen = line.count_images_seen(weights)
            step = weights.folder.name if seen is None else f"{seen}_images"
            log.info("%s, %s: %.4f nats/token, %.4f at layer %d", name, step, loss.value, share.value, best.layers[0])
            fits[f"{name}/{step}"] = table
            result.numbers |= {
                f"{name}/{step}/loss_gen": loss, f"{name}/{step}/accuracy": share,
                f"{name}/{step}/layer": Number(best.layers[0], f"of 0 … {net.n_layer}", 1),
            }  # fmt: skip
            points[name].append((loss.value, share))
            assert table.correct is not None
            right[name].append(table.correct[table.windows.index(best.layers)])
            images += [] if seen is None else [float(seen)]
            del net, scored  # before the next one is built
        losses, shares = [loss for loss, _ in points[name]], [share.value for _, share in points[name]]
        result.curves[name] = Curve(losses, shares, loss_axis, ACCURACY)
        if len(images) == len(losses):
            result.curves[f"{name}: probe"] = Curve(images, shares, "images seen", ACCURACY)
            result.curves[f"{name}: loss"] = Curve(images, losses, "images seen", loss_axis)
    by_size = [line.name for line in sorted(lines, key=_count_weights)]
    result.numbers |= compare_points({name: points[name] for name in by_size}, right)
    of = (f"{each.source.name}, {each.source.resolution}×{each.source.resolution}" for each in (components, probed))
    title = "loss: {split} of {}; probe: val of {}".format(*of, split=settings.split)
    result.lines["figure3"] = MarkedLines(points, loss_axis, ACCURACY, title, x_falls=True)
    result.provenance = {
        "weights": {line.name: [weights.sha256 for weights in line.weights] for line in lines},
        "tokenizer": components.tokenizer.hash, "norm": settings.norm, "pooling": "mean over positions",
        "solver": "lbfgs", "chosen_on": "val", "masks": masks, "split": settings.split, "loss_images": source.name,
        "probed_images": probed.source.name, "labels": len(probed.source.split("train")), "seed": seed,
        **({"warning": "; ".join(warnings)} if warnings else {}), **report_convergence(fits),
    }  # fmt: skip
    return result


def _count_weights(line: ScalingLine) -> int:
    return line.last.n_parameter


def compare_points(
    points: Mapping[str, list[tuple[float, Number]]], right: Mapping[str, list[np.ndarray]]
) -> dict[str, Number]:
    """The statistics of the figure. `points`: the lines, from small networks to large, each of (loss, accuracy).

    `right`: of every point whether the probe is right on each image, (N,) bool, the same images for all.

    Rank correlations of -loss and accuracy: along each line, over the last points of all, over all points. And how much
    more a larger network's probe reads at equal loss than the next smaller one's, where their losses overlap, with the
    interval of its mean over the images: each image's gap is paired, the losses are taken as known.
    """
    values = {name: [(-loss, share.value) for loss, share in line] for name, line in points.items()}
    of_several = {
        "final": [line[-1] for line in values.values()],
        "all": [pair for line in values.values() for pair in line],
    }
    numbers = {}
    for name, pairs in {**values, **(of_several if len(values) > 1 else {})}.items():
        x, y = np.transpose(pairs).tolist()
        if not np.isnan(correlation := rank_correlation(x, y)):
            interval = rank_correlation_interval(x, y)
            unit = "Spearman, -loss and accuracy"
            numbers[f"{name}/rank_correlation"] = Number(correlation, unit, len(x), interval=interval)
    for smaller, larger in pairwise(points):
        weights = weigh_gap_at_equal_x(*([loss for loss, _ in points[name]] for name in (smaller, larger)))
        if weights is not None:
            gaps = weights[1] @ np.stack(right[larger]) - weights[0] @ np.stack(right[smaller])  # (N,), of each image
            number = Number(float(gaps.mean()), "share, mean where the losses overlap", len(gaps))
            if len(gaps) > 1:
                stderr, interval = mean_interval(gaps.tolist())
                number = replace(number, stderr=stderr, interval=interval)
            numbers[f"equal_loss/{larger} - {smaller}"] = number
    return numbers
