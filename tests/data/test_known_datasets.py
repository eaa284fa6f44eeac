"""Known datasets are read as by earlier versions: hashes of their pixels and labels."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from igpt.tokens.openai_npy import OpenAITokens
from tests.data.conftest import Shop
from tests.data.test_images import row, stored
from tests.tokens.test_palette import random_palette

ILSVRC = {
    "short_side": [256, 384],
    "eval_short_side": 224,
    "size": 224,
    "filter": "bilinear",
    "resize": "twice",
    "draft": 3,
}
OF_SHARED = {
    "cifar10-jpeg": ({"resolution": 32, "n_class": 10, "val_fraction": 0.1}, 50,
                     {"train": "9393fb47ad6ffa3d", "val": "5853cea885464d5f", "test": "605e02c7d6c54929"}),
    "cifar100-sample": ({"resolution": 32, "n_class": 100, "label_column": ["fine_label"], "val_fraction": 0.1}, 1,
                        {"train": "7aaaebd4f71df64e", "val": "64d6d944eda2eec4", "test": "8968366cf4d9a110"}),
    "imagenet-sample": ({"resolution": 32, "n_class": 1000, "classes": "imagenet", "val_fraction": 0.04, "crop": ILSVRC,
                         "splits": {"train": ["train"], "val": [], "test": ["validation"]}}, 8,
                        {"train": "4dcb9afa81ef839b", "val": "63fffc4695a60c50", "test": "74cb49ea02f79144"}),
}  # fmt: skip


def hash_split(split: Any, step: int = 1) -> str:
    rows = range(0, len(split), step)
    pixels, labels = split.read(rows, [0] * len(rows))
    return hashlib.sha256(pixels.tobytes() + labels.astype("<i8").tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", list(OF_SHARED))
def test_known_datasets_are_read_as_before(images: Shop, shared: Path, name: str) -> None:
    """Independent source: hashes of pixels and labels as Hugging Face's loaders of folders and parquet gave them."""
    settings, step, digests = OF_SHARED[name]
    source = images(shared / "data" / name, **settings)
    assert {split: hash_split(source.split(split), step) for split in digests} == digests


def test_stl10s_layout_is_read_as_before(images: Shop, tmp_path: Path) -> None:
    for name, count in (("train", 12), ("test", 5), ("unlabeled", 3)):
        rows = [row(i, i % 10, (96, 96)) for i in range(count)]
        stored(tmp_path / "data" / f"{name}-00000-of-00001.parquet", rows, names=[f"class {c}" for c in range(10)])
    source = images(tmp_path / "data", resolution=32, n_class=10)
    digests = [hash_split(source.split(name)) for name in ("train", "val", "test")]
    assert digests == ["95698c8ed52c3fc7", "9d3931dca8cae1af", "4679d74b34a321a5"]


@pytest.mark.parametrize(("name", "digest"), [("ar", "a46071737e6a0f4f"), ("bert", "7b7bd7c3341293ce")])
def test_the_oracles_tokens_are_read_as_before(shared: Path, tmp_path: Path, name: str, digest: str) -> None:
    reference = np.load(shared / "oracles" / f"openai-{name}" / "reference.npz")
    random_palette(16).save(tmp_path / "colours.npy")
    np.save(tmp_path / "o_vaX.npy", reference["tokens"])
    np.save(tmp_path / "o_vaY.npy", np.eye(reference["labels"].max() + 1, dtype=np.float32)[reference["labels"]])
    source = OpenAITokens(name="o", resolution=8, path=str(tmp_path), clusters=str(tmp_path / "colours.npy"))
    assert hash_split(source.split("val")) == digest
