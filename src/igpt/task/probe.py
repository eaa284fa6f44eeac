"""Linear probes: what a linear classifier can read from the pooled features of every layer."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from igpt import files, ranks
from igpt.checkpoint.native import Weights
from igpt.data.crop import check_keys
from igpt.metric.result import Curve, Number, Result
from igpt.model.features import NORMS
from igpt.model.gpt import GPT
from igpt.objective.base import Objective
from igpt.probe.choice import Choice, Images, Table, chosen, few_folds, fitted, folds_of, searched, window_around
from igpt.probe.features import Dtype
from igpt.probe.scores import accuracy_number, confusion, share_number, top_k
from igpt.task.classify import check_classes
from igpt.task.features import Reader
from igpt.task.fit import Runner
from igpt.task.machine import matmul_precision
from igpt.task.probe_sgd import trained
from igpt.tokens.datamodule import TokenDataModule

log = logging.getLogger(__name__)

WHOLE = ("steps", "batch_size", "val_every", "log_every", "checkpoint_every")
SGD_SETTINGS = ("rates", "momentum", "weight_decay", *WHOLE)


def check(
    *,
    norm: str,
    batch_size: int,
    solver: str,
    strengths: list[float],
    sgd: dict[str, Any],
    masks: int,
    layer: int | None,
    concat: int | None,
    folds: int | str | None,
    refit: bool,
    **_: Any,
) -> None:
    """Raises ValueError when a setting of the task cannot be right, before anything is built."""
    if norm not in NORMS:
        raise ValueError(f"task.norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if solver not in ("lbfgs", "sgd"):
        raise ValueError(f"task.solver must be lbfgs or sgd, got {solver!r}")
    if solver == "sgd" and isinstance(folds, int):
        raise ValueError("task.solver=sgd judges on val: set task.folds=null")
    if solver == "sgd" and concat is not None and layer is None:
        raise ValueError(
            "task.solver=sgd with task.concat needs to know around which layer: task.layer=N, the best one"
        )
    check_keys("task.sgd", sgd, SGD_SETTINGS)
    if not 0 <= sgd["momentum"] < 1 or not sgd["weight_decay"] >= 0:
        raise ValueError(f"task.sgd: momentum lies in [0, 1) and weight_decay is at least 0; got {sgd}")
    if not sgd["rates"] or min(sgd["rates"]) <= 0 or any(sgd[key] < 1 for key in SGD_SETTINGS if key in WHOLE):
        raise ValueError(f"task.sgd: rates are positive, and {', '.join(WHOLE)} start at 1; got {sgd}")
    if batch_size < 1 or masks < 1:
        raise ValueError(f"task.batch_size and task.masks start at 1, got {batch_size} and {masks}")
    if not strengths or min(strengths) <= 0:
        raise ValueError(f"task.strengths are one or more positive numbers, got {strengths}")
    if concat is not None and (concat < 3 or concat % 2 == 0):
        raise ValueError(f"task.concat is null or an odd number of layers from 3 on, got {concat}")
    if folds not in (None, "auto") and not (isinstance(folds, int) and folds >= 2):
        raise ValueError(f"task.folds is auto, null (choose on val) or at least 2, got {folds!r}")


def run(
    *,
    runner: Runner,
    tokens: Callable[..., TokenDataModule],
    weights: Weights,
    objective: Objective,
    cache: Path,
    made_by: dict[str, Any],
    seed: int,
    norm: str,
    dtype: Dtype,
    batch_size: int,
    solver: Literal["lbfgs", "sgd"],
    strengths: list[float],
    sgd: dict[str, Any],
    layer: int | None,
    concat: int | None,
    masks: int,
    folds: int | Literal["auto"] | None,
    refit: bool,
    test: bool,
    untrained: bool,
    pixels: bool,
) -> Result:
    """Accuracy of every layer on val, of the best on test, and of what it has to beat.

    Where layer and strength are chosen by cross-validation inside train, `cv/` stands for `val/` in the names.
    """
    net = weights.net()
    n_layer = net.n_layer
    if layer is not None and not 0 <= layer <= n_layer:
        raise ValueError(f"task.layer must lie in 0 … {n_layer} (0: the embedding), got {layer}")
    if concat is not None and concat > n_layer + 1:
        raise ValueError(f"task.concat={concat}: the network has {n_layer + 1} layers to take together")
    data = tokens()
    source = data.source
    if source.labels_per_class is not None:  # only those labels are there to be used
        refit = False
        if folds == "auto" and solver == "sgd":
            raise ValueError(
                "task.solver=sgd chooses on val, whose labels data.labels_per_class forbids: take task.solver=lbfgs, "
                "or allow them, task.folds=null"
            )
        folds = few_folds(source.labels_per_class) if folds == "auto" else folds
    folds = None if folds == "auto" else folds
    n_class = check_classes(source, [*(["val"] if folds is None or refit else []), *(["test"] if test else [])])
    masks = masks if not objective.causal else 1  # only a masked objective has any
    if solver == "sgd":
        result = by_sgd(
            runner=runner, tokens=tokens, weights=weights, objective=objective, norm=norm, masks=masks, seed=seed,
            n_class=n_class, layer=layer, concat=concat, test=test, settings=sgd,
        )  # fmt: skip
    else:
        reader = Reader(runner, tokens, objective, cache, made_by, norm, dtype, batch_size)
        result = by_lbfgs(
            reader=reader, net=net, weights=weights, seed=seed, strengths=strengths, layer=layer, concat=concat,
            masks=masks, n_class=n_class, folds=folds, refit=refit, test=test, untrained=untrained, pixels=pixels,
        )  # fmt: skip
    result.files["probe"] = Path("probe.safetensors")
    result.provenance |= {
        "weights": weights.sha256, "tokenizer": data.tokenizer.hash, "norm": norm, "pooling": "mean over positions",
        "solver": solver, "masks": masks, "seed": seed,
    }  # fmt: skip
    return result


def by_sgd(
    *,
    runner: Runner,
    tokens: Callable[..., TokenDataModule],
    weights: Weights,
    objective: Objective,
    norm: str,
    masks: int,
    seed: int,
    n_class: int,
    layer: int | None,
    concat: int | None,
    test: bool,
    settings: dict[str, Any],
) -> Result:
    """Heads of every layer (or of the one that is given, with its neighbours) and rate, trained at once."""
    n_layer = int(weights.metadata.network.n_layer)
    if layer is None:
        windows = [[single] for single in range(n_layer + 1)]
    else:
        windows = [window_around(layer, concat or 1, n_layer)]
    module, validate = trained(
        runner=runner, tokens=tokens, weights=weights, objective=objective, norm=norm, windows=windows, masks=masks,
        n_class=n_class, seed=seed, **settings,
    )  # fmt: skip
    table = module.table()
    best = chosen(table, layer=None)
    result = report(table, best, n_layer=n_layer, layer=layer, masks=masks, judged="val")
    result.numbers["probe/rate"] = Number(best.strength, "learning rate", 1)
    result.curves |= module.curves()
    place = windows.index(best.layers), table.strengths.index(best.strength)
    if ranks.this_rank().first:
        weight, bias = module.weights[place[1]][place[0]], module.biases[place[1]][place[0]]
        save_head(runner.folder / "probe.safetensors", weight, bias, best.layers)
    if test:
        validate("test")
        source = tokens().source
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


def by_lbfgs(
    *,
    reader: Reader,
    net: GPT,
    weights: Weights,
    seed: int,
    strengths: list[float],
    layer: int | None,
    concat: int | None,
    masks: int,
    n_class: int,
    folds: int | None,
    refit: bool,
    test: bool,
    untrained: bool,
    pixels: bool,
) -> Result:
    """Logistic regression on features on disk, every layer at every strength."""
    runner, data = reader.runner, reader.tokens()
    source, n_layer, device = data.source, net.n_layer, runner.machine.device
    how: dict[str, Any] = {"n_class": n_class, "device": device, "seed": seed}
    judged = "val" if folds is None else "cv"
    images = partial(reader.images, masks=masks)
    train = images(net, weights.sha256, "train")
    val = images(net, weights.sha256, "val") if folds is None or refit else train  # folds look at train alone
    with matmul_precision(runner.machine.matmul_precision, device):
        fold = None if folds is None else folds_of(train.labels, folds, seed=seed)
        table = searched(train, val, strengths, folds=fold, **how)
        best = chosen(table, layer=layer)
        log.info("probe: layer %d of %d is best, C = %g", best.layers[0], n_layer, best.strength)
        result = report(table, best, n_layer=n_layer, layer=layer, masks=masks, judged=judged)
        if concat is not None:
            windows = [window_around(best.layers[0], concat, n_layer)]
            together = searched(train, val, strengths, folds=fold, windows=windows, **how)
            best = chosen(together, layer=None)
            result.numbers[f"{judged}/concatenated"] = together.number(best)
        result.numbers["probe/C"] = Number(best.strength, "C", 1)
        if untrained:
            fresh = GPT(weights.metadata.network)
            fresh.init_weights(seed)
            name = f"untrained, seed {seed}, {sorted(net.config.to_dict().items())}, {data.tokenizer.hash}"
            fresh_train = images(fresh, name, "train")
            fresh_val = images(fresh, name, "val") if folds is None else fresh_train
            theirs = searched(fresh_train, fresh_val, strengths, folds=fold, **how)
            result.curves[f"untrained network, {judged}"] = theirs.curve()
            result.numbers[f"{judged}/untrained"] = theirs.number(chosen(theirs, layer=None))
        if pixels:
            raw_train = Images.of_pixels(source.split("train"))
            raw_val = Images.of_pixels(source.split("val")) if folds is None else raw_train
            of_pixels = searched(raw_train, raw_val, strengths, folds=fold, **how)
            share = of_pixels.number(chosen(of_pixels, layer=None))
            result.numbers[f"{judged}/raw_pixels"] = share
            depth = [0.0, float(n_layer)]
            result.curves[f"raw pixels, {judged}"] = Curve(depth, [share.value] * 2, "layer", "accuracy")
        heads = fitted([train, val] if refit else [train], best, **how)
        if ranks.this_rank().first:
            weight, bias = heads.heads.weight[0, 0], heads.heads.bias[0, 0]
            save_head(runner.folder / "probe.safetensors", weight, bias, best.layers)
        if test:
            held_out = images(net, weights.sha256, "test")
            said, scores = heads.predict(held_out)
            labels = held_out.labels
            result.numbers["test/accuracy"] = accuracy_number(said == labels, seed=seed)
            if masks > 1:
                one = scores.argmax(dim=-1).cpu().numpy()
                result.numbers["test/accuracy_one_mask"] = accuracy_number(one == labels, seed=seed)
            if n_class > 5:
                five = top_k(scores.cpu(), torch.from_numpy(labels), 5).numpy()
                result.numbers["test/top_5"] = accuracy_number(five, seed=seed)
            result.add_confusion(confusion(labels, said, n_class), source.class_names)
    result.provenance = {
        "layers": best.layers, "C": best.strength, "refitted_on_val": refit,
        "chosen_on": "val" if folds is None else f"{folds} folds of train",
    }  # fmt: skip
    return result


def report(table: Table, best: Choice, *, n_layer: int, layer: int | None, masks: int, judged: str) -> Result:
    """The numbers and the curve of the search; the embedding and the last layer are what the best has to beat."""
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
    """Writes weight (K, D) and bias (K,), and which layers they read side by side."""
    tensors = {"weight": weight.detach().cpu().contiguous(), "bias": bias.detach().cpu().contiguous()}
    with files.atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"layers": " ".join(map(str, layers))})
