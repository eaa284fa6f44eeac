"""Features of a frozen network on any split: computed in one pass with `Trainer.predict`, or read from the cache."""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from torch import Tensor

from igpt.data.cache import file_lock
from igpt.data.source import Source
from igpt.distributed import ranks
from igpt.model.features import layer_features
from igpt.model.gpt import GPT
from igpt.objective.base import Objective
from igpt.probe.feature_files import Features, FeatureWriter, features_path, read_features
from igpt.probe.selection import Images
from igpt.run.components import Components
from igpt.settings.fields import FeatureDtype
from igpt.settings.probing import FeatureSettings
from igpt.tokens.batches import Batch
from igpt.training.hardware import Machine
from igpt.utils import keyed

log = logging.getLogger(__name__)

OF_TRAINING_ALONE = ("labels_per_class", "subset_seed")  # data settings that do not affect val and test


def stored_at(
    cache: Path,
    source: Source,
    split: str,
    *,
    made_by: Mapping[str, Any],
    weights: str,
    norm: str,
    dtype: FeatureDtype,
    mask: int = 0,
    **of_some: Any,
) -> Path:
    """Cache path of the features of a split; `weights`: hash of the network, `of_some`: names a part of the split."""
    made_by = {**made_by, **of_some}
    if split != "train":
        made_by["data"] = {k: v for k, v in made_by.get("data", {}).items() if k not in OF_TRAINING_ALONE}
    decided = {"weights": weights, "split": split, "norm": norm, "dtype": dtype, "mask": mask}
    return features_path(cache, f"{source.name}{source.resolution}-{split}", {**made_by, **decided})


class ProbeModule(L.LightningModule):
    """Writes the pooled features of a frozen network, all layers in one forward pass per image and mask."""

    def __init__(self, *, net: GPT, objective: Objective, machine: Machine, norm: str, masks: int) -> None:
        super().__init__()
        machine.prepare(net)
        self.net, self.objective, self.norm, self.masks = net.requires_grad_(False), objective, norm, masks
        self.writers: list[FeatureWriter] = []

    def pooled(self, batch: Batch, mask: int) -> Tensor:
        """The pooled features under one mask, (L + 1, B, C)."""
        keys = keyed.fold(batch.keys, 100 + mask) if mask else batch.keys
        return layer_features(self.net, batch.tokens, self.objective.visible_mask(batch.tokens, keys), norm=self.norm)

    def predict_step(self, batch: Batch, batch_idx: int) -> None:
        for mask, writer in enumerate(self.writers):
            writer.add(self.pooled(batch, mask), batch.rows, batch.labels)


@dataclass(frozen=True)
class Reader:
    """Reads the features of a network on any split from the cache, or computes them in one pass."""

    components: Components
    settings: FeatureSettings

    def read(self, net: GPT, name: str, split: str, *, masks: int) -> list[Features]:
        """One `Features` per mask; `name`: identifies the network, e.g. the hash of its weights."""
        components, norm, dtype = self.components, self.settings.norm, self.settings.dtype
        plan = components.hardware.reading_plan(self.settings.batch_size)
        data = components.build_datamodule(plan=plan, eval_split=split)
        images = data.source.split(split)
        if not len(images):
            raise ValueError(
                f"{data.source.name} has no images in its {split} split: set data.{split}_fraction above 0"
            )
        made: dict[str, Any] = {"made_by": components.cache_key, "weights": name, "norm": norm, "dtype": dtype}
        paths = [stored_at(components.cache_dir, data.source, split, mask=mask, **made) for mask in range(masks)]
        first = ranks.this_rank().first
        with file_lock(paths[0]) if first else nullcontext():
            found = [read_features(path, n_layer=net.n_layer, n_image=len(images)) for path in paths]
            if not ranks.from_first(lambda: all(features is not None for features in found)):
                module = ProbeModule(
                    net=net, objective=components.objective, machine=components.hardware, norm=norm, masks=masks
                )
                module.writers = [FeatureWriter(path, n_image=len(images), dtype=dtype) for path in paths]
                log.info("features: %s, %d images, %d layers", split, len(images), net.n_layer + 1)
                try:
                    components.runner.predict(module, data)
                    for writer in module.writers:
                        writer.finish()
                finally:
                    for writer in module.writers:
                        writer.discard()
            ranks.barrier()
            found = [read_features(path, n_layer=net.n_layer, n_image=len(images)) for path in paths]
        for path, features in zip(paths, found, strict=True):
            assert features is not None
            if not np.array_equal(features.labels, images.labels):
                raise ValueError(f"the labels of {split} are not those that {path} was written with: remove that file")
        return [features for features in found if features is not None]

    def images(self, net: GPT, name: str, split: str, *, masks: int) -> Images:
        """The features as `Images`; training images under one mask only."""
        return Images(self.read(net, name, split, masks=1 if split == "train" else masks))
