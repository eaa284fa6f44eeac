"""`task=low_data`: probes on few labels per class; mean and standard deviation over subsets (Chen et al. 2020)."""

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from igpt.data.split import balanced_subset
from igpt.metric.result import Curve, Number, Result
from igpt.metric.statistics import mean_interval
from igpt.probe.depth import number_layer, resolve_layer
from igpt.probe.selection import (
    FeatureSet,
    FittedHead,
    GridScores,
    assign_folds,
    choose_n_fold,
    fit_head,
    grid_search,
    report_convergence,
    select_best,
)
from igpt.run.components import Components
from igpt.settings.probing import PIXELS, RAW_PIXELS, LowDataSettings
from igpt.task.class_score import check_classes
from igpt.task.encoder_features import ReadFeatures, open_features
from igpt.task.feature_reader import FeatureReader
from igpt.training.hardware import matmul_precision

log = logging.getLogger(__name__)

SIZE = "labels per class"  # x of the curves


@dataclass(frozen=True)
class Method:
    """Features that classifiers are fitted on, of the drawn training images and of the evaluated split."""

    name: str  # in the names of numbers
    title: str  # of its curve, in the log, and of its fits
    features: str  # as of `Number`
    drawn: FeatureSet
    judged: FeatureSet


def run(components: Components, settings: LowDataSettings) -> Result:
    """Accuracy on `split` for each `per_class` number of labels, over random subsets: of the network and the baselines.

    All are fitted on the same subsets and judged on the same images. Only the drawn labels are used: C is chosen by
    cross-validation among them. The layer is `layer`, or the best on val of a probe with all labels; the result's
    provenance states which.
    """
    weights, hardware = components.trained_weights, components.hardware
    source, seed = components.source, components.seed
    split, C_grid = settings.split, settings.C_grid
    if source.labels_per_class is not None:
        raise ValueError("task=low_data draws its subsets itself, task.per_class: leave data.labels_per_class=null")
    n_class = check_classes(source, ["val", split])
    masks = settings.eval_masks if not components.objective.causal else 1
    labels = source.split("train").labels
    draw = partial(balanced_subset, labels, where=source.name, setting="task.per_class")
    rows_of = {  # before features are read, so that a class with too few images fails at once
        n: [draw(per_class=n, seed=settings.subset_seed + i) for i in range(settings.subsets)]
        for n in sorted(settings.per_class)
    }
    drawn = np.unique(np.concatenate([rows for subsets in rows_of.values() for rows in subsets]))
    places_of = {n: [np.searchsorted(drawn, rows) for rows in subsets] for n, subsets in rows_of.items()}
    encoders = {name: open_encoder(components, settings, name) for name in settings.encoders}
    reader = FeatureReader(components, settings)
    net = hardware.build_frozen(weights.build_network, weights.load_into)
    layer = resolve_layer(settings.layer, net.n_layer)
    how: dict[str, Any] = {"n_class": n_class, "device": hardware.device, "seed": seed}
    result = Result()
    fits: dict[str, GridScores | FittedHead] = {}
    train = reader.read_masked(net, weights.sha256, "train", eval_masks=masks)
    held_out = reader.read_masked(net, weights.sha256, split, eval_masks=masks)
    with matmul_precision(hardware.matmul_precision, hardware.device):
        chosen_by = "given"
        correct: np.ndarray | None = None
        if layer is None:
            val = reader.read_masked(net, weights.sha256, "val", eval_masks=masks)
            table = fits["all labels"] = grid_search(train, val, C_grid, **how)
            layer, correct = select_best(table, layer=None).layers[0], table.correct
            chosen_by = f"probe with {len(labels):,} labels, on val"
        few = train.select_layer(layer).select_rows(drawn)
        methods = [Method("accuracy", "features", f"layer {layer}", few, held_out.select_layer(layer))]
        if PIXELS in settings.baselines:
            train_pixels, split_pixels = (FeatureSet.from_pixels(source.split(of)) for of in ("train", split))
            methods.append(
                Method(RAW_PIXELS, "raw pixels", "raw pixels", train_pixels.select_rows(drawn), split_pixels)
            )
        methods += [Method(name, name, name, read("train", drawn), read(split)) for name, (read, _) in encoders.items()]
        shares: dict[str, dict[int, list[float]]] = {}
        for method in methods:
            shares[method.name], of_method = score_subsets(method, places_of, C_grid, **how)
            fits |= of_method
    for method in methods:
        result.numbers |= describe_shares(shares[method.name], method, split=split)
        title = "low-data probe" if method.name == "accuracy" else method.title
        result.curves[f"{title}, {split}"] = build_curve(shares[method.name])
    for method in methods[1:]:
        result.numbers |= compare_shares(shares["accuracy"], shares[method.name], method.name, split=split)
    ends = [float(end) for end in (min(rows_of), max(rows_of))]
    result.curves["chance"] = Curve(ends, [1 / n_class] * 2, SIZE, "accuracy")
    result.numbers["probe/layer"] = number_layer(layer, net.n_layer, correct)
    result.provenance = {
        "weights": weights.sha256, "tokenizer": components.tokenizer.hash, "layer": layer, "layer_chosen_by": chosen_by,
        "norm": settings.norm, "pooling": "mean over positions", "solver": "lbfgs",
        "C": "cross-validation inside each subset",
        "masks": masks, "seed": seed, "subset_seeds": [settings.subset_seed + i for i in range(settings.subsets)],
        **({"encoders": {name: described for name, (_, described) in encoders.items()}} if encoders else {}),
        **report_convergence(fits),
    }  # fmt: skip
    return result


def open_encoder(components: Components, settings: LowDataSettings, name: str) -> tuple[ReadFeatures, dict[str, Any]]:
    """As `open_features`, of an encoder among `task.baselines`."""
    try:
        return open_features(
            components, settings.encoders[name], ["train", settings.split], dtype=settings.dtype,
            batch_size=settings.batch_size, setting=f"task.baselines {name}",
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(str(error).replace("task.encoder", "task.baselines")) from error


def score_subsets(
    method: Method, places_of: dict[int, list[np.ndarray]], C_grid: list[float], **how: Any
) -> tuple[dict[int, list[float]], dict[str, GridScores | FittedHead]]:
    """(labels per class → the accuracy of each subset, the fits by what they are of).

    `places_of`: labels per class → for each subset, the positions of its images in `method.drawn`.
    """
    shares: dict[int, list[float]] = {}
    fits: dict[str, GridScores | FittedHead] = {}
    for n, subsets in places_of.items():
        shares[n] = []
        for i, places in enumerate(subsets):
            share, table, head = score_subset(method.drawn.select_rows(places), method.judged, C_grid, n, **how)
            shares[n].append(share)
            subset = f"{method.title}, {n} labels a class, subset {i}"
            fits |= {f"{subset}, folds": table, f"{subset}, final": head}
        log.info(
            "%s, %d labels a class: %.4f ± %.4f (standard deviation of %d subsets)", method.title, n,
            np.mean(shares[n]), np.std(shares[n], ddof=1), len(subsets),
        )  # fmt: skip
    return shares, fits


def describe_shares(shares: dict[int, list[float]], method: Method, *, split: str) -> dict[str, Number]:
    """Mean and standard deviation over the subsets, for each number of labels."""
    return {
        f"{split}/{method.name}_{n}_per_class": Number(
            float(np.mean(each)), "share", len(each), deviation=float(np.std(each, ddof=1)), features=method.features
        )
        for n, each in shares.items()
    }


def compare_shares(
    shares: dict[int, list[float]], others: dict[int, list[float]], name: str, *, split: str
) -> dict[str, Number]:
    """Mean gain over `others`, named `name`, on the same subset; the interval is that of the paired t-test."""
    numbers = {}
    for n, each in shares.items():
        differences = (np.array(each) - np.array(others[n])).tolist()
        stderr, interval = mean_interval(differences)
        numbers[f"{split}/gain_over_{name}_{n}_per_class"] = Number(
            float(np.mean(differences)), "share", len(differences), stderr, interval
        )
    return numbers


def build_curve(shares: dict[int, list[float]]) -> Curve:
    """Mean accuracy by labels per class, with standard deviations over the subsets."""
    means, deviations = ([float(of(each)) for each in shares.values()] for of in (np.mean, partial(np.std, ddof=1)))
    return Curve([float(n) for n in shares], means, SIZE, "accuracy", y_deviations=deviations)


def score_subset(
    few: FeatureSet, judged: FeatureSet, C_grid: list[float], per_class: int, *, seed: int, **how: Any
) -> tuple[float, GridScores, FittedHead]:
    """Accuracy on `judged` of a head fitted on the `few` images of one layer, C by cross-validation among them."""
    folds = assign_folds(few.labels, choose_n_fold(per_class), seed=seed)
    table = grid_search(few, few, C_grid, folds=folds, seed=seed, **how)
    head = fit_head([few], select_best(table, layer=None), seed=seed, **how)
    predictions, _ = head.predict(judged)
    return float((predictions == judged.labels).mean()), table, head
