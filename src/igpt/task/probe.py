"""`task=probe`: linear classifiers on the pooled features of every layer."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from igpt.distributed import ranks
from igpt.metric.result import Curve, Number, Result
from igpt.model.gpt import GPT
from igpt.probe.scores import accuracy_number, confusion, share_number, top_k
from igpt.probe.selection import Choice, Images, Table, chosen, few_folds, fitted, folds_of, searched, window_around
from igpt.run.components import Components
from igpt.settings.probing import ProbeSettings
from igpt.task.class_score import check_classes
from igpt.task.feature_reader import Reader
from igpt.task.sgd_probe import trained
from igpt.training.hardware import matmul_precision
from igpt.utils import files

log = logging.getLogger(__name__)


def run(components: Components, settings: ProbeSettings) -> Result:
    """Val accuracy of every layer, test accuracy of the best, and the baselines.

    Names start with `cv/` instead of `val/` if layer and C are chosen by cross-validation inside train.
    """
    weights, objective = components.trained_weights, components.objective
    layer, concat, folds, refit = settings.layer, settings.concat, settings.folds, settings.refit
    net = weights.net()
    n_layer = net.n_layer
    if layer is not None and not 0 <= layer <= n_layer:
        raise ValueError(f"task.layer must lie in 0 … {n_layer} (0: the embedding), got {layer}")
    if concat is not None and concat > n_layer + 1:
        raise ValueError(f"task.concat={concat}: the network has {n_layer + 1} layers to take together")
    source = components.source
    if source.labels_per_class is not None:  # no other labels may be used
        refit = False
        if folds == "auto" and settings.solver == "sgd":
            raise ValueError(
                "task.solver=sgd chooses on val, whose labels data.labels_per_class forbids: take task.solver=lbfgs, "
                "or allow them, task.folds=null"
            )
        folds = few_folds(source.labels_per_class) if folds == "auto" else folds
    folds = None if folds == "auto" else folds
    splits = [*(["val"] if folds is None or refit else []), *(["test"] if settings.test else [])]
    masks = settings.masks if not objective.causal else 1  # an autoregressive objective has no masks
    settings = settings.model_copy(update={"folds": folds, "refit": refit, "masks": masks})
    n_class = check_classes(source, splits)
    solve = by_sgd if settings.solver == "sgd" else by_lbfgs
    result = solve(components, settings, net=net, n_class=n_class)
    result.files["probe"] = Path("probe.safetensors")
    result.provenance |= {
        "weights": weights.sha256, "tokenizer": components.tokenizer.hash, "norm": settings.norm,
        "pooling": "mean over positions", "solver": settings.solver, "masks": masks, "seed": components.seed,
    }  # fmt: skip
    return result


def by_sgd(components: Components, settings: ProbeSettings, *, net: GPT, n_class: int) -> Result:
    """SGD: trains heads for every layer (or `layer` with its neighbours) and learning rate at once."""
    n_layer, layer, masks, seed = net.n_layer, settings.layer, settings.masks, components.seed
    if layer is None:
        windows = [[single] for single in range(n_layer + 1)]
    else:
        windows = [window_around(layer, settings.concat or 1, n_layer)]
    module, validate = trained(components, settings, net=net, windows=windows, n_class=n_class)
    table = module.table()
    best = chosen(table, layer=None)
    result = report(table, best, n_layer=n_layer, layer=layer, masks=masks, judged="val")
    result.numbers["probe/rate"] = Number(best.strength, "learning rate", 1)
    result.curves |= module.curves()
    place = windows.index(best.layers), table.strengths.index(best.strength)
    if ranks.this_rank().first:
        weight, bias = module.weights[place[1]][place[0]], module.biases[place[1]][place[0]]
        save_head(components.run_dir / "probe.safetensors", weight, bias, best.layers)
    if settings.test:
        validate("test")
        source = components.source
        labels, said = source.split("test").labels, module.said[place]
        result.numbers["test/accuracy"] = accuracy_number(said == labels, seed=seed)
        if masks > 1:
            result.numbers["test/accuracy_one_mask"] = share_number(module.right[1][place], len(labels), seed=seed)
        if n_class > 5:
            result.numbers["test/top_5"] = share_number(module.right[2][place], len(labels), seed=seed)
        result.add_confusion(confusion(labels, said, n_class), source.class_names)
    result.files["checkpoints"] = Path("checkpoints")
    result.provenance = {"layers": best.layers, "rate": best.strength, "chosen_on": "val"}
    return result


def by_lbfgs(components: Components, settings: ProbeSettings, *, net: GPT, n_class: int) -> Result:
    """L-BFGS: logistic regression on cached features, every layer at every C."""
    weights, hardware = components.trained_weights, components.hardware
    source, seed = components.source, components.seed
    n_layer, layer, folds, strengths = net.n_layer, settings.layer, settings.folds, settings.strengths
    assert folds != "auto", "run has chosen"
    how: dict[str, Any] = {"n_class": n_class, "device": hardware.device, "seed": seed}
    judged = "val" if folds is None else "cv"
    images = partial(Reader(components, settings).images, masks=settings.masks)
    train = images(net, weights.sha256, "train")
    val = images(net, weights.sha256, "val") if folds is None or settings.refit else train  # folds need train only
    with matmul_precision(hardware.matmul_precision, hardware.device):
        fold = None if folds is None else folds_of(train.labels, folds, seed=seed)
        table = searched(train, val, strengths, folds=fold, **how)
        best = chosen(table, layer=layer)
        log.info("probe: layer %d of %d is best, C = %g", best.layers[0], n_layer, best.strength)
        result = report(table, best, n_layer=n_layer, layer=layer, masks=settings.masks, judged=judged)
        if settings.concat is not None:
            windows = [window_around(best.layers[0], settings.concat, n_layer)]
            together = searched(train, val, strengths, folds=fold, windows=windows, **how)
            best = chosen(together, layer=None)
            result.numbers[f"{judged}/concatenated"] = together.number(best)
        result.numbers["probe/C"] = Number(best.strength, "C", 1)
        if settings.untrained:
            fresh = GPT(weights.metadata.network)
            fresh.init_weights(seed)
            name = f"untrained, seed {seed}, {sorted(net.config.to_dict().items())}, {components.tokenizer.hash}"
            fresh_train = images(fresh, name, "train")
            fresh_val = images(fresh, name, "val") if folds is None else fresh_train
            theirs = searched(fresh_train, fresh_val, strengths, folds=fold, **how)
            result.curves[f"untrained network, {judged}"] = theirs.curve()
            result.numbers[f"{judged}/untrained"] = theirs.number(chosen(theirs, layer=None))
        if settings.pixels:
            raw_train = Images.of_pixels(source.split("train"))
            raw_val = Images.of_pixels(source.split("val")) if folds is None else raw_train
            of_pixels = searched(raw_train, raw_val, strengths, folds=fold, **how)
            share = of_pixels.number(chosen(of_pixels, layer=None))
            result.numbers[f"{judged}/raw_pixels"] = share
            depth = [0.0, float(n_layer)]
            result.curves[f"raw pixels, {judged}"] = Curve(depth, [share.value] * 2, "layer", "accuracy")
        heads = fitted([train, val] if settings.refit else [train], best, **how)
        if ranks.this_rank().first:
            weight, bias = heads.heads.weight[0, 0], heads.heads.bias[0, 0]
            save_head(components.run_dir / "probe.safetensors", weight, bias, best.layers)
        if settings.test:
            held_out = images(net, weights.sha256, "test")
            said, scores = heads.predict(held_out)
            labels = held_out.labels
            result.numbers["test/accuracy"] = accuracy_number(said == labels, seed=seed)
            if settings.masks > 1:
                one = scores.argmax(dim=-1).cpu().numpy()
                result.numbers["test/accuracy_one_mask"] = accuracy_number(one == labels, seed=seed)
            if n_class > 5:
                five = top_k(scores.cpu(), torch.from_numpy(labels), 5).numpy()
                result.numbers["test/top_5"] = accuracy_number(five, seed=seed)
            result.add_confusion(confusion(labels, said, n_class), source.class_names)
    result.provenance = {
        "layers": best.layers, "C": best.strength, "refitted_on_val": settings.refit,
        "chosen_on": "val" if folds is None else f"{folds} folds of train",
    }  # fmt: skip
    return result


def report(table: Table, best: Choice, *, n_layer: int, layer: int | None, masks: int, judged: str) -> Result:
    """Numbers and curve of the search: the best, and the embedding and the last layer as baselines."""
    result = Result()
    result.numbers[f"{judged}/accuracy"] = table.number(best)
    if masks > 1 and judged == "val":
        result.numbers[f"{judged}/accuracy_one_mask"] = table.number(best, one_mask=True)
    last = len(table.windows) - 1
    result.numbers["probe/layer"] = Number(best.layers[0] if layer is None else layer, f"of 0 … {n_layer}", 1)
    if last:
        result.numbers[f"{judged}/embedding"] = table.number(chosen(table, layer=0))
        result.numbers[f"{judged}/last_layer"] = table.number(chosen(table, layer=last))
    result.curves[f"probe, {judged}"] = table.curve()
    return result


def save_head(path: Path, weight: Tensor, bias: Tensor, layers: list[int]) -> None:
    """Writes weight (K, D) and bias (K,), and the layers whose concatenated features they read."""
    tensors = {"weight": weight.detach().cpu().contiguous(), "bias": bias.detach().cpu().contiguous()}
    with files.atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"layers": " ".join(map(str, layers))})
