"""Linear probes: what a linear classifier can read from the pooled features of every layer."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from igpt import ranks
from igpt.checkpoint.native import Weights
from igpt.data.crop import check_keys
from igpt.data.source import Source
from igpt.metric.result import Curve, Number, Result
from igpt.model.features import NORMS
from igpt.model.gpt import GPT
from igpt.objective.base import Objective
from igpt.probe.choice import Choice, Images, Table, chosen, few_folds, fitted, folds_of, searched
from igpt.probe.features import Dtype
from igpt.probe.scores import accuracy_number, confusion, top_k
from igpt.task.features import Reader
from igpt.task.fit import Runner, matmul_precision
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


def check_classes(source: Source, splits: Sequence[str]) -> int:
    """The number of classes. Raises ValueError without labels, or where a class has nothing to learn from."""
    if source.n_class is None:
        raise ValueError(f"data={source.name} has no labels (data.n_class=null): a probe needs some")
    known = set(np.unique(source.split("train").labels).tolist())
    if -1 in known:
        raise ValueError(f"data={source.name}: some images have no label, a probe needs them all")
    for split in splits:
        if unknown := set(np.unique(source.split(split).labels).tolist()) - known:
            raise ValueError(
                f"data={source.name}: class {min(unknown)} is in {split}, but no image of it is in train: "
                "take other splits, or more images"
            )
    return source.n_class


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
    """Accuracy of every layer on val, of the best on test, and of what it has to beat."""
    reader = Reader(runner, tokens, objective, cache, made_by, norm, dtype, batch_size)
    net = weights.net()
    n_layer = net.n_layer
    if layer is not None and not 0 <= layer <= n_layer:
        raise ValueError(f"task.layer must lie in 0 … {n_layer} (0: the embedding), got {layer}")
    if concat is not None and concat > n_layer + 1:
        raise ValueError(f"task.concat={concat}: the network has {n_layer + 1} layers to take together")
    source = tokens().source
    n_class = check_classes(source, ["val", *(["test"] if test else [])])
    masks = masks if not objective.causal else 1  # only a masked objective has any
    if source.labels_per_class is not None:  # only those labels are there to be used
        refit = False
        if folds == "auto" and solver == "sgd":
            raise ValueError(
                "task.solver=sgd chooses on val, whose labels data.labels_per_class forbids: take task.solver=lbfgs, "
                "or allow them, task.folds=null"
            )
        folds = few_folds(source.labels_per_class) if folds == "auto" else folds
    folds = None if folds == "auto" else folds
    if solver == "sgd":
        if layer is None:
            windows = [[single] for single in range(n_layer + 1)]
        else:
            windows = [window_around(layer, concat or 1, n_layer)]
        table, read = trained(
            runner=runner, tokens=tokens, weights=weights, objective=objective, norm=norm, windows=windows, masks=masks,
            n_class=n_class, seed=seed, **sgd,
        )  # fmt: skip
        best = chosen(table, layer=None)
        result = report(table, best, n_layer=n_layer, masks=masks, searched_for="rate")
        if test:
            said = read("test")[windows.index(best.layers), table.strengths.index(best.strength)]
            labels = source.split("test").labels
            result.numbers["test/accuracy"] = accuracy_number(said == labels, seed=seed)
            result.matrices["confusion"] = confusion(labels, said, n_class)
        result.files["checkpoints"] = Path("checkpoints")
        result.provenance = {
            "weights": weights.sha256, "palette": tokens().palette.hash, "layers": best.layers, "norm": norm,
            "pooling": "mean over positions", "solver": "sgd", "rate": best.strength, "masks": masks, "seed": seed,
            "chosen_on": "val",
        }  # fmt: skip
        return result
    device = runner.machine.device
    how: dict[str, Any] = {"n_class": n_class, "device": device, "seed": seed}

    images = partial(reader.images, masks=masks)
    train, val = images(net, weights.sha256, "train"), images(net, weights.sha256, "val")
    with matmul_precision(runner.machine.matmul_precision, device):
        fold = None if folds is None else folds_of(train.labels, folds, seed=seed)
        table = searched(train, val, strengths, folds=fold, **how)
        best = chosen(table, layer=layer)
        log.info("probe: layer %d of %d is best, C = %g", best.layers[0], n_layer, best.strength)
        result = report(table, best, n_layer=n_layer, masks=masks, searched_for="C")
        if concat is not None:
            windows = [window_around(best.layers[0], concat, n_layer)]
            together = searched(train, val, strengths, folds=fold, windows=windows, **how)
            best = chosen(together, layer=None)
            result.numbers["val/concatenated"] = together.number(best)
        if untrained:
            fresh = GPT(**weights.origin.network)
            fresh.init_weights(seed)
            name = f"untrained, seed {seed}, {sorted(net.config.items())}"
            of_fresh = [images(fresh, name, split) for split in ("train", "val")]
            theirs = searched(of_fresh[0], of_fresh[1], strengths, folds=fold, **how)
            result.curves["untrained network, val"] = theirs.curve()
            result.numbers["val/untrained"] = theirs.number(chosen(theirs, layer=None))
        if pixels:
            raw = [Images.of_pixels(source.split(split)) for split in ("train", "val")]
            of_pixels = searched(raw[0], raw[1], strengths, folds=fold, **how)
            share = of_pixels.number(chosen(of_pixels, layer=None))
            result.numbers["val/raw_pixels"] = share
            depth = [0.0, float(n_layer)]
            result.curves["raw pixels, val"] = Curve(depth, [share.value] * 2, "layer", "accuracy")
        heads = fitted([train, val] if refit else [train], best, **how)
        heads.save(runner.folder / "probe.safetensors" if ranks.this_rank().first else None)
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
            result.matrices["confusion"] = confusion(labels, said, n_class)
    result.files["probe"] = Path("probe.safetensors")
    result.provenance = {
        "weights": weights.sha256, "palette": tokens().palette.hash, "layers": best.layers, "norm": norm,
        "pooling": "mean over positions", "solver": "lbfgs", "C": best.strength, "masks": masks, "seed": seed,
        "chosen_on": "val" if folds is None else f"{folds} folds of train", "refitted_on_val": refit,
    }  # fmt: skip
    return result


def report(table: Table, best: Choice, *, n_layer: int, masks: int, searched_for: str) -> Result:
    """The numbers and the curve of the search; the embedding and the last layer are what the best has to beat."""
    result = Result()
    result.numbers["val/accuracy"] = table.number(best)
    if masks > 1:
        result.numbers["val/accuracy_one_mask"] = table.number(best, one_mask=True)
    last = len(table.windows) - 1
    middle = best.layers[len(best.layers) // 2]
    result.numbers["probe/layer"] = Number(middle, f"of 0 … {n_layer}", 1)
    result.numbers[f"probe/{searched_for}"] = Number(best.strength, searched_for, 1)
    if last:
        result.numbers["val/embedding"] = table.number(chosen(table, layer=0))
        result.numbers["val/last_layer"] = table.number(chosen(table, layer=last))
    result.curves["probe, val"] = table.curve()
    return result


def window_around(layer: int, size: int, n_layer: int) -> list[int]:
    """`size` adjacent layers of 0 … n_layer, centred on one; moved inside where it lies too near an end."""
    first = min(max(0, layer - size // 2), n_layer + 1 - size)
    return list(range(first, first + size))
