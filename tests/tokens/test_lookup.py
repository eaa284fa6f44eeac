"""The table of all colours: the same tokens, sooner."""

from pathlib import Path

import numpy as np
import pytest
import torch

from igpt.tokens import lookup
from igpt.tokens.lookup import LookupEncoder, build_table
from igpt.tokens.palette import Palette, colour_codes, decode_colour_codes
from tests.tokens.test_palette import random_palette

RNG = np.random.default_rng(5)


def uneven_palette() -> Palette:
    """Colours crowded as photographs' are, with two the same and pairs that many pixels lie half way between."""
    centres = np.clip(RNG.normal(0, 0.25, (200, 3)), -1, 1)
    grid = np.array([[r, g, b] for r in (-0.5, 0.5) for g in (-0.5, 0.5) for b in (-0.5, 0.5)])
    return Palette(np.concatenate([centres, grid, centres[:1]]).astype(np.float32))


@pytest.mark.parametrize("palette", [random_palette(), uneven_palette(), random_palette(2), random_palette(1500)])
def test_the_table_is_brute_force(palette: Palette) -> None:
    """Independent source: numpy in float64, on random colours and on all greys (many of them ties)."""
    table = build_table(palette)
    grey = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    colours = np.concatenate([RNG.integers(0, 256, (3000, 3), dtype=np.uint8), grey])
    square = (colours[:, None] / 127.5 - 1 - palette.centres.astype(np.float64)) ** 2
    expected = ((square[..., 0] + square[..., 1]) + square[..., 2]).argmin(-1)
    codes = colour_codes(torch.from_numpy(colours))
    assert np.array_equal(table[codes.numpy()], expected)
    assert np.array_equal(palette.encode(torch.from_numpy(colours)).numpy(), expected)
    assert torch.equal(decode_colour_codes(codes), torch.from_numpy(colours).long())


def test_it_is_used_once_it_pays_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: the same tokens before and after; the next encoder reads the file; a damaged one is made anew."""
    palette = random_palette(16)
    pixels = torch.from_numpy(RNG.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8))
    monkeypatch.setattr(lookup, "PAYS", 1500)
    encoder = LookupEncoder(palette, tmp_path)
    expected = encoder(pixels)
    assert torch.equal(expected, palette.encode(pixels))
    assert not list(tmp_path.rglob("*.npy"))
    assert torch.equal(encoder(pixels), expected)
    assert torch.equal(encoder(pixels), expected)
    (path,) = tmp_path.rglob("*.npy")
    monkeypatch.setattr(lookup, "build_table", None)  # nothing is made again
    assert torch.equal(LookupEncoder(palette, tmp_path)(pixels), expected)
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:1000])
    assert torch.equal(LookupEncoder(palette, tmp_path)(pixels), expected)
    np.save(path, np.full(256**3, 99, dtype=np.int16))  # tokens that are not there
    assert torch.equal(LookupEncoder(palette, tmp_path)(pixels), expected)


def test_it_wants_bytes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="uint8"):
        LookupEncoder(random_palette(), tmp_path)(torch.zeros(2, 2, 3))
