"""Does a better generative loss go with better features? Checkpoints of several runs, each scored and probed."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from igpt.checkpoint.find import find
from igpt.checkpoint.native import Weights
from igpt.metric.result import Curve, Number, Result
from igpt.model.features import NORMS
from igpt.objective.base import Objective
from igpt.older_configs import read_record
from igpt.probe.choice import chosen, searched
from igpt.probe.features import Dtype
from igpt.task.classify import check_classes
from igpt.task.evaluate import EvaluateModule
from igpt.task.features import Reader
from igpt.task.fit import Runner
from igpt.task.machine import matmul_precision
from igpt.tokens.datamodule import TokenDataModule

HELD_OUT = ("val_fraction", "test_fraction", "split_seed", "splits")  # settings of the data

log = logging.getLogger(__name__)


def check(*, runs: list[str], norm: str, strengths: list[float], batch_size: int, **_: Any) -> None:
    """Raises ValueError when a setting of the task cannot be right, before anything is built."""
    if norm not in NORMS:
        raise ValueError(f"task.norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if not strengths or min(strengths) <= 0:
        raise ValueError(f"task.strengths are one or more positive numbers, got {strengths}")
    if batch_size < 1:
        raise ValueError(f"task.batch_size must be at least 1, got {batch_size}")


def checkpoints_of(run: str) -> list[Weights]:
    """Every checkpoint that a pretraining run has kept, oldest first.

    Raises:
        ValueError: there is none.
    """
    found = sorted((Path(run) / "checkpoints").glob("step_*.ckpt"))
    if not found:
        raise ValueError(
            f"task.runs: {run} has no checkpoints: train with task.checkpoint_keep at what there is to save"
        )
    return [find(str(path)) for path in found]


def run(
    *,
    runner: Runner,
    tokens: Callable[..., TokenDataModule],
    objective: Objective,
    cache: Path,
    made_by: dict[str, Any],
    seed: int,
    runs: list[str],
    norm: str,
    dtype: Dtype,
    batch_size: int,
    strengths: list[float],
) -> Result:
    """Validation loss and best-layer probe accuracy, on val, of each checkpoint of each run (the paper's Figure 3)."""
    every = {run: checkpoints_of(run) for run in runs}
    tokenizer = tokens().tokenizer.hash
    for path, found in every.items():
        metadata = found[-1].metadata
        if (metadata.tokenizer.hash, metadata.objective) != (tokenizer, made_by["objective"]):
            raise ValueError(f"task.runs: {path} has another tokenizer or objective: losses cannot be compared")
        data = read_record(Path(path) / "run.json")["config"].get("data", {})
        if other := [key for key in HELD_OUT if data.get(key) != made_by["data"].get(key)]:
            raise ValueError(f"task.runs: {path} held out other images (data.{', data.'.join(other)})")
    names = {path: found[-1].metadata.model for path, found in every.items()}
    if len(set(names.values())) < len(names):  # several runs of one size
        names = {path: f"{name}, seed {every[path][-1].metadata.seed}" for path, name in names.items()}
    if len(set(names.values())) < len(names):
        names = {path: Path(path).name for path in names}
    result = Result()
    source = tokens().source
    n_class = check_classes(source, ["val"])
    reader = Reader(runner, tokens, objective, cache, made_by, norm, dtype, batch_size)
    n_val = len(source.split("val"))
    device = runner.machine.device
    for path, found in every.items():
        name = names[path]
        size = int(read_record(Path(path) / "run.json")["config"]["task"]["batch_size"])
        losses, shares, images = [], [], []
        for weights in found:
            net = weights.net()
            scored = EvaluateModule(net=net, objective=objective, machine=runner.machine, split="val", n_image=n_val)
            runner.validate(scored, tokens(plan=runner.machine.reading_plan(batch_size), eval_split="val"))
            train, val = (reader.images(net, weights.sha256, split, masks=1) for split in ("train", "val"))
            with matmul_precision(runner.machine.matmul_precision, device):
                table = searched(train, val, strengths, n_class=n_class, device=device, seed=seed)
            best = chosen(table, layer=None)
            loss, share = scored.numbers["val/loss_gen"], table.number(best)
            seen = weights.metadata.step * size
            log.info("%s, %s images: %.4f nats/token, %.4f at layer %d", name, f"{seen:,}", loss.value, share.value,
                     best.layers[0])  # fmt: skip
            key = f"{name}/{seen}_images"
            result.numbers |= {
                f"{key}/loss_gen": loss, f"{key}/accuracy": share,
                f"{key}/layer": Number(best.layers[0], f"of 0 … {net.n_layer}", 1),
            }  # fmt: skip
            losses.append(loss.value)
            shares.append(share.value)
            images.append(float(seen))
        result.curves |= {
            name: Curve(losses, shares, "val loss (nats/token)", "best layer's val accuracy"),
            f"{name}: probe": Curve(images, shares, "images seen", "best layer's val accuracy"),
            f"{name}: loss": Curve(images, losses, "images seen", "val loss (nats/token)"),
        }
        if len(set(losses)) > 1 and len(set(shares)) > 1:
            result.numbers[f"{name}/rank_correlation"] = Number(
                rank_correlation([-loss for loss in losses], shares), "Spearman, -loss and accuracy", len(losses)
            )
    result.provenance = {
        "weights": {names[path]: [weights.sha256 for weights in found] for path, found in every.items()},
        "tokenizer": tokenizer, "norm": norm, "pooling": "mean over positions", "solver": "lbfgs", "chosen_on": "val",
        "labels": len(source.split("train")), "seed": seed,
    }  # fmt: skip
    return result


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's: the correlation of the ranks, equal values sharing theirs."""
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(values: list[float]) -> np.ndarray:
    v = np.asarray(values)
    return np.asarray([((v < a).sum() + (v <= a).sum() - 1) / 2 for a in v])
