"""`task=probe_encoder`: a linear probe of any image encoder, by the protocol of `task=probe`, for one table with it."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from igpt.checkpoint.probe_files import PROBE, save_probe
from igpt.data.source import Split, plain_pixels
from igpt.distributed import ranks
from igpt.encoder.encoder import Encoder
from igpt.encoder.find_encoder import find_encoder
from igpt.encoder.given_features import SPLITS, is_features, read_given_features
from igpt.metric.result import Number, Result
from igpt.probe.feature_files import Features, FeatureWriter, features_path
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
from igpt.task.feature_reader import OF_TRAINING_ALONE, read_or_write
from igpt.task.probe import score_test
from igpt.training.hardware import matmul_precision

log = logging.getLogger(__name__)


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
    read, described = open_features(components, settings, needed)
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


def open_features(
    components: Components, settings: EncoderProbeSettings, needed: list[str]
) -> tuple[Callable[[str], FeatureSet], dict[str, Any]]:
    """(split → its features, what they are of): given ones, or computed by an encoder and kept in the cache."""
    source = components.source
    if is_features(settings.encoder):
        counts = {split: len(source.split(split)) for split in SPLITS}
        given = read_given_features(settings.encoder, counts, needed)
        sha256 = components.run.input_hashes["task.encoder"]
        described = {"encoder": settings.encoder, "weights": sha256, "width": given["train"].shape[1]}
        return lambda split: FeatureSet([Features(given[split][None], source.split(split).labels)]), described
    encoder = find_encoder(
        settings.encoder, device=components.hardware.device, resolution=source.resolution,
        input_size=settings.input_size, pooling=settings.pooling,
    )  # fmt: skip
    side, size = source.resolution, encoder.input_size
    resized = "" if side == size else f", resized from {side}×{side}, bicubic"
    log.info("encoder: %s, %d features of %d×%d pixels%s", encoder.name, encoder.width, size, size, resized)
    described = {
        "encoder": settings.encoder, "weights": encoder.hash, "width": encoder.width, "pooling": encoder.pooling,
        "input": f"{size}×{size}{resized}", "mean": encoder.preprocess.mean, "std": encoder.preprocess.std,
    }  # fmt: skip
    return partial(read_encoded, encoder, components, settings), described


def read_encoded(encoder: Encoder, components: Components, settings: EncoderProbeSettings, split: str) -> FeatureSet:
    """The features of a split: from the cache, or computed by the encoder and written to it."""
    source, images = components.source, components.source.split(split)
    data = components.run.image_key
    if split != "train":
        data["data"] = {key: value for key, value in data["data"].items() if key not in OF_TRAINING_ALONE}
    key = {**data, "encoder": encoder.hash, "split": split, "dtype": settings.dtype}
    path = features_path(components.cache_dir, f"{source.name}{source.resolution}-{split}-encoder", key)
    write = partial(encode_split, encoder, images, path, settings, what=f"{encoder.name}: {split}")
    return FeatureSet(read_or_write([path], write, n_layer=0, labels=images.labels, split=split))


def encode_split(encoder: Encoder, images: Split, path: Path, settings: EncoderProbeSettings, *, what: str) -> None:
    """Computes the features of a split, (1, N, D), each rank those of its part of the images, with a progress bar."""
    rank = ranks.this_rank()
    images.prepare()
    rows = np.array_split(np.arange(len(images)), rank.count)[rank.index]
    writer = FeatureWriter(path, n_image=len(images), dtype=settings.dtype)
    try:
        with tqdm(total=len(rows), desc=what, unit="image", disable=None, leave=False) as bar:
            for start in range(0, len(rows), settings.batch_size):
                batch = rows[start : start + settings.batch_size]
                features = encoder.encode(torch.from_numpy(plain_pixels(images, batch.tolist())))
                labels = torch.from_numpy(images.labels[batch])
                writer.add(features[None], torch.from_numpy(batch), labels)
                bar.update(len(batch))
        writer.finish()
    finally:
        writer.discard()
