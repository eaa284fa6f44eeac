"""A VQ-VAE as tokenizer: exact tokens, what is known and visible, its file, and files that are none."""

import base64
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from igpt.checkpoint.find import find_vqvae
from igpt.data.digits import Digits
from igpt.distributed.process_state import float32_matmul_precision, num_threads
from igpt.tokens.code_search import nearest_codes
from igpt.tokens.exact_encoding import encode_exactly, encode_windows
from igpt.tokens.pixel_order import PixelOrder
from igpt.tokens.tokenizer import TokenGrid, Tokenizer
from igpt.tokens.tokenizer_registry import read_tokenizer, save_tokenizer, tokenizer_to_dict
from igpt.tokens.vqvae import VQVAE, VQVAEConfig, init_weights, scale_pixels
from igpt.tokens.vqvae_tokenizer import VQVAESettings, VQVAETokenizer, unrounded_float32

CONFIG: dict[str, Any] = {
    "factor": 2, "codes": 256, "code_width": 4, "hidden": 12, "residual_blocks": 1, "quantizer": "ema", "loss": "l2",
    "commitment": 0.25, "decay": 0.99, "unquantised_steps": 60, "restart_below": 0.01,
}  # fmt: skip
SIDE = 32
CODEBOOK = "quantizer.codebook"


def draw_pixels(n: int, side: int = SIDE) -> Tensor:
    """Smooth images with noise."""
    draw = torch.Generator().manual_seed(5)
    coarse = 255 * torch.rand(n, 3, 4, 4, generator=draw)
    smooth = F.interpolate(coarse, (side, side), mode="bilinear") + 8 * torch.randn(n, 3, side, side, generator=draw)
    return smooth.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def build_network(**changed: Any) -> VQVAE:
    """A random network; its codes lie among the vectors of 24 images, half of them in pairs with a border at one.

    Where the float32 encoder's rounding decides between the codes of a pair, its tokens are as good as random.
    """
    network = VQVAE(VQVAEConfig(**{**CONFIG, **changed})).requires_grad_(False)
    init_weights(network, 1)
    if network.config.quantizer == "fsq":
        return network
    vectors = encode_by_hand(network, draw_pixels(24)).flatten(0, 1)  # (N, D) float64
    draw = torch.Generator().manual_seed(0)
    some = vectors[torch.randperm(len(vectors), generator=draw)[: network.config.codes]]
    aside = 0.01 * torch.randn(len(some) // 4, some.shape[1], generator=draw)
    some[: len(aside)], some[-len(aside) :] = some[: len(aside)] + aside, some[: len(aside)] - aside
    network.quantizer.codebook.copy_(some)
    return network


def build_tokenizer(network: VQVAE | None = None, order: str = "raster", side: int = SIDE) -> VQVAETokenizer:
    network = network or build_network()
    return VQVAETokenizer(network, side, PixelOrder.from_name(side // network.config.factor, order))


def encode_by_hand(network: VQVAE, pixels: Tensor) -> Tensor:
    """Independent: the encoder from its weights by their names, one image at a time, in float64: → (B, n², D)."""
    weights = {name: value.double() for name, value in network.encoder.state_dict().items()}
    halvings, blocks = network.config.factor // 2, network.config.residual_blocks
    images = []
    for image in pixels:
        x = (image.double().permute(2, 0, 1) / 127.5 - 1)[None]
        for i in range(halvings):
            x = F.conv2d(x, weights[f"{2 * i}.weight"], weights[f"{2 * i}.bias"], stride=2, padding=1).relu()
        first = 2 * halvings
        x = F.conv2d(x, weights[f"{first}.weight"], weights[f"{first}.bias"], padding=1)
        for i in range(first + 1, first + 1 + blocks):
            inner = F.conv2d(x.relu(), weights[f"{i}.conv_3.weight"], weights[f"{i}.conv_3.bias"], padding=1)
            x = x + F.conv2d(inner.relu(), weights[f"{i}.conv_1.weight"], weights[f"{i}.conv_1.bias"])
        last = first + blocks + 2
        x = F.conv2d(x.relu(), weights[f"{last}.weight"], weights[f"{last}.bias"])
        images.append(x[0].flatten(1).T)
    return torch.stack(images)


def find_tokens(network: VQVAE, pixels: Tensor) -> Tensor:
    """Independent: the nearest code by all distances in float64."""
    if network.config.quantizer == "fsq":
        codes = network.quantizer.lookup(torch.arange(network.config.codes)).double()
        levels = [sorted(set(column.tolist())) for column in codes.T]
        half = torch.tensor([(len(level) - 1) * 1.001 / 2 for level in levels]).double()
        bounded = (encode_by_hand(network, pixels) + (0.5 / half).atanh()).tanh() * half - 0.5
        vectors = bounded / torch.tensor([len(level) // 2 for level in levels])
    else:
        vectors, codes = encode_by_hand(network, pixels), network.quantizer.codebook.double()
    return torch.cdist(vectors, codes, compute_mode="donot_use_mm_for_euclid_dist").argmin(2)


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
@pytest.mark.parametrize("changed", [{}, {"factor": 4, "residual_blocks": 0}], ids=str)
def test_tokens_are_those_of_float64(changed: dict[str, Any]) -> None:
    """Independent source, and invariant: whatever the batch, memory format, threads, precision, autocast or library."""
    network, pixels = build_network(**changed), draw_pixels(24)
    tokenizer, expected = build_tokenizer(network), find_tokens(network, pixels)
    assert torch.equal(tokenizer.encode(pixels), expected)
    for size in (1, 5):
        batches = [tokenizer.encode(some) for some in torch.split(pixels[:10], size)]
        assert torch.equal(torch.cat(batches), expected[:10])
    planes = pixels.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # the same images, colour by colour
    for threads in (2, 4):
        with num_threads(threads):
            assert torch.equal(tokenizer.encode(planes), expected)
    with float32_matmul_precision("medium"), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(pixels[:6]), expected[:6])
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(tokenizer.encode(pixels[:6]), expected[:6])
    shuffled = build_tokenizer(network, "random:3")
    assert torch.equal(shuffled.order.unflatten(shuffled.encode(pixels)).flatten(1), expected)
    assert tokenizer.encode(pixels[:0]).shape == (0, tokenizer.grid.n_ctx)
    used = network(scale_pixels(pixels), torch.arange(24))[1].tokens.view(24, -1)
    assert (used != expected).any()  # float32 alone gives others: this test sees the difference


def test_threads_leave_the_precision_as_it_was() -> None:
    """Invariant: after two that encode at once, in whatever order they end, the precision is that of before."""
    inside, left = threading.Event(), threading.Event()

    def encode(begun: threading.Event, end: threading.Event) -> None:
        with unrounded_float32(torch.device("cpu")):
            begun.set()
            end.wait(0.1)

    with float32_matmul_precision("medium"):
        first = threading.Thread(target=encode, args=(inside, threading.Event()))
        first.start()
        inside.wait(5)
        second = threading.Thread(target=encode, args=(threading.Event(), left))
        second.start()
        first.join()
        left.set()
        second.join()
        assert torch.get_float32_matmul_precision() == "medium"


def test_tokens_of_fsq_are_those_of_float64() -> None:
    """Independent source, with a vector on a border in each dimension, of eight of an image."""
    network, pixels, differing = build_network(quantizer="fsq"), draw_pixels(2), 0
    levels = torch.tensor([8, 8, 4])
    shift = (1 / ((levels - 1) * 1.001)).atanh()  # tanh is 0 at a border
    for place in range(8):
        network.encoder[-1].bias -= encode_by_hand(network, pixels[:1])[0, 31 * place].float() + shift
        expected = find_tokens(network, pixels)
        assert torch.equal(build_tokenizer(network).encode(pixels), expected)
        differing += int((network(scale_pixels(pixels), torch.arange(2))[1].tokens.view(2, -1) != expected).sum())
    assert differing  # as without float64


def test_a_wrong_float32_encoder_is_noticed() -> None:
    """Invariant: were the error of float32 far above its bound, the vectors of the image come from float64."""
    network, pixels = build_network(), draw_pixels(6)
    expected, exact = find_tokens(network, pixels), build_network().double()
    for weight in network.parameters():
        weight.mul_(1 + 1e-3 * torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)))
    vectors = network.encoder(scale_pixels(pixels)).permute(0, 2, 3, 1).flatten(0, 2)
    assert (nearest_codes(vectors, network.quantizer.codebook).view(6, -1) != expected).sum() > 20
    encoded = encode_exactly(network, exact, pixels)
    assert torch.equal(encoded.tokens.flatten(1), expected)
    assert encoded.n_recomputed >= 6 * 256


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize(("blocks", "shape"), [(0, (32, 32)), (2, (48, 32)), (2, (4, 36)), (1, (12, 12))])
def test_windows_are_the_image(factor: int, blocks: int, shape: tuple[int, int]) -> None:
    """Invariant: a vector from its window is that from the image, to 1e-12, at every place; also at the borders."""
    network = VQVAE(VQVAEConfig(**{**CONFIG, "factor": factor, "residual_blocks": blocks})).double()
    network.requires_grad_(False)
    init_weights(network, 2)
    pixels = draw_pixels(2, 48)[:, : shape[0], : shape[1]]
    expected = network.encoder(scale_pixels(pixels, torch.float64)).permute(0, 2, 3, 1)  # (2, h, w, D)
    image, row, column = (torch.ones(expected.shape[:3])).nonzero(as_tuple=True)
    windows = encode_windows(network, pixels, image, row, column)
    assert torch.allclose(windows, expected.flatten(0, 2), atol=1e-12, rtol=0)


def test_few_vectors_are_computed_again() -> None:
    """Of codes that lie anywhere few are in doubt, of pairs with a border at a vector those, of equal codes none."""
    pixels, network, twins, same = draw_pixels(8), build_network(), build_network(), build_network()
    network.quantizer.codebook[:64] = network.quantizer.codebook[64:128]
    same.quantizer.codebook.copy_(same.quantizer.codebook[:1].expand(256, 4))
    numbers = [encode_exactly(each, each_64, pixels).n_recomputed for each, each_64 in (
        (network, build_copy(network)), (twins, build_copy(twins)), (same, build_copy(same))
    )]  # fmt: skip
    assert 8 <= numbers[0] < 40
    assert numbers[1] > numbers[0]
    assert numbers[2] == 8


def build_copy(network: VQVAE) -> VQVAE:
    copy = VQVAE(network.config).requires_grad_(False)
    copy.load_state_dict(network.state_dict())
    return copy.double()


@pytest.mark.parametrize("factor", [2, 4])
def test_tokens_of_the_top(factor: int) -> None:
    """Invariant: rows below do not change the known tokens, which are those of the image cut there."""
    tokenizer = build_tokenizer(build_network(factor=factor), "random:2")
    pixels, rows = draw_pixels(3), 13
    known = tokenizer.known_tokens(rows)
    top = tokenizer.encode_top(pixels, rows)
    other = pixels.clone()
    other[:, rows // factor * factor :] = 255 - other[:, rows // factor * factor :]
    assert torch.equal(tokenizer.encode_top(other, rows), top)
    assert not torch.equal(tokenizer.encode(other)[:, known], top[:, known])
    grid, full = (tokenizer.order.unflatten(each) for each in (top, tokenizer.encode(pixels)))
    n_row, reach = rows // factor, tokenizer.config.encoder_reach
    assert torch.equal(grid[:, : n_row - reach], full[:, : n_row - reach])
    assert torch.equal(grid[:, n_row:], grid[:, n_row - 1 : n_row].expand_as(grid[:, n_row:]))
    assert torch.equal(tokenizer.encode_top(pixels, SIDE), tokenizer.encode(pixels))
    assert not tokenizer.encode_top(pixels, factor - 1).any()
    with pytest.raises(ValueError, match="a prompt has 0 to 32 rows"):
        tokenizer.encode_top(pixels, 33)


@pytest.mark.parametrize("changed", [{}, {"factor": 4, "residual_blocks": 2}, {"residual_blocks": 0}], ids=str)
def test_how_far_a_token_reaches(changed: dict[str, Any]) -> None:
    """Invariant, in float64: another token changes pixels up to `reach` beside its own, and no further."""
    network = build_network(**changed)
    tokenizer, exact = build_tokenizer(network), build_copy(network)
    n, factor, reach = tokenizer.order.side, tokenizer.config.factor, tokenizer.reach
    tokens = torch.randint(256, (20, tokenizer.grid.n_ctx), generator=torch.Generator().manual_seed(0))
    place = n // 2 * n + n // 2
    tokens[:, torch.arange(n * n) != place] = tokens[:1, torch.arange(n * n) != place]
    codes = exact.quantizer.lookup(tokenizer.order.unflatten(tokens)).permute(0, 3, 1, 2)
    images = exact.decoder(codes)  # (20, 3, R, R) float64
    changed_pixels = (images - images[:1]).abs().amax((0, 1)) > 1e-14
    pixels = torch.arange(SIDE)
    near = (pixels >= n // 2 * factor - reach) & (pixels < (n // 2 + 1) * factor + reach)
    assert torch.equal(changed_pixels, near[:, None] & near)
    own = tokenizer.visible_pixels(torch.arange(n * n) == place)
    assert own.sum() == factor**2
    assert own[n // 2 * factor : (n // 2 + 1) * factor, n // 2 * factor : (n // 2 + 1) * factor].all()


def test_decode() -> None:
    """Independent source: the decoder in float64, within a level; and an image does not depend on its batch."""
    tokenizer = build_tokenizer(order="random:1")
    tokens = torch.randint(256, (5, 256), generator=torch.Generator().manual_seed(0))
    pixels = tokenizer.decode(tokens)
    network = build_copy(tokenizer.load_network(torch.device("cpu")))
    codes = network.quantizer.lookup(tokenizer.order.unflatten(tokens)).permute(0, 3, 1, 2)
    levels = ((network.decoder(codes).clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(pixels - levels).max() < 0.501
    assert np.array_equal(np.concatenate([tokenizer.decode(each[None]) for each in tokens]), pixels)
    assert pixels.dtype == np.uint8
    with pytest.raises(ValueError, match=r"tokens lie in 0 … 255, got 0 to 256"):
        tokenizer.decode(torch.tensor([[*range(255), 256]]))


@pytest.mark.parametrize("quantizer", ["ema", "fsq"])
def test_saved_and_read(quantizer: str, tmp_path: Path) -> None:
    """Round trip: the same hash, tokens and images; a tokenizer that differs anywhere has another hash."""
    network, pixels = build_network(quantizer=quantizer), draw_pixels(2)
    tokenizer = build_tokenizer(network)
    assert isinstance(tokenizer, Tokenizer)
    save_tokenizer(tmp_path / "run" / "model" / "tokenizer.json", tokenizer)
    for place in ("run", "run/model", "run/model/tokenizer.json"):
        again = find_vqvae(str(tmp_path / place))
        assert again == tokenizer
        assert hash(again) == hash(tokenizer)
    tokens = tokenizer.encode(pixels)
    assert torch.equal(again.encode(pixels), tokens)
    assert np.array_equal(again.decode(tokens), tokenizer.decode(tokens))
    assert (again.n_vocab, again.side, again.grid.n_ctx) == (256, 32, 256)
    assert again.describe() == "VQ-VAE of 256 codes, 2×2 pixels each"
    others = [build_tokenizer(network, "random"), build_tokenizer(network, side=16)]
    network.decoder[0].bias[0] += 1e-6
    assert len({each.hash for each in [tokenizer, *others, build_tokenizer(network)]}) == 4


def change_weights(saved: dict[str, Any], changed: dict[str, Tensor]) -> str:
    """Other weights in the saved form."""
    tensors = safetensors.torch.load(base64.b64decode(saved["weights"]))
    return base64.b64encode(safetensors.torch.save(tensors | changed)).decode()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda s: {"hash": "0" * 12}, "the VQ-VAE's hash is"),
        (lambda s: {"weights": s["weights"][:-9] + "*" * 9}, "weights are damaged"),
        (lambda s: {"weights": "AAAA" + s["weights"][4:]}, "weights are damaged"),
        (lambda s: {"weights": s["weights"][: len(s["weights"]) // 2]}, "weights are less than the"),
        (lambda s: {"weights": 7}, "weights are less than the"),
        (lambda s: {"config": {**CONFIG, "codes": 128}}, r"not those of its config: quantizer.codebook differs"),
        (lambda s: {"config": {**CONFIG, "codes": 65536, "code_width": 512}}, r"less than the 134,4.* bytes"),
        (lambda s: {"config": {**CONFIG, "hidden": 4096, "residual_blocks": 64}}, "is too large to be saved"),
        (lambda s: {"config": {**CONFIG, "hidden": 10**9}}, "config.hidden must be at most 4096"),
        (lambda s: {"config": {**CONFIG, "more": 1}}, "config has no setting 'more'"),
        (lambda s: {"config": None}, "not described whole"),
        (lambda s: {"side": 64}, "256 tokens of 2×2 pixels are not an image of 64×64"),
        (lambda s: {"side": "32"}, "the side is no whole number"),
        (lambda s: {"permutation": [0] * 256}, "must hold 0 … 255 once"),
        (lambda s: {"weights": change_weights(s, {CODEBOOK: torch.full((256, 4), torch.nan)})},
         "quantizer.codebook holds numbers that are not finite"),
        (lambda s: {"weights": change_weights(s, {CODEBOOK: torch.ones(256, 4).double()})}, "codebook differs"),
        (lambda s: {"weights": change_weights(s, {"more": torch.ones(9)})}, "not those of its config: more differs"),
        (lambda s: {"format": 2}, "is no tokenizer of format 1"),
    ],
)  # fmt: skip
def test_a_file_that_is_none(changed: Any, message: str, tmp_path: Path) -> None:
    """One line that names the file; nothing is made of sizes that its content does not have."""
    saved = {"format": 1, **tokenizer_to_dict(build_tokenizer())}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(saved | changed(saved)))
    with pytest.raises(ValueError, match=message) as error:
        read_tokenizer(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    path.write_text(json.dumps(saved)[:-20])
    with pytest.raises(ValueError, match="is not a JSON file"):
        read_tokenizer(path)


def test_an_encoder_that_overflows() -> None:
    """By hand: beyond the range of float32 the tokens are those of float64; beyond both, or of such weights, a line."""
    network, pixels = build_network(residual_blocks=4), draw_pixels(1)
    for name in ("0.weight", "2.weight"):
        network.encoder.get_parameter(name).mul_(1e38)
    assert torch.equal(build_tokenizer(network).encode(pixels), find_tokens(network, pixels))
    for block in list(network.encoder)[3:7]:
        block.conv_3.weight.mul_(1e38)
        block.conv_1.weight.mul_(1e38)
    with pytest.raises(ValueError, match=r"encoder gives numbers that are not finite: train it again"):
        build_tokenizer(network).encode(pixels)
    network.decoder[0].weight[0] = torch.inf
    with pytest.raises(ValueError, match=r"the VQ-VAE's decoder.0.weight holds numbers that are not finite"):
        build_tokenizer(network)


def test_settings(tmp_path: Path) -> None:
    """By hand: 32 / 2 is 16 a side. It is not fitted to images."""
    settings = VQVAESettings(**CONFIG, path=None, order="raster")
    digits = Digits(
        name="digits", resolution=8, val_fraction=0.1, test_fraction=0.1, split_seed=0, shift=0, shift_share=0.0
    )
    assert settings.sizes(32) == (TokenGrid(16, 16), 256)
    with pytest.raises(ValueError, match=r"tokens.factor=2 does not divide data.resolution=31"):
        settings.sizes(31)
    with pytest.raises(ValueError, match=r"needs a trained tokenizer: tokens.path=RUN_FOLDER of task=tokenizer"):
        settings.build(digits, tmp_path)
