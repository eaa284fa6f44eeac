"""Nearest training images of an image by cosine similarity of a layer's pooled features, which are cached."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt.data.cache import file_lock
from igpt.data.source import plain_pixels
from igpt.model.features import layer_features
from igpt.model.gpt import GPT
from igpt.probe.feature_files import Features, FeatureWriter, find_features_damage, read_features
from igpt.probe.neighbours import find_nearest
from igpt.settings.generation import DemoSettings
from igpt.task.feature_reader import feature_path
from igpt.tokens.datamodule import TokenDataModule
from igpt.training.hardware import HardwareConfig


@dataclass(eq=False)
class TrainingFeatures:
    """Pooled features of training images, all layers, in the feature cache.

    Uses the features of the whole split if `task=probe` has written them. Else computes, at the first request, those of
    at most `among` images drawn by the seed. The file is named by the hash of the weights and `cache_key`, which
    determines pixels and tokens.
    """

    net: GPT
    machine: HardwareConfig
    data: TokenDataModule
    cache: Path
    settings: DemoSettings
    weights: str
    cache_key: Mapping[str, Any]
    done: int = 0  # images processed
    total: int = 0  # images to process
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # of the training split
    features: Features | None = None
    stopping: threading.Event = field(default_factory=threading.Event)

    def find(self, tokens: Tensor, *, layer: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest training rows of an image, tokens (1, T), by one layer, and their cosines; call `read` first.

        Raises:
            ValueError: a layer that the network does not have.
        """
        assert self.features is not None
        if not 0 <= layer <= self.net.n_layer:
            raise ValueError(f"there are layers 0 (the embedding) to {self.net.n_layer}, got {layer}")
        query = self._pool(tokens)[layer, 0].float().cpu().numpy()
        places, cosines = find_nearest(self.features.values[layer], query, k=k)
        return self.rows[places], cosines

    def read(self) -> None:
        """Loads the features, or computes and caches them; writes nothing if `stopping` is set meanwhile.

        Raises:
            ValueError: the training images could not be read.
        """
        if self.features is None:
            try:
                self.features = self._read()
            except Exception as error:  # shown on the page
                raise ValueError(f"the training images could not be read: {error}") from error

    def _read(self) -> Features | None:
        split = self.data.source.split("train")
        if not len(split):
            raise ValueError(f"{self.data.source.name} has none")
        known = partial(read_features, n_layer=self.net.n_layer)
        kept = partial(
            feature_path, self.cache, self.data.source, "train", cache_key=self.cache_key, weights=self.weights,
            norm=self.settings.norm, dtype=self.settings.dtype,
        )  # fmt: skip
        rows, path = np.arange(len(split)), kept()
        features = known(path, n_image=len(rows))
        if features is None and len(split) > self.settings.among:
            rows = self.data.sample_rows("train", at_most=self.settings.among)
            path = kept(among=self.settings.among, seed=self.data.seed)
            features = known(path, n_image=len(rows))
        if features is None:
            with file_lock(path, problem=find_features_damage(path)):  # another process may have written them meanwhile
                if known(path, n_image=len(rows)) is None:
                    self._write(path, rows)
            features = known(path, n_image=len(rows))
        self.rows = rows
        return features and Features(features.values, split.labels[rows])

    def _write(self, path: Path, rows: np.ndarray) -> None:
        split = self.data.source.split("train")
        self.done, self.total = 0, len(rows)
        writer = FeatureWriter(path, n_image=len(rows), dtype=self.settings.dtype)
        try:
            for place in torch.split(torch.arange(len(rows)), self.settings.batch_size):
                if self.stopping.is_set():
                    return
                some = rows[place]
                tokens = self.data.encode(torch.from_numpy(plain_pixels(split, some.tolist())))
                writer.add(self._pool(tokens), place, torch.from_numpy(split.labels[some]))
                self.done += len(some)
            writer.finish()
        finally:
            writer.discard()

    @torch.inference_mode()
    def _pool(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) → (L + 1, B, C)."""
        with self.machine.autocast():
            return layer_features(self.net, tokens.to(self.net.wte.device), norm=self.settings.norm)
