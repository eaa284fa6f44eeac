"""`task=inspect`: what a trained network attends to, where it is surprised, and what its features know of classes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA
from tqdm.auto import tqdm

from igpt.data.classes import format_class_name
from igpt.data.source import Source, Split, plain_pixels
from igpt.distributed import ranks
from igpt.metric.likelihood import likelihood_numbers
from igpt.metric.result import Curve, Grid, Result, Scatter
from igpt.metric.share import share_number
from igpt.model.attention_maps import measure_spread
from igpt.model.gpt import GPT
from igpt.probe.depth import number_layer, resolve_layer
from igpt.probe.feature_files import Features
from igpt.probe.neighbours import classify_by_neighbours, find_neighbours
from igpt.run.components import Components
from igpt.settings.probing import InspectSettings
from igpt.task.attention_pictures import (
    MOST_HEADS,
    MOST_LAYERS,
    choose_numbers,
    choose_queries,
    describe_layout,
    draw_attention_maps,
    list_spread_curves,
)
from igpt.task.feature_reader import FeatureReader, read_batch
from igpt.task.loss_map import TokenLosses, draw_losses, measure_token_losses
from igpt.tokens.batches import Batch
from igpt.utils import files

FILE = Path("inspect.npz")


def run(components: Components, settings: InspectSettings) -> Result:
    """Pictures of attention, loss per pixel, nearest images and a map of features; k-NN accuracy of every layer.

    `inspect.npz` holds what they are drawn from. Without labels there is no k-NN, and the map has no colours.
    """
    weights, split, source = components.trained_weights, settings.split, components.source
    sizes = weights.metadata.network
    layer = resolve_layer(settings.layer, sizes.n_layer)
    queries = choose_queries(settings.queries, components.tokenizer)
    blocks = choose_numbers(settings.attention_layers, sizes.n_layer, most=MOST_LAYERS, setting="task.attention_layers")
    heads = choose_numbers(settings.attention_heads, sizes.n_head, most=MOST_HEADS, setting="task.attention_heads")
    for name in ("train", split):
        if not len(source.split(name)):
            raise ValueError(f"{source.name} has no images in its {name} split: set data.{name}_fraction above 0")
    data, result = components.build_datamodule(eval_split=split), Result()
    with components.hardware.inference(weights.build_network, weights.load_into) as net:
        reader = FeatureReader(components, settings)
        rows, judged = reader.read_sample(net, weights.sha256, split, at_most=settings.val_images)
        train_rows, train = reader.read_sample(net, weights.sha256, "train", at_most=settings.train_images)
        shown = np.linspace(0, len(rows) - 1, min(settings.count, len(rows))).round().astype(np.int64)
        images = plain_pixels(source.split(split), rows[shown].tolist())
        batch = read_batch(data, split, rows[shown], net.wte.device)
        arrays = {"rows": rows, "train_rows": train_rows, "shown": rows[shown]}
        arrays |= show_losses(result, net, components, batch, images, settings)
        arrays |= show_attention(
            result, net, components, batch, images[: settings.attention_images], queries, blocks, heads
        )
    remarks = []
    if linear := [str(i) for i, name in enumerate(sizes.patterns, start=1) if name == "linear"]:
        remarks.append(f"linear attention has no weights to draw: layers {', '.join(linear)}")
    correct = judge_layers(train, judged, source, k=settings.k, device=components.hardware.device)
    if correct is None:
        remarks.append(f"{source.name} has no labels in train or none in {split}: no k-NN accuracy")
        chosen_by = "task.layer: " + ("the middle" if layer is None else "given")
        layer = sizes.n_layer // 2 if layer is None else layer
    else:
        chosen_by = f"k-NN on {split}" if layer is None else "task.layer"
        layer = show_knn(result, correct, layer, split=split)
        pixels = [flatten_pixels(source.split(name), of) for name, of in (("train", train_rows), (split, rows))]
        pixels = [values - pixels[0].mean(1) for values in pixels]  # they have no zero of their own
        raw = judge_layers(
            replace(train, values=pixels[0]), replace(judged, values=pixels[1]), source, k=settings.k,
            device=components.hardware.device,
        )  # fmt: skip
        assert raw is not None
        share = share_number(float(raw.mean()), raw.shape[1], features="raw pixels")
        result.numbers[f"{split}/knn_raw_pixels"] = share
        depth = [0.0, float(sizes.n_layer)]
        result.curves[f"raw pixels, {split}"] = Curve(depth, [share.value] * 2, "layer", "accuracy")
        if source.n_class is not None:
            result.curves["chance"] = Curve(depth, [1 / source.n_class] * 2, "layer", "accuracy")
        arrays["knn_correct"] = correct
    if settings.neighbours:
        k = min(settings.neighbours, len(train_rows))
        of_train, of_shown = (
            torch.from_numpy(np.array(of)) for of in (train.values[layer], judged.values[layer][shown])
        )
        found, cosines = find_neighbours(of_train, of_shown, k=k, centred=True)
        nearest = train_rows[found.numpy()]
        result.grids["neighbours"] = draw_neighbours(images, judged.labels[shown], source, nearest)
        arrays |= {"nearest": nearest, "nearest_cosines": cosines.numpy()}
    if (scatter := map_features(judged, layer, source)) is not None:
        result.scatters["feature_map"] = scatter
        arrays |= {"map": scatter.points, "map_labels": scatter.classes}
    if ranks.this_rank().is_first:
        with files.atomic_write(components.run_dir / FILE) as file:
            np.savez(file, allow_pickle=False, **arrays)
    result.files["inspect"] = FILE
    result.provenance = {
        "weights": weights.sha256, "tokenizer": components.tokenizer.hash, "split": split, "layer": layer,
        "layer_chosen_by": chosen_by, "k": settings.k, "seed": components.seed,
        **({"warning": "; ".join(remarks)} if remarks else {}),
    }  # fmt: skip
    return result


def show_losses(
    result: Result, net: GPT, components: Components, batch: Batch, images: np.ndarray, settings: InspectSettings
) -> dict[str, np.ndarray]:
    """Adds `shown/loss_gen` and the picture of the loss per pixel; returns the losses of the tokens."""
    parts = [
        measure_token_losses(net, components.objective, Batch(*of_batch), eval_masks=settings.eval_masks)
        for of_batch in zip(*(torch.split(part, settings.batch_size) for part in batch), strict=True)
    ]
    losses = TokenLosses(*(torch.cat(list(each)) for each in zip(*parts, strict=True)))
    result.numbers["shown/loss_gen"] = likelihood_numbers("shown", losses.per_image)["shown/loss_gen"]
    names = [name_class(components.source, label) for label in batch.labels.tolist()]
    result.grids["loss_per_pixel"] = draw_losses(images, losses, components.tokenizer, names)
    return {"token_nats": losses.nats.numpy(), "image_nats": losses.per_image.numpy()}


def show_attention(
    result: Result,
    net: GPT,
    components: Components,
    batch: Batch,
    images: np.ndarray,
    queries: list[int],
    layers: list[int],
    heads: list[int],
) -> dict[str, np.ndarray]:
    """Adds the attention over `images`, the first of the batch, and its spread over all; returns the latter."""
    tokenizer = components.tokenizer
    visible = components.objective.visible_mask(batch.tokens, batch.rng_keys)
    spread = measure_spread(net, batch.tokens, describe_layout(tokenizer), visible)
    cell = tokenizer.side // tokenizer.grid.rows
    result.curves |= list_spread_curves(spread, cell=cell, causal=net.causal)
    if len(images):
        first = slice(len(images))
        grid = draw_attention_maps(
            net, batch.tokens[first], images, tokenizer, visible=None if visible is None else visible[first],
            queries=queries, layers=layers, heads=heads,
        )  # fmt: skip
        if grid is not None:
            result.grids["attention"] = grid
    return {f"attention_{name}": values.numpy() for name, values in spread._asdict().items()}


def judge_layers(
    train: Features, judged: Features, source: Source, *, k: int, device: torch.device
) -> np.ndarray | None:
    """Whether k-NN on each layer is right on each labelled image, (L + 1, N) bool; None without labels."""
    known, asked = (torch.from_numpy(np.flatnonzero(each.labels >= 0)) for each in (train, judged))
    if not (len(known) and len(asked)):
        return None
    labels, expected = (torch.from_numpy(each.labels)[of].to(device) for each, of in ((train, known), (judged, asked)))
    n_class = source.n_class or int(max(labels.max(), expected.max())) + 1
    correct = []
    for layer in tqdm(range(len(train.values)), desc="k-NN", unit="layer", disable=None, leave=False):
        of_train, of_judged = (
            each.layers([layer], dtype=torch.float32, device=device)[0][of.to(device)]
            for each, of in ((train, known), (judged, asked))
        )
        predicted = classify_by_neighbours(of_train, labels, of_judged, k=min(k, len(labels)), n_class=n_class)
        correct.append((predicted == expected).cpu().numpy())
    return np.stack(correct)


def show_knn(result: Result, correct: np.ndarray, layer: int | None, *, split: str) -> int:
    """Adds the accuracy of every layer, (L + 1, N) bool, and that of the best one or `layer`; returns this layer."""
    n_layer, n = len(correct) - 1, correct.shape[1]
    shares = [share_number(float(each.mean()), n) for each in correct]
    best = int(correct.sum(axis=1).argmax())
    found = number_layer(best, n_layer, correct)
    result.curves[f"k-NN, {split}"] = Curve(
        [float(i) for i in range(n_layer + 1)], [share.value for share in shares], "layer", "accuracy",
        y_intervals=[share.interval or (share.value, share.value) for share in shares], best=found.interval,
    )  # fmt: skip
    taken = best if layer is None else layer
    result.numbers[f"{split}/knn_accuracy"] = replace(shares[taken], features=f"layer {taken}")
    result.numbers["inspect/layer"] = found if layer is None else number_layer(layer, n_layer)
    return taken


def flatten_pixels(split: Split, rows: np.ndarray) -> np.ndarray:
    """The pixels of some images as features of one layer, (1, N, R·R·3) float32."""
    return plain_pixels(split, rows.tolist()).reshape(1, len(rows), -1).astype(np.float32)


def draw_neighbours(images: np.ndarray, labels: np.ndarray, source: Source, nearest: np.ndarray) -> Grid:
    """Images (N, R, R, 3) with labels (N,), each before its nearest training images, rows (N, k) of their split."""
    train, (n, k) = source.split("train"), nearest.shape
    found = plain_pixels(train, nearest.flatten().tolist()).reshape(n, k, *images.shape[1:])
    every = np.concatenate([labels[:, None], train.labels[nearest]], axis=1)
    captions = tuple(name_class(source, label) for label in every.flatten().tolist())
    titles = "image", *(str(i + 1) for i in range(k))
    return Grid(np.concatenate([images[:, None], found], axis=1), titles, captions=captions)


def name_class(source: Source, label: int) -> str:
    """The name of a class; "class 3" for one without, "" for an image without a label."""
    if label < 0:
        return ""
    return f"class {label}" if source.class_names is None else format_class_name(source.class_names[label])


def map_features(images: Features, layer: int, source: Source) -> Scatter | None:
    """The first two principal components of a layer's features; None of fewer than three images."""
    values = images.values[layer].astype(np.float64)
    if min(values.shape) < 2 or len(values) < 3:
        return None
    fitted = PCA(n_components=2, svd_solver="full")  # exact, the largest loading positive: the same every time
    points = fitted.fit_transform(values)
    shares = fitted.explained_variance_ratio_
    x, y = (f"component {i} ({100 * share:.0f} % of the variance)" for i, share in enumerate(shares, start=1))
    title = f"Layer {layer}: features of {len(values):,} images"
    return Scatter(points, images.labels, source.class_names or (), x, y, title)
