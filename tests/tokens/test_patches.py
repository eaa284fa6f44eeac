"""Patches as tokens, against a slow rewrite, and from training to every task that reads the weights."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import initialize_config_dir

from igpt.app.workbench import Workbench
from igpt.checkpoint.find import find_weights
from igpt.data.digits import Digits
from igpt.metric.result import Result
from igpt.run.launch import launch
from igpt.settings.fields import parse_settings
from igpt.tokens.patches import PatchSettings, PatchTokenizer, cut_patches
from igpt.tokens.pixel_order import PixelOrder
from igpt.tokens.tokenizer_registry import tokenizer_from_dict, tokenizer_to_dict
from tests.app.test_demo import build_workbench
from tests.data.conftest import photo
from tests.test_conf import CONF, built

SETTINGS: dict[str, Any] = {"patch": 2, "k": 24, "n_patches": 4000, "iterations": 5, "order": "raster", "seed": 0}


@pytest.fixture(scope="module")
def tokenizer() -> PatchTokenizer:
    centres = np.random.default_rng(0).uniform(-1, 1, (24, 12)).astype(np.float32)
    return PatchTokenizer(centres, 2, PixelOrder.from_name(4, "random:1"))


def make_pixels(n: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(photo(seed, 8, 8)) for seed in range(n)]))


def test_every_patch_is_that_of_the_nearest_centre(tokenizer: PatchTokenizer) -> None:
    """Independent source: a loop over patches and centres in float64, in the order of the permutation."""
    pixels = make_pixels(5)
    tokens = tokenizer.encode(pixels)
    for image, row in zip(pixels.numpy(), tokens.tolist(), strict=True):
        for place, token in zip(tokenizer.order.permutation, row, strict=True):
            y, x = divmod(place, 4)
            patch = image[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].reshape(12) / 127.5 - 1
            assert token == int(((tokenizer.centres.astype(float) - patch) ** 2).sum(1).argmin())
    assert torch.equal(tokenizer.encode(pixels[3:4]), tokens[3:4])


def test_a_tie_goes_to_the_lowest_index() -> None:
    """Invariant: two centres that are equally far, in any batch."""
    centres = np.zeros((4, 12), np.float32)
    centres[0], centres[1, 0], centres[2, 0] = 1, 0.5, -0.5
    twins = PatchTokenizer(
        np.stack([centres[0], centres[1], centres[1], centres[2]]), 2, PixelOrder.from_name(1, "raster")
    )
    grey = torch.full((3, 2, 2, 3), 128, dtype=torch.uint8)
    assert twins.encode(grey).flatten().tolist() == [1, 1, 1]


def test_many_ties_at_once() -> None:
    """By hand: the first and the third centre are the same, and the nearest of half the patches."""
    ends = np.stack([np.full(12, 0.2, np.float32), np.full(12, -0.2, np.float32), np.full(12, 0.2, np.float32)])
    tied = PatchTokenizer(np.concatenate([ends, np.ones((1, 12), np.float32)]), 2, PixelOrder.from_name(4, "raster"))
    pixels = torch.full((64, 8, 8, 3), 255, dtype=torch.uint8)
    pixels[:, :, :4] = 153  # 0.2 in [-1, 1]: the first and the third centre
    assert tied.encode(pixels).view(64, 4, 4).unique(dim=0).tolist() == [[[0, 0, 3, 3]] * 4]


def test_there_and_back(tokenizer: PatchTokenizer) -> None:
    """Round trip: images made of the patches themselves, and the description of the tokenizer."""
    tokens = torch.randint(24, (3, 16), generator=torch.Generator().manual_seed(0))
    pixels = tokenizer.decode(tokens)
    assert pixels.shape == (3, 8, 8, 3)
    assert torch.equal(tokenizer.encode(torch.from_numpy(pixels)), tokens)
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer_to_dict(tokenizer))))
    assert again == tokenizer
    assert np.array_equal(again.decode(tokens), pixels)
    assert tokenizer != PatchTokenizer(tokenizer.centres, 2, PixelOrder.from_name(4, "raster"))
    with pytest.raises(ValueError, match=r"tokens lie in 0 … 23, got 0 to 24"):
        tokenizer.decode(torch.tensor([[*range(15), 24]]))


def test_what_is_known_of_some_rows(tokenizer: PatchTokenizer) -> None:
    """By hand: of 5 rows of pixels, two rows of patches are known, which show 4 rows of pixels."""
    known = tokenizer.known_tokens(5)
    assert [tokenizer.order.permutation[i] for i in known.nonzero().flatten().tolist()] != list(range(8))
    assert sorted(tokenizer.order.permutation[i] for i in known.nonzero().flatten().tolist()) == list(range(8))
    visible = tokenizer.visible_pixels(known)
    assert visible[:4].all()
    assert not visible[4:].any()
    with pytest.raises(ValueError, match="a prompt has 0 to 8 rows"):
        tokenizer.known_tokens(9)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hash": "0" * 12}, "the patches' hash is"),
        ({"patch": 3}, r"patches of 3 pixels a side are float32 \(2 … 4096, 27\)"),
        ({"patch": 2.0}, "whole numbers"),
        ({"permutation": [0, 0, 1, 2]}, "must hold 0 … 3 once"),
        ({"centres": [[9.0] * 12] * 24}, "finite numbers in"),
        ({"centres": None}, "float32"),
    ],
)
def test_a_description_that_is_none(tokenizer: PatchTokenizer, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer_from_dict(tokenizer_to_dict(tokenizer) | changed)


def test_it_is_fitted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Invariant: the same from the cache; another seed or size is another; fewer patches than k are said."""
    digits = Digits(
        name="digits", resolution=8, val_fraction=0.1, test_fraction=0.1, split_seed=0, shift=0, shift_share=0.0
    )
    first = PatchSettings(**SETTINGS).build(digits, tmp_path)
    assert (first.n_vocab, first.grid.n_ctx, first.side) == (24, 16, 8)
    result = list((tmp_path / "patches").iterdir())
    assert PatchSettings(**SETTINGS).build(digits, tmp_path) == first
    assert list((tmp_path / "patches").iterdir()) == result
    other = PatchSettings(**{**SETTINGS, "patch": 4}).build(digits, tmp_path)
    assert (other.grid.n_ctx, other.centres.shape[1]) == (4, 48)
    distinct = len(np.unique(cut_patches(torch.from_numpy(digits.split("train").pixels), 1).flatten(0, 1), axis=0))
    with caplog.at_level(logging.WARNING):
        every = PatchSettings(**{**SETTINGS, "patch": 1, "k": 512, "n_patches": 10**6}).build(digits, tmp_path)
    assert every.n_vocab == distinct == 17
    assert "hold 17 distinct ones, tokens.k=512" in caplog.text
    with pytest.raises(ValueError, match=r"tokens\.patch=3 does not divide data\.resolution=8"):
        PatchSettings(**{**SETTINGS, "patch": 3}).sizes(8)
    for name, value in (("k", 1), ("n_patches", 0), ("iterations", 0)):
        with pytest.raises(ValueError, match=rf"tokens\.{name} must be at least {value + 1}, got {value}"):
            parse_settings(PatchSettings, {**SETTINGS, name: value}, "tokens")


def test_settings_are_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokens\.iterations must be at least 1, got 0"):
        run(tmp_path, *TRAIN, "tokens.iterations=0")
    assert not list(tmp_path.glob("*"))


TRAIN = ("task=pretrain", "tokens=patches", "tokens.k=24", "tokens.iterations=5", "model.n_layer=2", "model.n_embd=16",
         "task.steps=4", "task.batch_size=16", "task.warmup_steps=1", "task.val_every=0", "task.log_every=1",
         "task.checkpoint_every=2", "callbacks=none", "logger=none", "trainer=cpu")  # fmt: skip


def run(place: Path, *overrides: str) -> tuple[Result, Path]:
    build = built(*overrides, f"paths.cache={place / 'cache'}", f"paths.runs={place / 'runs'}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        result = launch(build.run.cfg, choices=build.run.choices, overrides=list(overrides))
    return result, place / "runs" / build.run.name


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    return run(tmp_path_factory.mktemp("patches"), *TRAIN)


def test_the_weights_carry_their_tokenizer(trained: tuple[Result, Path]) -> None:
    result, folder = trained
    weights = find_weights(str(folder))
    assert isinstance(weights.tokenizer, PatchTokenizer)
    assert (weights.metadata.network.n_ctx, weights.metadata.network.n_vocab) == (16, 24)
    assert result.provenance["tokenizer"] == weights.tokenizer.hash
    assert find_weights(str(folder / "checkpoints" / "step_0000002.ckpt")).tokenizer == weights.tokenizer


@pytest.mark.parametrize(
    "overrides",
    [
        ("task=sample", "task.count=3"),
        ("task=complete", "task.count=2", "task.completions=2", "task.rows=5"),
        ("task=evaluate", "task.baseline_images=50"),
        ("task=probe", "task.C_grid=[1.0]", "task.baselines=[]", "task.test=false"),
    ],
)
def test_every_task_reads_them(
    trained: tuple[Result, Path], overrides: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """What is given of an image is shown, the rest is drawn; losses and baselines are of the same tokens."""
    _, folder = trained
    result, _ = run(folder.parents[1], *overrides, f"init={folder}", "trainer=cpu", "logger=none")
    if overrides[0] == "task=complete":
        grid = result.grids["completions"].images  # (2, 4, 8, 8, 3)
        assert "4 of the 5 rows are fixed: a token shows several rows" in caplog.text
        assert (grid[:, 1, 4:] == 127).all()  # of five rows of pixels, two rows of patches are known
        assert np.array_equal(grid[:, 2, :4], grid[:, 0, :4])
    if overrides[0] == "task=evaluate":
        assert result.numbers["val/unigram"].value < np.log(24)
    if overrides[0] == "task=sample":
        assert result.grids["samples"].images.shape[2:] == (8, 8, 3)


def test_another_tokenizer_is_refused(trained: tuple[Result, Path]) -> None:
    _, folder = trained
    for overrides, message in (
        (("task=evaluate", "tokens=fitted"), r"was trained on other tokens \(24 patches of 2×2 pixels, .*17 colours"),
        (("task=export",), "reads 24 patches of 2×2 pixels, Hugging Face's ImageGPT a palette of colours only"),
        (("task=palette", *TRAIN[1:4]), "task=palette looks at colours, this run's tokens are 24 patches"),
    ):
        init = () if overrides[0] == "task=palette" else (f"init={folder}",)
        with pytest.raises(ValueError, match=message):
            run(folder.parents[1], *overrides, *init, "trainer=cpu", "logger=none")


def test_it_goes_on_where_it_stopped(trained: tuple[Result, Path], tmp_path: Path) -> None:
    """Invariant: resumed from step 2, the weights are those of the run that was never stopped, to the bit."""
    _, folder = trained
    stopped = tmp_path / "runs" / folder.name
    stopped.parent.mkdir()
    shutil.copytree(folder, stopped)
    for path in (stopped / "result.json", stopped / "checkpoints" / "step_0000004.ckpt"):
        path.unlink()
    shutil.rmtree(stopped / "model")
    (stopped / "checkpoints" / "latest").write_text("step_0000002.ckpt\n")
    run(tmp_path, *TRAIN, f"resume={stopped}")
    before, after = (find_weights(str(place)).net().state_dict() for place in (folder, stopped))
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_the_demo_shows_them(trained: tuple[Result, Path], tmp_path: Path) -> None:
    """Completions grow by rows of patches, and are those of the task."""
    _, folder = trained
    build = built("task=demo", f"init={folder}", f"paths.cache={folder.parents[1] / 'cache'}", "trainer=cpu")
    bench: Workbench = build_workbench(build)
    chosen = bench.choices(0, 1)[0]
    assert (bench.show_prompt(chosen, 5)[4:] == 127).all()
    drawings = list(bench.complete(chosen, rows=4, completions=1, seed=0, temperature=1.0, top_k=None))
    assert [drawing.rows for drawing in drawings] == [4, 6, 8]
    bench.stop()
