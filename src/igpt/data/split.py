"""Seeded splits, the same on every machine and for every run that states the same seed."""

import numpy as np

from igpt import keyed


def split_indices(n: int, *, val_fraction: float, test_fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Disjoint indices of train, val and test, together 0 … n-1: name → (n_split,) int64, ascending.

    `test_fraction` is taken of all images, `val_fraction` of those that are left, each rounded to whole images.

    Raises:
        ValueError: a fraction outside [0, 1), or a training split that would be empty.
    """
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= fraction < 1:
            raise ValueError(f"data.{name} must be at least 0 and below 1, got {fraction}")
    order = keyed.generator(seed, "split").permutation(n)
    n_test = round(n * test_fraction)
    n_val = round((n - n_test) * val_fraction)
    if n - n_test - n_val < 1:
        raise ValueError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} leave none of {n} images to train on"
        )
    parts = np.split(order, [n_test, n_test + n_val])
    return {name: np.sort(part) for name, part in zip(("test", "val", "train"), parts, strict=True)}
