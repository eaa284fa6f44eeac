"""RGB values as tokens: nothing is lost, channels follow one another, and losses are in bits per dimension."""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import igpt
from igpt.data.images import Images
from igpt.metric.result import Result
from igpt.run import launch
from igpt.run.targets import checked_partial
from igpt.tokens.pixel_order import PixelOrder
from igpt.tokens.rgb import RGBSettings, RGBTokenizer
from igpt.tokens.tokenizer import TokenGrid
from igpt.tokens.tokenizer_registry import tokenizer_from_dict, tokenizer_to_dict
from tests.app.test_demo import build_workbench
from tests.configs import CONF, built
from tests.data.conftest import SETTINGS, encoded, photo


def make_tokenizer(side: int, order: str = "raster") -> RGBTokenizer:
    return RGBTokenizer(PixelOrder.from_name(side, order))


def run(place: Path, *overrides: str) -> tuple[Result, Path]:
    result, folder = launch.run(*overrides, f"paths.cache={place / 'cache'}", f"paths.runs={place / 'runs'}", conf=CONF)
    assert folder is not None
    return result, folder


def make_pixels(n: int, side: int) -> torch.Tensor:
    return torch.randint(256, (n, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_channels_follow_one_another() -> None:
    """By hand: red, green, blue of the first pixel, of the second, …; in another order pixels move, not channels."""
    pixels = torch.tensor([[[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [255, 0, 12]]]], dtype=torch.uint8)
    tokenizer = make_tokenizer(2)
    assert tokenizer.encode(pixels).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 255, 0, 12]]
    other = RGBTokenizer(PixelOrder(2, (2, 0, 3, 1)))
    assert other.encode(pixels).tolist() == [[7, 8, 9, 1, 2, 3, 255, 0, 12, 4, 5, 6]]
    assert (tokenizer.n_vocab, tokenizer.grid, tokenizer.grid.n_ctx, tokenizer.side) == (256, TokenGrid(2, 2, 3), 12, 2)
    assert RGBSettings(order="raster").sizes(32) == (TokenGrid(32, 32, 3), 256)


@pytest.mark.parametrize("order", ["raster", "random:3"])
def test_there_and_back(order: str) -> None:
    """Round trip: pixels of every level. Another order is another tokenizer."""
    tokenizer, pixels = make_tokenizer(8, order), make_pixels(40, 8)
    tokens = tokenizer.encode(pixels)
    assert tokens.dtype == torch.int64
    assert len(tokens.unique()) == 256
    assert np.array_equal(tokenizer.decode(tokens), pixels.numpy())
    assert tokenizer.decode(tokens[:0]).shape == (0, 8, 8, 3)
    assert tokenizer != make_tokenizer(8, "random:4")


def test_lossless_images_come_back_to_the_bit(shared: Path, tmp_path: Path) -> None:
    """Round trip: CIFAR-100's PNG files at 32×32, pixels of the test split through tokens and back."""
    settings = {**SETTINGS, "path": str(shared / "data" / "cifar100-sample"), "resolution": 32, "label_column": []}
    source: Images = checked_partial({"_target_": "igpt.data.images.Images", **settings}, "data")(cache=tmp_path)
    split = source.split("test")
    pixels, _ = split.read(range(50), [0] * 50)
    tokenizer = make_tokenizer(32)
    assert np.array_equal(tokenizer.decode(tokenizer.encode(torch.from_numpy(pixels))), pixels)
    assert split.pixel_changes == ""


@pytest.mark.parametrize("order", ["raster", "random:3"])
def test_what_is_known_of_some_rows(order: str) -> None:
    """By hand: of the top 3 of 4 rows, three tokens a pixel; a pixel that lacks a token is not shown."""
    tokenizer = make_tokenizer(4, order)
    known = tokenizer.known_tokens(3)
    assert int(known.sum()) == 3 * 4 * 3
    assert tokenizer.visible_pixels(known).tolist() == [[True] * 4] * 3 + [[False] * 4]
    for channel in range(3):
        lacking = known.clone()
        place = tokenizer.order.permutation.index(5)  # row 1, column 1
        lacking[3 * place + channel] = False
        expected = tokenizer.visible_pixels(known)
        expected[1, 1] = False
        assert torch.equal(tokenizer.visible_pixels(lacking), expected)
    with pytest.raises(ValueError, match="a prompt has 0 to 4 rows"):
        tokenizer.known_tokens(5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hash": "0" * 12}, "the pixel order's hash is"),
        ({"permutation": [0, 0, 1, 2]}, "must hold 0 … 3 once"),
        ({"permutation": [0, 1, 2.0, 3]}, "holds no whole numbers"),
        ({"permutation": None}, "holds no whole numbers"),
    ],
)
def test_a_description_that_is_none(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer_from_dict(tokenizer_to_dict(make_tokenizer(2)) | changed)


SMALL = ("model.n_layer=2", "model.n_embd=16", "model.n_head=2", "task.steps=2", "task.batch_size=8",
         "task.warmup_steps=1", "task.val_every=2", "task.log_every=1", "task.checkpoint_every=2", "callbacks=none",
         "logger=none", "trainer=cpu")  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of 8×8 as PNG, and the test split once more as JPEG."""
    place = tmp_path_factory.mktemp("rgb")
    for kind in ("png", "jpeg"):
        for split, of_split, first, n in (("train", "png", 0, 24), ("test", kind, 100, 5)):
            folder = place / kind / split
            folder.mkdir(parents=True)
            for i in range(n):
                (folder / f"{i}.{of_split}").write_bytes(encoded(photo(first + i, 8, 8), of_split))
    return place


def data(place: Path, name: str = "png") -> tuple[str, ...]:
    return "data=folder", f"data.path={place / name}", "data.resolution=8"


@pytest.fixture(scope="module")
def trained(place: Path) -> tuple[Result, Path]:
    return run(place, "task=pretrain", "tokens=rgb", *data(place), *SMALL)


def test_bits_per_dimension_are_those_of_the_images(trained: tuple[Result, Path], place: Path) -> None:
    """Independent source: the log-likelihood of every image in float64, divided by its 192 values, 64 pixels."""
    result, folder = trained
    scored, _ = run(
        place, "task=evaluate", *data(place), "task.split=test", f"init={folder}", "trainer=cpu", "logger=none"
    )
    model = igpt.load(folder)
    pixels = np.stack([np.asarray(photo(100 + i, 8, 8)) for i in range(5)])
    tokens = torch.from_numpy(pixels.reshape(5, 192).astype(np.int64))
    nats = F.cross_entropy(model.logits(tokens).double().mT, tokens, reduction="none").sum(1).numpy()  # (5,)
    bits, per_pixel = scored.numbers["test/bits_per_dim"], scored.numbers["test/bits_per_pixel"]
    assert bits.value == pytest.approx(nats.mean() / math.log(2) / 192, rel=1e-6)
    assert bits.stderr == pytest.approx(nats.std(ddof=1) / math.log(2) / 192 / 5**0.5, rel=1e-4)
    assert (bits.unit, bits.n) == ("bits/dim", 5)
    assert per_pixel.value == pytest.approx(nats.mean() / math.log(2) / 64, rel=1e-6)
    assert per_pixel.stderr == pytest.approx(3 * bits.stderr)
    assert scored.numbers["test/bits_per_token"].value == pytest.approx(bits.value)
    assert result.curves["val/bits_per_dim"].y[-1] == result.numbers["val/bits_per_dim"].value
    assert scored.numbers["test/unigram"].value < math.log(256)


def test_of_other_pixels_it_has_another_name(
    place: Path, trained: tuple[Result, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: images from JPEG files or resized ones have no `bits_per_dim` among their numbers; a line says why."""
    taken = (f"init={trained[1]}", "task.split=test", "trainer=cpu", "logger=none")
    runs = {
        "test: JPEG files": ("task=evaluate", *data(place, "jpeg"), *taken),
        "val: resized from 8×8": ("task=pretrain", "tokens=rgb", *data(place), "data.resolution=4", *SMALL),
    }
    for expected, overrides in runs.items():
        split, _, reason = expected.partition(": ")
        caplog.clear()
        with caplog.at_level(logging.INFO):
            numbers = run(place, *overrides)[0].numbers
        number = numbers[f"{split}/bits_per_dim_of_these_pixels"]
        assert number.unit == "bits/dim of these pixels"
        assert number.value == pytest.approx(numbers[f"{split}/bits_per_token"].value)
        assert f"{split}/bits_per_dim" not in numbers
        lines = [record.message for record in caplog.records if "of these pixels" in record.message]
        assert [line.rpartition(": ")[2] for line in lines if line.startswith(split)] == [reason]


def test_patches_have_bits_per_pixel_and_masks_have_none(place: Path) -> None:
    """By hand: a patch of 2×2 pixels is one token; the loss of masked tokens is no likelihood of an image."""
    settings = ("tokens=patches", "tokens.k=8", "tokens.iterations=2")
    numbers = run(place, "task=pretrain", *settings, *data(place), *SMALL)[0].numbers
    assert numbers["val/bits_per_pixel"].value == pytest.approx(numbers["val/bits_per_token"].value / 4)
    assert not [name for name in numbers if "per_dim" in name]
    masked = run(place, "task=pretrain", "tokens=rgb", "objective=bert", *data(place), *SMALL)[0].numbers
    assert [name for name in masked if "bits" in name] == ["val/bits_per_token"]


def test_completions_show_pixels_that_are_complete(trained: tuple[Result, Path], place: Path) -> None:
    """Invariant: what was given is the original to the bit; the demo draws whole rows, three tokens a pixel."""
    _, folder = trained
    init = f"init={folder}"
    given = ("task.rows=3", "task.count=2", "task.completions=2", "task.split=test")
    result, _ = run(place, "task=complete", *given, *data(place), init, "trainer=cpu", "logger=none")
    grid = result.grids["completions"].images  # (2, 4, 8, 8, 3)
    files = [np.asarray(photo(100 + i, 8, 8)) for i in result.provenance["images"]]
    assert np.array_equal(grid[:, 0], np.stack(files))
    assert np.array_equal(grid[:, 1:, :3], np.repeat(grid[:, :1, :3], 3, axis=1))
    assert (grid[:, 1, 3:] == 127).all()
    build = built("task=demo", init, *data(place), f"paths.cache={place / 'cache'}", "trainer=cpu", "task.split=test")
    bench = build_workbench(build)
    drawings = list(bench.complete(bench.choices(0, 1)[0], rows=5, completions=1, seed=0, temperature=1.0, top_k=None))
    assert [drawing.rows for drawing in drawings] == [5, 6, 7, 8]
    assert [(drawing.pixels[0, -1] == 127).all() for drawing in drawings] == [True, True, True, False]
    bench.stop()


def test_pixels_are_as_the_original_in_all_three_values(
    trained: tuple[Result, Path], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: one of three values is another in every second of the pixels drawn, so half of them are as they were."""

    def draw_nearly(net: Any, sampling: Any, *, prompts: torch.Tensor, **_: Any) -> torch.Tensor:
        drawn = prompts.clone()
        drawn[:, 3 * 32 + 2 :: 6] ^= 1  # blue, from row 4 on
        return drawn

    monkeypatch.setattr("igpt.task.complete.draw_images", draw_nearly)
    init = f"init={trained[1]}"
    result, _ = run(place, "task=complete", "task.count=2", *data(place), init, "trainer=cpu", "logger=none")
    assert result.numbers["complete/pixels_as_original"].value == 0.5
