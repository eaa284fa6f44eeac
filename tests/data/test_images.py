"""Datasets as people have them, and everything that can be wrong with them."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetNotFoundError
from PIL import Image

from igpt.data.classes import CIFAR10
from igpt.data.image_decoding import BadImageError
from igpt.data.image_splits import CachedSplit, DecodedSplit
from tests.data.conftest import RANDOM_CROP, SETTINGS, Shop, class_folders, encoded, photo


def stored(path: Path, rows: list[dict[str, Any]], names: list[str] | None = None, column: str = "label") -> Path:
    """A parquet file as the Hub's copies are: encoded images and class labels."""
    features = datasets.Features(
        {"image": datasets.Image(), column: datasets.ClassLabel(names=names) if names else datasets.Value("int64")}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    return path


def row(seed: int, label: int, size: tuple[int, int] = (8, 8)) -> dict[str, Any]:
    return {"image": {"bytes": encoded(photo(seed, *size), "PNG"), "path": None}, "label": label}


def test_class_folders(images: Shop, folder: Path) -> None:
    """By hand: twenty images of two classes, a quarter held out; a known image is its file, cut and averaged."""
    source = images(folder)
    train, val = source.split("train"), source.split("val")
    assert (len(train), len(val), len(source.split("test"))) == (15, 5, 0)
    everything = images(folder, val_fraction=0.0).split("train")
    assert everything.read(range(20), [0] * 20).labels.tolist() == [0] * 10 + [1] * 10
    file = Image.open(folder / "train" / "dog" / "3.jpg")
    expected = file.resize((8, 8), Image.Resampling.BILINEAR, box=(8, 0, 56, 48))
    assert np.array_equal(everything.read([13], [0]).pixels[0], np.asarray(expected))


def test_cached_equals_decoded(images: Shop, folder: Path) -> None:
    """Invariant: `prepare` changes nothing but the time; the cache is used, and shared by train and val."""
    train = images(folder).split("train")
    assert isinstance(train, CachedSplit)
    before = train.read([3, 1, 3], [0] * 3)
    train.prepare()
    after = train.read([3, 1, 3], [0] * 3)
    assert np.array_equal(before.pixels, after.pixels)
    assert before.labels.tolist() == after.labels.tolist()
    val = images(folder).split("val")
    val.prepare()
    assert len(list((images.cache / "pixels").glob("*.npy"))) == 1


def test_a_cache_of_other_settings_or_other_files_is_not_used(images: Shop, tmp_path: Path) -> None:
    """Invariant: another filter, resolution or a changed file is another cache."""
    root = class_folders(tmp_path / "photos", ["a", "b"], 3)
    caches = []
    for changed in ({}, {"resolution": 4}, {"crop": {**SETTINGS["crop"], "filter": "box"}}):
        images(root, **changed).split("train").prepare()
        caches.append(len(list((images.cache / "pixels").glob("*.npy"))))
    (root / "train" / "a" / "0.jpg").write_bytes(encoded(photo(77)))
    split = images(root, val_fraction=0.0).split("train")
    split.prepare()
    caches.append(len(list((images.cache / "pixels").glob("*.npy"))))
    assert caches == [1, 2, 3, 4]
    expected = Image.open(root / "train" / "a" / "0.jpg").resize((8, 8), Image.Resampling.BILINEAR, box=(8, 0, 56, 48))
    assert np.array_equal(split.read([0], [0]).pixels[0], np.asarray(expected))


def test_folders_called_train_val_and_test(images: Shop, folder: Path, tmp_path: Path) -> None:
    """By hand: with a val folder nothing is drawn from train; training images are cut anew by key, others are not."""
    root = tmp_path / "all"
    shutil.copytree(folder, root)
    class_folders(root, ["cat", "dog"], 2, split="val", seed=500)
    class_folders(root, ["dog"], 3, split="test", seed=600)
    source = images(root, crop=RANDOM_CROP)
    assert (source.class_names, source.n_class) == (("cat", "dog"), 2)
    assert images(root, n_class=2).class_names == ("cat", "dog")
    assert [len(source.split(name)) for name in ("train", "val", "test")] == [20, 4, 3]
    assert source.split("test").read(range(3), [0] * 3).labels.tolist() == [1, 1, 1]
    training = source.training()
    assert isinstance(training, DecodedSplit)
    first, again, other = (training.read([0], [key]).pixels for key in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.array_equal(*(source.split("val").read([0], [key]).pixels for key in (1, 2)))


def test_images_without_classes(images: Shop, tmp_path: Path) -> None:
    """A folder of files: labels are -1, and where classes are needed this is said."""
    class_folders(tmp_path, ["bare"], 4, split="")
    split = images(tmp_path / "bare", val_fraction=0.0).split("train")
    assert split.read(range(4), [0] * 4).labels.tolist() == [-1] * 4
    with pytest.raises(ValueError, match="there are no labels"):
        images(tmp_path / "bare", classes="imagenet", n_class=1000)
    with pytest.raises(ValueError, match="class 'bare' is no wnid"):
        images(tmp_path, classes="imagenet", n_class=1000)


def test_one_class_folder_is_a_class(images: Shop, tmp_path: Path) -> None:
    root = class_folders(tmp_path / "photos", ["n01498041"], 3)
    split = images(root, classes="imagenet", n_class=1000, val_fraction=0.0).split("train")
    assert split.read(range(3), [0] * 3).labels.tolist() == [6] * 3


def test_one_parquet_file_and_other_columns(images: Shop, tmp_path: Path) -> None:
    """Round trip: lossless images of the model's own size come back to the bit, whatever the column is called."""
    rows = [{"image": row(i, 0)["image"], "fine_label": i} for i in range(5)]
    path = stored(tmp_path / "some.parquet", rows, names=list("abcde"), column="fine_label")
    source = images(path, val_fraction=0.0, n_class=5)
    pixels, labels = source.split("train").read(range(5), [0] * 5)
    assert source.class_names == tuple("abcde")
    assert np.array_equal(pixels, np.stack([np.asarray(photo(i, 8, 8)) for i in range(5)]))
    assert labels.tolist() == list(range(5))
    with pytest.raises(ValueError, match=r"none of the columns picture is there .* it has image, fine_label"):
        images(path, image_column=["picture"])


def test_a_saved_dataset(images: Shop, tmp_path: Path) -> None:
    result = datasets.Dataset.from_list([row(i, i) for i in range(4)]).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": result}).save_to_disk(tmp_path / "saved")
    assert images(tmp_path / "saved", val_fraction=0.0).split("train").read([2], [0]).labels.tolist() == [2]


def test_stl10_in_the_hubs_layout(images: Shop, tmp_path: Path) -> None:
    """By hand: 96×96 becomes 32×32, or stays as it is; its unlabelled split is not read."""
    for name, count in (("train", 12), ("test", 5), ("unlabeled", 3)):
        rows = [row(i, i % 10, (96, 96)) for i in range(count)]
        stored(tmp_path / "data" / f"{name}-00000-of-00001.parquet", rows, names=[f"class {c}" for c in range(10)])
    source = images(tmp_path / "data", resolution=32, n_class=10)
    assert [len(source.split(name)) for name in ("train", "val", "test")] == [9, 3, 5]
    expected = photo(4, 96, 96).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(source.split("test").read([4], [0]).pixels[0], np.asarray(expected))
    source = images(tmp_path / "data", resolution=96, n_class=10)
    assert np.array_equal(source.split("test").read([4], [0]).pixels[0], np.asarray(photo(4, 96, 96)))


def test_cifar100_with_the_hubs_columns(images: Shop, shared: Path) -> None:
    """Independent source: the file itself, read with pyarrow and Pillow."""
    path = shared / "data" / "cifar100-sample"
    source = images(path, resolution=32, n_class=100, label_column=["fine_label", "label"], val_fraction=0.1)
    assert [len(source.split(name)) for name in ("train", "val", "test")] == [437, 49, 916]
    table = pq.read_table(path / "test-00000-of-00001.parquet").slice(41, 1).to_pylist()[0]
    pixels, labels = source.split("test").read([41], [0])
    assert np.array_equal(pixels[0], np.asarray(Image.open(io.BytesIO(table["img"]["bytes"]))))
    assert labels.tolist() == [table["fine_label"]]


def test_cifar10_splits_as_the_paper(images: Shop, shared: Path) -> None:
    """Chen et al. 2020, §3.1: 45,000 to train on, 5,000 to validate on; 0 folds them together; subsets are balanced."""
    path = shared / "data" / "cifar10-jpeg"
    sizes = {"resolution": 32, "n_class": 10}
    source = images(path, val_fraction=0.1, **sizes)
    assert [len(source.split(name)) for name in ("train", "val", "test")] == [45000, 5000, 10000]
    assert source.class_names == CIFAR10
    assert len(images(path, val_fraction=0.0, **sizes).split("train")) == 50000
    few = images(path, val_fraction=0.1, labels_per_class=25, **sizes)
    assert np.bincount(few.split("train").read(range(250), [0] * 250).labels).tolist() == [25] * 10
    assert len(few.split("val")) == 5000


def test_imagenet_photographs(images: Shop, shared: Path) -> None:
    """Independent source: the folders' names; 4 % of 400 are held out, `val` is what ILSVRC calls so, our test."""
    with (shared / "data" / "imagenet-classes.csv").open() as file:
        index = {line.split(",")[1]: int(line.split(",")[0]) for line in file.readlines()[1:]}
    path = shared / "data" / "imagenet-sample"
    splits = {"train": ["train"], "val": [], "test": ["validation"]}
    source = images(path, resolution=32, n_class=1000, classes="imagenet", splits=splits, val_fraction=0.04)
    assert [len(source.split(name)) for name in ("train", "val", "test")] == [384, 16, 125]
    expected = sorted(index[wnid.name] for wnid in (path / "val").iterdir())
    assert sorted(source.split("test").read(range(125), [0] * 125).labels.tolist()) == expected
    assert source.class_names is not None
    assert (source.class_names[0], source.class_names[999]) == ("tench", "toilet tissue")


# What can be wrong.


@pytest.mark.parametrize("path", ["/nowhere/at/all", "../nowhere", "a/b/c"])
def test_a_missing_path(images: Shop, path: str) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        images(path)


def test_no_path_at_all(images: Shop) -> None:
    with pytest.raises(ValueError, match=r"data=made needs .* data.path=FOLDER"):
        images(None)


def test_an_empty_folder(images: Shop, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty does not open: .*expected a folder of images"):
        images(tmp_path / "empty")


def test_a_damaged_parquet_file(images: Shop, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ValueError, match=r"x\.parquet is no parquet file, or is cut short"):
        images(tmp_path / "x.parquet")


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Three classes of three, one image cut short, one that is a web page, one empty."""
    root = class_folders(tmp_path / "photos", ["a", "b", "c"], 3)
    cut = root / "train" / "b" / "1.jpg"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (root / "train" / "c" / "0.jpg").write_bytes(b"<html>not found</html>")
    (root / "train" / "c" / "2.jpg").write_bytes(b"")
    return root


def test_corrupt_images_are_named(images: Shop, damaged: Path) -> None:
    split = images(damaged, val_fraction=0.0).split("train")
    for index, name in ((4, "b/1.jpg: it is damaged or cut short"), (6, "c/0.jpg: its 22 bytes are no image")):
        with pytest.raises(BadImageError, match=f"{name}.*; data.on_corrupt=skip leaves such images out"):
            split.read([0, index], [0, 0])
    with pytest.raises(BadImageError, match=r"b/1\.jpg"):
        split.prepare()


def test_corrupt_images_are_skipped_and_counted(images: Shop, damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By hand: three of nine are left out, said each time; the good ones and the split are those of before."""
    for _ in range(2):
        caplog.clear()
        split = images(damaged, val_fraction=0.0, on_corrupt="skip").split("train")
        assert "3 of 9 images" in caplog.text
        assert "b/1.jpg" in caplog.text
    split.prepare()
    assert split.read(range(6), [0] * 6).labels.tolist() == [0, 0, 0, 1, 1, 2]
    record = json.loads(next((images.cache / "pixels").glob("*.corrupt.json")).read_text())
    assert [image["row"] for image in record] == [4, 6, 8]
    shutil.rmtree(images.cache / "pixels")
    skipped, plain = images(damaged, on_corrupt="skip").split("val"), images(damaged).split("val")
    assert isinstance(skipped, CachedSplit)
    assert isinstance(plain, CachedSplit)
    assert set(skipped.decoded.rows) <= set(plain.decoded.rows)


def test_a_corrupt_row_is_named_by_its_number(images: Shop, tmp_path: Path) -> None:
    rows = [row(0, 0), {"image": {"bytes": b"\xff\xd8 no more", "path": None}, "label": 1}]
    path = stored(tmp_path / "x.parquet", [*rows, {"image": None, "label": 0}])
    split = images(path, val_fraction=0.0).split("train")
    with pytest.raises(BadImageError, match=r"row 1 of .*x.parquet \(train\): "):
        split.read([1], [0])
    with pytest.raises(BadImageError, match=r"row 2 of .*there is no image"):
        split.read([2], [0])


def test_labels_that_are_no_classes(images: Shop, tmp_path: Path) -> None:
    path = stored(tmp_path / "x.parquet", [row(i, i) for i in range(4)])
    with pytest.raises(ValueError, match=r"row 3 has label 3, data.n_class=3 allows 0 … 2"):
        images(path, n_class=3, val_fraction=0.0)
    with pytest.raises(ValueError, match="there are no labels"):
        images(path, n_class=3, val_fraction=0.0, label_column=["kind"])


def test_two_classes_of_one_name(images: Shop, tmp_path: Path) -> None:
    """`dog` and `Dog` are two that look like one."""
    with pytest.raises(ValueError, match=r"two classes have one name \('Dog', 'dog'\)"):
        images(class_folders(tmp_path / "case", ["Dog", "dog"], 1), n_class=2)


def test_a_truncated_png_is_named_too(images: Shop, tmp_path: Path) -> None:
    """Its size is read with the rest of it; building the cache names it, and blames no disk."""
    root = class_folders(tmp_path / "photos", ["a", "b"], 2)
    (root / "train" / "a" / "9.png").write_bytes(encoded(photo(9), "PNG")[:900])
    split = images(root, val_fraction=0.0).split("train")
    with pytest.raises(BadImageError, match=r"a/9\.png: it is damaged or cut short"):
        split.prepare()
    assert len(images(root, val_fraction=0.0, on_corrupt="skip").split("train")) == 4


def test_a_folder_of_parquet_files_with_other_columns(images: Shop, tmp_path: Path) -> None:
    rows = [{"image": row(i, 0)["image"], "fine_label": i} for i in range(5)]
    for name in ("train", "test"):
        stored(tmp_path / "data" / f"{name}-00000-of-00001.parquet", rows, names=list("abcde"), column="fine_label")
    assert len(images(tmp_path / "data", n_class=5, val_fraction=0.0).split("train")) == 5
    with pytest.raises(ValueError, match="there are no labels"):
        images(tmp_path / "data", n_class=5, label_column=["kind"])


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_hold_something_else(images: Shop, tmp_path: Path, streaming: bool) -> None:
    """Numbers are no images; words and fractions are no classes, and are not rounded to some."""
    for name, column, value in (("i", "image", 3), ("w", "label", "cat"), ("f", "label", 0.33)):
        cells = {"image": row(0, 0)["image"], "label": 0, column: value}
        datasets.Dataset.from_list([cells] * 3).to_parquet(tmp_path / f"{name}.parquet")  # says nowhere "image"
        with pytest.raises(ValueError, match=f"column '{column}' holds"):
            source = images(tmp_path / f"{name}.parquet", streaming=streaming, val_fraction=0.0)
            list(source.training().records(0, 0))


def test_encoded_bytes_are_images(images: Shop, tmp_path: Path) -> None:
    """A column of bytes, or of bytes and path, without a word that these are images."""
    data = row(0, 0)["image"]["bytes"]
    for name, cell in (("bytes", data), ("struct", {"bytes": data, "path": None})):
        datasets.Dataset.from_list([{"image": cell}] * 3).to_parquet(tmp_path / f"{name}.parquet")
        split = images(tmp_path / f"{name}.parquet", val_fraction=0.0).split("train")
        assert np.array_equal(split.read([2], [0]).pixels[0], np.asarray(photo(0, 8, 8)))


def test_a_fixed_length_for_training_is_the_one_for_training(images: Shop, folder: Path) -> None:
    """Invariant: short_side decides training, eval_short_side everything else, also when both are one length."""
    crop = {**RANDOM_CROP, "short_side": [56, 56]}
    source = images(folder, crop=crop)
    training = source.training()
    training.prepare()
    expected = images(folder, crop={**crop, "eval_short_side": 56}).split("train")
    assert np.array_equal(training.read([0, 4], [1, 2]).pixels, expected.read([0, 4], [0, 0]).pixels)
    assert not np.array_equal(training.read([0], [0]).pixels, source.split("train").read([0], [0]).pixels)


def test_subsets_need_labels(images: Shop, tmp_path: Path) -> None:
    class_folders(tmp_path, ["bare"], 4, split="")
    with pytest.raises(ValueError, match="some images have no label"):
        images(tmp_path / "bare", labels_per_class=2)


def test_a_cache_that_cannot_be_written(images: Shop, folder: Path, tmp_path: Path) -> None:
    """`paths.cache` lies in a file here."""
    (tmp_path / "file").write_text("")
    split = images(folder).split("train")
    assert isinstance(split, CachedSplit)
    split.path = tmp_path / "file" / "pixels.npy"
    with pytest.raises(ValueError, match=r"cannot be written .*paths.cache=FOLDER"):
        split.prepare()


def test_splits_that_are_not_there(images: Shop, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"has the splits train, none called fit: .*data.splits.train=\[train\]"):
        images(folder, splits={"train": ["fit"], "val": [], "test": []})
    with pytest.raises(ValueError, match=r"data\.splits\.train must be a list of at least 1"):
        images(folder, splits={"train": []})
    with pytest.raises(ValueError, match="'valid'"):
        images(folder).split("valid")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Couldn't reach 'a/made' on the Hub"), r"Couldn't reach .*data.path=FOLDER.*data=digits"),
        (
            DatasetNotFoundError("Dataset 'a/made' doesn't exist on the Hub or cannot be accessed."),
            "doesn't exist .*FOLDER",
        ),
        (
            DatasetNotFoundError("Dataset 'a/made' is a gated dataset on the Hub. You must be authenticated"),
            r"is gated: accept its terms at https://huggingface.co/datasets/a/made, then `hf auth login`",
        ),
    ],
)
def test_a_hub_name_that_cannot_be_had(
    images: Shop, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    """What `datasets` 5.2 raises without network, without such a name, and without the right to read it."""

    def load_dataset(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=message):
        images("a/made")
