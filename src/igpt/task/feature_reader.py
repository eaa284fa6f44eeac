"""Features of a frozen network on any split: computed in one pass with `Trainer.predict`, or read from the cache."""

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from tqdm.auto import tqdm

from igpt.data.cache import file_lock
from igpt.data.order import Item
from igpt.data.source import Source
from igpt.distributed import ranks
from igpt.model.features import layer_features
from igpt.model.gpt import GPT
from igpt.probe.feature_files import (
    Features,
    FeatureWriter,
    features_path,
    find_features_damage,
    read_features,
)
from igpt.probe.selection import FeatureSet
from igpt.run.components import Components
from igpt.settings.fields import FeatureDtype
from igpt.settings.probing import PooledSettings
from igpt.tokens.batches import Batch, PixelBatches
from igpt.tokens.datamodule import TokenDataModule
from igpt.training.frozen_networks import attach_frozen, is_sharded
from igpt.utils import keyed

log = logging.getLogger(__name__)

OF_TRAINING_ALONE = ("labels_per_class", "subset_seed")  # data settings that do not affect val and test


def feature_path(
    cache: Path,
    source: Source,
    split: str,
    *,
    cache_key: Mapping[str, Any],
    weights: str,
    norm: str,
    dtype: FeatureDtype,
    mask: int = 0,
    **of_some: Any,
) -> Path:
    """Cache path of the features of a split; `weights`: hash of the network, `of_some`: names a part of the split."""
    cache_key = {**cache_key, **of_some}
    if split != "train":
        cache_key["data"] = {k: v for k, v in cache_key.get("data", {}).items() if k not in OF_TRAINING_ALONE}
    decided = {"weights": weights, "split": split, "norm": norm, "dtype": dtype, "mask": mask}
    return features_path(cache, f"{source.name}{source.resolution}-{split}", {**cache_key, **decided})


class ProbeModule(L.LightningModule):
    """Writes the pooled features of a frozen network, all layers in one forward pass per image and mask."""

    net: GPT

    def __init__(self, components: Components, net: GPT, writers: list[FeatureWriter], *, norm: str) -> None:
        super().__init__()
        attach_frozen(self, net)
        self.objective, self.norm = components.objective, norm
        self.writers = writers  # one per mask

    def predict_step(self, batch: Batch, batch_idx: int) -> None:
        for mask, writer in enumerate(self.writers):
            rng_keys = keyed.fold_in(batch.rng_keys, 100 + mask) if mask else batch.rng_keys
            visible = self.objective.visible_mask(batch.tokens, rng_keys)
            features = layer_features(self.net, batch.tokens, visible, norm=self.norm)  # (L + 1, B, C)
            writer.add(features, batch.rows, batch.labels)


def read_or_write(
    paths: list[Path], write: Callable[[], None], *, n_layer: int, labels: np.ndarray, split: str
) -> list[Features]:
    """The features in these files, after `write` has written them all where one is missing or damaged.

    Called on every rank. `n_layer`: L of L + 1 layers; `labels` (N,): those of the images of `split`.

    Raises:
        ValueError: the files are not the same on every rank, or were written with other labels.
    """

    def read_all() -> list[Features] | None:
        stored = [read_features(path, n_layer=n_layer, n_image=len(labels)) for path in paths]
        complete = [features for features in stored if features is not None]
        return complete if len(complete) == len(paths) else None

    if not ranks.broadcast_from_rank0(lambda: read_all() is not None):  # else no lock: the cache may be read-only
        lock = partial(file_lock, paths[0], problem=find_features_damage(paths[0]))
        with lock() if ranks.this_rank().is_first else nullcontext():
            if not ranks.broadcast_from_rank0(lambda: read_all() is not None):
                write()
            ranks.barrier()
    stored = read_all()
    if stored is None:
        raise ValueError(f"{paths[0]} is not the same on every rank: give all machines the same paths.cache")
    for path, features in zip(paths, stored, strict=True):
        if not np.array_equal(features.labels, labels):
            raise ValueError(f"the labels of {split} are not those that {path} was written with: remove that file")
    return stored


def read_batch(data: TokenDataModule, split: str, rows: np.ndarray, device: torch.device) -> Batch:
    """The images at `rows` of a split as an evaluation reads them, tokenized on a device."""
    images = PixelBatches(data.source.split(split), seed=data.seed, stream=split)
    batch = images.__getitems__([Item(0, row) for row in rows.tolist()])
    return Batch(*(part.to(device) for part in batch._replace(tokens=data.encode(batch.tokens.to(device)))))


@dataclass(frozen=True)
class FeatureReader:
    """Reads the features of a network on any split from the cache, or computes them in one pass."""

    components: Components
    settings: PooledSettings

    def read(self, net: GPT, name: str, split: str, *, eval_masks: int) -> list[Features]:
        """One `Features` per mask; `name`: identifies the network, e.g. the hash of its weights."""
        components, norm, dtype = self.components, self.settings.norm, self.settings.dtype
        plan = components.hardware.eval_batch_layout(self.settings.batch_size)
        data = components.build_datamodule(plan=plan, eval_split=split)
        images = data.source.split(split)
        if not len(images):
            raise ValueError(
                f"{data.source.name} has no images in its {split} split: set data.{split}_fraction above 0"
            )
        inputs: dict[str, Any] = {"cache_key": components.cache_key, "weights": name, "norm": norm, "dtype": dtype}
        paths = [
            feature_path(components.cache_dir, data.source, split, mask=mask, **inputs) for mask in range(eval_masks)
        ]
        write = partial(self._write, net, data, paths, split, n_image=len(images))
        return read_or_write(paths, write, n_layer=net.n_layer, labels=images.labels, split=split)

    def read_sample(self, net: GPT, name: str, split: str, *, at_most: int) -> tuple[np.ndarray, Features]:
        """Rows of at most `at_most` images of a split, drawn by the seed, and their features, under the first mask.

        Taken from the features of the whole split where these are cached; else computed, and cached as those of some.
        """
        components, norm, dtype = self.components, self.settings.norm, self.settings.dtype
        data = components.build_datamodule(eval_split=split)
        images = data.source.split(split)
        rows = data.sample_rows(split, at_most=at_most)
        inputs: dict[str, Any] = {"cache_key": components.cache_key, "weights": name, "norm": norm, "dtype": dtype}
        full = feature_path(components.cache_dir, data.source, split, **inputs)
        of_all = ranks.broadcast_from_rank0(
            lambda: read_features(full, n_layer=net.n_layer, n_image=len(images)) is not None
        )
        if of_all and (stored := read_features(full, n_layer=net.n_layer, n_image=len(images))) is not None:
            return rows, Features(stored.values[:, rows], stored.labels[rows])
        among: dict[str, Any] = {} if len(rows) == len(images) else {"among": at_most, "sampled_by": data.seed}
        path = feature_path(components.cache_dir, data.source, split, **inputs, **among)
        write = partial(self._write_sample, net, data, path, split, rows)
        (stored,) = read_or_write([path], write, n_layer=net.n_layer, labels=images.labels[rows], split=split)
        return rows, stored

    def _write_sample(self, net: GPT, data: TokenDataModule, path: Path, split: str, rows: np.ndarray) -> None:
        """Computes the features of these rows, each rank those of its part, with a progress bar."""
        assert not is_sharded(net), "ranks make unequal numbers of forward passes"
        rank, objective = ranks.this_rank(), self.components.objective
        writer = FeatureWriter(path, n_image=len(rows), dtype=self.settings.dtype)
        mine = np.array_split(np.arange(len(rows)), rank.count)[rank.index]
        try:
            with tqdm(total=len(mine), desc=f"features: {split}", unit="image", disable=None, leave=False) as bar:
                for places in torch.split(torch.from_numpy(mine), self.settings.batch_size):
                    batch = read_batch(data, split, rows[places], net.wte.device)
                    with torch.inference_mode():
                        visible = objective.visible_mask(batch.tokens, batch.rng_keys)
                        features = layer_features(net, batch.tokens, visible, norm=self.settings.norm)
                    writer.add(features, places, batch.labels)
                    bar.update(len(places))
            writer.finish()
        finally:
            writer.discard()

    def _write(self, net: GPT, data: TokenDataModule, paths: list[Path], split: str, *, n_image: int) -> None:
        """Computes the features of a split, one file per mask."""
        writers = [FeatureWriter(path, n_image=n_image, dtype=self.settings.dtype) for path in paths]
        log.info("features: %s, %d images, %d layers", split, n_image, net.n_layer + 1)
        try:
            self.components.runner.predict(ProbeModule(self.components, net, writers, norm=self.settings.norm), data)
            for writer in writers:
                writer.finish()
        finally:
            for writer in writers:
                writer.discard()

    def read_masked(self, net: GPT, name: str, split: str, *, eval_masks: int) -> FeatureSet:
        """The features as `FeatureSet`; training images under one mask only."""
        return FeatureSet(self.read(net, name, split, eval_masks=1 if split == "train" else eval_masks))
