"""Small datasets made on the spot, in the layouts people have."""

import io
import struct
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from igpt.data.images import Images
from igpt.data.mixture import Mixture
from igpt.run.targets import checked_partial

SETTINGS: dict[str, Any] = {
    "name": "made",
    "resolution": 8,
    "n_class": None,
    "classes": None,
    "splits": {"train": ["train"], "val": ["validation"], "test": ["test"]},
    "layout": "auto",
    "image_column": ["image", "img"],
    "label_column": ["label", "fine_label"],
    "val_fraction": 0.25,
    "test_fraction": 0.0,
    "split_seed": 0,
    "labels_per_class": None,
    "subset_seed": 0,
    "crop": {
        "short_side": None,
        "eval_short_side": None,
        "size": None,
        "filter": "bilinear",
        "resize": "twice",
        "draft": None,
    },
    "augment": {"pad": 0, "flip": False},
    "on_corrupt": "raise",
    "streaming": False,
    "stream": {"buffer": 16, "held_in_memory": 100, "num_readers": None},
}
RANDOM_CROP = {**SETTINGS["crop"], "short_side": [40, 56], "eval_short_side": 36, "size": 32}


def photo(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    """A picture with edges, slopes and grain, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    grain = rng.normal(0, 6, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def claimed_png(width: int, height: int) -> bytes:
    """A PNG of some dozen bytes that says it has so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(100)))


def class_folders(root: Path, classes: Sequence[str], n: int, *, split: str = "train", seed: int = 0) -> Path:
    """`root/split/class/i.jpg`, n of each class; returns root."""
    for c, name in enumerate(classes):
        folder = root / split / name if split else root / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(n):
            (folder / f"{i}.jpg").write_bytes(encoded(photo(seed + 100 * c + i)))
    return root


class Shop:
    """Opens what a test made, with one cache for all of it."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def __call__(self, path: Path | str | None, **changed: Any) -> Images:
        settings = {**SETTINGS, **changed, "path": None if path is None else str(path)}
        images: Images = checked_partial({"_target_": "igpt.data.images.Images", **settings}, "data")(cache=self.cache)
        return images


@pytest.fixture
def images(tmp_path: Path) -> Shop:
    return Shop(tmp_path / "cache")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of ten photographs of 64×48."""
    return class_folders(tmp_path_factory.mktemp("photos"), ["cat", "dog"], 10)


def tar_shards(folder: Path, sizes: Sequence[int], *, first: int = 0) -> list[Path]:
    """WebDataset shards of so many photographs each, with classes 0, 1, 2 in turn: `folder/web-000.tar`, …"""
    folder.mkdir(parents=True, exist_ok=True)
    paths, result = [], first
    for shard, size in enumerate(sizes):
        paths.append(folder / f"web-{shard:03}.tar")
        with tarfile.open(paths[-1], "w") as tar:
            for number in range(result, result + size):
                for ending, data in (("jpg", encoded(photo(number))), ("cls", str(number % 3).encode())):
                    member = tarfile.TarInfo(f"{number:05}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        result += size
    return paths


def parquet_shards(folder: Path, sizes: Sequence[int], *, first: int = 0) -> list[Path]:
    """The same as parquet files in small row groups: `folder/train-0.parquet`, …"""
    folder.mkdir(parents=True, exist_ok=True)
    paths, result = [], first
    for shard, size in enumerate(sizes):
        numbers = range(result, result + size)
        cells = [{"bytes": encoded(photo(number)), "path": None} for number in numbers]
        table = pa.table({"image": cells, "label": [number % 3 for number in numbers]})
        paths.append(folder / f"train-{shard}.parquet")
        pq.write_table(table, paths[-1], row_group_size=4)
        result += size
    return paths


def mixture(folder: Path, *, num_readers: int | None, buffer: int = 16, **changed: Any) -> Mixture:
    """3 tar shards of 23 photographs and 2 parquet files of 15, as one stream; the first call writes them."""
    if not folder.exists():
        tar_shards(folder / "tar", [7, 11, 5])
        parquet_shards(folder / "parquet", [6, 9], first=23)
    settings = {key: value for key, value in SETTINGS.items() if key != "name"}
    settings |= {"streaming": True, "val_fraction": 0.0, "image_column": ["image", "jpg"], "label_column": ["cls"]}
    full: dict[str, Any] = {
        "weights": {"web": 3, "photos": 1.5},
        "held_out": "photos",
        "resolution": 8,
        "streams": {
            name: {"_target_": "igpt.data.images.Images", "_partial_": True, **settings, "path": str(folder / place)}
            for name, place in (("web", "tar"), ("photos", "parquet"))
        },
        "stream": {"buffer": buffer, "num_readers": num_readers},
    }
    spec = {"_target_": "igpt.data.mixture.Mixture", "name": "mixed", **full, **changed}
    result: Mixture = checked_partial(spec, "data")(cache=folder / "cache")
    return result
