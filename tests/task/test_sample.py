"""Samples and completions of trained weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.igpt_format import Weights
from igpt.data.digits import Digits
from igpt.metric.result import Grid
from igpt.metric.share import wilson_interval
from igpt.model.generate import Sampling, generate
from igpt.model.gpt import GPT
from igpt.objective.ar import AR
from igpt.task.complete import HIDDEN, prompt_rows
from igpt.tokens.palette import Palette
from igpt.utils import keyed
from tests.task.conftest import Lab, check_bad_settings, machine
from tests.task.conftest import drawn as random_weights

WHOLE = {"temperature": 1.0, "top_k": None, "top_p": None}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: Digits, palette: Palette) -> Weights:
    folder = tmp_path_factory.mktemp("trained")
    Lab(digits, palette).pretrain(folder)
    return find_weights(str(folder))


def test_samples_do_not_depend_on_the_batch(tmp_path: Path, lab: Lab, trained: Weights) -> None:
    """Invariant: and another seed draws others."""
    drawn = [
        lab.execute("sample", tmp_path, trained, seed=seed, count=7, batch_size=size, **WHOLE).arrays["samples"]
        for seed, size in [(0, 7), (0, 3), (1, 7)]
    ]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert drawn[0].shape == (7, 64)


def test_completions_keep_what_was_given(tmp_path: Path, lab: Lab, trained: Weights) -> None:
    """Invariant: the original stands beside what was given, and every completion begins with it."""
    settings = {"split": "val", "count": 3, "completions": 2, "fraction": 0.5, "rows": None, "batch_size": 4}
    result = lab.execute("complete", tmp_path, trained, **settings, **WHOLE)
    grid = result.grids["completions"]
    assert grid.images.shape == (3, 4, 8, 8, 3)
    assert grid.titles == ("original", "given", "completion 1", "completion 2")
    original, given = grid.images[:, 0], grid.images[:, 1]
    chosen = result.provenance["images"]
    assert np.array_equal(original, lab.digits.split("val").pixels[chosen])
    assert (given[:, 4:] == HIDDEN).all()
    for column in range(1, 4):
        assert np.array_equal(grid.images[:, column, :4], original[:, :4])
    assert not np.array_equal(grid.images[:, 2], grid.images[:, 3])
    share = result.numbers["complete/pixels_as_original"]
    same = (grid.images[:, 2:, 4:] == original[:, None, 4:]).all(axis=-1).mean()
    assert (share.value, share.n) == (pytest.approx(same), 3)
    assert share.interval == wilson_interval(share.value, 3)  # of three images, however many completions each has


def test_all_rows_given_is_the_image(tmp_path: Path, lab: Lab, trained: Weights) -> None:
    """By hand: nothing is left to draw."""
    settings = {"split": "val", "count": 1, "completions": 1, "fraction": 0.5, "rows": 8, "batch_size": 4}
    result = lab.execute("complete", tmp_path, trained, **settings, **WHOLE)
    assert np.array_equal(result.grids["completions"].images[0, 2], result.grids["completions"].images[0, 0])


def test_rows_of_a_fraction() -> None:
    """By hand."""
    assert [prompt_rows(f, None, 32) for f in (0, 0.5, 0.25, 1)] == [0, 16, 8, 32]
    assert prompt_rows(0.5, 3, 32) == 3
    with pytest.raises(ValueError, match="0 … 32, the image's height; got 33"):
        prompt_rows(0.5, 33, 32)


def test_more_images_than_there_are(tmp_path: Path, lab: Lab, trained: Weights) -> None:
    settings = {"split": "val", "count": 500, "completions": 1, "fraction": 0.5, "rows": None, "batch_size": 4}
    with pytest.raises(ValueError, match="500 images asked for, the val split has 18"):
        lab.execute("complete", tmp_path, trained, **settings, **WHOLE)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": 0}, r"task\.count"),
        ({"batch_size": 0}, r"task\.batch_size"),
        ({"temperature": 0.0}, "temperature"),
        ({"completions": 0}, r"task\.completions"),
        ({"fraction": -0.1}, r"task\.fraction"),
        ({"fraction": 1.5}, r"task\.fraction"),
        ({"rows": -1}, r"task\.rows"),
        ({"split": "valid"}, "'valid'"),
    ],
)
def test_bad_settings_are_found_before_anything_is_built(changed: dict[str, object], message: str) -> None:
    good = {"split": "val", "count": 1, "completions": 1, "fraction": 0.5, "rows": None, "batch_size": 4, **WHOLE}
    check_bad_settings("complete", good, changed, message)
    if changed.keys() <= {"count", "batch_size", "temperature"}:
        check_bad_settings("sample", {"count": 1, "batch_size": 4, **WHOLE}, changed, message)


@contextmanager
def narrowed(weights: Weights, precision: str) -> Iterator[GPT]:
    """The network at a lower precision by PyTorch alone: in its autocast, or with weights turned into bfloat16."""
    net = weights.net()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        yield net.to(torch.bfloat16) if precision == "bf16-true" else net


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_inference_at_lower_precision(trained: Weights, precision: str) -> None:
    """Independent source: PyTorch's autocast, or its bfloat16 weights: those logits to the bit, not float32's."""
    tokens = torch.randint(17, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        with narrowed(trained, precision) as net:
            expected = net(tokens)
        with machine(precision=precision).inference(trained.build_network, trained.load_into) as net:
            logits = net(tokens)
        exact = trained.net()(tokens)
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, expected)
    off = (logits.float() - exact).abs().max()
    assert 0 < off < 0.05 * exact.abs().max()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_samples_at_lower_precision(tmp_path: Path, lab: Lab, palette: Palette, precision: str) -> None:
    """Independent source: drawn from a network at PyTorch's bfloat16. Invariant: most first pixels are float32's."""
    weights = random_weights(
        tmp_path, palette, AR()
    )  # a sharper one than after a few steps: rounding moves some tokens
    exact, drawn = (
        lab.execute("sample", tmp_path, weights, on=on, count=30, batch_size=30, **WHOLE).arrays["samples"]
        for on in (machine(), machine(precision=precision, decoding="layers"))
    )
    uniforms = keyed.uniform(keyed.per_example_keys(keyed.key(0, "sample"), torch.arange(30)), 64)
    with narrowed(weights, precision) as net:
        expected = generate(net, uniforms, Sampling(**WHOLE), backend="layers")
    assert np.array_equal(drawn, expected)
    assert not np.array_equal(drawn, exact)
    assert (drawn[:, :3] == exact[:, :3]).mean() > 0.9


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_loss_at_lower_precision(tmp_path: Path, lab: Lab, trained: Weights, precision: str) -> None:
    """Independent source: the loss of a network at PyTorch's bfloat16 on the same images, which is not float32's."""
    exact, found = (
        lab.evaluate(tmp_path, trained, on=on, batch_size=18, eval_masks=1).numbers["val/loss_gen"].value
        for on in (machine(), machine(precision=precision))
    )  # fmt: skip
    tokens = lab.tokens().sample_tokens("val").long()
    with torch.inference_mode(), narrowed(trained, precision) as net:
        expected = F.cross_entropy(net(tokens).flatten(0, 1).float(), tokens.flatten())
    assert found == pytest.approx(float(expected), rel=1e-6)
    assert 1e-5 < abs(found / exact - 1) < 0.01


def test_a_grid_is_filled_with_white() -> None:
    """By hand: five images in 2 × 3."""
    grid = Grid.square(np.zeros((5, 4, 4, 3), np.uint8)).images
    assert grid.shape == (2, 3, 4, 4, 3)
    assert grid[1, 1].max() == 0
    assert grid[1, 2].min() == 255
