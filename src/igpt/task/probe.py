"""`task=probe`: linear classifiers on the pooled features of every layer."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from igpt.checkpoint.probe_files import PROBE, ProbeMetadata, save_probe
from igpt.distributed import ranks
from igpt.metric.classification import ClassMetrics
from igpt.metric.result import Curve, Number, Result
from igpt.model.gpt import GPT
from igpt.probe.depth import fall_to_last_layer, number_layer, resolve_layer
from igpt.probe.selection import (
    Choice,
    FeatureSet,
    FittedHead,
    GridScores,
    assign_folds,
    choose_n_fold,
    describe_shift,
    fit_head,
    grid_search,
    report_convergence,
    select_best,
    window_around,
)
from igpt.run.components import Components
from igpt.settings.probing import ProbeSettings
from igpt.task.class_score import check_classes
from igpt.task.feature_reader import FeatureReader
from igpt.task.sgd_probe import refit_head, train_heads
from igpt.training.hardware import matmul_precision

log = logging.getLogger(__name__)

AT_ONCE = 4096  # images scored together: top 5 takes three tables of images × classes


def run(components: Components, settings: ProbeSettings) -> Result:
    """Val accuracy of every layer, val and test accuracy of the best (or of those concatenated), and the baselines.

    Names start with `cv/` instead of `val/` if layer and C are chosen by cross-validation inside train.
    """
    weights, objective = components.trained_weights, components.objective
    concat, folds = settings.concat_layers, settings.folds
    refit = settings.solver == "lbfgs" if settings.refit == "auto" else settings.refit
    n_layer = weights.metadata.network.n_layer
    resolve_layer(settings.layer, n_layer)
    if concat is not None and concat > n_layer + 1:
        raise ValueError(f"task.concat_layers={concat}: the network has {n_layer + 1} layers to take together")
    source = components.source
    if (n_label := source.labels_per_class) is not None:  # no other labels may be used
        if settings.refit is True:
            log.warning("task.refit does not train on val: data.labels_per_class=%s limits labels", n_label)
        refit = False
        if folds == "auto" and settings.solver == "sgd":
            raise ValueError(
                "task.solver=sgd chooses on val, whose labels data.labels_per_class forbids: take task.solver=lbfgs, "
                "or allow them, task.folds=null"
            )
        folds = choose_n_fold(n_label) if folds == "auto" else folds
    folds = None if folds == "auto" else folds
    splits = [*(["val"] if folds is None or refit else []), *(["test"] if settings.test else [])]
    masks = settings.eval_masks if not objective.causal else 1  # an autoregressive objective has no masks
    settings = settings.model_copy(update={"folds": folds, "refit": refit, "eval_masks": masks})
    n_class = check_classes(source, splits)
    net = components.hardware.build_frozen(weights.build_network, weights.load_into)
    solve = probe_by_sgd if settings.solver == "sgd" else probe_by_lbfgs
    result = solve(components, settings, net=net, n_class=n_class)
    result.files["probe"] = Path(PROBE)
    if any(len(curve.x) > 1 for curve in result.curves.values() if curve.x_unit == "layer"):
        result.curves["chance"] = Curve([0.0, float(n_layer)], [1 / n_class] * 2, "layer", "accuracy")
    shift = describe_shift(result.provenance["layers"], int(result.numbers["probe/layer"].value))
    if concat is not None and shift:
        log.warning("task.concat_layers=%d: %s", concat, shift)
        result.provenance["warning"] = shift
    result.provenance |= {
        "weights": weights.sha256, "tokenizer": components.tokenizer.hash, "norm": settings.norm,
        "pooling": "mean over positions", "solver": settings.solver, "masks": masks, "seed": components.seed,
        **({"positions_resized_from": weights.resized_from} if weights.resized_from else {}),
    }  # fmt: skip
    return result


def probe_by_sgd(components: Components, settings: ProbeSettings, *, net: GPT, n_class: int) -> Result:
    """SGD: trains heads for every layer (or `layer` with its neighbours) and learning rate at once."""
    n_layer, layer, masks = net.n_layer, resolve_layer(settings.layer, net.n_layer), settings.eval_masks
    if layer is None:
        windows = [[single] for single in range(n_layer + 1)]
    else:
        windows = [window_around(layer, settings.concat_layers or 1, n_layer)]
    module, progress, validate = train_heads(components, settings, net=net, windows=windows, n_class=n_class)
    table = module.table(components.source.split("val").labels)
    best = select_best(table, layer=None)
    result = build_result(table, best, n_layer=n_layer, layer=layer, eval_masks=masks, judged="val")
    result.numbers["probe/rate"] = Number(best.strength, "learning rate", 1)
    result.curves |= module.curves()
    cell = windows.index(best.layers), table.C_grid.index(best.strength)
    if settings.refit:
        module, validate = refit_head(
            components, settings, net=net, window=best.layers, rate=best.strength, n_class=n_class
        )
        result.curves |= {name.replace("train/", "refit/"): curve for name, curve in module.curves().items()}
        cell = 0, 0
    if ranks.this_rank().is_first:
        weight, bias = module.weights[cell[1]][cell[0]], module.biases[cell[1]][cell[0]]
        save_probe(components.run_dir / PROBE, weight, bias, best.layers, describe_head(components, settings))
    if settings.test:
        module.cell = cell
        validate("test")
        numbers, confusion = module.test_scores
        result.numbers |= {f"test/{name}": replace(of, features=best.features) for name, of in numbers.items()}
        result.add_confusion(confusion, components.source.class_names)
    result.files["checkpoints"] = Path("checkpoints" if settings.sgd.search == "together" else "rates")
    result.provenance = {
        "layers": best.layers, "rate": best.strength, "rates": table.C_grid, "refitted_on_val": settings.refit,
        "chosen_on": "val", **progress.provenance,
    }  # fmt: skip
    return result


def probe_by_lbfgs(components: Components, settings: ProbeSettings, *, net: GPT, n_class: int) -> Result:
    """L-BFGS: logistic regression on cached features, every layer at every C."""
    weights, hardware = components.trained_weights, components.hardware
    source, seed = components.source, components.seed
    n_layer, folds, C_grid = net.n_layer, settings.folds, settings.C_grid
    layer = resolve_layer(settings.layer, n_layer)
    assert folds != "auto", "run has chosen"
    how: dict[str, Any] = {"n_class": n_class, "device": hardware.device, "seed": seed}
    judged = "val" if folds is None else "cv"
    images = partial(FeatureReader(components, settings).read_masked, eval_masks=settings.eval_masks)
    train = images(net, weights.sha256, "train")
    val = images(net, weights.sha256, "val") if folds is None or settings.refit else train  # folds need train only
    with matmul_precision(hardware.matmul_precision, hardware.device):
        fold = None if folds is None else assign_folds(train.labels, folds, seed=seed)
        table = grid_search(train, val, C_grid, folds=fold, **how)
        fits: dict[str, GridScores | FittedHead] = {"probe": table}
        best = select_best(table, layer=layer)
        log.info("probe: layer %d of %d is best, C = %g", best.layers[0], n_layer, best.strength)
        result = build_result(table, best, n_layer=n_layer, layer=layer, eval_masks=settings.eval_masks, judged=judged)
        if settings.concat_layers is not None:
            windows = [window_around(best.layers[0], settings.concat_layers, n_layer)]
            together = fits["concatenated"] = grid_search(train, val, C_grid, folds=fold, windows=windows, **how)
            single, best = best, select_best(together, layer=None)
            result.numbers |= score_choice(together, best, eval_masks=settings.eval_masks, judged=judged)
            result.numbers[f"{judged}/best_layer"] = table.number(single)
        result.numbers["probe/C"] = Number(best.strength, "C", 1)
        if "untrained" in settings.baselines:
            fresh = hardware.build_frozen(weights.build_network, lambda net: net.init_weights(seed))
            name = f"untrained, seed {seed}, {sorted(net.config.to_dict().items())}, {components.tokenizer.hash}"
            fresh_train = images(fresh, name, "train")
            fresh_val = images(fresh, name, "val") if folds is None else fresh_train
            baseline_table = fits["untrained"] = grid_search(fresh_train, fresh_val, C_grid, folds=fold, **how)
            result.curves[f"untrained network, {judged}"] = baseline_table.curve()
            chosen = select_best(baseline_table, layer=None)
            untrained = baseline_table.number(chosen, features=f"{chosen.features}, untrained")
            result.numbers[f"{judged}/untrained"] = untrained
        if "pixels" in settings.baselines:
            raw_train = FeatureSet.from_pixels(source.split("train"))
            raw_val = FeatureSet.from_pixels(source.split("val")) if folds is None else raw_train
            of_pixels = fits["raw pixels"] = grid_search(raw_train, raw_val, C_grid, folds=fold, **how)
            share = of_pixels.number(select_best(of_pixels, layer=None), features="raw pixels")
            result.numbers[f"{judged}/raw_pixels"] = share
            depth = [0.0, float(n_layer)]
            result.curves[f"raw pixels, {judged}"] = Curve(depth, [share.value] * 2, "layer", "accuracy")
        heads = fits["final"] = fit_head([train, val] if settings.refit else [train], best, **how)
        if ranks.this_rank().is_first:
            weight, bias = heads.heads.weight[0, 0], heads.heads.bias[0, 0]
            save_probe(components.run_dir / PROBE, weight, bias, best.layers, describe_head(components, settings))
        if settings.test:
            held_out = images(net, weights.sha256, "test")
            score_test(result, heads, held_out, features=best.features, class_names=source.class_names)
    result.provenance = {
        "layers": best.layers, "C": best.strength, "refitted_on_val": settings.refit,
        "chosen_on": "val" if folds is None else f"{folds} folds of train", **report_convergence(fits),
    }  # fmt: skip
    return result


def describe_head(components: Components, settings: ProbeSettings) -> ProbeMetadata:
    """What is saved with the probe. Those of SGD read features that were never rounded."""
    source = components.source
    return ProbeMetadata(
        norm=settings.norm, dtype=settings.dtype if settings.solver == "lbfgs" else "float32", data=source.name,
        weights=components.trained_weights.sha256, resolution=components.tokenizer.side,
        eval_masks=settings.eval_masks, seed=components.seed, class_names=source.class_names,
    )  # fmt: skip


def score_test(
    result: Result, head: FittedHead, images: FeatureSet, *, features: str, class_names: tuple[str, ...] | None
) -> None:
    """Adds the `ClassMetrics` of a head on test images, by vote over masks, and its confusion matrix."""
    predictions, scores = head.predict(images)
    metrics = ClassMetrics(head.n_class, has_votes=len(images.by_mask) > 1, synced=False)  # each rank has all images
    answers, labels = torch.from_numpy(predictions), torch.from_numpy(images.labels)
    for some in zip(*(torch.split(of, AT_ONCE) for of in (scores.cpu(), answers, labels)), strict=True):
        metrics.update(*some)
    numbers, confusion = metrics.compute(features=features)
    result.numbers |= {f"test/{name}": number for name, number in numbers.items()}
    result.add_confusion(confusion, class_names)


def build_result(
    table: GridScores, best: Choice, *, n_layer: int, layer: int | None, eval_masks: int, judged: str
) -> Result:
    """Numbers and curve of the search: the best layer with its interval, the embedding and the last as baselines."""
    result = Result(numbers=score_choice(table, best, eval_masks=eval_masks, judged=judged))
    last = len(table.windows) - 1
    curve = table.curve()
    result.numbers["probe/layer"] = number_layer(best.layers[0] if layer is None else layer, n_layer)
    if last:
        assert table.correct is not None
        found = number_layer(select_best(table, layer=None).layers[0], n_layer, table.correct)
        curve = replace(curve, best=found.interval)
        if layer is None:
            result.numbers["probe/layer"] = found
        result.numbers[f"{judged}/embedding"] = table.number(select_best(table, layer=0))
        result.numbers[f"{judged}/last_layer"] = table.number(select_best(table, layer=last))
        result.numbers[f"{judged}/fall_to_last_layer"] = fall_to_last_layer(table.correct)
    result.curves[f"probe, {judged}"] = curve
    return result


def score_choice(table: GridScores, choice: Choice, *, eval_masks: int, judged: str) -> dict[str, Number]:
    """The accuracy of a choice on the images it was made on; with several masks also that of the first alone."""
    numbers = {f"{judged}/accuracy": table.number(choice)}
    if eval_masks > 1 and judged == "val":
        numbers[f"{judged}/accuracy_one_mask"] = table.number(choice, one_mask=True)
    return numbers
