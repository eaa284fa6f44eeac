"""What every tokenizer promises, and a run with each from training to every task that reads its weights."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from igpt.checkpoint import huggingface
from igpt.checkpoint.find import find_weights
from igpt.data.source import plain_pixels
from igpt.distributed.process_state import num_threads
from igpt.hub import ImageGPT
from igpt.metric.result import Result
from igpt.report.folder import RunFolder
from igpt.run.components import Components
from igpt.run.execute import prepare_task
from igpt.tokens.palette_tokenizer import PaletteTokenizer
from igpt.tokens.patches import PatchTokenizer, cut_patches
from igpt.tokens.pixel_order import PixelOrder
from igpt.tokens.rgb import RGBTokenizer
from igpt.tokens.tokenizer import Tokenizer, count_decided_rows
from igpt.tokens.tokenizer_registry import TOKENIZER, TOKENIZERS, save_tokenizer, tokenizer_from_dict, tokenizer_to_dict
from igpt.tokens.vqvae import VQVAE, VQVAEConfig, init_weights, scale_pixels
from igpt.tokens.vqvae_tokenizer import VQVAETokenizer
from tests.app.test_demo import build_workbench
from tests.configs import built
from tests.data.conftest import photo
from tests.tokens.test_palette import random_palette

SIDE = 16  # pixels a side; of a run 8, the digits'
ROWS = 10  # given rows of pixels


def make_pixels(n: int, side: int = SIDE) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(photo(seed, side, side)) for seed in range(n)]))


def make_vqvae(side: int, *, order: str = "raster", **config: Any) -> VQVAETokenizer:
    """A VQ-VAE that was never trained: weights are drawn, vectors standardised, codes are vectors."""
    values = {
        "factor": 2, "codes": 24, "code_width": 4, "hidden": 8, "residual_blocks": 1, "quantizer": "ema", "loss": "l2",
        "commitment": 0.25, "decay": 0.99, "unquantised_steps": 0, "restart_below": 0.0,
    }  # fmt: skip
    network = VQVAE(VQVAEConfig(**{**values, **config}))
    init_weights(network, 0)
    photos, last = scale_pixels(make_pixels(6, 32)), network.encoder[-1]
    with torch.no_grad():
        vectors = network.encoder(photos).permute(0, 2, 3, 1).flatten(0, 2)
        last.weight.div_(vectors.std(0)[:, None, None, None])
        last.bias.sub_(vectors.mean(0)).div_(vectors.std(0))
    if network.config.quantizer == "ema":
        vectors = (vectors - vectors.mean(0)) / vectors.std(0)
        drawn = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))
        network.quantizer.codebook.copy_(vectors[drawn[: network.config.codes]])
    return VQVAETokenizer(network, side, PixelOrder.from_name(side // network.config.factor, order))


def make_patches() -> PatchTokenizer:
    """Its centres are patches of photographs."""
    centres = cut_patches(make_pixels(2), 2).flatten(0, 1)[::5][:24].numpy() / 127.5 - 1
    return PatchTokenizer(centres.astype(np.float32), 2, PixelOrder.from_name(SIDE // 2, "random:1"))


@dataclass(frozen=True)
class Case:
    """A tokenizer under test."""

    make: Callable[[], Tokenizer]  # for images of SIDE pixels
    decided: int  # of ROWS given rows, those that do not change with what is drawn below, by hand
    settings: tuple[str, ...]  # of a run on digits; "" stands for the folder of its trained tokenizer
    decided_of_run: int  # the same of 5 rows, in a run
    is_exact: bool = True  # every token comes back from its pixels


FSQ: dict[str, Any] = {"quantizer": "fsq", "codes": 64}
# A pixel of the decoder with one residual block depends on tokens at most 3 rows below its own.
CASES = {
    "palette": Case(lambda: PaletteTokenizer(random_palette(40), PixelOrder.from_name(SIDE, "raster")), 10,
                    ("tokens=fitted",), 5),
    "permuted": Case(lambda: PaletteTokenizer(random_palette(40), PixelOrder.from_name(SIDE, "random:1")), 10,
                     ("tokens=fitted", "tokens.order=random:1"), 5),
    "patches": Case(make_patches, 10, ("tokens=patches", "tokens.k=24", "tokens.iterations=5"), 4),
    "rgb": Case(lambda: RGBTokenizer(PixelOrder.from_name(SIDE, "random:1")), 10, ("tokens=rgb",), 5),
    "vqvae": Case(lambda: make_vqvae(SIDE), 5, ("tokens=vqvae", "tokens.path="), 1, is_exact=False),
    "fsq": Case(lambda: make_vqvae(SIDE, **FSQ), 5, ("tokens=vqvae", "tokens.path="), 1, is_exact=False),
}  # fmt: skip
OF_RUNS = {  # trained tokenizers that decide some pixels of 8 rows
    "vqvae": lambda: make_vqvae(8, residual_blocks=0),
    "fsq": lambda: make_vqvae(8, residual_blocks=0, **FSQ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def tokenizer(case: Case) -> Tokenizer:
    return case.make()


def test_every_kind_is_here() -> None:
    assert {case.make().kind for case in CASES.values()} == TOKENIZERS.keys()


def test_tokens_fit_their_grid(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(make_pixels(5))
    assert (tokens.dtype, tokens.shape) == (torch.int64, (5, tokenizer.grid.n_ctx))
    assert tokenizer.grid.n_ctx == tokenizer.grid.rows * tokenizer.grid.columns * tokenizer.grid.channels
    assert tokens.min() >= 0
    assert len(tokens.unique()) > 3
    assert tokens.max() < tokenizer.n_vocab
    assert tokenizer.decode(tokens).shape == (5, SIDE, SIDE, 3)
    for wrong in (-1, tokenizer.n_vocab):
        with pytest.raises(ValueError, match="tokens lie in 0 … "):
            tokenizer.decode(torch.full_like(tokens, wrong))


def test_tokens_depend_on_their_image_alone(tokenizer: Tokenizer) -> None:
    """Invariant: not on the other images, their number, the memory format, the threads, the precision of the run."""
    pixels = make_pixels(20)
    expected = tokenizer.encode(pixels)
    assert torch.equal(torch.cat([tokenizer.encode(some) for some in pixels.split(3)]), expected)
    assert torch.equal(tokenizer.encode(pixels.flip(0)).flip(0), expected)
    channels_first = pixels.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(tokenizer.encode(channels_first), expected)
    assert torch.equal(tokenizer.encoder(None)(pixels), expected)
    for count in (1, 2):
        with num_threads(count):
            assert torch.equal(tokenizer.encode(pixels), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.encode(pixels), expected)
    assert len(tokenizer.encode(pixels[:0])) == 0


def test_there_and_back(tokenizer: Tokenizer, case: Case) -> None:
    """Round trip: of all tokens; of a learned tokenizer of a share, whatever the batch and the memory format."""
    tokens = torch.randint(tokenizer.n_vocab, (7, tokenizer.grid.n_ctx), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(tokenizer.decode(tokens))
    singly = torch.from_numpy(np.concatenate([tokenizer.decode(some) for some in tokens.split(1)]))
    assert torch.equal(singly, images)
    back = tokenizer.encode(images) == tokens
    if case.is_exact:
        assert back.all()
    by_two = torch.cat([tokenizer.encode(some) for some in images.split(2)]) == tokens
    channels_first = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for other in (by_two, tokenizer.encode(channels_first) == tokens):
        assert other.double().mean() == back.double().mean()


def test_given_tokens_know_nothing_below(tokenizer: Tokenizer, case: Case) -> None:
    """Invariant: hidden pixels change no given token, unknown tokens no row that is to stay; by hand: these rows."""
    pixels = make_pixels(6)
    generator = torch.Generator().manual_seed(0)
    for rows in (0, 5, ROWS, SIDE):
        known = tokenizer.known_tokens(rows)
        given = tokenizer.encode_top(pixels, rows)
        hidden = pixels.clone()
        hidden[:, rows:] = torch.randint(256, hidden[:, rows:].shape, generator=generator, dtype=torch.uint8)
        assert torch.equal(tokenizer.encode_top(hidden, rows)[:, known], given[:, known])
        visible = tokenizer.visible_pixels(known)
        assert bool(visible.all()) == (rows == SIDE)
        if tokenizer.reach:
            visible[count_decided_rows(tokenizer, rows) :] = False
        drawn = torch.randint(tokenizer.n_vocab, given.shape, generator=generator)
        images, others = (tokenizer.decode(torch.where(known, given, tokens)) for tokens in (drawn, drawn.flip(0)))
        assert np.array_equal(images[:, visible.numpy()], others[:, visible.numpy()])
        assert rows == SIDE or not np.array_equal(images, others)
    assert torch.equal(tokenizer.encode_top(pixels, SIDE), tokenizer.encode(pixels))
    assert count_decided_rows(tokenizer, ROWS) == case.decided
    assert [count_decided_rows(tokenizer, rows) for rows in (0, SIDE)] == [0, SIDE]
    for wrong in (-1, SIDE + 1):
        for ask in (tokenizer.known_tokens, lambda rows: tokenizer.encode_top(pixels, rows)):
            with pytest.raises(ValueError, match=f"a prompt has 0 to {SIDE} rows"):
                ask(wrong)


def test_saved_and_read_it_is_the_same(tokenizer: Tokenizer) -> None:
    """Round trip: as JSON; another tokenizer has another hash."""
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer_to_dict(tokenizer))))
    assert (again, again.hash, again.grid, again.side) == (tokenizer, tokenizer.hash, tokenizer.grid, tokenizer.side)
    pixels = make_pixels(4)
    tokens = tokenizer.encode(pixels)
    assert torch.equal(again.encode(pixels), tokens)
    assert np.array_equal(again.decode(tokens), tokenizer.decode(tokens))
    assert sum(case.make().hash == tokenizer.hash for case in CASES.values()) == 1


NETWORK = ("model.n_layer=1", "model.n_embd=16", "task.steps=4", "task.batch_size=16", "task.warmup_steps=1",
           "task.val_every=2", "task.log_every=1", "task.checkpoint_every=2")  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A run with a tokenizer, and other runs that start from its weights."""

    folder: Path
    case: Case
    settings: tuple[str, ...]

    def build(self, name: str, *overrides: str) -> Components:
        """The parts of another run, in the folder `name` beside it."""
        place = self.folder.parent
        shared = (f"paths.cache={place / 'cache'}", "trainer=cpu", "callbacks=none", "logger=none")
        components = built(*overrides, *shared)
        components.run_dir = place / name
        return components

    def run(self, name: str, *overrides: str) -> Result:
        """A task without its page and pictures; one that trains goes on from the checkpoints in its folder."""
        components = self.build(name, *overrides)
        RunFolder(components.run_dir).start(components.run.config, None, components.run.input_hashes)
        return prepare_task(components)(components)


@pytest.fixture(scope="module", params=[name for name in CASES if name != "palette"])  # which other tests train with
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    place, case = tmp_path_factory.mktemp("every"), CASES[request.param]
    if request.param in OF_RUNS:
        save_tokenizer(place / "tokenizer" / "model" / TOKENIZER, OF_RUNS[request.param]())
    settings = tuple(f"{each}{place / 'tokenizer'}" if each.endswith("path=") else each for each in case.settings)
    trained = Trained(place / "trained", case, settings)
    trained.run("trained", "task=pretrain", *settings, *NETWORK)
    return trained


def test_it_goes_on_where_it_stopped(trained: Trained) -> None:
    """Invariant: resumed from step 2, the weights are those of the run that was never stopped, to the bit."""
    stopped = trained.folder.with_name("stopped")
    shutil.copytree(trained.folder, stopped, ignore=shutil.ignore_patterns("model", "*_0000004.*"))
    (stopped / "checkpoints" / "latest").write_text("step_0000002.ckpt\n")
    trained.run("stopped", "task=pretrain", *trained.settings, *NETWORK)
    before, after = (find_weights(str(place)).net().state_dict() for place in (trained.folder, stopped))
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_the_weights_carry_their_tokenizer(trained: Trained) -> None:
    """Invariant: also in a checkpoint, and in an export in our own format; Hugging Face's holds palettes alone."""
    weights = find_weights(str(trained.folder))
    tokenizer, network = weights.tokenizer, weights.metadata.network
    assert (network.n_ctx, network.n_vocab) == (tokenizer.grid.n_ctx, tokenizer.n_vocab)
    trained.run("export", "task=export", "task.format=igpt", f"init={trained.folder}")
    for path in (trained.folder / "checkpoints" / "step_0000002.ckpt", trained.folder.with_name("export")):
        assert find_weights(str(path)).tokenizer == tokenizer
    assert RunFolder(trained.folder).read_run()["files_sha256"]["tokens.path"] in (None, tokenizer.hash)
    refusal = "row by row" if isinstance(tokenizer, PaletteTokenizer) else "a palette of colours only"
    with pytest.raises(ValueError, match=refusal):
        huggingface.check_exportable(weights)


def test_another_tokenizer_is_refused(trained: Trained) -> None:
    init = f"init={trained.folder}"
    with pytest.raises(ValueError, match=r"was trained on other tokens \(.*than this run's \(17 colours, "):
        trained.build("other", "task=evaluate", "tokens=fitted", init).check_weights()
    trained.build("same", "task=evaluate", *trained.settings, init).check_weights()


def test_samples(trained: Trained) -> None:
    result = trained.run("sample", "task=sample", "task.count=4", f"init={trained.folder}")
    tokenizer = find_weights(str(trained.folder)).tokenizer
    drawn = torch.from_numpy(result.arrays["samples"]).long()
    assert drawn.shape == (4, tokenizer.grid.n_ctx)
    assert np.array_equal(result.grids["samples"].images.reshape(4, 8, 8, 3), tokenizer.decode(drawn))


def test_completions_keep_what_is_given(trained: Trained, caplog: pytest.LogCaptureFixture) -> None:
    """Invariant: tokens of the given rows alone; what is shown as given stays in every completion."""
    reading = ("task.count=2", "task.completions=2", "task.rows=5", f"init={trained.folder}")
    components = trained.build("complete", "task=complete", *reading)
    result = prepare_task(components)(components)
    tokenizer = components.tokenizer
    pixels = torch.from_numpy(plain_pixels(components.source.split("val"), result.provenance["images"]))
    known = tokenizer.known_tokens(5)
    given = tokenizer.encode_top(pixels, 5)[:, known]
    drawn = torch.from_numpy(result.arrays["completions"]).long()
    assert torch.equal(drawn.view(2, 2, -1)[:, :, known], given[:, None].expand(-1, 2, -1))
    visible = tokenizer.visible_pixels(known).numpy()
    images = result.grids["completions"].images  # (2, 4, 8, 8, 3)
    assert np.array_equal(images[:, 0], tokenizer.decode(tokenizer.encode(pixels)))
    assert (images[:, 1, ~visible] == 127).all()
    assert np.array_equal(images[:, 1, visible], tokenizer.decode(tokenizer.encode_top(pixels, 5))[:, visible])
    decided = trained.case.decided_of_run
    stays = visible if not tokenizer.reach else np.arange(8)[:, None].repeat(8, 1) < decided
    for column in (2, 3):
        assert np.array_equal(images[:, column, stays], images[:, 1, stays])
    for text in (caplog.text, "".join(result.warnings)):  # in the log and on the page
        assert (f"the upper {decided} of the 5 given rows stay as they are" in text) == (decided < 5)


def test_nothing_hidden_is_seen(trained: Trained) -> None:
    """Invariant: images that are alike in the given rows have the same completions, in the demo and from Python."""
    pixels = make_pixels(2, 8)
    pixels[1, :5] = pixels[0, :5]
    model = ImageGPT.from_weights(find_weights(str(trained.folder)))
    one, other = (model.complete(image.numpy(), rows=5, seed=1) for image in pixels)
    assert np.array_equal(one, other)
    bench = build_workbench(trained.build("demo", "task=demo", f"init={trained.folder}"))
    chosen = bench.choices(0, 1)[0]
    images = [chosen.__class__(image.numpy(), 7, "made") for image in pixels]
    assert np.array_equal(*(bench.show_prompt(image, 5) for image in images))
    known = bench.data.tokenizer.known_tokens(5)
    visible = bench.data.tokenizer.visible_pixels(known).numpy()
    assert (bench.show_prompt(images[0], 5)[~visible] == 127).all()
    assert bench.prompt_rows(5) == trained.case.decided_of_run
    how: dict[str, Any] = {"rows": 5, "completions": 1, "seed": 0, "temperature": 1.0, "top_k": None}
    first, *_, last = drawings = list(bench.complete(images[0], **how))
    for drawing, of_other in zip(drawings, bench.complete(images[1], **how), strict=True):
        assert np.array_equal(drawing.pixels, of_other.pixels)
    assert np.array_equal(first.pixels[0], bench.show_prompt(images[0], 5))
    assert (last.rows, first.rows) == (8, known.sum() * 8 / len(known))
    bench.stop()


def test_losses_and_probes_are_of_its_tokens(trained: Trained) -> None:
    """By hand: the frequency baseline of its own tokens, under a uniform one; a probe above chance."""
    init = f"init={trained.folder}"
    uniform = np.log(find_weights(str(trained.folder)).tokenizer.n_vocab)
    numbers = trained.run("evaluate", "task=evaluate", "task.baseline_images=50", init).numbers
    assert numbers["val/unigram"].value < uniform
    assert abs(numbers["val/loss_gen"].value - uniform) < 0.5  # hardly trained
    probe = ("task=probe", "task.C_grid=[1.0]", "task.baselines=[]", "task.test=false")
    assert trained.run("probe", *probe, init).numbers["val/accuracy"].value > 0.15
