"""Layers by depth: the layer that a setting names; the best one and the fall after it, by bootstrap over images."""

import math
from collections.abc import Iterator

import numpy as np

from igpt.metric.result import Number
from igpt.utils import keyed

RESAMPLES = 2000
TOGETHER = 1 << 22  # images drawn at a time, over all resamples


def resolve_layer(layer: float | str | None, n_layer: int) -> int | None:
    """The number of `task.layer` in a network of `n_layer` blocks; None stays None.

    `last`: n_layer; a fraction of the depth: the nearest layer, of two equally near ones the lower.

    Raises:
        ValueError: the network has no such layer.
    """
    if layer is None or isinstance(layer, str):
        return None if layer is None else n_layer
    if 0 < layer < 1:
        return math.ceil(layer * n_layer - 0.5)
    if not 0 <= layer <= n_layer:
        raise ValueError(
            f"task.layer must lie in 0 … {n_layer} (0: the embedding), or be last or a fraction of the depth (0.5: its "
            f"middle), got {layer}"
        )
    return int(layer)


def best_layer_interval(correct: np.ndarray) -> tuple[int, int]:
    """95 % interval of the best layer, from whether each layer is right on each image, (L + 1, N) bool.

    Percentiles of the best layer in resamples of the images (Efron 1979), the lowest and the highest of equal ones.
    """
    low, high, last = [], [], len(correct) - 1
    for shares in _resampled_shares(correct):
        low.append(shares.argmax(axis=1))
        high.append(last - shares[:, ::-1].argmax(axis=1))
    best = int(correct.sum(axis=1).argmax())
    ends = (np.quantile(np.concatenate(of), q, method="inverted_cdf") for of, q in ((low, 0.025), (high, 0.975)))
    first, final = map(int, ends)
    return min(first, best), max(final, best)


def number_layer(layer: int, n_layer: int, correct: np.ndarray | None = None) -> Number:
    """A layer as a number; with `correct` the best one, with its interval (`best_layer_interval`)."""
    unit = f"of 0 … {n_layer}"
    if correct is None:
        return Number(layer, unit, 1)
    return Number(layer, unit, correct.shape[1], interval=best_layer_interval(correct))


def fall_to_last_layer(correct: np.ndarray) -> Number:
    """Accuracy of the best layer less that of the last, paired over the images of (L + 1, N) bool.

    The 95 % interval is simultaneous over all layers (the maximum of |t| in resamples; Romano and Wolf 2005), because
    the same images chose the best one: it lies above 0 only if some layer is better than the last.
    """
    n = correct.shape[1]
    ahead = correct[:-1].astype(np.int8) - correct[-1].astype(np.int8)  # (L, N): -1, 0 or 1
    means = ahead.mean(axis=1)
    stderr = ahead.std(axis=1) / n**0.5
    differs = stderr > 0  # the others are right on the same images as the last
    largest = [
        np.max(abs(shares[:, :-1] - shares[:, -1:] - means)[:, differs] / stderr[differs], axis=1, initial=0)
        for shares in _resampled_shares(correct)
    ]
    reach = float(np.quantile(np.concatenate(largest), 0.95)) * stderr
    interval = max(0.0, float((means - reach).max())), max(0.0, float((means + reach).max()))
    layers = f"layers {int(correct.sum(axis=1).argmax())} and {len(ahead)}"
    return Number(max(0.0, float(means.max())), "share", n, interval=interval, features=layers)


def _resampled_shares(correct: np.ndarray) -> Iterator[np.ndarray]:
    """Shares of right images in RESAMPLES random draws of N images with replacement, in parts (B, L + 1)."""
    n = correct.shape[1]
    generator = keyed.generator(0, "resampled images", n)  # the same for every run: intervals do not depend on its seed
    right = correct.T.astype(np.float32)
    at_once = max(1, TOGETHER // n)
    for start in range(0, RESAMPLES, at_once):
        some = min(at_once, RESAMPLES - start)
        drawn = generator.integers(n, size=(some, n)) + n * np.arange(some)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=some * n).reshape(some, n).astype(np.float32)
        yield (counts @ right).astype(np.float64) / n  # counts below 2^24 are exact in float32
