"""Features of encoders that are not ours, for the images of a run: given ones, or computed once and cached."""

import logging
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm.auto import tqdm

from igpt.data.source import Split, plain_pixels
from igpt.distributed import ranks
from igpt.encoder.encoder import Encoder
from igpt.encoder.find_encoder import find_encoder
from igpt.encoder.given_features import SPLITS, is_features, read_given_features
from igpt.probe.feature_files import Features, FeatureWriter, features_path, read_features
from igpt.probe.selection import FeatureSet
from igpt.run.components import Components
from igpt.settings.fields import FeatureDtype, Pooling
from igpt.task.feature_reader import OF_TRAINING_ALONE, read_or_write
from igpt.utils import files

log = logging.getLogger(__name__)


class ReadFeatures(Protocol):
    """Reads the features of a split, or of its images `rows` (M,), ascending and in that order."""

    def __call__(self, split: str, rows: np.ndarray | None = None) -> FeatureSet: ...


def open_features(
    components: Components,
    spec: str,
    needed: list[str],
    *,
    dtype: FeatureDtype,
    batch_size: int,
    input_size: int | None = None,
    pooling: Pooling = "auto",
    setting: str = "task.encoder",
) -> tuple[ReadFeatures, dict[str, Any]]:
    """(a reader of an encoder's features, what they are of, for a result's provenance).

    `spec`, `input_size`, `pooling`: as of `find_encoder`; or `spec` names features, which must have those of all splits
    `needed`. `dtype`: of the features on disk. `setting`: the name of `spec` in `components.run.input_hashes`.

    Raises:
        ValueError: no such encoder, its weights or library are not here, or features that do not fit the images.
    """
    source = components.source
    if is_features(spec):
        given = read_given_features(spec, {split: len(source.split(split)) for split in SPLITS}, needed)
        sha256 = components.run.input_hashes[setting]
        described = {"encoder": spec, "weights": sha256, "width": given[needed[0]].shape[1]}
        return partial(_select_given, given, components), described
    encoder = find_encoder(
        spec, device=components.hardware.device, resolution=source.resolution, input_size=input_size, pooling=pooling
    )
    side, size = source.resolution, encoder.input_size
    resized = "" if side == size else f", resized from {side}×{side}, bicubic"
    log.info("encoder: %s, %d features of %d×%d pixels%s", encoder.name, encoder.width, size, size, resized)
    described = {
        "encoder": spec, "weights": encoder.hash, "width": encoder.width, "pooling": encoder.pooling,
        "input": f"{size}×{size}{resized}", "mean": encoder.preprocess.mean, "std": encoder.preprocess.std,
    }  # fmt: skip
    return partial(read_encoded, encoder, components, dtype=dtype, batch_size=batch_size), described


def _select_given(
    given: dict[str, np.ndarray], components: Components, split: str, rows: np.ndarray | None = None
) -> FeatureSet:
    features = FeatureSet([Features(given[split][None], components.source.split(split).labels)])
    return features if rows is None else features.select_rows(rows)


def read_encoded(
    encoder: Encoder,
    components: Components,
    split: str,
    rows: np.ndarray | None = None,
    *,
    dtype: FeatureDtype,
    batch_size: int,
) -> FeatureSet:
    """The features of a split, or of its images `rows`: from the cache, or computed by the encoder and written to it.

    Those of some images are taken from the features of all, where these are in the cache.
    """
    source, images = components.source, components.source.split(split)
    data = components.run.image_key
    if split != "train":
        data["data"] = {key: value for key, value in data["data"].items() if key not in OF_TRAINING_ALONE}
    key = {**data, "encoder": encoder.hash, "split": split, "dtype": dtype}
    locate = partial(features_path, components.cache_dir, f"{source.name}{source.resolution}-{split}-encoder")
    path, every = locate(key), np.arange(len(images))
    if rows is None or ranks.broadcast_from_rank0(
        lambda: read_features(path, n_layer=0, n_image=len(images)) is not None
    ):
        read, selected = every, rows
    else:
        read, selected = rows, None
        path = locate({**key, "rows": files.hash_json(rows.tolist())})
    write = partial(
        encode_images, encoder, images, read, path, dtype=dtype, batch_size=batch_size, what=f"{encoder.name}: {split}"
    )
    stored = FeatureSet(read_or_write([path], write, n_layer=0, labels=images.labels[read], split=split))
    return stored if selected is None else stored.select_rows(selected)


def encode_images(
    encoder: Encoder,
    images: Split,
    rows: np.ndarray,
    path: Path,
    *,
    dtype: FeatureDtype,
    batch_size: int,
    what: str,
) -> None:
    """Computes the features of the images `rows` (M,), (1, M, D), each rank those of its part, with a progress bar."""
    rank = ranks.this_rank()
    images.prepare()
    mine = np.array_split(np.arange(len(rows)), rank.count)[rank.index]
    writer = FeatureWriter(path, n_image=len(rows), dtype=dtype)
    try:
        with tqdm(total=len(mine), desc=what, unit="image", disable=None, leave=False) as bar:
            for start in range(0, len(mine), batch_size):
                places = mine[start : start + batch_size]
                batch = rows[places]
                features = encoder.encode(torch.from_numpy(plain_pixels(images, batch.tolist())))
                writer.add(features[None], torch.from_numpy(places), torch.from_numpy(images.labels[batch]))
                bar.update(len(places))
        writer.finish()
    finally:
        writer.discard()
