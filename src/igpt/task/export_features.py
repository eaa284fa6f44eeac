"""`task=features`: pooled features of trained weights as files for other programs."""

import csv
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from igpt.data.listed_images import name_image
from igpt.data.source import Source
from igpt.distributed import ranks
from igpt.metric.result import Number, Result
from igpt.probe.depth import resolve_layer
from igpt.probe.feature_files import Features
from igpt.run.components import Components
from igpt.settings.probing import ExportFeaturesSettings
from igpt.task.feature_reader import FeatureReader
from igpt.utils import files

log = logging.getLogger(__name__)


def run(components: Components, settings: ExportFeaturesSettings) -> Result:
    """Writes `layer_N/features_SPLIT.safetensors` (or .npy) of every layer and split, and `SPLIT.csv`.

    A file holds features (N, C), those that `task=probe` reads, in the order of the split; the .csv has a line for each
    image. `task.encoder=RUN_FOLDER/layer_N` reads the files.
    """
    weights, source, folder = components.trained_weights, components.source, components.run_dir
    layers = choose_layers(settings.layers, weights.metadata.network.n_layer)
    net = components.hardware.build_frozen(weights.build_network, weights.load_into)
    reader, result = FeatureReader(components, settings), Result()
    splits = [split for split in dict.fromkeys(settings.splits) if len(source.split(split))]
    if not splits:
        raise ValueError(f"data={source.name} has no images in {', '.join(settings.splits)}: choose other task.splits")
    if empty := [split for split in settings.splits if split not in splits]:
        result.provenance["warning"] = f"no images in {', '.join(empty)}, so no features of them"
        log.warning("features: %s has %s", source.name, result.provenance["warning"])
    about = {"weights": weights.sha256, "norm": settings.norm, "pooling": "mean over positions"}
    for split in splits:
        (features,) = reader.read(net, weights.sha256, split, eval_masks=1)
        result.numbers[f"{split}/images"] = Number(len(features.labels), "images", 1)
        result.files |= {split: Path(f"{split}.csv")}
        for layer in layers:
            path = Path(f"layer_{layer}") / f"features_{split}.{settings.format}"
            result.files[f"layer_{layer}/{split}"] = path
            if ranks.this_rank().is_first:
                write_layer(folder / path, features, layer, {**about, "layer": layer, "split": split}, source)
        if ranks.this_rank().is_first:
            write_listing(folder / f"{split}.csv", source, split)
    log.info("features: task=probe_encoder task.encoder=%s probes them", folder / f"layer_{layers[0]}")
    width = features.values.shape[2]
    result.numbers["features/width"] = Number(width, "features", 1)
    result.provenance |= {**about, "tokenizer": components.tokenizer.hash, "layers": layers, "seed": components.seed}
    return result


def choose_layers(layers: Any, n_layer: int) -> list[int]:
    """The layers that `task.layers` names in a network of `n_layer` blocks, each once, ascending.

    Raises:
        ValueError: the network has no such layer.
    """
    if layers == "all":
        return list(range(n_layer + 1))
    try:
        chosen = [resolve_layer(layer, n_layer) for layer in (layers if isinstance(layers, list) else [layers])]
    except ValueError as error:
        raise ValueError(str(error).replace("task.layer ", "task.layers: each ")) from error
    return sorted({layer for layer in chosen if layer is not None})


def write_layer(path: Path, features: Features, layer: int, about: dict[str, Any], source: Source) -> None:
    """Writes the features of one layer; read from their memory-mapped file, they are not in memory together."""
    values = features.values[layer]
    with files.atomic_path(path) as temporary:
        if path.suffix == ".npy":
            with temporary.open("wb") as file:
                np.save(file, values, allow_pickle=False)
            return
        metadata = {key: str(value) for key, value in about.items()}
        if source.class_names is not None:
            metadata["class_names"] = json.dumps(source.class_names)
        save_file({"features": values, "labels": features.labels}, temporary, metadata=metadata)


def write_listing(path: Path, source: Source, split: str) -> None:
    """Writes a line for each image of a split: file (`test/12` without files), label (-1: none) and class."""
    images = source.split(split)
    names, classes = [name_image(split, images, i) for i in range(len(images))], source.class_names
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(("file", "label", "class"))
    for name, label in zip(names, images.labels.tolist(), strict=True):
        lines.writerow((name, label, "" if classes is None or label < 0 else classes[label]))
    with files.atomic_write(path) as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))
