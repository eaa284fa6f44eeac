"""Feature files: pooled features of every layer, written in one pass, memory-mapped, named by a hash of the inputs."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt.data.cache import hash_cache_key, unwritable, warn_of_damage
from igpt.distributed import ranks
from igpt.probe.lbfgs import check_finite
from igpt.settings.fields import FeatureDtype
from igpt.utils import files

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Features:
    """Features of one split: values (L + 1, N, C), memory-mapped, and labels (N,) int64."""

    values: np.ndarray
    labels: np.ndarray

    def layers(self, which: list[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The layers `which` as a tensor, (P, N, C)."""
        return torch.from_numpy(np.ascontiguousarray(self.values[which])).to(device=device, dtype=dtype)


class FeatureWriter:
    """Writes the features of a split to disk, batch by batch, rows in any order, on every rank its own rows.

    Each rank writes a part file; rank 0 merges them and renames the result, so a file with the final name is complete.
    Only labels and row numbers stay in memory.
    """

    def __init__(self, path: Path, *, n_image: int, dtype: FeatureDtype) -> None:
        if ranks.this_rank().is_first:
            warn_of_damage(path, find_features_damage(path))
            files.remove_parts(path.parent)
        self.path, self.n_image, self.dtype = path, n_image, dtype
        self.rows: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.end = 0
        self.part: np.memmap[Any, Any] | None = None
        self.part_path: Path | None = None
        self._opened = ExitStack()
        self.n_row = -(-n_image // ranks.this_rank().count) + 4096  # the ranks' numbers differ by less than a batch

    def add(self, features: Tensor, rows: Tensor, labels: Tensor) -> None:
        """Appends features (L + 1, B, C) of the images `rows` (B,). Raises ValueError on NaN or infinity."""
        plain = features.to("cpu", torch.float16 if self.dtype == "float16" else torch.float32)
        check_finite(plain.isfinite().flatten(1).all(dim=1))
        values = plain.numpy()
        if self.part is None:
            shape = (len(values), self.n_row, values.shape[2])
            try:
                part_path = self._opened.enter_context(files.temporary_path(self.path))
                self.part = np.lib.format.open_memmap(part_path, mode="w+", dtype=values.dtype, shape=shape)
                with part_path.open("r+b") as file:  # allocated at once: a full disk under a map kills the process
                    files.reserve_space(file, part_path.stat().st_size)
                self.part_path = part_path
            except OSError as error:
                raise unwritable(self.path, error, "features") from error
        stop = self.end + values.shape[1]
        self.part[:, self.end : stop] = values
        self.end = stop
        self.rows.append(rows.cpu().numpy())
        self.labels.append(labels.cpu().numpy())

    def discard(self) -> None:
        """Deletes this rank's part file; finished files stay."""
        self.part = None
        self._opened.close()

    def finish(self) -> None:
        """Merges the part files of all ranks. Must be called on every rank."""
        rows = np.concatenate(self.rows) if self.rows else np.empty(0, dtype=np.int64)
        labels = np.concatenate(self.labels) if self.labels else np.empty(0, dtype=np.int64)
        if self.part is not None:
            self._flush(self.part)
        parts = ranks.all_gather_object((str(self.part_path), rows, labels))
        if ranks.this_rank().is_first:
            self._assemble(parts)
        ranks.barrier()
        self.discard()

    def _flush(self, part: "np.memmap[Any, Any]") -> None:
        """Writes the part to disk: rank 0 may be on another machine, and only this reports a page that is lost."""
        try:
            part.flush()
        except OSError as error:
            raise unwritable(self.path, error, "features") from error

    def _assemble(self, parts: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
        every = np.concatenate([rows for _, rows, _ in parts])
        assert np.array_equal(np.sort(every), np.arange(self.n_image)), "an image has no features, or twice"
        labels = np.empty(self.n_image, dtype=np.int64)
        opened = [(np.load(place, mmap_mode="r"), rows) for place, rows, _ in parts if len(rows)]
        labels[every] = np.concatenate([part_labels for _, _, part_labels in parts])
        n_layer, _, width = opened[0][0].shape
        try:
            with files.checksummed_path(labels_path(self.path)) as temporary, temporary.open("wb") as file:
                np.save(file, labels, allow_pickle=False)
            with files.checksummed_path(self.path) as temporary, temporary.open("wb") as file:
                header = {"descr": opened[0][0].dtype.str, "fortran_order": False}
                np.lib.format.write_array_header_1_0(file, {**header, "shape": (n_layer, self.n_image, width)})
                for layer in range(n_layer):
                    full = np.empty((self.n_image, width), dtype=opened[0][0].dtype)
                    for part, rows in opened:
                        full[rows] = part[layer, : len(rows)]
                    file.write(full.data)
        except OSError as error:
            raise unwritable(self.path, error, "features") from error


def labels_path(path: Path) -> Path:
    """Path of the labels of a feature file: beside it."""
    return path.with_suffix(".labels.npy")


def features_path(cache: Path, name: str, cache_key: Mapping[str, Any]) -> Path:
    """Path of a feature file: `cache/features/<name>-<hash of cache_key>.npy`."""
    return cache / "features" / f"{name}-{hash_cache_key(cache_key)}.npy"


def find_features_damage(path: Path) -> str | None:
    """As `files.find_damage`, of features or else of their labels."""
    return files.find_damage(path) or files.find_damage(labels_path(path))


def read_features(path: Path, *, n_layer: int, n_image: int) -> Features | None:
    """The features in a file; None where it is missing, damaged or, with a warning, of another shape."""
    if find_features_damage(path) is not None:
        return None
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    labels = np.load(labels_path(path), allow_pickle=False)
    if values.shape[:2] != (n_layer + 1, n_image) or labels.shape != (n_image,):
        log.warning("features: %s holds %s, not %d layers of %d images: it is made anew", path, values.shape,
                    n_layer + 1, n_image)  # fmt: skip
        return None
    return Features(values, labels)
