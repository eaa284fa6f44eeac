"""`task=scaling`: generative loss against probe accuracy, over the checkpoints of several runs."""

import logging
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.igpt_format import Weights
from igpt.checkpoint.resume import find_checkpoints
from igpt.data.split import split_differences
from igpt.metric.result import Curve, Number, Result
from igpt.probe.selection import FittedHead, GridScores, grid_search, report_convergence, select_best
from igpt.run.components import Components
from igpt.settings.older_configs import read_record
from igpt.settings.probing import ScalingSettings
from igpt.task.class_score import check_classes
from igpt.task.evaluate import EvaluateModule
from igpt.task.feature_reader import FeatureReader
from igpt.training.hardware import matmul_precision

log = logging.getLogger(__name__)


def list_checkpoints(run: str) -> list[Weights]:
    """All checkpoints of a pretraining run, oldest first.

    Raises:
        ValueError: there are none.
    """
    paths = find_checkpoints(Path(run))
    if not paths:
        raise ValueError(
            f"task.runs: {run} has no checkpoints: train with task.checkpoint_keep at what there is to save"
        )
    return [find_weights(str(path)) for path in paths]


def run(components: Components, settings: ScalingSettings) -> Result:
    """Loss and best-layer probe accuracy on val, for each checkpoint of each run (Chen et al. 2020, Figure 3)."""
    runner, hardware, source, seed = components.runner, components.hardware, components.source, components.seed
    every = {run: list_checkpoints(run) for run in settings.runs}
    tokenizer, cache_key = components.tokenizer.hash, components.cache_key
    for path, checkpoints in every.items():
        metadata = checkpoints[-1].metadata
        if (metadata.tokenizer.hash, metadata.objective) != (tokenizer, cache_key["objective"]):
            raise ValueError(f"task.runs: {path} has another tokenizer or objective: losses cannot be compared")
        config = read_record(Path(path) / "run.json")["config"]
        if other := split_differences(cache_key["data"], config.get("data", {})):
            raise ValueError(f"task.runs: {path} held out other images (data.{', data.'.join(other)})")
        if cooled := config["task"].get("cooled_at"):  # the others are not comparable: their rate was high
            ends = {*cooled, config["task"]["steps"]}
            every[path] = [each for each in checkpoints if each.metadata.step in ends] or checkpoints
    names = {path: checkpoints[-1].metadata.model for path, checkpoints in every.items()}
    if len(set(names.values())) < len(names):  # several runs of one size
        names = {path: f"{name}, seed {every[path][-1].metadata.seed}" for path, name in names.items()}
    if len(set(names.values())) < len(names):
        names = {path: Path(path).name for path in names}
    result = Result()
    fits: dict[str, GridScores | FittedHead] = {}
    n_class = check_classes(source, ["val"])
    reader = FeatureReader(components, settings)
    for path, checkpoints in every.items():
        name = names[path]
        size = int(read_record(Path(path) / "run.json")["config"]["task"]["batch_size"])
        losses, shares, images = [], [], []
        for weights in checkpoints:
            net = weights.net()
            scored = EvaluateModule(components, net, split="val")
            plan = hardware.eval_batch_layout(settings.batch_size)
            runner.validate(scored, components.build_datamodule(plan=plan, eval_split="val"))
            train, val = (reader.read_masked(net, weights.sha256, split, eval_masks=1) for split in ("train", "val"))
            with matmul_precision(hardware.matmul_precision, hardware.device):
                table = grid_search(train, val, settings.C_grid, n_class=n_class, device=hardware.device, seed=seed)
            best = select_best(table, layer=None)
            loss, share = scored.numbers["val/loss_gen"], table.number(best)
            seen = weights.metadata.step * size
            log.info("%s, %s images: %.4f nats/token, %.4f at layer %d", name, f"{seen:,}", loss.value, share.value,
                     best.layers[0])  # fmt: skip
            checkpoint = f"{name}/{seen}_images"
            fits[checkpoint] = table
            result.numbers |= {
                f"{checkpoint}/loss_gen": loss, f"{checkpoint}/accuracy": share,
                f"{checkpoint}/layer": Number(best.layers[0], f"of 0 … {net.n_layer}", 1),
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
        "weights": {names[path]: [weights.sha256 for weights in checkpoints] for path, checkpoints in every.items()},
        "tokenizer": tokenizer, "norm": settings.norm, "pooling": "mean over positions", "solver": "lbfgs",
        "chosen_on": "val",
        "labels": len(source.split("train")), "seed": seed, **report_convergence(fits),
    }  # fmt: skip
    return result


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's rank correlation; ties have their mean rank."""
    return float(np.corrcoef(rankdata(x) - 1, rankdata(y) - 1)[0, 1])
