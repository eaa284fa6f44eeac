"""Labels."""

import csv
from pathlib import Path

import numpy as np
import pytest

from igpt.data.classes import (
    CIFAR10,
    Classes,
    check_names,
    describe_classes,
    format_class_name,
    imagenet_classes,
    imagenet_names,
)
from igpt.data.split import balanced_subset

ILSVRC = Classes("imagenet", 1000)


def test_the_wnids_of_ilsvrc(shared: Path) -> None:
    """Independent source: the list of the 1,000 classes; the first and the last by hand."""
    with (shared / "data" / "imagenet-classes.csv").open() as file:
        assert imagenet_classes() == {row["wnid"]: (int(row["index"]), row["name"]) for row in csv.DictReader(file)}
    assert imagenet_classes()["n01440764"] == (0, "tench")
    assert imagenet_classes()["n15075141"] == (999, "toilet tissue")


def test_names_of_classes_by_their_label() -> None:
    """By hand: ILSVRC's whatever folders are called, the bird before the machine; else the data's, one a class."""
    names = imagenet_names()
    assert len(set(names)) == 1000
    assert (names[0], names[134], names[517]) == ("tench", "crane (n02012849)", "crane (n03126707)")
    assert Classes.from_split_names("imagenet", 1000, [("n01440764",)]).names == names
    assert Classes.from_split_names(None, 2, [("cat", "dog")]).names == ("cat", "dog")
    assert Classes.from_split_names(None, 3, [("cat", "dog")]).names is None
    assert Classes.from_split_names(None, None, [("cat", "dog"), ("ant", "dog")]).names == ("cat", "dog", "ant")
    assert Classes.from_split_names(None, 2, [None]).names is None


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("airplane", "airplane"),
        ("  two\nlines\tand\u2028more ", "two lines and more"),
        ("\x1b[31mred\x07", "\ufffd[31mred\ufffd"),
        ("abc\u202eexe.gpj\u2066", "abc\ufffdexe.gpj\ufffd"),
        ("not\udcffutf-8", "not\ufffdutf-8"),
        ("כלב", "כלב"),
        ("👩\u200d🌾 $x$ <b>", "👩\u200d🌾 $x$ <b>"),
        ("", "''"),
        (" \n", "''"),
        ("x" * 40, "x" * 40),
        ("x" * 41, "x" * 39 + "…"),
        ("\n" * 1_000_000, "…"),
    ],
)
def test_names_are_shown_as_one_line_of_text(name: str, shown: str) -> None:
    """By hand. Invariant: at most 40 characters, which UTF-8 can hold."""
    assert format_class_name(name) == shown
    assert len(format_class_name(name).encode()) >= 1
    assert len(format_class_name(name, most=5)) <= 5


def test_classes_are_described_in_a_line() -> None:
    """By hand: the first twelve by name, and how many more there are."""
    assert describe_classes(CIFAR10[:3]) == "3 classes: airplane, automobile, bird"
    assert describe_classes(["a\nb"]) == "1 class: a b"
    line = describe_classes(imagenet_names())
    assert line.startswith("1,000 classes: tench, goldfish, ")
    assert line.endswith(", … and 988 more")
    assert line.count(", ") == 12


def test_folders_of_wnids_become_ilsvrc_indices() -> None:
    """By hand: of the classes tench, stingray, toilet tissue only, labels 0, 1, 2 are 0, 6, 999."""
    labels = ILSVRC(np.array([2, 0, 1, 1]), ["n01440764", "n01498041", "n15075141"], "here")
    assert labels.tolist() == [999, 0, 6, 6]


def test_the_hubs_copy_counts_as_ilsvrc_does() -> None:
    names = [name if name not in ("crane", "maillot") else f"{name} {i}" for i, name in imagenet_classes().values()]
    assert ILSVRC(np.array([5, 999]), names, "here").tolist() == [5, 999]
    assert ILSVRC(np.array([5, 999]), None, "here").tolist() == [5, 999]


@pytest.mark.parametrize(
    ("names", "labels", "message"),
    [
        (["n01440764", "n99999999"], [0, 1], "'n99999999' is no wnid"),
        (["cat", "dog"], [0, 1], "'cat' is no wnid of ILSVRC 2012 .2 of 2"),
        (["n01440764"], [0, 1], "row 1 has label 1"),
        (None, [3, 1000], "row 1 has label 1000, data.n_class=1000 allows 0 … 999"),
        (None, [-1, 4], "row 0 has no label"),
        (None, [-1, -1], "there are no labels"),
    ],
)
def test_labels_that_are_no_classes(names: list[str] | None, labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ILSVRC(np.array(labels), names, "here")


def test_two_classes_of_one_name() -> None:
    with pytest.raises(ValueError, match=r"two classes have one name \('dog', 'Dog '\)"):
        check_names(["cat", "dog", "Dog "], "here")


def test_balanced_subsets() -> None:
    """Invariant: so many of each class, the same for one seed, smaller ones inside larger ones."""
    labels = np.random.default_rng(0).integers(0, 5, 200)
    small, large = (balanced_subset(labels, per_class=n, seed=3, where="here") for n in (4, 9))
    assert np.bincount(labels[small]).tolist() == [4] * 5
    assert set(small) < set(large)
    assert not np.array_equal(small, balanced_subset(labels, per_class=4, seed=4, where="here"))
    with pytest.raises(ValueError, match=r"class \d has \d+ images, data.labels_per_class=60"):
        balanced_subset(labels, per_class=60, seed=3, where="here")
    with pytest.raises(ValueError, match="at least 1"):
        balanced_subset(labels, per_class=0, seed=3, where="here")
