"""What is read of a folder and what is not, one case each; `test_layouts.py` makes up more."""

import json
import logging
import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from igpt.data import parquet_files
from igpt.data.image_decoding import BadImageError
from igpt.data.listing import hash_files, list_files
from igpt.data.shards import BadShardError, expand_shard_path
from igpt.data.stream import ImageStream
from tests.data.conftest import Shop, class_folders
from tests.data.local_files import everything, labels, write
from tests.data.test_images import row, stored

# Splits and classes.


def test_cifar100_as_folders(images: Shop, tmp_path: Path) -> None:
    """It has a class called train; test images do not train."""
    for split in ("train", "test"):
        class_folders(tmp_path, ["apple", "train", "trout"], 3, split=split, seed=len(split))
    source = images(tmp_path, n_class=3, val_fraction=0.0)
    assert everything(source) == {"train": 9, "val": 0, "test": 9}
    assert source.class_names == ("apple", "train", "trout")
    assert labels(source, "test") == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_folders_that_may_be_splits_or_classes(images: Shop, tmp_path: Path) -> None:
    """They are not guessed: `layout` says what they are, and both answers are read."""
    class_folders(tmp_path, ["train", "car", "bus"], 2, split="")
    with pytest.raises(ValueError, match=r"train/ is called as a split, bus/ beside it is not: data\.layout=classes"):
        images(tmp_path)
    assert images(tmp_path, layout="classes", n_class=3).class_names == ("bus", "car", "train")
    assert everything(images(tmp_path, layout="splits", val_fraction=0.0)) == {"train": 2, "val": 0, "test": 0}
    with pytest.raises(ValueError, match=r"data\.layout must be one of auto, splits, classes, got 'guess'"):
        images(tmp_path, layout="guess")


def test_splits_that_are_named_in_the_settings(images: Shop, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class_folders(tmp_path, ["a", "b"], 2, split="fit")
    class_folders(tmp_path, ["a", "b"], 3, split="rest")
    source = images(tmp_path, splits={"train": ["fit"], "val": [], "test": ["rest"]}, val_fraction=0.0, n_class=2)
    assert everything(source) == {"train": 4, "val": 0, "test": 6}
    images(tmp_path, splits={"train": ["fit"], "val": [], "test": []}, val_fraction=0.0)
    assert "6 files below" in caplog.text
    assert "are of no split and are not read, as rest/a/0.jpg" in caplog.text


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("data/train/a", "data/test/a"), r"a folder called test/ lies below data/, .*: data\.path=.*/data"),
        (("train/a", "val/a", "dev/a"), r"dev/ and val/ are both the split validation"),
        (("val/a", "test/a"), r"has the splits test, validation, none called train"),
    ],
)
def test_splits_that_are_not_clear(images: Shop, tmp_path: Path, folders: Sequence[str], message: str) -> None:
    for folder in folders:
        write(tmp_path / folder / "0.png")
    with pytest.raises(ValueError, match=message):
        images(tmp_path)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (("a-0.parquet", "b-1.parquet"), {"train": 2}),
        (("train_0.parquet", "test.parquet"), {"train": 1, "test": 1}),
        (("x/0.parquet", "train.parquet"), "of which split x/0.parquet is"),
        (("cifar_train.parquet", "cifar_test.parquet"), "not clear of which split cifar_t"),
        (("cifar_train.parquet",), {"train": 1}),
        (("fit-0-of-2.parquet", "rest-0-of-2.parquet"), "has the splits fit, rest, none called train"),
    ],
)
def test_splits_of_shards(images: Shop, tmp_path: Path, files: Sequence[str], found: dict[str, int] | str) -> None:
    """By the first folder, or by how the name begins; `cifar_test.parquet` is no training file."""
    for i, name in enumerate(files):
        stored(tmp_path / name, [row(i, 0)])
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            images(tmp_path, val_fraction=0.0)
    else:
        assert everything(images(tmp_path, val_fraction=0.0)) == {"train": 0, "val": 0, "test": 0} | found


def test_folders_below_classes(images: Shop, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`cat/2019/x` is a cat, which is said; where the first folders cannot be the classes, it is refused."""
    for name in ("cat/2019/0.png", "dog/2020/0.png", "dog/1.png"):
        write(tmp_path / "pets" / name)
    source = images(tmp_path / "pets", n_class=2, val_fraction=0.0)
    assert source.class_names == ("cat", "dog")
    assert labels(source) == [0, 1, 1]
    assert "as cat/2019/0.png: the first folders are 2 classes: cat, dog" in caplog.text
    with pytest.raises(ValueError, match=r"the first folders would be 1 class: pets; data\.n_class=2"):
        images(tmp_path, n_class=2)


def test_an_image_of_no_class_is_named(images: Shop, tmp_path: Path) -> None:
    class_folders(tmp_path, ["a", "b"], 2, split="")
    write(tmp_path / "preview.png")
    with pytest.raises(ValueError, match=r"preview\.png lies in no class folder \(1 of 5 images\)"):
        images(tmp_path, n_class=2)
    assert labels(images(tmp_path, val_fraction=0.0)) == [0, 0, 1, 1, -1]


def test_a_class_that_training_images_do_not_have(images: Shop, tmp_path: Path) -> None:
    class_folders(tmp_path, ["cow", "dog"], 2)
    class_folders(tmp_path, ["ant", "dog"], 2, split="val")
    with pytest.raises(ValueError, match="no training image is of the class 'ant'"):
        images(tmp_path, n_class=2)
    source = images(tmp_path)  # no labels are asked for: numbered behind the others
    assert source.class_names == ("cow", "dog", "ant")
    assert labels(source, "val") == [2, 2, 1, 1]


@pytest.mark.parametrize("streaming", [False, True])
def test_classes_in_another_order(images: Shop, tmp_path: Path, streaming: bool) -> None:
    """By hand: ClassLabel counts cat as 0 in one file and as 2 in others; a cat is a cat in all."""
    orders = {"train-0": ["cat", "cow", "dog"], "train-1": ["dog", "cow", "cat"], "test": ["dog", "cat", "cow"]}
    for i, (name, names) in enumerate(orders.items()):
        stored(tmp_path / f"{name}.parquet", [row(i, names.index("cat"))], names=names)
    source = images(tmp_path, n_class=3, val_fraction=0.0, streaming=streaming)
    assert source.class_names == ("cat", "cow", "dog")
    assert labels(source, "train") == [0, 0]
    assert labels(source, "test") == [0]
    stored(tmp_path / "test.parquet", [row(9, 0)], names=["zebra", "cat", "cow"])
    with pytest.raises(ValueError, match="no training image is of the class 'zebra'"):
        images(tmp_path, n_class=3, streaming=streaming).split("test")


def test_numbers_and_names_do_not_mix(images: Shop, tmp_path: Path) -> None:
    stored(tmp_path / "train.parquet", [row(0, 0)], names=["cat", "dog"])
    stored(tmp_path / "test.parquet", [row(1, 1)])
    with pytest.raises(ValueError, match="its classes are numbers, those of the training images are names"):
        images(tmp_path, n_class=2, val_fraction=0.0)


# Names.


def test_a_neighbour_is_not_read(images: Shop, tmp_path: Path) -> None:
    """`set[1]` and `set*` are folders, and no patterns that `set1` would fit; a pattern of shards still is one."""
    for name, n in (("set[1]", 2), ("set*", 3), ("set1", 9)):
        class_folders(tmp_path / name, ["a"], n, split="")
        for i in range(n):
            stored(tmp_path / name / "shards" / f"web-{i}.parquet", [row(i, 0)])
    for name, n in (("set[1]", 2), ("set*", 3)):
        assert everything(images(tmp_path / name / "a", val_fraction=0.0))["train"] == n
        shards = images(f"{tmp_path}/{name}/shards/web-*.parquet", val_fraction=0.0, streaming=True)
        assert len(shards.split("train")) == n
        assert len(expand_shard_path(f"{tmp_path}/{name}/shards/web-{{0..1}}.parquet") or ()) == 2


def test_links(images: Shop, tmp_path: Path) -> None:
    """A linked class or split is one as any other; a link in a circle ends; one to nothing is a bad image by name."""
    class_folders(tmp_path / "pool", ["x", "y"], 3, split="")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(tmp_path / "pool")
    (tmp_path / "pool" / "z").symlink_to(tmp_path / "pool" / "y")
    (tmp_path / "pool" / "y" / "round").symlink_to(tmp_path / "pool")
    source = images(tmp_path / "data", n_class=3, val_fraction=0.0)
    assert labels(source) == [0] * 3 + [1] * 3 + [2] * 3
    (tmp_path / "pool" / "x" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    split = images(tmp_path / "data", n_class=3, val_fraction=0.0).split("train")
    with pytest.raises(BadImageError, match=r"train/x/gone\.png: No such file"):
        split.prepare()
    skipped = images(tmp_path / "data", n_class=3, val_fraction=0.0, on_corrupt="skip")
    assert everything(skipped)["train"] == 9


def test_other_files_are_counted_and_change_nothing(
    images: Shop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Documents, videos, archives, lists and programs beside the images; an image format that is not read is said."""
    root = class_folders(tmp_path / "photos", ["cat", "dog"], 3, split="")
    before, sha = everything(images(root)), hash_files(root, list_files)
    for name in (
        "a.pdf",
        "b.mp4",
        "c.h5",
        "train.txt",
        "photos.py",
        "backup.zip",
        "cat/x.heic",
        "cat/y.HEIC",
        "LICENSE",
    ):
        (root / name).write_bytes(b"PK\3\4 cut short")
    (root / "metadata.csv").write_text("file_name,label\n")
    (root / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: /etc/*\n---\n")
    (root / "cat" / ".hidden.png").write_bytes(b"x")
    (root / "__MACOSX").mkdir()
    write(root / "__MACOSX" / "0.png")
    with caplog.at_level(logging.WARNING):
        assert everything(images(root)) == before
    assert "2 .heic" in caplog.text
    assert "1 without an ending" in caplog.text
    assert "1 .zip" in caplog.text
    lone = tmp_path / "lone"
    shutil.copytree(root, lone, ignore=shutil.ignore_patterns("*.jpg", "metadata.csv"))
    with pytest.raises(ValueError, match=r"there is no image in it, but 2 \.heic"):
        images(lone)
    (root / "metadata.csv").unlink()
    assert hash_files(root, list_files) == sha


def test_images_beside_shards(images: Shop, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Parquet files with images are read, and a preview beside them is not; parquet files without are not."""
    stored(tmp_path / "a" / "train.parquet", [row(0, 0), row(1, 0)])
    write(tmp_path / "a" / "assets" / "preview.png")
    assert everything(images(tmp_path / "a", val_fraction=0.0))["train"] == 2
    assert "1 .png" in caplog.text
    class_folders(tmp_path / "b", ["x", "y"], 3, split="")
    datasets.Dataset.from_dict({"feature": [0.5] * 6}).to_parquet(tmp_path / "b" / "features.parquet")
    with tarfile.open(tmp_path / "b" / "photos.tar", "w") as tar:
        tar.add(tmp_path / "b" / "x", "x")
    assert everything(images(tmp_path / "b", val_fraction=0.0))["train"] == 6
    assert "1 .parquet" in caplog.text


# Metadata beside the images.


@pytest.mark.parametrize(
    ("name", "lines", "expected"),
    [
        ("metadata.csv", ["file_name,label", "0.png,dog", "1.png,cat", "2.png,dog"], ([1, 0, 1], ("cat", "dog"))),
        ("metadata.csv", ["\ufefffile_name,label", "0.png,2", "1.png,0", "./2.png,1"], ([2, 0, 1], None)),
        ("metadata.jsonl", [json.dumps({"file_name": f"{i}.png", "label": i}) for i in range(3)], ([0, 1, 2], None)),
    ],
)
def test_labels_in_metadata(images: Shop, tmp_path: Path, name: str, lines: list[str], expected: Any) -> None:
    for i in range(3):
        write(tmp_path / f"{i}.png", seed=i)
    (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    source = images(tmp_path, val_fraction=0.0)
    assert (labels(source), source.class_names) == expected


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["file_name,label", "0.png,0"], r"1\.png has no line in the metadata"),
        (["file_name,label", "0.png,0", "1.png,1", "/etc/hostname,1"], r"line 4: '/etc/hostname' is no image below"),
        (["file_name,label", "0.png,0", "1.png,1", "../x.png,1"], r"'\.\./x\.png' is no image below"),
        (["file_name,label", "0.png,1", "1.png,2.5"], "label '2.5' is neither a whole number nor a name"),
        (["file_name,label", "0.png,1", "1.png,1", "0.png,0"], "line 4: '0.png' is '0' here and '1' elsewhere"),
        (["file_name,label", "0.png,1", f"1.png,{'9' * 30}"], "neither a whole number nor a name"),
    ],
)
def test_metadata_that_is_wrong(images: Shop, tmp_path: Path, lines: list[str], message: str) -> None:
    write(tmp_path / "x.png")
    for i in range(2):
        write(tmp_path / "data" / f"{i}.png", seed=i)
    (tmp_path / "data" / "metadata.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        images(tmp_path / "data", n_class=2)


def test_metadata_and_class_folders(images: Shop, tmp_path: Path) -> None:
    """Labels for some images of class folders contradict them; without the column, folders are classes."""
    class_folders(tmp_path, ["a", "b"], 2, split="")
    (tmp_path / "metadata.csv").write_text("file_name,label\na/0.jpg,1\n")
    with pytest.raises(ValueError, match=r"a metadata file gives labels, too: .*data\.label_column=\[\]"):
        images(tmp_path, n_class=2)
    assert labels(images(tmp_path, n_class=2, val_fraction=0.0, label_column=[])) == [0, 0, 1, 1]


# What a file may not do.


def test_a_readme_names_no_files(images: Shop, tmp_path: Path) -> None:
    """The front matter of a README.md beside parquet files, which `datasets` would follow."""
    stored(tmp_path / "other" / "train.parquet", [row(7, 0)] * 3)
    stored(tmp_path / "data" / "train.parquet", [row(1, 0)])
    readme = f"---\nconfigs:\n- config_name: default\n  data_files: {tmp_path}/other/*.parquet\n---\n"
    (tmp_path / "data" / "README.md").write_text(readme)
    for streaming in (False, True):
        assert len(images(tmp_path / "data", val_fraction=0.0, streaming=streaming).split("train")) == 1


def test_a_saved_dataset_names_no_other_files(images: Shop, tmp_path: Path) -> None:
    result = datasets.Dataset.from_list([row(i, i) for i in range(2)]).cast_column("image", datasets.Image())
    for name in ("mine", "other"):
        result.save_to_disk(tmp_path / name)
    assert len(images(tmp_path / "mine", val_fraction=0.0).split("train")) == 2
    state = json.loads((tmp_path / "mine" / "state.json").read_text())
    other = next((tmp_path / "other").glob("*.arrow"))
    for named in (str(other), f"../other/{other.name}"):
        state["_data_files"] = [{"filename": named}]
        (tmp_path / "mine" / "state.json").write_text(json.dumps(state))
        with pytest.raises(ValueError, match="which is not a file beside it"):
            images(tmp_path / "mine")


@pytest.mark.parametrize("name", ["x.parquet", "x.tar", "x.png", "metadata.csv"])
def test_a_pipe_is_no_file(images: Shop, tmp_path: Path, name: str) -> None:
    """A named pipe, from which a read would wait for ever, under every kind of name."""
    if name in ("x.png", "metadata.csv"):
        write(tmp_path / "good.png")
    os.mkfifo(tmp_path / name)
    if name == "metadata.csv":
        assert everything(images(tmp_path, val_fraction=0.0))["train"] == 1
        return
    with pytest.raises(ValueError, match="it is no regular file"):
        images(tmp_path, val_fraction=0.0).split("train").read([1], [0])


# What went wrong once.


def test_folders_that_link_to_nothing(images: Shop, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A class or a split on a disk that is not there is not passed over in silence."""
    class_folders(tmp_path, ["a", "b"], 2)
    (tmp_path / "train" / "c").symlink_to("/nowhere/c")
    with pytest.raises(ValueError, match=r"train/c is a link to nothing .*: mend or remove it"):
        images(tmp_path)
    assert everything(images(tmp_path, val_fraction=0.0, on_corrupt="skip"))["train"] == 4
    assert "train/c is a link to nothing" in caplog.text
    (tmp_path / "train" / "c").unlink()
    (tmp_path / "test").symlink_to("/nowhere/test")
    with pytest.raises(ValueError, match="test is a link to nothing"):
        images(tmp_path)


def test_folders_that_all_link_to_one_another(tmp_path: Path) -> None:
    """Listing ends: their files would be read as often as there are ways through them."""
    for name in "abcdefgh":
        write(tmp_path / name / "x.png")
        for other in "abcdefgh":
            if other != name:
                (tmp_path / name / other).symlink_to(tmp_path / other)
    with pytest.raises(ValueError, match="links lead to this folder by more than 64 ways"):
        list_files(tmp_path)


def test_a_copy_without_a_file_is_not_kept(
    images: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: what could not be read once is read when it can; without `skip` it ends the run."""
    for i in range(2):
        stored(tmp_path / f"train-{i}.parquet", [row(2 * i, 0), row(2 * i + 1, 1)])
    batches = parquet_files.ParquetShards.read

    def broken(self: Any, number: int, start: int) -> Any:
        for i, *rest in batches(self, number, start):
            if (number, i) == (1, 1):
                raise BadShardError("train-1.parquet cannot be read after 1 images: Input/output error")
            yield i, *rest

    with monkeypatch.context() as patch:
        patch.setattr(parquet_files.ParquetShards, "read", broken)
        with pytest.raises(BadShardError, match=r"Input/output error; data\.on_corrupt=skip leaves out"):
            images(tmp_path, val_fraction=0.0)
        assert everything(images(tmp_path, val_fraction=0.0, on_corrupt="skip"))["train"] == 3
    assert "what is left of it is left out" in caplog.text
    for on_corrupt in ("skip", "raise"):
        assert everything(images(tmp_path, val_fraction=0.0, on_corrupt=on_corrupt))["train"] == 4
    (copy,) = [path for path in (images.cache / "parquet").glob("*.arrow") if "partial" not in path.name]
    copy.write_bytes(b"damaged")
    (copy.parent / f".{copy.stem}.partial.arrow.x.part").write_bytes(b"of a kill")
    assert everything(images(tmp_path, val_fraction=0.0))["train"] == 4
    assert not list(copy.parent.glob("*.part"))


def test_splits_that_are_not_asked_for_are_not_opened(images: Shop, tmp_path: Path) -> None:
    stored(tmp_path / "train-00000-of-00001.parquet", [row(0, 0)])
    (tmp_path / "unlabeled-00000-of-00001.parquet").write_bytes(b"damaged")
    assert everything(images(tmp_path, val_fraction=0.0))["train"] == 1
    assert len(list((images.cache / "parquet").glob("*.arrow"))) == 1


def test_a_stray_record_of_something_else(images: Shop, tmp_path: Path) -> None:
    """A state.json without .arrow files beside it is no saved dataset."""
    class_folders(tmp_path, ["a", "b"], 2, split="")
    (tmp_path / "state.json").write_text("{}")
    assert everything(images(tmp_path, val_fraction=0.0))["train"] == 4


def test_arrays_beside_images_do_not_make_another_run(tmp_path: Path) -> None:
    write(tmp_path / "0.png")
    before = hash_files(tmp_path, list_files)
    np.save(tmp_path / "features.npy", np.zeros(3))
    assert hash_files(tmp_path, list_files) == before


def test_a_stream_of_a_folder_reads_its_files_once(images: Shop, tmp_path: Path) -> None:
    """More files than shards: consecutive ones are one shard, and each is read once."""
    from igpt.data import image_files

    class_folders(tmp_path, ["a", "b"], 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_files, "_MOST_SHARDS", 4)
        training = images(tmp_path, val_fraction=0.0, streaming=True).training()
        assert isinstance(training, ImageStream)
        assert training.contents == {"made": 4}
        records = [record.place for record, _ in training.make_reader(0, 1, 0).iterate_epoch(training.initial_state())]
    assert sorted(records) == [str(path) for path in sorted((tmp_path / "train").rglob("*.jpg"))]


def test_a_folder_that_is_full_of_links_in_circles(tmp_path: Path) -> None:
    """Invariant: listing ends, and every file is listed once under each name it has."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    Image.new("RGB", (1, 1)).save(tmp_path / "a" / "b" / "x.png")
    for name in ("a/up", "a/b/top", "a/b/here"):
        (tmp_path / name).symlink_to(tmp_path / {"a/up": ".", "a/b/top": "a", "a/b/here": "a/b"}[name])
    assert list_files(tmp_path).names == ["a/b/x.png"]
