"""Made-up layouts: whatever folders, files and classes are called, what is read is exactly what is there.

`LAYOUTS=200 python -m pytest tests/data/test_layouts.py` makes so many; the suite 15.
"""

import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pytest
from PIL import Image

from igpt.data.images import Images
from igpt.data.layout import SPLIT_NAMES
from igpt.data.source import Source
from igpt.data.stream import ImageStream
from tests.data.conftest import Shop, encoded

CLASSES = (
    "train", "test", "val", "eval", "dev", "validation", "train-track", "test_tube", "bullet train", "mytest",
    "valid.1", "set[1]", "set1", "a*b", "what?", "a b", " blank", "Süß 写真", "$HOME", "~", "x\ny", "-rf",
    "a=b", "c,d", "{0..1}", "__x", "a::b", "%20", "#1", "0001", "cat", "Dog", "images", "data", "2019", "n01440764",
    "'", '"', "x.jpg", "é", "re\u0301",
)  # fmt: skip
SPLITS = {"train": ("train", "training", "Train"), "val": ("val", "valid", "dev", "Validation"),
          "test": ("test", "testing", "TEST", "eval")}  # fmt: skip
ROOTS = ("set[1]", "photos*", "wh?t", "$HOME", "two words", "ünï", "line\nend", "train", "test.d", "a=b", "~", "x::y")
NEIGHBOURS = ("set1", "photosX", "what")
ENDINGS = (".png", ".PNG", ".bmp", ".ppm", ".tif", ".webp")
OTHERS = (
    "README.md",
    "train.txt",
    "notes.pdf",
    "clip.mp4",
    "labels.csv",
    "x.py",
    ".hidden.png",
    "backup.zip",
    "metadata.csv",
)


class Made(NamedTuple):
    """One image: its 8×8 pixels, its class, the split it is in (None: there are none), the folder of both."""

    pixels: np.ndarray
    name: str
    split: str | None
    folder: str


def make_layout(seed: int) -> tuple[np.random.Generator, str, list[Made]]:
    """A root's name, and images of some classes in some splits."""
    rng = np.random.default_rng(seed)
    known: dict[str, str] = {}
    for name in rng.permutation(CLASSES)[: rng.integers(2, 6)].tolist():
        known.setdefault(name.strip().lower(), name)
    splits = [("train", str(rng.choice(SPLITS["train"])))] if rng.random() < 0.7 else []
    splits += [(split, str(rng.choice(SPLITS[split]))) for split in ("val", "test") if splits and rng.random() < 0.6]
    result = []
    for split, folder in splits or [(None, "")]:
        for name in known.values():
            for _ in range(rng.integers(2, 4)):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                result.append(Made(pixels, name, split, os.path.join(folder, name)))
    return rng, str(rng.choice(ROOTS)), result


def write_folder(rng: np.random.Generator, root: Path, made: Sequence[Made]) -> None:
    """Image files in class folders, some of them behind links, with other files among them."""
    elsewhere = root.parent / "elsewhere"
    elsewhere.mkdir(parents=True)
    for name in NEIGHBOURS:
        (root.parent / name).mkdir()
        Image.new("RGB", (8, 8), (1, 2, 3)).save(root.parent / name / "neighbour.png")
    for i, image in enumerate(made):
        folder = root / image.folder
        if not folder.exists() and rng.random() < 0.2:
            folder.parent.mkdir(parents=True, exist_ok=True)
            (elsewhere / f"folder {i}").mkdir()
            folder.symlink_to(elsewhere / f"folder {i}")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{rng.choice(['test_', 'train-', 'valid.', '[1]', 'x*', ''])}{i}{rng.choice(ENDINGS)}"
        target = elsewhere / f"image {i}{path.suffix}" if rng.random() < 0.2 else path
        options = {"lossless": True, "exact": True} if path.suffix == ".webp" else {}
        Image.fromarray(image.pixels).save(target, **options)
        if target != path:
            path.symlink_to(target)
    folders = sorted({root, *(root / image.folder for image in made)})
    for name in rng.choice(OTHERS, 4, replace=False).tolist():
        (folders[rng.integers(len(folders))] / name).write_bytes(
            b"file_name,label\n" if name == "metadata.csv" else b"x"
        )
    if rng.random() < 0.5:
        (folders[-1] / "loop").symlink_to(root)


def by_split(made: Iterable[Made]) -> dict[str, list[Made]]:
    by_name: dict[str, list[Made]] = {}
    for image in made:
        by_name.setdefault(image.split or "train", []).append(image)
    return by_name


def write_parquet(rng: np.random.Generator, root: Path, made: Sequence[Made]) -> None:
    """The same images, in two files a split; each file counts the classes in an order of its own."""
    for split, images in by_split(made).items():
        for part in range(2):
            names = sorted({image.name for image in made})
            if split != "train" or part:
                rng.shuffle(names)
            features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
            rows = [
                {"image": {"bytes": encoded(Image.fromarray(image.pixels), "PNG"), "path": None},
                 "label": names.index(image.name)}
                for image in images[part::2]
            ]  # fmt: skip
            word = SPLITS[split][0] if split != "val" else "validation"
            where = root / (f"{word}/{part}.parquet" if len(made) % 2 else f"data/{word}-0000{part}-of-00002.parquet")
            where.parent.mkdir(parents=True, exist_ok=True)
            with where.open("wb") as file:
                datasets.Dataset.from_list(rows, features=features).to_parquet(file)


def write_tar(root: Path, made: Sequence[Made], names: Sequence[str]) -> None:
    """The same images, in two files a split; labels are numbers, as `names` count."""
    for split, images in by_split(made).items():
        for part in range(2):
            where = root / f"{split}-{part}.tar"
            where.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(where, "w") as tar:
                for i, image in enumerate(images[part::2]):
                    data = encoded(Image.fromarray(image.pixels), "PNG")
                    for ending, content in (
                        ("png", data),
                        ("cls", str(names.index(image.name)).encode()),
                        ("json", b"{}"),
                    ):
                        member = tarfile.TarInfo(f"{'train/' if i % 2 else 'test-'}{i}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))


Read = Counter[tuple[bytes, str]]


def read_split(source: Source, split: str, names: Sequence[str]) -> Read:
    of = source.split(split)
    pixels, labels = of.read(range(len(of)), [0] * len(of))
    assert np.array_equal(labels, of.labels)
    return Counter((one.tobytes(), names[label]) for one, label in zip(pixels, labels.tolist(), strict=True))


def read_stream(source: Source, names: Sequence[str]) -> Read:
    images = source.training()
    assert isinstance(images, ImageStream)
    records = [record for record, _ in images.make_reader(0, 1, 0).iterate_epoch(images.initial_state())]
    pixels, labels = images.read(records, [0] * len(records)) if records else (np.empty((0, 8, 8, 3)), np.empty(0, int))
    return Counter((one.tobytes(), names[label]) for one, label in zip(pixels, labels.tolist(), strict=True))


def check_source(source: Source, made: Sequence[Made], names: Sequence[str], *, stream: bool) -> None:
    """The splits are disjoint, their union is what was made, and every image has its class."""
    assert source.n_class == len(names)
    expected = {
        split: Counter((image.pixels.tobytes(), image.name) for image in images)
        for split, images in by_split(made).items()
    }
    by_name = {split: read_split(source, split, names) for split in ("train", "val", "test")}
    if stream:
        by_name["train"] = read_stream(source, names)
    if "val" not in expected:
        assert not by_name["train"] & by_name["val"]
        by_name["train"] += by_name.pop("val")
    assert by_name == {**{split: Counter() for split in by_name}, **expected}


@pytest.mark.parametrize("seed", range(int(os.environ.get("LAYOUTS", "15"))))
def test_what_is_read_is_what_is_there(seed: int, tmp_path: Path) -> None:
    """Invariant: folder, parquet and tar, at once or as streams, give the same images with the classes of their
    folders, each in one split."""
    rng, name, result = make_layout(seed)
    names = sorted({image.name for image in result})
    images = Shop(tmp_path / "cache")
    for kind in ("folder", "parquet", "tar"):
        root = tmp_path / kind / name
        write_folder(rng, root, result) if kind == "folder" else None
        write_parquet(rng, root, result) if kind == "parquet" else None
        write_tar(root, result, names) if kind == "tar" else None
        flat = result[0].split is None and any(image.name.lower() in SPLIT_NAMES for image in result)
        settings: dict[str, Any] = {
            "n_class": len(names),
            "layout": "classes" if flat and kind == "folder" else "auto",
            "image_column": ["image", "png"],
            "label_column": ["label", "cls"],
        }
        for streaming in (False, True):
            source = images(root, streaming=streaming, **settings)
            assert isinstance(source, Images)
            assert source.class_names == (None if kind == "tar" else tuple(names))
            check_source(source, result, names, stream=streaming)
