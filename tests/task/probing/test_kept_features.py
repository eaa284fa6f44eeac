"""Features of a probe that are left on disk."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from igpt.checkpoint.igpt_format import Weights
from igpt.data.source import ArraySplit
from igpt.model.gpt import GPT, Block
from igpt.utils import files
from tests.checkpoint.test_igpt_format import small_disk
from tests.data.test_damaged_caches import ReadOnlyLock
from tests.task.conftest import Arrays, Lab
from tests.task.probing.conftest import features, kept_features, perturbed, save_state


@pytest.mark.parametrize("norm", ["ln_1", "raw"])
def test_what_is_kept_is_a_plain_pass(tmp_path: Path, lab: Lab, ar: Weights, norm: str) -> None:
    """Independent source: the features of one pass over all images, whatever the batches were."""
    lab.probe(tmp_path, ar, norm=norm, batch_size=13)
    for name in kept_features(tmp_path):
        split = name.split("-")[1]
        found = np.load(tmp_path / "cache" / "features" / name)
        assert np.abs(found - features(lab, ar.net(), split, norm=norm)).max() < 1e-5
    assert [name.split("-")[1] for name in kept_features(tmp_path)] == ["test", "train", "val"]


def test_one_pass_for_all_layers_and_none_the_second_time(
    tmp_path: Path, lab: Lab, ar: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: each of 2 blocks sees each of 360 images once; read from disk, the numbers are the same."""
    seen, forward = [], Block.forward

    def noted(self: Block, h: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(len(h))
        return forward(self, h, *rest)

    monkeypatch.setattr(Block, "forward", noted)
    first = lab.probe(tmp_path, ar)
    assert sum(seen) == 2 * (200 + 60 + 100)

    def refuses(*_: Any) -> None:
        raise KeyError("forward pass")

    monkeypatch.setattr(GPT, "embed", refuses)
    again = lab.probe(tmp_path, ar)
    assert again.numbers == first.numbers
    assert again.curves == first.curves
    with pytest.raises(KeyError):  # so it is noticed
        lab.probe(tmp_path, ar, norm="raw")


@pytest.mark.parametrize("changed", [{"norm": "raw"}, {"dtype": "float16"}, {"seed": 1}, "weights"])
def test_other_features_are_other_files(tmp_path: Path, lab: Lab, ar: Weights, changed: Any) -> None:
    """Invariant: nothing is read that something else has made, and nothing of it is written over."""
    lab.probe(tmp_path, ar, test=False)
    before = kept_features(tmp_path)
    assert len(before) == 2
    if changed == "weights":
        lab.probe(tmp_path, save_state(tmp_path / "other", lab, perturbed(ar)), test=False)
    else:
        lab.probe(tmp_path, ar, test=False, **changed)
    assert len(kept_features(tmp_path)) == 4
    assert set(before) < set(kept_features(tmp_path))


def test_damaged_features_are_made_anew(
    tmp_path: Path, lab: Lab, ar: Weights, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: cut, or with zeros in them, that is said, and the numbers are those of before; also read-only."""
    first = lab.probe(tmp_path, ar)
    short, zeroed = (tmp_path / "cache" / "features" / name for name in kept_features(tmp_path)[1:3])
    short.write_bytes(short.read_bytes()[:1000])
    content = bytearray(zeroed.read_bytes())
    content[2048:] = bytes(len(content) - 2048)
    zeroed.write_bytes(content)
    monkeypatch.setattr(files, "_intact", set())
    assert lab.probe(tmp_path, ar).numbers == first.numbers
    for path in (short, zeroed):
        assert caplog.text.count(f"{path} is made anew: it is damaged") == 1
    monkeypatch.setattr("igpt.data.cache.FileLock", ReadOnlyLock)
    assert lab.probe(tmp_path, ar).numbers == first.numbers
    short.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{short} cannot be written \(Read-only file system\): it is damaged"):
        lab.probe(tmp_path, ar)


def changed_labels(few: Arrays, split: str) -> Arrays:
    of = few.splits[split]
    return replace(few, splits=few.splits | {split: ArraySplit(of.pixels, (of.labels + 1) % 10)})


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_other_labels_than_on_disk(tmp_path: Path, lab: Lab, few: Arrays, ar: Weights, split: str) -> None:
    """The file is named, and what to do; once it is removed, the run goes through."""
    lab.probe(tmp_path, ar)
    lab.digits = changed_labels(few, split)
    (name,) = [name for name in kept_features(tmp_path) if f"-{split}-" in name]
    with pytest.raises(ValueError, match=f"the labels of {split} are not those that .*{name} was written with"):
        lab.probe(tmp_path, ar)
    (tmp_path / "cache" / "features" / name).unlink()
    lab.probe(tmp_path, ar)


def test_a_full_disk(tmp_path: Path, lab: Lab, ar: Weights) -> None:
    """It says what to do, and leaves nothing that takes room."""
    with pytest.raises(ValueError, match=r"cannot be written .*paths\.cache=FOLDER"), small_disk():
        lab.probe(tmp_path, ar)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size] == []
    lab.probe(tmp_path, ar)


def test_features_too_large_for_float16(tmp_path: Path, lab: Lab, ar: Weights) -> None:
    """By hand: the streams of an embedding a million times larger, not normed, pass 65,504."""
    large = save_state(tmp_path / "large", lab, perturbed(ar, times=1e8))
    with pytest.raises(ValueError, match=r"layer\(s\) 0, 1, 2 hold NaN or infinity.*task\.dtype=float32"):
        lab.probe(tmp_path, large, norm="raw", dtype="float16")
    assert list((tmp_path / "cache" / "features").glob(".*.part")) == []
    lab.probe(tmp_path, large, norm="raw", dtype="float32", test=False, C_grid=[0.1])
