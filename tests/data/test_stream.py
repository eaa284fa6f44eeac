"""Streams."""

from pathlib import Path

import numpy as np
import pytest

from igpt.data.decode import BadImageError
from igpt.data.source import Stream
from igpt.data.stream import ImageStream, hashed
from tests.data.conftest import RANDOM_CROP, SETTINGS, Shop, class_folders


def stream(source: object) -> ImageStream:
    assert isinstance(source, ImageStream)
    assert isinstance(source, Stream)
    return source


def test_a_pass_holds_every_image_once_and_passes_differ(images: Shop, folder: Path) -> None:
    """Invariant: the same order for the same seed and epoch; train and what is held out are all of them."""
    source = images(folder, streaming=True)
    training = stream(source.training())
    passes = [[record.place for record in training.records(seed, epoch)] for seed, epoch in ((1, 0), (1, 0), (1, 1))]
    assert passes[0] == passes[1] != passes[2]
    assert sorted(passes[0]) == sorted(passes[2])
    files = sorted((folder / "train").rglob("*.jpg"))
    held = [str(f) for f in files if hashed(f.read_bytes(), 0) < SETTINGS["val_fraction"]]
    assert 0 < len(held) < 20
    assert sorted([*passes[0], *held]) == [str(f) for f in files]
    assert len(source.split("val")) == len(held)


def test_it_reads_what_a_copy_would(images: Shop, folder: Path) -> None:
    """Invariant: pixels, labels and random crops of a stream are those of the same file read as a table."""
    table = images(folder, crop=RANDOM_CROP, val_fraction=0.0).training()
    training = stream(images(folder, crop=RANDOM_CROP, val_fraction=0.0, streaming=True).training())
    records = list(training.records(0, 0))
    names = [str(f) for f in sorted((folder / "train").rglob("*.jpg"))]
    rows = [names.index(record.place) for record in records]
    streamed, read = training.read(records, list(range(20))), table.read(rows, list(range(20)))
    assert np.array_equal(streamed.pixels, read.pixels)
    assert np.array_equal(streamed.labels, read.labels)


def test_only_so_many_are_kept(images: Shop, folder: Path) -> None:
    source = images(folder, streaming=True, stream={"buffer": 4, "held": 7})
    assert len(source.split("train")) == 7
    assert len(source.split("test")) == 0
    assert source.split("train") is source.split("train")


def test_corrupt_images(images: Shop, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A corrupt image ends the run by its name, or is left out of every pass, and how many is said."""
    root = class_folders(tmp_path / "photos", ["a", "b"], 3)
    (root / "train" / "b" / "1.jpg").write_bytes(b"nothing")
    strict = stream(images(root, streaming=True, val_fraction=0.0).training())
    with pytest.raises(BadImageError, match=r"b/1.jpg: its 7 bytes"):
        strict.read(list(strict.records(0, 0)), list(range(6)))
    lenient = stream(images(root, streaming=True, val_fraction=0.0, on_corrupt="skip").training())
    records = sorted(lenient.records(0, 0))
    assert lenient.read(records, [0] * 5).labels.tolist() == [0, 0, 0, 1, 1]
    assert "1 images of" in caplog.text


def test_what_a_stream_cannot(images: Shop, folder: Path) -> None:
    with pytest.raises(ValueError, match="which a stream cannot"):
        images(folder, streaming=True, labels_per_class=2)
    with pytest.raises(ValueError, match="are 1 or more"):
        images(folder, streaming=True, stream={"buffer": 0, "held": 5})
    with pytest.raises(ValueError, match="is no wnid"):
        next(stream(images(folder, streaming=True, classes="imagenet", n_class=1000).training()).records(0, 0))
