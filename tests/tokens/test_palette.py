"""The palette: exact nearest colours, OpenAI's decoding, files that are refused."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from igpt.tokens.palette import Palette
from tests.conftest import Planted


def random_palette(k: int = 512, seed: int = 0) -> Palette:
    return Palette(np.random.default_rng(seed).uniform(-1, 1, (k, 3)).astype(np.float32))


def test_encode_is_the_nearest_centre() -> None:
    """Independent source: brute force in numpy float64, on random pixels."""
    palette = random_palette()
    pixels = np.random.default_rng(1).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    distance = ((pixels[..., None, :] / 127.5 - 1 - palette.centres.astype(np.float64)) ** 2).sum(-1)
    assert np.array_equal(palette.encode(torch.from_numpy(pixels)).numpy(), distance.argmin(-1))


def test_a_tie_goes_to_the_lowest_index() -> None:
    """By hand: the same colour twice, and a pixel half way between two colours (0.5 and -0.5 from 0)."""
    twice = Palette(np.array([[1, 1, 1], [0.25, 0, 0], [0.25, 0, 0]], dtype=np.float32))
    assert twice.encode(torch.tensor([[140, 127, 127]], dtype=torch.uint8)).tolist() == [1]
    white = 1.0
    between = Palette(np.array([[white, 0.5, white], [white, -0.5, white], [-1, 0, 0]], dtype=np.float32))
    mixed = torch.tensor([[255, 255, 255], [255, 0, 255]], dtype=torch.uint8)
    assert between.encode(mixed).tolist() == [0, 1]


def test_every_colour_decodes_and_encodes_to_itself() -> None:
    """Round trip over all 512 colours, when each is a pixel's own colour."""
    rng = np.random.default_rng(0)
    codes = rng.choice(256**3, 512, replace=False)
    pixels = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1)
    palette = Palette((pixels / 127.5 - 1).astype(np.float32))
    assert np.array_equal(palette.colours, pixels)
    assert palette.encode(torch.from_numpy(palette.colours)).tolist() == list(range(512))


def test_decode_rounds_as_openai_does() -> None:
    """By hand, rint(127.5 · (c + 1)): -1 → 0, 1 → 255, 0 → 127.5 → the even 128, 0.5 → 191.25 → 191."""
    centres = np.array([[-1, 0, 1], [0.5, -0.5, 0.25]], dtype=np.float32)
    assert Palette(centres).colours.tolist() == [[0, 128, 255], [191, 64, 159]]


def test_decode_refuses_what_is_no_token() -> None:
    with pytest.raises(ValueError, match=r"0 … 511, got 512"):
        random_palette().decode(torch.tensor([512]))


def test_encode_wants_bytes() -> None:
    with pytest.raises(ValueError, match=r"uint8"):
        random_palette().encode(torch.zeros(4, 4, 3))


def test_file_round_trip_is_bit_exact(tmp_path: Path) -> None:
    """Round trip; numpy reads the file as the released one is read."""
    palette = random_palette()
    palette.save(tmp_path / "p.npy")
    assert np.array_equal(np.load(tmp_path / "p.npy", allow_pickle=False), palette.centres)
    assert Palette.load(tmp_path / "p.npy").hash == palette.hash


def test_the_hash_sees_colour_and_order() -> None:
    """Invariant."""
    palette = random_palette()
    swapped = palette.centres[[1, 0, *range(2, 512)]]
    nudged = palette.centres.copy()
    nudged[5, 1] = np.nextafter(nudged[5, 1], np.float32(2))
    assert len({palette.hash, Palette(swapped).hash, Palette(nudged).hash}) == 3


@pytest.mark.parametrize(
    ("centres", "message"),
    [
        (np.zeros((512, 4), np.float32), r"shape \(k, 3\), got \(512, 4\)"),
        (np.zeros(512, np.float32), r"shape \(k, 3\)"),
        (np.zeros((512, 3), np.float64), "float64"),
        (np.zeros((1, 3), np.float32), "2 to 4096 colours, got 1"),
        (np.zeros((4097, 3), np.float32), "got 4097"),
        (np.full((4, 3), np.nan, np.float32), "not finite"),
        (np.full((4, 3), 255, np.float32), r"\[-1, 1\]"),
    ],
)
def test_a_bad_palette_is_refused(tmp_path: Path, centres: np.ndarray, message: str) -> None:
    np.save(tmp_path / "bad.npy", centres)
    with pytest.raises(ValueError, match=message):
        Palette.load(tmp_path / "bad.npy")


def test_a_pickle_in_a_palette_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    np.save(tmp_path / "objects.npy", np.array([Planted(mark)], dtype=object), allow_pickle=True)
    (tmp_path / "bare.npy").write_bytes(pickle.dumps(Planted(mark)))
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("objects.npy", "bare.npy", "empty.npy"):
        with pytest.raises(ValueError, match=f"{name} is no .npy array of numbers"):
            Palette.load(tmp_path / name)
    assert not mark.exists()
    with pytest.raises(ValueError, match="no palette at"):
        Palette.load(tmp_path / "nowhere.npy")
