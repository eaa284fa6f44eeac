"""Weights at another resolution: positions interpolated, everything else as it was, and what has no meaning refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.igpt_format import CheckpointMetadata, save_model
from igpt.checkpoint.resized import resize_table, resize_weights
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.run import launch
from igpt.tokens.palette import Palette
from igpt.tokens.palette_tokenizer import PaletteTokenizer
from igpt.tokens.patches import PatchTokenizer
from igpt.tokens.pixel_order import PixelOrder
from igpt.tokens.rgb import RGBTokenizer
from igpt.tokens.tokenizer import TokenGrid
from tests.configs import save_small
from tests.conftest import ROOT, perturbed

SIZES: dict[str, Any] = {"n_layer": 2, "n_embd": 24, "n_head": 3, "causal": True}
PALETTE = Palette(np.linspace(-1, 1, 51, dtype=np.float32).reshape(17, 3))


def save(folder: Path, tokenizer: Any, **changed: Any) -> Path:
    grid, order = tokenizer.grid, tokenizer.order
    config = GPTConfig(
        **SIZES, n_ctx=grid.n_ctx, n_vocab=tokenizer.n_vocab, grid=tuple(grid),
        permutation=None if order.is_raster else order.permutation, **changed,
    )  # fmt: skip
    metadata = CheckpointMetadata(config, tokenizer, {"name": "ar"}, "small", "toy", 1, 0)
    save_model(folder / "model", perturbed(GPT(config)).state_dict(), metadata)
    return folder


@pytest.mark.parametrize("to", [7, 3])
def test_the_interpolation_is_pillows(to: int) -> None:
    """Independent source: Pillow's bicubic resize of float images, up and down, every channel by itself."""
    table = torch.randn(5 * 5, 2 * 3, generator=torch.Generator().manual_seed(0))  # two tokens a cell, three channels
    table = table.view(25, 2, 3).reshape(50, 3)
    resized = resize_table(table, TokenGrid(5, 5, 2), TokenGrid(to, to, 2)).view(to, to, 6)
    for channel in range(6):
        plane = Image.fromarray(table.view(5, 5, 6)[..., channel].numpy().copy())
        expected = np.asarray(plane.resize((to, to), Image.Resampling.BICUBIC))
        assert np.abs(resized[..., channel].numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("positions", ["learned", "factorised", "rope_2d", "learned+rope_2d"])
@pytest.mark.parametrize("of_pixels", [True, False])
def test_only_positions_change(tmp_path: Path, positions: str, of_pixels: bool) -> None:
    """Invariants: all but tables of positions is as it was, to the bit; at the same size nothing changes."""
    order = PixelOrder.from_name(4, "raster")
    tokenizer = PaletteTokenizer(PALETTE, order) if of_pixels else RGBTokenizer(order)
    weights = find_weights(str(save(tmp_path, tokenizer, positions=positions)))
    assert resize_weights(weights, 4) is weights
    resized = resize_weights(weights, 6)
    before, after = weights.net().state_dict(), resized.net().state_dict()
    tables = {"wpe", "positions.factorised.row", "positions.factorised.column"} & before.keys()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - tables)
    for name in tables:
        assert len(after[name]) == len(before[name]) * (36 if name == "wpe" else 6) // (16 if name == "wpe" else 4)
    if weights.net().has_position_table:  # a sum of vectors is interpolated as its parts are
        expected = resize_table(weights.net().position_table(), tokenizer.grid, resized.tokenizer.grid)
        assert torch.allclose(resized.net().position_table(), expected, atol=1e-5)
    assert (resized.sha256, resized.resized_from, resized.tokenizer.side) == (weights.sha256, 4, 6)
    assert resized.metadata.network == replace(
        weights.metadata.network, n_ctx=resized.tokenizer.grid.n_ctx,
        grid=None if weights.metadata.network.grid is None else tuple(resized.tokenizer.grid),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("order", "changed", "message"),
    [
        ("random", {}, "pixels row by row"),
        ("raster", {"relative_bias": True}, "relative_bias"),
        ("raster", {"attention": "local", "radius": 1}, "attention=local"),
        ("patches", {}, "tokens of pixels, and they read 5 patches"),
    ],
)
def test_what_has_no_meaning_is_refused(tmp_path: Path, order: str, changed: dict[str, Any], message: str) -> None:
    tokenizer: Any = PaletteTokenizer(PALETTE, PixelOrder.from_name(4, "raster" if order == "patches" else order))
    if order == "patches":
        centres = np.random.default_rng(0).uniform(-1, 1, (5, 12)).astype(np.float32)
        tokenizer = PatchTokenizer(centres, 2, PixelOrder.from_name(4, "raster"))
    weights = find_weights(str(save(tmp_path, tokenizer, **changed)))
    with pytest.raises(ValueError, match=rf"task\.resize_positions of .* needs .*{message}"):
        resize_weights(weights, 16)


def test_fine_tuning_and_probing_at_another_resolution(tmp_path: Path) -> None:
    """Weights of 4×4 pixels, on digits of 8×8: an error names the setting; with it the kept model has 64 positions."""
    init = save_small(tmp_path / "run", n_ctx=16)
    how = ["data=digits", f"init={init}", "callbacks=none", "logger=none", "trainer=cpu"]
    how += [f"paths.{name}={tmp_path / name}" for name in ("runs", "cache")]
    of_weights = ["model=checkpoint", "tokens=checkpoint", "objective=checkpoint"]
    tune = [*how, *of_weights, "task=finetune", "task.steps=2", "task.val_every=2", "task.learning_rate=1e-30"]
    with pytest.raises(ValueError, match=r"reads 4×4 pixels .* gives 8×8: task\.resize_positions=true interpolates"):
        launch.run(*tune, conf=ROOT / "conf")
    result, folder = launch.run(*tune, "task.resize_positions=true", conf=ROOT / "conf")
    assert folder is not None
    kept, given = find_weights(str(folder)), load_file(init / "model" / "model.safetensors")
    assert (kept.metadata.network.n_ctx, kept.tokenizer.side) == (64, 8)
    assert result.provenance["positions_resized_from"] == 4
    wpe = resize_table(given["wpe"], TokenGrid(4, 4), TokenGrid(8, 8))
    assert torch.allclose(kept.state()["wpe"].read(), wpe, atol=1e-6)
    probe = ["task=probe", "task.resize_positions=true", "task.C_grid=[1.0]", "task.baselines=[]", "task.test=false"]
    probed, _ = launch.run(*how, *probe, conf=ROOT / "conf")
    assert probed.provenance["positions_resized_from"] == 4
    assert probed.numbers["val/accuracy"].value > 0.3
