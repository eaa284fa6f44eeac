"""The training images that a layer finds most like an image: cosine of pooled features, which are read or made once."""

import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt.data.cache import file_lock
from igpt.data.source import plain_pixels
from igpt.model.features import layer_features
from igpt.model.gpt import GPT
from igpt.probe.features import Features, FeatureWriter, read_features
from igpt.settings.base import FeatureDtype
from igpt.task.features import stored_at
from igpt.task.machine import Machine
from igpt.tokens.datamodule import TokenDataModule

log = logging.getLogger(__name__)

AT_ONCE = 65536  # rows of features that are compared at a time


def nearest(features: np.ndarray, query: np.ndarray, *, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k rows most alike by cosine, best first, of equals the first row: (N, C), (C,) → rows (k,), cosines (k,)."""
    direction = query.astype(np.float64) / max(float(np.linalg.norm(query.astype(np.float64))), 1e-30)
    cosines = np.empty(len(features))
    for start in range(0, len(features), AT_ONCE):
        some = np.asarray(features[start : start + AT_ONCE], dtype=np.float64)
        cosines[start : start + AT_ONCE] = some @ direction / np.maximum(np.linalg.norm(some, axis=1), 1e-30)
    rows = np.argsort(-cosines, kind="stable")[:k]
    return rows, cosines[rows]


@dataclass(frozen=True)
class Neighbour:
    """A training image that was found."""

    pixels: np.ndarray  # (R, R, 3) uint8
    row: int  # of the training split
    label: int  # -1: it has none
    cosine: float


class TrainingFeatures:
    """Pooled features of training images, all layers, on disk.

    Those of the whole split that task=probe wrote are taken where they are. Else they are made, of at most `among`
    images drawn by the seed, in a thread of its own the first time that somebody asks, and kept in the same place.
    """

    def __init__(
        self,
        *,
        net: GPT,
        machine: Machine,
        data: TokenDataModule,
        cache: Path,
        weights: str,
        made_by: dict[str, Any],
        norm: str,
        dtype: FeatureDtype,
        among: int,
        batch_size: int,
    ) -> None:
        self.net, self.machine, self.data, self.norm = net, machine, data, norm
        self.among, self.batch_size, self.dtype = among, batch_size, dtype
        self.place: dict[str, Any] = {"made_by": made_by, "weights": weights, "norm": norm, "dtype": dtype}
        self.cache = cache
        self.done, self.total = 0, 0  # images read, of how many
        self.rows = np.empty(0, dtype=np.int64)  # of the training split
        self.features: Features | None = None
        self.error: Exception | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def ready(self, wait: float) -> bool:
        """Whether they are there, after at most `wait` seconds; the first call begins to make them.

        Raises:
            ValueError: they could not be made.
        """
        with self._lock:
            if self.features is None and self._thread is None and not self._stop.is_set():
                self.error = None
                self._thread = threading.Thread(target=self._make, name="training features")
                self._thread.start()
            thread = self._thread
        if thread is not None:
            thread.join(wait)
            if thread.is_alive():
                return False
            with self._lock:
                self._thread = None
        if self.error is not None:
            raise ValueError(f"the training images could not be read: {self.error}") from self.error
        return self.features is not None

    def find(self, tokens: Tensor, *, layer: int, k: int) -> list[Neighbour]:
        """The k nearest to one image, tokens (1, T), by one layer. To be called when they are `ready`.

        Raises:
            ValueError: a layer that the network does not have.
        """
        assert self.features is not None
        if not 0 <= layer <= self.net.n_layer:
            raise ValueError(f"there are layers 0 (the embedding) to {self.net.n_layer}, got {layer}")
        query = self._pooled(tokens)[layer, 0].float().cpu().numpy()
        rows, cosines = nearest(self.features.values[layer], query, k=k)
        pixels = plain_pixels(self.data.source.split("train"), self.rows[rows].tolist())
        found = zip(
            pixels, self.rows[rows].tolist(), self.features.labels[rows].tolist(), cosines.tolist(), strict=True
        )
        return [Neighbour(*one) for one in found]

    def stop(self) -> None:
        """Ends the thread, if it is at work; what it had is not kept."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _make(self) -> None:
        try:
            self._read()
        except Exception as error:  # whatever it is: told to whoever waits, by `ready`
            log.debug("traceback", exc_info=True)
            self.error = error

    def _read(self) -> None:
        split = self.data.source.split("train")
        if not len(split):
            raise ValueError(f"{self.data.source.name} has none")
        path = stored_at(self.cache, self.data.source, "train", **self.place)
        whole = read_features(path, n_layer=self.net.n_layer, n_image=len(split))
        if whole is not None or len(split) <= self.among:
            self.rows = np.arange(len(split))
        else:
            self.rows = self.data.some_rows("train", at_most=self.among)
            path = stored_at(self.cache, self.data.source, "train", **self.place, among=self.among, seed=self.data.seed)
            whole = read_features(path, n_layer=self.net.n_layer, n_image=len(self.rows))
        if whole is None:
            with file_lock(path):  # another process may be making them, and then they are there
                whole = read_features(path, n_layer=self.net.n_layer, n_image=len(self.rows))
                if whole is None:
                    self._write(path)
            whole = read_features(path, n_layer=self.net.n_layer, n_image=len(self.rows))
        if not self._stop.is_set():
            assert whole is not None
            self.features = Features(whole.values, split.labels[self.rows])

    def _write(self, path: Path) -> None:
        split = self.data.source.split("train")
        self.done, self.total = 0, len(self.rows)
        writer = FeatureWriter(path, n_image=len(self.rows), dtype=self.dtype)
        try:
            for start in range(0, self.total, self.batch_size):
                if self._stop.is_set():
                    return
                rows = self.rows[start : start + self.batch_size]
                tokens = self.data.encode(torch.from_numpy(plain_pixels(split, rows.tolist())))
                place = torch.arange(start, start + len(rows))
                writer.add(self._pooled(tokens), place, torch.from_numpy(split.labels[rows]))
                self.done = start + len(rows)
            writer.finish()
        finally:
            writer.discard()

    @torch.inference_mode()
    def _pooled(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) → (L + 1, B, C)."""
        with self.machine.autocast():
            return layer_features(self.net, tokens.to(self.net.wte.device), norm=self.norm)
