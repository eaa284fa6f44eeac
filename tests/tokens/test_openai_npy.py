"""OpenAI's token arrays as images: every token comes back, and what is wrong is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from igpt.data.classes import CIFAR10
from igpt.tokens.datamodule import TokenDataModule
from igpt.tokens.openai_npy import OpenAITokens
from igpt.tokens.palette import Palette
from igpt.tokens.palette_tokenizer import PaletteTokenizer
from igpt.tokens.pixel_order import PixelOrder
from tests.conftest import Planted
from tests.tokens.test_palette import random_palette

K, R, N = 512, 32, 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Arrays of every split, in several kinds of whole numbers, with a palette of 512 colours."""
    draw = np.random.default_rng(0)
    random_palette(K).save(tmp_path / "colours.npy")
    for i, (short, dtype) in enumerate({"tr": np.int64, "va": np.uint16, "te": np.int32}.items()):
        np.save(tmp_path / f"cifar10_{short}X.npy", draw.integers(0, K, (N + i, R * R)).astype(dtype))
        np.save(tmp_path / f"cifar10_{short}Y.npy", np.eye(10, dtype=np.float32)[draw.integers(0, 10, N + i)])
    return tmp_path


def source(folder: Path, **changed: Any) -> OpenAITokens:
    settings = {"name": "cifar10", "resolution": R, "path": str(folder), "clusters": str(folder / "colours.npy")}
    return OpenAITokens(**{**settings, **changed})


def test_every_token_comes_back(folder: Path) -> None:
    """Round trip: token → pixel → token, through the data module, for every split; labels are those of the rows."""
    images = source(folder)
    data = TokenDataModule(
        source=images,
        tokenizer=PaletteTokenizer(images.palette, PixelOrder.from_name(R, "raster")),
        seed=0,
        num_workers=0,
    )
    for split, short in (("train", "tr"), ("val", "va"), ("test", "te")):
        ids = np.load(folder / f"cifar10_{short}X.npy")
        assert np.array_equal(data.sample_tokens(split).numpy(), ids)
        one_hot = np.load(folder / f"cifar10_{short}Y.npy")
        assert np.array_equal(np.eye(10)[images.split(split).labels], one_hot)
        read = images.split(split).read([3, 0], [0, 0])
        assert np.array_equal(read.labels, images.split(split).labels[[3, 0]])
    assert images.n_class == 10


def test_class_names_are_those_of_the_released_arrays(folder: Path) -> None:
    """By hand: CIFAR-10's and ImageNet's, where both the name and the number of classes are theirs; else none."""
    assert source(folder).class_names == CIFAR10
    for n_class, known in ((10, False), (1000, True)):
        for short in ("tr", "va", "te"):
            (folder / f"imagenet_{short}X.npy").write_bytes((folder / f"cifar10_{short}X.npy").read_bytes())
            n_image = len(np.load(folder / f"cifar10_{short}X.npy"))
            np.save(folder / f"imagenet_{short}Y.npy", np.eye(n_class, dtype=np.float32)[np.arange(n_image) % n_class])
        names = source(folder, name="imagenet").class_names
        assert (names is not None) == known
    assert names is not None
    assert (names[0], names[999]) == ("tench", "toilet tissue")


def test_a_permutation_is_applied_to_them(folder: Path) -> None:
    """Invariant: position i of the sequence is pixel π(i) of what the file has row by row."""
    images, raster = source(folder), PixelOrder.from_name(R, "random:3")
    data = TokenDataModule(source=images, tokenizer=PaletteTokenizer(images.palette, raster), seed=0, num_workers=0)
    ids = np.load(folder / "cifar10_vaX.npy")
    assert np.array_equal(data.sample_tokens("val").numpy(), ids[:, np.asarray(raster.permutation)])


def test_only_the_split_that_is_read_is_needed(folder: Path) -> None:
    for path in folder.glob("cifar10_t*.npy"):
        path.unlink()
    assert len(source(folder).split("val")) == N + 1
    with pytest.raises(ValueError, match=r"cifar10_trX\.npy is not there"):
        len(source(folder).split("train"))


def test_tokens_of_another_palette(folder: Path) -> None:
    """Their pixels would become other tokens: refused before an image is read."""
    with pytest.raises(ValueError, match="its tokens were made with palette"):
        TokenDataModule(
            source=source(folder), seed=0, num_workers=0,
            tokenizer=PaletteTokenizer(random_palette(K, seed=5), PixelOrder.from_name(R, "raster")),
        )  # fmt: skip


def saved(name: str, value: Any) -> Callable[[Path], object]:
    return lambda folder: np.save(folder / name, value, allow_pickle=True)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (saved("cifar10_vaX.npy", np.full((7, R * R), K)), "image 0 has tokens 512 to 512, the palette has 0 … 511"),
        (saved("cifar10_vaX.npy", np.full((7, R * R), -1)), "image 0 has tokens -1 to -1"),
        (saved("cifar10_vaX.npy", np.zeros((7, R * R), "f4")), "float32 .*expected whole numbers"),
        (saved("cifar10_vaX.npy", np.zeros((7, 100), "i4")), r"\(7, 100\), expected whole numbers \(images, 1024\)"),
        (saved("cifar10_vaX.npy", np.array([{}])), "no .npy array of numbers"),
        (saved("cifar10_vaY.npy", np.eye(10)), r"expected one-hot labels \(7, classes\)"),
        (saved("cifar10_vaY.npy", np.zeros((7, 10))), "row 0 is not one-hot"),
        (saved("cifar10_vaY.npy", np.arange(7)), "expected one-hot labels"),
        (lambda f: (f / "cifar10_vaY.npy").unlink(), r"vaY\.npy is not there"),
        (lambda f: (f / "cifar10_vaX.npy").write_bytes((f / "cifar10_vaX.npy").read_bytes()[:999]), "is damaged"),
        (lambda f: [path.unlink() for path in f.glob("cifar10*")], "has no cifar10_vaX.npy"),
        (lambda f: Palette(np.repeat(random_palette(256).centres, 2, 0)).save(f / "colours.npy"), "are one pixel"),
    ],
)
def test_what_is_refused(folder: Path, fault: Callable[[Path], object], message: str) -> None:
    fault(folder)
    with pytest.raises(ValueError, match=message):
        source(folder).split("val").read(range(7), range(7))


def test_code_in_an_array_is_not_run(folder: Path) -> None:
    np.save(folder / "cifar10_vaX.npy", np.array([Planted(folder / "ran")], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"no \.npy array of numbers"):
        source(folder).split("val").read([0], [0])
    assert not (folder / "ran").exists()


def test_files_have_to_be_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path=FOLDER.*data\.clusters="):
        OpenAITokens(name="imagenet", resolution=R, path=None, clusters=None)


def test_a_pixel_for_every_colour() -> None:
    """Independent source: colours as OpenAI decodes them, rint(127.5 (c + 1)), are nearest to their own centre."""
    palette = random_palette(K)
    pixels = torch.from_numpy(np.rint(127.5 * (palette.centres + 1)).astype(np.uint8))
    assert torch.equal(palette.encode(pixels), torch.arange(K))
