"""`task=probe_encoder`: a linear probe of any image encoder, by the protocol of `task=probe`, for one table with it."""

from pathlib import Path
from typing import Any

from igpt.checkpoint.probe_files import PROBE, save_probe
from igpt.distributed import ranks
from igpt.encoder.given_features import SPLITS
from igpt.metric.result import Number, Result
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
from igpt.settings.probing import EncoderProbeSettings
from igpt.task.class_score import check_classes
from igpt.task.encoder_features import open_features
from igpt.task.probe import score_test
from igpt.training.hardware import matmul_precision


def run(components: Components, settings: EncoderProbeSettings) -> Result:
    """Val and test accuracy of logistic regression on the encoder's features, and of the pixels themselves.

    Numbers have the names that `task=probe` gives them; they start with `cv/` instead of `val/` if C is chosen by
    cross-validation inside train.
    """
    source, name, few = components.source, components.run.model_name, components.source.labels_per_class
    refit = settings.refit and few is None  # no other labels may be used
    n_fold = settings.folds
    if n_fold == "auto":
        n_fold = None if few is None else choose_n_fold(few)
    needed = [split for split, is_read in zip(SPLITS, (True, n_fold is None or refit, settings.test), strict=True)
              if is_read]  # fmt: skip
    n_class = check_classes(source, [split for split in needed if split != "train"])
    read, described = open_features(
        components, settings.encoder, needed, dtype=settings.dtype, batch_size=settings.batch_size,
        input_size=settings.input_size, pooling=settings.pooling,
    )  # fmt: skip
    how: dict[str, Any] = {"n_class": n_class, "device": components.hardware.device, "seed": components.seed}
    judged = "val" if n_fold is None else "cv"
    train = read("train")
    val = read("val") if "val" in needed else train
    with matmul_precision(components.hardware.matmul_precision, components.hardware.device):
        folds = None if n_fold is None else assign_folds(train.labels, n_fold, seed=components.seed)
        table = grid_search(train, val, settings.C_grid, folds=folds, **how)
        best = select_best(table, layer=None)
        result = Result(numbers={f"{judged}/accuracy": table.number(best, features=name)})
        result.numbers["probe/C"] = Number(best.strength, "C", 1)
        fits: dict[str, GridScores | FittedHead] = {"probe": table}
        if "pixels" in settings.baselines:
            raw_train = FeatureSet.from_pixels(source.split("train"))
            raw_val = FeatureSet.from_pixels(source.split("val")) if n_fold is None else raw_train
            of_pixels = fits["raw pixels"] = grid_search(raw_train, raw_val, settings.C_grid, folds=folds, **how)
            share = of_pixels.number(select_best(of_pixels, layer=None), features="raw pixels")
            result.numbers[f"{judged}/raw_pixels"] = share
        head = fits["final"] = fit_head([train, val] if refit else [train], best, **how)
        if ranks.this_rank().is_first:
            weight, bias = head.heads.weight[0, 0], head.heads.bias[0, 0]
            save_probe(components.run_dir / PROBE, weight, bias, [], None)
        if settings.test:
            score_test(result, head, read("test"), features=name, class_names=source.class_names)
    result.files["probe"] = Path(PROBE)
    result.provenance = {
        **described, "C": best.strength, "refitted_on_val": refit, "solver": "lbfgs",
        "chosen_on": "val" if n_fold is None else f"{n_fold} folds of train", "seed": components.seed,
        **report_convergence(fits),
    }  # fmt: skip
    return result
