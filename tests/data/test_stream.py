"""Streams."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from igpt.data.image_decoding import BadImageError
from igpt.data.shards import BadShardError, expand_shard_path
from igpt.data.source import Stream
from igpt.data.stream import ImageStream, Record, hash_to_unit_interval
from tests.data.conftest import RANDOM_CROP, SETTINGS, Shop, class_folders, mixture, parquet_shards, tar_shards


def stream(source: object) -> ImageStream:
    assert isinstance(source, ImageStream)
    assert isinstance(source, Stream)
    return source


def one_pass(images: object, seed: int = 0, epoch: int = 0) -> list[Record]:
    found = stream(images).make_reader(0, 1, seed).iterate_epoch(stream(images).initial_state()._replace(epoch=epoch))
    return [record for record, _ in found]


def test_a_pass_holds_every_image_once_and_passes_differ(images: Shop, folder: Path) -> None:
    """Invariant: the same order for the same seed and epoch; train and what is held out are all of them."""
    source = images(folder, streaming=True)
    training = stream(source.training())
    passes = [[record.place for record in one_pass(training, seed, epoch)] for seed, epoch in ((1, 0), (1, 0), (1, 1))]
    assert passes[0] == passes[1] != passes[2]
    assert sorted(passes[0]) == sorted(passes[2])
    files = sorted((folder / "train").rglob("*.jpg"))
    held = [str(f) for f in files if hash_to_unit_interval(f.read_bytes(), 0) < SETTINGS["val_fraction"]]
    assert 0 < len(held) < 20
    assert sorted([*passes[0], *held]) == [str(f) for f in files]
    assert len(source.split("val")) == len(held)


def test_it_reads_what_a_copy_would(images: Shop, folder: Path) -> None:
    """Invariant: pixels, labels and random crops of a stream are those of the same file read as a table."""
    table = images(folder, crop=RANDOM_CROP, val_fraction=0.0).training()
    training = stream(images(folder, crop=RANDOM_CROP, val_fraction=0.0, streaming=True).training())
    records = one_pass(training)
    names = [str(f) for f in sorted((folder / "train").rglob("*.jpg"))]
    rows = [names.index(record.place) for record in records]
    streamed, read = training.read(records, list(range(20))), table.read(rows, list(range(20)))
    assert np.array_equal(streamed.pixels, read.pixels)
    assert np.array_equal(streamed.labels, read.labels)


def test_only_so_many_are_kept(images: Shop, folder: Path) -> None:
    source = images(folder, streaming=True, stream={"buffer": 4, "held_in_memory": 7, "num_readers": None})
    assert len(source.split("train")) == 7
    assert len(source.split("test")) == 0
    assert source.split("train") is source.split("train")


def test_corrupt_images(images: Shop, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A corrupt image ends the run by its name, or is left out of every pass, and how many is said."""
    root = class_folders(tmp_path / "photos", ["a", "b"], 3)
    (root / "train" / "b" / "1.jpg").write_bytes(b"nothing")
    assert images(root, streaming=True, n_class=2).class_names == ("a", "b")
    strict = stream(images(root, streaming=True, val_fraction=0.0).training())
    with pytest.raises(BadImageError, match=r"b/1.jpg: its 7 bytes"):
        strict.read(one_pass(strict), list(range(6)))
    lenient = stream(images(root, streaming=True, val_fraction=0.0, on_corrupt="skip").training())
    records = sorted(one_pass(lenient))
    assert lenient.read(records, [0] * 5).labels.tolist() == [0, 0, 0, 1, 1]
    assert "1 images and 0 shards of" in caplog.text


def test_what_a_stream_cannot(images: Shop, folder: Path) -> None:
    with pytest.raises(ValueError, match="which a stream cannot"):
        images(folder, streaming=True, labels_per_class=2)
    with pytest.raises(ValueError, match=r"must be at least 1, got 0"):
        images(folder, streaming=True, stream={"buffer": 0, "held_in_memory": 5, "num_readers": None})
    with pytest.raises(ValueError, match="is no wnid"):
        one_pass(images(folder, streaming=True, classes="imagenet", n_class=1000).training())


TAR: dict[str, Any] = {"streaming": True, "image_column": ["jpg"], "label_column": ["cls"], "val_fraction": 0.0}


def test_names_of_shards(tmp_path: Path) -> None:
    assert expand_shard_path("/a/web-{008..011}.tar") == [f"/a/web-{n}.tar" for n in ("008", "009", "010", "011")]
    assert expand_shard_path("https://a.b/{x,y}/{0..1}.parquet") == [
        f"https://a.b/{part}/{n}.parquet" for part in "xy" for n in (0, 1)
    ]
    assert expand_shard_path("imagenet-1k") is None
    result = tar_shards(tmp_path, [1, 1])
    assert expand_shard_path(f"{tmp_path}/*.tar") == [str(path) for path in result]


def test_tar_and_parquet_shards_hold_the_same_images(images: Shop, tmp_path: Path) -> None:
    """Invariant: pixels and labels of one set of photographs, as a folder of either kind or by name."""
    tar_shards(tmp_path / "tar", [3, 2])
    parquet_shards(tmp_path / "parquet", [4, 1])
    both = {**TAR, "image_column": ["image", "jpg"], "label_column": ["cls", "label"]}
    read = []
    for path in (tmp_path / "tar", f"{tmp_path}/tar/web-{{000..001}}.tar", tmp_path / "parquet"):
        training = stream(images(path, **both).training())
        records = sorted(one_pass(training), key=lambda record: record.digest)
        read.append(training.read(records, [0] * 5))
    for one in read[1:]:
        assert np.array_equal(one.pixels, read[0].pixels)
        assert np.array_equal(one.labels, read[0].labels)
    assert sorted(read[0].labels) == [0, 0, 1, 1, 2]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server on this machine that has two shards."""
    folder = tmp_path_factory.mktemp("served")
    tar_shards(folder, [3, 2])

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_shards_elsewhere(images: Shop, served: str) -> None:
    """All images of a server's shards; a shard it does not have is named, or left out and counted."""
    there = stream(images(f"{served}/web-{{000..001}}.tar", **TAR).training())
    assert len({record.digest for record in one_pass(there)}) == 5
    lacking = f"{served}/web-{{000..002}}.tar"
    with pytest.raises(BadShardError, match=r"web-002\.tar cannot be read .*data\.on_corrupt=skip"):
        images(lacking, **TAR)
    assert len(one_pass(images(lacking, **TAR, on_corrupt="skip").training())) == 5


def test_shards_that_cannot_be_read(images: Shop, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Missing, empty or of another kind: named before anything starts. Cut short: by its name when it is read."""
    good = tar_shards(tmp_path / "tar", [3, 2, 4])
    where = f"{tmp_path}/tar/web-{{000..003}}.tar"
    with pytest.raises(BadShardError, match=r"web-003\.tar cannot be read \(No such file"):
        images(where, **TAR)
    (tmp_path / "tar" / "web-003.tar").write_bytes(b"")
    with pytest.raises(BadShardError, match=r"web-003\.tar is no tar file"):
        images(tmp_path / "tar", **TAR)
    assert len(one_pass(images(tmp_path / "tar", **TAR, on_corrupt="skip").training())) == 9
    assert "1 of 4 shards of" in caplog.text
    good[2].write_bytes(good[2].read_bytes()[:4000])  # in the middle of the second image
    with pytest.raises(BadShardError, match=r"web-002\.tar cannot be read after 1 images"):
        one_pass(images(where.replace("003", "002"), **TAR).training())
    assert len(one_pass(images(tmp_path / "tar", **TAR, on_corrupt="skip").training())) == 6
    assert "0 images and 1 shards of" in caplog.text
    (parquet,) = parquet_shards(tmp_path / "parquet", [3])
    parquet.write_bytes(parquet.read_bytes()[:-9])
    with pytest.raises(BadShardError, match=r"train-0\.parquet is no parquet file, or is cut short"):
        images(tmp_path / "parquet", streaming=True)
    with pytest.raises(ValueError, match="none of its 1 shards can be read"):
        images(tmp_path / "parquet", streaming=True, on_corrupt="skip")
    with pytest.raises(ValueError, match=r"holds \.tar and \.parquet files"):
        images(tmp_path, **TAR)
    with pytest.raises(ValueError, match="names shards, which are read in turn"):
        images(where, **{**TAR, "streaming": False})
    with pytest.raises(ValueError, match="there is no such file"):
        images(f"{tmp_path}/none-*.tar", **TAR)


def test_a_mixture(tmp_path: Path) -> None:
    """Invariant: all of both once a pass; each is cut as its own settings say; val is that of one of them."""
    mixed = mixture(tmp_path / "shards", num_readers=1)
    records = one_pass(mixed.training())
    assert len({record.digest for record in records}) == 38
    assert {record.part for record in records} == {"web", "photos"}
    assert mixed.split("train").labels.tolist() == [-1] * 15
    assert mixed.class_names is None
    without = mixture(tmp_path / "shards", num_readers=1, weights={"web": 0, "photos": 1})
    assert {record.part for record in one_pass(without.training())} == {"photos"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights": {"web": 0, "photos": 0}}, "not all of them 0"),
        ({"weights": {"web": -1, "photos": 2}}, "at least 0"),
        ({"weights": {"web": float("nan"), "photos": 2}}, "a finite number, got nan"),
        ({"weights": {"web": 1}}, r"data\.weights is of web, the streams are web, photos"),
        ({"held_out": "other"}, "none of the streams web, photos"),
        ({"resolution": 16}, r"data\.streams\.web\.resolution is 8, data\.resolution 16"),
    ],
)
def test_mixtures_that_are_none(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture(tmp_path / "shards", num_readers=1, **changed)
