"""Selection of layer and regularisation strength: grid search on validation images or by cross-validation."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt.data.cache import map_chunks
from igpt.data.source import Split, plain_pixels
from igpt.metric.result import Curve, Number
from igpt.metric.share import share_number, wilson_interval
from igpt.probe.feature_files import Features
from igpt.probe.lbfgs import TOLERANCE, Heads, logistic_regression
from igpt.probe.scores import vote
from igpt.utils import keyed

log = logging.getLogger(__name__)

CPU_BYTES = 1 << 30  # bytes of features fitted together on a CPU; on a GPU, a sixth of its free memory


@dataclass(frozen=True)
class FeatureSet:
    """Features of a set of images, one `Features` per mask (BERT) or just one (AR)."""

    by_mask: list[Features]

    @property
    def labels(self) -> np.ndarray:
        return self.by_mask[0].labels

    @property
    def n_layer(self) -> int:
        """Number of layers, the embedding included: L + 1."""
        return len(self.by_mask[0].values)

    def select_layer(self, which: int) -> "FeatureSet":
        """The features of one layer, which becomes layer 0."""
        return FeatureSet([Features(features.values[which : which + 1], features.labels) for features in self.by_mask])

    def select_rows(self, rows: np.ndarray) -> "FeatureSet":
        """The images `rows` (M,)."""
        return FeatureSet([Features(features.values[:, rows], features.labels[rows]) for features in self.by_mask])

    @staticmethod
    def from_pixels(split: Split) -> "FeatureSet":
        """Raw pixels in [-1, 1] as the features of one layer, (1, N, R·R·3): a baseline."""
        split.prepare()
        parts = map_chunks(lambda rows: plain_pixels(split, rows), np.arange(len(split)), "reading pixels")
        pixels = np.concatenate([part.reshape(len(part), -1) for part in parts])
        return FeatureSet([Features((pixels / np.float32(127.5) - 1)[None].astype(np.float32), split.labels)])

    def concat_layers(self, layers: Sequence[int], device: torch.device, mask: int = 0) -> Tensor:
        """Concatenated features of P layers under one mask, (1, N, P · C) float32."""
        features = self.by_mask[mask].layers(list(layers), dtype=torch.float32, device=device)  # (P, N, C)
        return torch.cat(list(features), dim=-1)[None]


@dataclass(frozen=True)
class Choice:
    """The selected layers (their features are concatenated) and strength C."""

    layers: list[int]
    strength: float

    @property
    def features(self) -> str:
        """The layers as text: "layer 3", "layers 2, 3, 4"."""
        return f"layer{'s' if len(self.layers) > 1 else ''} {', '.join(map(str, self.layers))}"


@dataclass(frozen=True)
class GridScores:
    """Result of a grid search: accuracy of every window of layers at every strength, (P, S)."""

    accuracy: np.ndarray
    one_mask: np.ndarray  # (P, S) accuracy under the first mask alone, without the vote
    windows: list[list[int]]
    C_grid: list[float]
    n_image: int
    correct: np.ndarray | None = None  # (P, N) bool: the images that each window is right on at its best strength
    suboptimality: np.ndarray | None = None  # (P, S) of `Heads`, the largest over folds; None: not fitted by L-BFGS

    def curve(self) -> Curve:
        """The best accuracy of each layer, with its 95 % interval over images."""
        shares = self.accuracy.max(axis=1).tolist()
        intervals = [wilson_interval(share, self.n_image) for share in shares]
        layers = [float(window[0]) for window in self.windows]
        return Curve(layers, shares, "layer", "accuracy", y_intervals=intervals)

    def number(self, choice: Choice, *, one_mask: bool = False, features: str | None = None) -> Number:
        """The accuracy of a choice, of its layers' features unless they are described otherwise."""
        row, column = self.windows.index(choice.layers), self.C_grid.index(choice.strength)
        share = float((self.one_mask if one_mask else self.accuracy)[row, column])
        return share_number(share, self.n_image, features=choice.features if features is None else features)


def select_strengths(accuracy: np.ndarray, C_grid: Sequence[float]) -> np.ndarray:
    """The best column of each row of (P, S), (P,); ties: the strongest regularisation."""
    order = np.argsort(C_grid)
    columns: np.ndarray = order[accuracy[:, order].argmax(axis=1)]
    return columns


def select_best(table: GridScores, *, layer: int | None) -> Choice:
    """The best choice in a table, or in one row of it. Ties: the lowest layer, then the strongest regularisation."""
    rows = range(len(table.windows)) if layer is None else [layer]
    order = np.argsort(table.C_grid)
    _, row, column = max((table.accuracy[r, c], -r, -i) for r in rows for i, c in enumerate(order))
    return Choice(table.windows[-row], table.C_grid[int(order[-column])])


FOLDS = 5


def choose_n_fold(per_class: int) -> int:
    """Number of cross-validation folds for `per_class` images of each class: at most `FOLDS`.

    Raises:
        ValueError: fewer than two images per class.
    """
    if per_class < 2:
        raise ValueError("one label per class leaves nothing to choose on: take two or more")
    return min(FOLDS, per_class)


def window_around(layer: int, size: int, n_layer: int) -> list[int]:
    """`size` adjacent layers in 0 … n_layer, centred on `layer`, or shifted to fit near either end."""
    first = min(max(0, layer - size // 2), n_layer + 1 - size)
    return list(range(first, first + size))


def describe_shift(window: list[int], layer: int) -> str:
    """A sentence on a window of `window_around` that is not centred on `layer`; "" for one that is."""
    below, above = layer - window[0], window[-1] - layer
    if below == above:
        return ""
    return (
        f"layers {format_window(window)} are not centred on layer {layer}, as the paper's are: {below} below it and "
        f"{above} above, where the network ends"
    )


def assign_folds(labels: np.ndarray, n: int, *, seed: int) -> np.ndarray:
    """Stratified random folds: a number from 0 to n - 1 for each image, (N,) → (N,).

    Raises:
        ValueError: a class with fewer images than folds.
    """
    folds = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels).tolist():
        (of_class,) = np.nonzero(labels == label)
        if len(of_class) < n:
            raise ValueError(f"class {label} has {len(of_class)} images, too few for task.folds={n}: take fewer folds")
        folds[keyed.generator(seed, "folds", label).permutation(of_class)] = np.arange(len(of_class)) % n
    return folds


def grid_search(
    train: FeatureSet,
    val: FeatureSet,
    C_grid: list[float],
    *,
    n_class: int,
    device: torch.device,
    seed: int,
    folds: np.ndarray | None = None,
    windows: list[list[int]] | None = None,
) -> GridScores:
    """Grid search: fits heads on train and scores them on val; with `folds` (N,), by cross-validation on train.

    `windows`: sets of layers to concatenate; None: each layer alone.
    """
    windows = windows or [[layer] for layer in range(train.n_layer)]
    shape = len(windows), len(C_grid)
    right, right_one, suboptimality = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    n = len(val.labels if folds is None else train.labels)
    correct = np.zeros((len(windows), n), dtype=bool)
    labels, val_labels = (torch.from_numpy(images.labels).to(device) for images in (train, val))
    for group in _group_windows(windows, train, device):
        some = [windows[i] for i in group]
        x = torch.cat([train.concat_layers(window, device) for window in some])  # (P, N, D)
        names = [format_window(window) for window in some]
        if folds is None:
            heads = logistic_regression(x, labels, n_class=n_class, C_grid=C_grid, names=names)
            del x
            suboptimality[group] = heads.suboptimality.cpu().numpy()
            predicted = _predict(heads, val, some, n_class, device, seed)  # 2 × (P, S, N)
            hits, hits_one = (each == val_labels for each in predicted)
            right[group], right_one[group] = (each.sum(dim=-1).cpu().numpy() for each in (hits, hits_one))
            correct[group] = _take_columns(hits, select_strengths(right[group], C_grid))
            continue
        hits = torch.zeros((len(some), len(C_grid), n), dtype=torch.bool, device=device)
        for fold in range(int(folds.max()) + 1):
            inside = torch.from_numpy(folds != fold).to(device)
            heads = logistic_regression(x[:, inside], labels[inside], n_class=n_class, C_grid=C_grid, names=names)
            suboptimality[group] = np.maximum(suboptimality[group], heads.suboptimality.cpu().numpy())
            hits[..., ~inside] = heads.scores(x[:, ~inside]).argmax(dim=-1) == labels[~inside]
        right[group] = right_one[group] = hits.sum(dim=-1).cpu().numpy()
        correct[group] = _take_columns(hits, select_strengths(right[group], C_grid))
    return GridScores(right / n, right_one / n, windows, list(C_grid), n, correct, suboptimality)


def _take_columns(hits: Tensor, columns: np.ndarray) -> np.ndarray:
    """One column of each row: (P, S, N), (P,) → (P, N)."""
    taken: np.ndarray = hits[torch.arange(len(hits)), torch.from_numpy(columns)].cpu().numpy()
    return taken


@dataclass(frozen=True)
class FittedHead:
    """One fitted head."""

    heads: Heads
    choice: Choice
    n_class: int
    device: torch.device
    seed: int

    def predict(self, images: FeatureSet) -> tuple[np.ndarray, Tensor]:
        """Predicted classes (N,), by vote over several masks, and scores (N, K) under the first mask."""
        predictions, _ = _predict(self.heads, images, [self.choice.layers], self.n_class, self.device, self.seed)
        scores = self.heads.scores(images.concat_layers(self.choice.layers, self.device))[0, 0]
        return predictions[0, 0].cpu().numpy(), scores


def fit_head(images: list[FeatureSet], choice: Choice, *, n_class: int, device: torch.device, seed: int) -> FittedHead:
    """Fits the chosen head on all of `images`, under the first mask."""
    x = torch.cat([some.concat_layers(choice.layers, device) for some in images], dim=1)
    labels = torch.from_numpy(np.concatenate([some.labels for some in images])).to(device)
    heads = logistic_regression(
        x, labels, n_class=n_class, C_grid=[choice.strength], names=[format_window(choice.layers)]
    )
    return FittedHead(heads, choice, n_class, device, seed)


def report_convergence(fits: dict[str, GridScores | FittedHead]) -> dict[str, Any]:
    """Entries for a result's provenance: `suboptimality`, the largest of all fits by L-BFGS, in nats per image.

    Fits that may be more than `TOLERANCE` above their minimum are logged, and listed as `not_converged`: the key in
    `fits`, the layer, C and the bound.
    """
    largest, unconverged = 0.0, []
    for name, fit in fits.items():
        if isinstance(fit, GridScores):
            assert fit.suboptimality is not None
            gaps, windows, C_grid = fit.suboptimality, fit.windows, fit.C_grid
        else:
            gaps, windows, C_grid = fit.heads.suboptimality.cpu().numpy(), [fit.choice.layers], [fit.choice.strength]
        largest = max(largest, float(gaps.max()))
        unconverged += [
            f"{name}, layer {format_window(windows[row])}, C = {C_grid[column]:g}: up to {gaps[row, column]:.1e} nats"
            for row, column in np.argwhere(gaps > TOLERANCE).tolist()
        ]
    if not unconverged:
        return {"suboptimality": largest}
    log.warning("classifiers that are not within %g nats of their minimum: %s", TOLERANCE, "; ".join(unconverged))
    return {"suboptimality": largest, "not_converged": unconverged}


def format_window(layers: Sequence[int]) -> str:
    """`3`, or for several layers `2+3+4`."""
    return "+".join(map(str, layers))


def _predict(
    heads: Heads, images: FeatureSet, windows: list[list[int]], n_class: int, device: torch.device, seed: int
) -> tuple[Tensor, Tensor]:
    """Predictions of the heads of P windows, each (P, S, N): by vote over all masks, and under the first mask alone."""
    under = [
        heads.scores(torch.cat([images.concat_layers(window, device, mask) for window in windows])).argmax(dim=-1)
        for mask in range(len(images.by_mask))
    ]
    if len(under) == 1:
        return under[0], under[0]
    rng_keys = keyed.per_example_keys(keyed.key(seed, "vote"), torch.arange(len(images.labels)))
    return vote(torch.stack(under, dim=-2), n_class=n_class, rng_keys=rng_keys), under[0]


def _group_windows(windows: list[list[int]], train: FeatureSet, device: torch.device) -> list[list[int]]:
    """Indices of windows, in groups that are fitted together: as many per group as memory allows."""
    budget = CPU_BYTES if device.type == "cpu" else torch.cuda.mem_get_info(device)[0] // 6
    _, n, width = train.by_mask[0].values.shape
    size = max(1, int(budget // (4 * n * width * max(len(window) for window in windows))))
    return [list(range(first, min(first + size, len(windows)))) for first in range(0, len(windows), size)]
