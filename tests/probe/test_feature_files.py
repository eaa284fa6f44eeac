"""Pooled features on disk: written a batch at a time, read back, never half of them."""

import errno
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from igpt.probe.feature_files import FeatureWriter, features_path, labels_path, read_features
from igpt.settings.fields import FeatureDtype
from tests.checkpoint.test_igpt_format import small_disk
from tests.conftest import run_killed

N_LAYER, N_IMAGE, WIDTH = 2, 11, 5
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def values() -> Tensor:
    """(L + 1, N, C)"""
    return torch.randn(N_LAYER + 1, N_IMAGE, WIDTH, generator=torch.Generator().manual_seed(0))


LABELS = torch.arange(N_IMAGE) * 7 % 4
IN_TURN = [list(range(0, 4)), list(range(4, 8)), list(range(8, 11))]
IN_NO_ORDER = [[10, 3], [0], [7, 1, 9, 4, 2], [8, 6, 5]]


def write(path: Path, values: Tensor, batches: list[list[int]], dtype: FeatureDtype = "float32") -> None:
    writer = FeatureWriter(path, n_image=N_IMAGE, dtype=dtype)
    for batch in batches:
        rows = torch.tensor(batch)
        writer.add(values[:, rows], rows, LABELS[rows])
    writer.finish()


COMPLETE = ["some.labels.npy", "some.labels.npy.sha256", "some.npy", "some.npy.sha256"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("batches", [IN_TURN, IN_NO_ORDER, [list(range(N_IMAGE))]])
def test_round_trip(tmp_path: Path, values: Tensor, batches: list[list[int]]) -> None:
    """Round trip: every layer of every image in its row, with its label, to the bit; nothing else is left there."""
    path = tmp_path / "new" / "some.npy"
    write(path, values, batches)
    found = read_features(path, n_layer=N_LAYER, n_image=N_IMAGE)
    assert found is not None
    assert np.array_equal(found.values, values.numpy())
    assert found.values.dtype == np.float32
    assert found.labels.tolist() == LABELS.tolist()
    assert torch.equal(found.layers([2, 0], dtype=torch.float64, device=CPU), values[[2, 0]].double())
    assert names(path.parent) == COMPLETE


def test_half_precision(tmp_path: Path, values: Tensor) -> None:
    """Independent source: numpy's float16; half of the bytes, and read back as what is asked for."""
    for dtype in ("float16", "float32"):
        write(tmp_path / f"{dtype}.npy", values, IN_NO_ORDER, dtype)
    found = read_features(tmp_path / "float16.npy", n_layer=N_LAYER, n_image=N_IMAGE)
    assert found is not None
    assert np.array_equal(found.values, values.numpy().astype(np.float16))
    assert found.layers([1], dtype=torch.float32, device=CPU).dtype == torch.float32
    header = 128  # of an .npy file
    sizes = [(tmp_path / f"{dtype}.npy").stat().st_size - header for dtype in ("float16", "float32")]
    assert sizes == [2 * values.numel(), 4 * values.numel()]


def test_batches_leave_no_trace(tmp_path: Path, values: Tensor) -> None:
    """Invariant: however the images were shared out, the files are the same bytes."""
    write(tmp_path / "a.npy", values, IN_TURN)
    write(tmp_path / "b.npy", values, IN_NO_ORDER)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    assert (tmp_path / "a.labels.npy").read_bytes() == (tmp_path / "b.labels.npy").read_bytes()


@pytest.mark.parametrize("batches", [IN_TURN[:2], [*IN_TURN, [3]], [[*range(10), 4]]])
def test_an_image_is_missing_or_twice(tmp_path: Path, values: Tensor, batches: list[list[int]]) -> None:
    """Invariant: then there is no file."""
    with pytest.raises(AssertionError, match="an image has no features, or twice"):
        write(tmp_path / "some.npy", values, batches)
    assert read_features(tmp_path / "some.npy", n_layer=N_LAYER, n_image=N_IMAGE) is None


def test_a_pass_that_was_killed(tmp_path: Path, values: Tensor) -> None:
    """Invariant: what it left is no file of features, and is gone after the next pass."""
    path = tmp_path / "some.npy"

    def begin() -> FeatureWriter:
        writer = FeatureWriter(path, n_image=N_IMAGE, dtype="float32")
        writer.add(values[:, :4] + 1, torch.arange(4), LABELS[:4])
        return writer

    run_killed(begin)
    assert len(names(tmp_path)) == 1
    assert read_features(path, n_layer=N_LAYER, n_image=N_IMAGE) is None
    write(path, values, IN_TURN)
    assert names(tmp_path) == COMPLETE
    found = read_features(path, n_layer=N_LAYER, n_image=N_IMAGE)
    assert found is not None
    assert np.array_equal(found.values, values.numpy())


@pytest.mark.parametrize("kept", [0, 3, 60, -1])
@pytest.mark.parametrize("which", ["some.npy", "some.labels.npy"])
def test_a_file_cut_short(
    tmp_path: Path, values: Tensor, caplog: pytest.LogCaptureFixture, which: str, kept: int
) -> None:
    """Invariant: not read, and said; written anew it is whole."""
    path = tmp_path / "some.npy"
    write(path, values, IN_TURN)
    (tmp_path / which).write_bytes((tmp_path / which).read_bytes()[:kept])
    assert read_features(path, n_layer=N_LAYER, n_image=N_IMAGE) is None
    with caplog.at_level(logging.WARNING):
        write(path, values, IN_TURN)
    assert f"{path} is made anew: it is damaged" in caplog.text
    assert read_features(path, n_layer=N_LAYER, n_image=N_IMAGE) is not None


@pytest.mark.parametrize(("n_layer", "n_image"), [(N_LAYER + 1, N_IMAGE), (N_LAYER, N_IMAGE - 1), (0, 1)])
def test_a_file_of_another_shape(
    tmp_path: Path, values: Tensor, caplog: pytest.LogCaptureFixture, n_layer: int, n_image: int
) -> None:
    """Invariant: not read, and said."""
    write(tmp_path / "some.npy", values, IN_TURN)
    with caplog.at_level(logging.WARNING):
        assert read_features(tmp_path / "some.npy", n_layer=n_layer, n_image=n_image) is None
    assert f"holds (3, 11, 5), not {n_layer + 1} layers of {n_image} images" in caplog.text


@pytest.mark.parametrize("gone", ["some.npy", "some.labels.npy"])
def test_one_of_two_files(tmp_path: Path, values: Tensor, gone: str) -> None:
    """Invariant: features without labels are none, nor the other way round."""
    write(tmp_path / "some.npy", values, IN_TURN)
    (tmp_path / gone).unlink()
    assert read_features(tmp_path / "some.npy", n_layer=N_LAYER, n_image=N_IMAGE) is None


MADE_BY: dict[str, Any] = {"weights": "ab12", "split": "val", "norm": "ln_1", "mask": 0, "data": {"name": "x", "r": 8}}


@pytest.mark.parametrize(
    "changed",
    [
        {"weights": "ab13"},
        {"split": "train"},
        {"norm": "raw"},
        {"mask": 1},
        {"mask": "0"},
        {"data": {"name": "x", "r": 9}},
        {"data": {"name": "x"}},
        {"seed": 0},
    ],
)
def test_whatever_made_them_is_in_the_name(changed: dict[str, Any]) -> None:
    """Invariant: another value, one more or one less, at any depth, is another file."""
    plain = features_path(Path("cache"), "digits8-val", MADE_BY)
    assert features_path(Path("cache"), "digits8-val", MADE_BY | changed) != plain


def test_the_name_says_what_it_is_of() -> None:
    """Invariant: the order in which things are stated is nothing; the readable part is kept."""
    plain = features_path(Path("cache"), "digits8-val", MADE_BY)
    assert features_path(Path("cache"), "digits8-val", dict(reversed(MADE_BY.items()))) == plain
    assert plain.parent == Path("cache/features")
    assert plain.name.startswith("digits8-val-")
    assert labels_path(plain).name == f"{plain.stem}.labels.npy"


def test_a_full_disk_while_batches_come(tmp_path: Path, values: Tensor) -> None:
    """A ValueError that says what to do; thrown away, nothing stays, which would take the room from others."""
    writer = FeatureWriter(tmp_path / "some.npy", n_image=N_IMAGE, dtype="float32")
    with pytest.raises(ValueError, match=r"cannot be written .*paths\.cache=FOLDER"), small_disk():
        writer.add(values.repeat(1, 1, 100), torch.arange(N_IMAGE), LABELS)
    writer.discard()
    assert names(tmp_path) == []


def test_a_full_disk_at_the_end(tmp_path: Path, values: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ValueError that says what to do; thrown away, there is no file of features and no temporary one."""

    def refuses(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = FeatureWriter(tmp_path / "some.npy", n_image=N_IMAGE, dtype="float32")
    writer.add(values, torch.arange(N_IMAGE), LABELS)
    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", refuses)
    with pytest.raises(ValueError, match=r"No space left on device.*paths\.cache=FOLDER"):
        writer.finish()
    writer.discard()
    assert [name for name in names(tmp_path) if name.endswith(".part")] == []
    assert read_features(tmp_path / "some.npy", n_layer=N_LAYER, n_image=N_IMAGE) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_features_that_are_no_numbers(tmp_path: Path, values: Tensor, bad: float) -> None:
    """By hand: a million is infinity in float16. The layer is named; no file of features comes of it."""
    broken = values.clone()
    broken[1, 4, 2] = bad
    with pytest.raises(ValueError, match=r"the features of layer\(s\) 1 hold NaN or infinity"):
        write(tmp_path / "some.npy", broken, IN_TURN, "float16")
    assert read_features(tmp_path / "some.npy", n_layer=N_LAYER, n_image=N_IMAGE) is None
