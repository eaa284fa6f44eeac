"""`task=low_data`: probes on few labels per class; mean and standard deviation over subsets (Chen et al. 2020)."""

import logging
from functools import partial
from typing import Any

import numpy as np

from igpt.data.split import balanced_subset
from igpt.metric.result import Curve, Number, Result
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
from igpt.settings.probing import LowDataSettings
from igpt.task.class_score import check_classes
from igpt.task.feature_reader import FeatureReader
from igpt.training.hardware import matmul_precision

log = logging.getLogger(__name__)


def run(components: Components, settings: LowDataSettings) -> Result:
    """Accuracy on `split` for each `per_class` number of labels, over random subsets.

    Only the drawn labels are used: C is chosen by cross-validation among them. The layer is `layer`, or the best on val
    of a probe with all labels; the result's provenance states which.
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
        for n in settings.per_class
    }
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
        sets = {"features": (train.select_layer(layer), held_out.select_layer(layer))}
        if "pixels" in settings.baselines:
            train_pixels, split_pixels = (FeatureSet.from_pixels(source.split(of)) for of in ("train", split))
            sets["raw_pixels"] = train_pixels, split_pixels
        for name, (few_of, judged) in sets.items():
            means = []
            for n, drawn in rows_of.items():
                shares = []
                for i, rows in enumerate(drawn):
                    share, table, head = score_subset(few_of.select_rows(rows), judged, C_grid, n, **how)
                    shares.append(share)
                    subset = f"{name.replace('_', ' ')}, {n} labels a class, subset {i}"
                    fits |= {f"{subset}, folds": table, f"{subset}, final": head}
                mean, deviation = float(np.mean(shares)), float(np.std(shares, ddof=1))
                log.info(
                    "%s, %d labels a class: %.4f ± %.4f (standard deviation of %d subsets)", name.replace("_", " "), n,
                    mean, deviation, settings.subsets,
                )  # fmt: skip
                key = f"{split}/accuracy_{n}_per_class" if name == "features" else f"{split}/{name}_{n}_per_class"
                result.numbers[key] = Number(
                    mean, "share", settings.subsets, deviation=deviation,
                    features=f"layer {layer}" if name == "features" else "raw pixels",
                )  # fmt: skip
                means.append(mean)
            title = "low-data probe" if name == "features" else "raw pixels"
            result.curves[f"{title}, {split}"] = Curve(
                [float(n) for n in rows_of], means, "labels per class", "accuracy"
            )
    ends = [float(end) for end in (min(rows_of), max(rows_of))]
    result.curves["chance"] = Curve(ends, [1 / n_class] * 2, "labels per class", "accuracy")
    result.numbers["probe/layer"] = number_layer(layer, net.n_layer, correct)
    result.provenance = {
        "weights": weights.sha256, "tokenizer": components.tokenizer.hash, "layer": layer, "layer_chosen_by": chosen_by,
        "norm": settings.norm, "pooling": "mean over positions", "solver": "lbfgs",
        "C": "cross-validation inside each subset",
        "masks": masks, "seed": seed, "subset_seeds": [settings.subset_seed + i for i in range(settings.subsets)],
        **report_convergence(fits),
    }  # fmt: skip
    return result


def score_subset(
    few: FeatureSet, judged: FeatureSet, C_grid: list[float], per_class: int, *, seed: int, **how: Any
) -> tuple[float, GridScores, FittedHead]:
    """Accuracy on `judged` of a head fitted on the `few` images of one layer, C by cross-validation among them."""
    folds = assign_folds(few.labels, choose_n_fold(per_class), seed=seed)
    table = grid_search(few, few, C_grid, folds=folds, seed=seed, **how)
    head = fit_head([few], select_best(table, layer=None), seed=seed, **how)
    predictions, _ = head.predict(judged)
    return float((predictions == judged.labels).mean()), table, head
