"""Seeded splits and subsets, equal on every machine and in every run with the same seed."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from igpt.utils import keyed

HELD_OUT = ("val_fraction", "test_fraction", "split_seed", "splits", "streaming")  # they decide the held-out images


def split_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Data settings by which two runs hold out different images. A missing setting equals null, 0 and false."""
    return [key for key in HELD_OUT if (a.get(key) or None) != (b.get(key) or None)]


def split_indices(n: int, *, val_fraction: float, test_fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Disjoint indices of train, val and test, together 0 … n-1: name → (n_split,) int64, ascending.

    `test_fraction` applies to all images, `val_fraction` to the rest; both are rounded to whole images.

    Raises:
        ValueError: an empty training split.
    """
    order = keyed.generator(seed, "split").permutation(n)
    n_test = round(n * test_fraction)
    n_val = round((n - n_test) * val_fraction)
    if n - n_test - n_val < 1:
        raise ValueError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} leave none of {n} images to train on"
        )
    parts = np.split(order, [n_test, n_test + n_val])
    return {name: np.sort(part) for name, part in zip(("test", "val", "train"), parts, strict=True)}


def balanced_subset(
    labels: np.ndarray, *, per_class: int, seed: int, where: str, setting: str = "data.labels_per_class"
) -> np.ndarray:
    """`per_class` images of every class present, drawn by `seed`: labels (N,) → indices (M,), ascending.

    Subsets of one seed are nested: a larger one contains a smaller one.

    Raises:
        ValueError: a class with fewer images.
    """
    if per_class < 1:
        raise ValueError(f"{setting} must be at least 1, or null for all; got {per_class}")
    chosen = []
    for label in np.unique(labels).tolist():
        (of_class,) = np.nonzero(labels == label)
        if len(of_class) < per_class:
            raise ValueError(f"{where}: class {label} has {len(of_class)} images, {setting}={per_class} are asked for")
        chosen.append(keyed.generator(seed, "subset", label).permutation(of_class)[:per_class])
    return np.sort(np.concatenate(chosen))
