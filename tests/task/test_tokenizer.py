"""`task=tokenizer`: training of a VQ-VAE, its numbers, and what it refuses."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from igpt.checkpoint.find import find_vqvae, find_weights
from igpt.checkpoint.resume import find_checkpoints
from igpt.data.source import ArraySplit
from igpt.distributed.signals import StoppedError
from igpt.metric.result import Result
from igpt.report.closing_table import closing_table
from igpt.run import launch
from igpt.settings.fields import parse_settings
from igpt.settings.training import TokenizerTaskSettings
from igpt.task.train_tokenizer import VQVAEModule, crop_pixels, name_tokenizers
from igpt.tokens import quantizer
from igpt.tokens.datamodule import ONE_BY_ONE, PixelDataModule
from igpt.tokens.patches import PatchSettings
from igpt.tokens.vqvae import VQVAEConfig
from igpt.training.nan_guard import NonFiniteLossError
from igpt.training.trainer import Runner
from igpt.utils import keyed
from tests.conftest import ROOT
from tests.data.conftest import mixture
from tests.task.conftest import TOKENIZER, VQVAE, Arrays, machine, pictures, train_tokenizer
from tests.task.test_finished_step import OwnError
from tests.task.test_stopping import Send

CONFIG = VQVAEConfig(**{key: value for key, value in VQVAE.items() if key not in ("path", "order")})


def tokenizer_hash(folder: Path) -> str:
    return find_vqvae(str(folder)).hash


def test_resumed_it_is_the_same_to_the_bit(tmp_path: Path) -> None:
    """Invariant: stopped before and after the codes start, resumed: curves and every weight of one go; some restart."""
    full = train_tokenizer(tmp_path / "whole")
    for step in (1, 7):
        with pytest.raises(StoppedError):
            train_tokenizer(tmp_path / "cut", callbacks=[Send(signal.SIGTERM, step=step)])
    resumed = train_tokenizer(tmp_path / "cut")
    assert resumed.curves == full.curves
    assert tokenizer_hash(tmp_path / "cut") == tokenizer_hash(tmp_path / "whole")
    assert resumed.numbers == full.numbers
    train_tokenizer(tmp_path / "never", tokens={"restart_below": 0.0})
    assert tokenizer_hash(tmp_path / "never") != tokenizer_hash(tmp_path / "whole")


def test_an_error_while_the_codes_are_updated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: half an update is not saved as the step before it; resumed, all is as if nothing had happened."""
    full = train_tokenizer(tmp_path / "whole", checkpoint_every=2)
    update = quantizer.EMAQuantizer.update

    def fail(self: quantizer.EMAQuantizer, *, step: int, **how: Any) -> None:
        update(self, step=step, **how)
        if step == 8:
            raise OwnError

    with monkeypatch.context() as patch, pytest.raises(OwnError):
        patch.setattr(quantizer.EMAQuantizer, "update", fail)
        train_tokenizer(tmp_path / "cut", checkpoint_every=2)
    assert [path.stem for path in find_checkpoints(tmp_path / "cut")][-1] == "step_0000006"
    assert train_tokenizer(tmp_path / "cut", checkpoint_every=2).curves == full.curves


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    """Invariant: the codes are updated once a step, whatever its passes; validation does not depend on batches."""
    full = train_tokenizer(tmp_path / "whole")
    parts = train_tokenizer(tmp_path / "parts", on=machine(micro_batch=2))
    for name, curve in full.curves.items():
        assert parts.curves[name].y == pytest.approx(curve.y, rel=1e-4)
    assert parts.numbers["val/psnr"].value == pytest.approx(full.numbers["val/psnr"].value, rel=1e-5)
    assert parts.numbers["val/psnr"].n == 21


def test_crops() -> None:
    """Invariant: a square of the image itself at a multiple of the factor, by the image's key alone; all are drawn."""
    pixels = torch.arange(12 * 12 * 3).view(1, 12, 12, 3).expand(200, -1, -1, -1)
    rng_keys = keyed.per_example_keys(5, torch.arange(200))
    crops = crop_pixels(pixels, rng_keys, side=8, multiple=2)
    corners = [divmod(int(crop[0, 0, 0]) // 3, 12) for crop in crops]
    assert set(corners) == {(y, x) for y in (0, 2, 4) for x in (0, 2, 4)}
    assert all(torch.equal(c, p[y : y + 8, x : x + 8]) for c, p, (y, x) in zip(crops, pixels, corners, strict=True))
    assert torch.equal(crop_pixels(pixels[7:9], rng_keys[7:9], side=8, multiple=2), crops[7:9])
    assert torch.equal(crop_pixels(pixels, rng_keys, side=12, multiple=2), pixels)


def test_collapsed_codes_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By hand: one code of 32 used is 3 % and a perplexity of 1: said once, and not before the codes have started."""
    data = PixelDataModule(source=pictures(), seed=0, num_workers=0, plan=ONE_BY_ONE)
    settings = parse_settings(TokenizerTaskSettings, TOKENIZER, "task")
    module = VQVAEModule(machine(), settings, CONFIG, side=12, seed=0, n_val=21)
    runner = Runner(machine=machine(), folder=tmp_path)
    runner.validate(module, data)
    assert "collapsed" not in caplog.text
    assert module.numbers["val/codes_used"].value == 1 / 32
    module.network.quantizer.has_codes = True
    runner.validate(module, data)
    runner.validate(module, data)
    assert caplog.text.count("the codes have collapsed: 3.1 % of 32 are used, perplexity ÷ K is 0.031") == 1
    one = {"codes": 64, "unquantised_steps": 0, "restart_below": 0.0}  # and without validation in the training
    few = ArraySplit(np.full((5, 12, 12, 3), 128, dtype=np.uint8), np.zeros(5, dtype=np.int64))
    grey = Arrays({"train": few, "val": few}, None, None, resolution=12)
    result = train_tokenizer(tmp_path / "grey", source=grey, tokens=one, steps=2, warmup_steps=1, val_every=0)
    assert "the codes have collapsed" in result.warnings[0]


def run_digits(place: Path, *changed: str) -> tuple[Result, Path]:
    """A run of `train.py` on digits, in this process."""
    result, folder = launch.run(
        "task=tokenizer", "data=digits", "trainer=cpu", "tokens.codes=16", "tokens.hidden=8", "tokens.code_width=4",
        "tokens.residual_blocks=1", "tokens.unquantised_steps=3", "task.steps=8", "task.batch_size=8",
        "task.warmup_steps=2", "task.val_every=4", "task.log_every=4", f"paths.runs={place / 'runs'}",
        f"paths.cache={place / 'cache'}", *changed, conf=ROOT / "conf",
    )  # fmt: skip
    assert folder is not None
    return result, folder


def test_a_run_and_its_page(tmp_path: Path) -> None:
    """Invariant: name, files, pictures, the row of k-means, a warning where that is better, what to run next."""
    result, folder = run_digits(tmp_path)
    assert folder.name.startswith("tokenizer-vqvae-digits8-l2-s0-")
    assert {path.name for path in (folder / "model").iterdir()} == {"tokenizer.json"}
    page, warning = (folder / "report.html").read_text(), result.warnings[0]
    assert "does not beat k-means on bare 2×2 patches of the same rate" in warning
    assert warning in page
    assert warning in closing_table(result, folder, 1.0)
    for heading in ("Reconstructions", "Reconstructions while it trained"):
        assert f"<h2>{heading}</h2>" in page
    assert f"python train.py task=pretrain tokens=vqvae tokens.path={folder}" in page
    assert len(list((folder / "reconstructions").iterdir())) == 2
    assert "train/loss" in (folder / "metrics" / "from_0000000" / "metrics.csv").read_text()
    for name, number in result.numbers.items():
        if name.startswith(("val/", "patches/")):
            assert number.n in (150, 150 * 16, 1), name
    assert result.numbers["val/rate"].value == 4 * 16 / 64
    assert run_digits(tmp_path, "model=igpt_pico", "objective=bert", "callbacks=none")[1] == folder  # finished

    _, other = run_digits(tmp_path, "tokens.loss=l1", f"task.compare_with=[{folder}]", "task.patches=false")
    beside = json.loads((other / "result.json").read_text())["numbers"]
    assert beside["vqvae_l2/psnr"]["value"] == pytest.approx(result.numbers["val/psnr"].value)
    assert name_tokenizers([str(folder), str(folder / "model")], side=8).keys() == {"vqvae_l2", "vqvae_l2-2"}
    with pytest.raises(ValueError, match=r"is of 8×8 pixels, data gives 12×12"):
        name_tokenizers([str(folder)], side=12)
    compared, _ = launch.run("task=compare", f"paths.runs={tmp_path / 'runs'}", conf=ROOT / "conf")
    best = max(result.numbers["val/psnr"].value, beside["val/psnr"]["value"])
    assert compared.numbers["best tokenizer/val/psnr"].value == pytest.approx(best)
    with pytest.raises(ValueError, match=r"is of a tokenizer, not a network: tokens=vqvae tokens\.path=RUN_FOLDER"):
        find_weights(str(find_checkpoints(folder)[-1]))


def test_the_row_of_patches(tmp_path: Path) -> None:
    """Independent source: the mean PSNR of `tokens=patches` of the same sizes, in NumPy."""
    source = pictures()
    numbers = train_tokenizer(tmp_path, patches=True, steps=4).numbers
    tokenizer = PatchSettings(patch=2, k=32, n_patches=200_000, iterations=20, order="raster", seed=0).build(
        source, tmp_path / "other"
    )  # type: ignore[arg-type]
    pixels = source.split("val").pixels
    error = tokenizer.decode(tokenizer.encode(torch.from_numpy(pixels))).astype(float) - pixels
    psnr = 10 * np.log10(255**2 / (error**2).mean((1, 2, 3)))
    assert numbers["patches/psnr"].value == pytest.approx(psnr.mean())
    assert numbers["patches/rate"].value == numbers["val/rate"].value == 5 / 4
    assert numbers["patches/tokens_returned"].value == 1


def test_the_share_of_tokens_that_come_back(tmp_path: Path) -> None:
    """Independent source: of the saved tokenizer, encoded, decoded and encoded again in one batch."""
    numbers = train_tokenizer(tmp_path, steps=4).numbers
    pixels = pictures().split("val").pixels
    trained = find_vqvae(str(tmp_path))
    tokens = trained.encode(torch.from_numpy(pixels))
    returned = trained.encode(torch.from_numpy(trained.decode(tokens))) == tokens
    assert numbers["val/tokens_returned"].value == pytest.approx(float(returned.double().mean()))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"crop": 14}, r"^task\.crop=14 is more than the 12 pixels of the images"),
        ({"crop": 7}, r"^tokens\.factor=2 does not divide task\.crop=7: take a multiple"),
        ({"batch_size": 1}, r"^tokens\.codes=32 are more than the 16 vectors of a step"),
        ({"steps": 3}, r"^task\.steps=3 end before the codes begin, after tokens\.unquantised_steps=3"),
        ({"on": {"precision": "bf16-true"}}, r"^trainer\.precision=bf16-true is for large networks"),
        ({"on": {"activation_checkpointing": True}}, r"^trainer\.activation_checkpointing=true is for large"),
        ({"tokens": {"order": "spiral"}}, r"^tokens\.order must be raster, random or random:SEED, got 'spiral'"),
        ({"compare_with": ["/nowhere"]}, r"^task\.compare_with=/nowhere: there is nothing"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    """By hand: one line, before any work."""
    on = machine(**changed.pop("on", {}))
    with pytest.raises(ValueError, match=message) as refused:
        train_tokenizer(tmp_path / "run", on=on, **changed)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("tokens=patches", r"^task=tokenizer trains a VQ-VAE: tokens=vqvae; tokens=patches is made by"),
        ("tokens.path=/somewhere", r"^task=tokenizer trains a tokenizer, tokens\.path=/somewhere names one"),
        ("init=/somewhere", r"^task=tokenizer begins with weights that are drawn: leave init="),
        ("data.resolution=7", r"^tokens\.factor=2 does not divide data\.resolution=7"),
        ("tokens.factor=3", r"^tokens\.factor must be one of 2, 4, got 3"),
        ("tokens.quantizer=fsq tokens.codes=100", r"^tokens\.quantizer=fsq has no levels for tokens\.codes=100"),
        ("tokens.hidden=4096 tokens.residual_blocks=64", r"^a VQ-VAE of 5,521,125,387 numbers is too large"),
    ],
)
def test_commands_that_are_refused(tmp_path: Path, overrides: str, message: str) -> None:
    """By hand: one line, and no run folder is left."""
    with pytest.raises(ValueError, match=message) as refused:
        runs = f"paths.runs={tmp_path / 'runs'}"
        launch.run("task=tokenizer", "data=digits", runs, *overrides.split(), conf=ROOT / "conf")
    assert "\n" not in str(refused.value)
    assert not [*(tmp_path / "runs").glob("*")]


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    """Invariant: the run ends by a line that names the step; what was saved before is left and is finite."""
    with pytest.raises(NonFiniteLossError, match="the loss of step 6 is not finite: the run is stopped"):
        train_tokenizer(tmp_path, callbacks=[Break(step=5)], val_every=0, checkpoint_every=1)
    newest = torch.load(find_checkpoints(tmp_path)[-1], weights_only=True)["state_dict"]
    assert find_checkpoints(tmp_path)[-1].stem == "step_0000005"
    assert all(tensor.double().isfinite().all() for tensor in newest.values())


class Break(Send):
    """Sets a weight of the encoder to NaN in the middle of an optimiser step."""

    def __init__(self, *, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:  # type: ignore[override]
        if trainer.global_step == self.step:
            pl_module.network.encoder[0].weight.data[0] = torch.nan


def test_a_stream(tmp_path: Path) -> None:
    """By hand: four steps of eight images."""
    stream = mixture(tmp_path / "shards", num_readers=None)
    streamed = train_tokenizer(tmp_path / "stream", source=stream, steps=4, val_every=0)
    assert streamed.numbers["train/images_seen"].value == 32


def test_fixed_codes(tmp_path: Path) -> None:
    """Invariant: of FSQ, which needs neither a start nor as many vectors as codes."""
    fixed = train_tokenizer(tmp_path / "fsq", tokens={"quantizer": "fsq"}, steps=3, batch_size=1, warmup_steps=1)
    assert fixed.numbers["val/codes_used"].value > 0.05


def test_few_grey_images(tmp_path: Path) -> None:
    """Invariant: five images of one level do no harm; without validation images there are no numbers of theirs."""
    grey = ArraySplit(np.full((5, 12, 12, 3), 128, dtype=np.uint8), np.zeros(5, dtype=np.int64))
    few = Arrays({"train": grey, "val": ArraySplit(grey.pixels[:1], grey.labels[:1])}, None, None, resolution=12)
    assert train_tokenizer(tmp_path / "grey", source=few).numbers["val/psnr"].n == 1
    few.splits["val"] = ArraySplit(grey.pixels[:0], grey.labels[:0])
    result = train_tokenizer(tmp_path / "none", source=few, val_every=0, steps=5)
    assert set(result.numbers) == {"parameters", "train/images_seen"}
    with pytest.raises(ValueError, match="nothing to validate on"):
        train_tokenizer(tmp_path / "no", source=few)


def test_what_is_learnt(tmp_path: Path) -> None:
    """A floor: 22 dB, where codes at their start reach 14 and a network without codes 10."""
    tokens = {"codes": 64, "hidden": 24, "decay": 0.9, "unquantised_steps": 20, "restart_below": 0.05}
    settings = {"steps": 150, "batch_size": 16, "val_every": 0, "checkpoint_every": 1000, "log_every": 50}
    numbers = train_tokenizer(tmp_path, tokens=tokens, **settings).numbers
    assert numbers["val/psnr"].value > 22
    assert numbers["val/codes_used"].value > 0.8


@pytest.mark.slow
def test_photographs(shared: Path, tmp_path: Path) -> None:
    """A floor: 29 dB after a minute on 400 photographs, where k-means on bare patches has 30.8 after as long."""
    folder = shared / "data" / "imagenet-sample"
    if not folder.is_dir():
        pytest.skip("needs imagenet-sample in the shared folder")
    result, _ = launch.run(
        "task=tokenizer", "data=folder", f"data.path={folder}", "data.resolution=96", "tokens.hidden=64", "trainer=cpu",
        "trainer.precision=bf16-mixed", "task.steps=450", "task.batch_size=16", "task.crop=48", "task.warmup_steps=20",
        "task.learning_rate=0.003", "task.val_every=0", "task.patches=false", f"paths.runs={tmp_path}",
        f"paths.cache={tmp_path}", conf=ROOT / "conf",
    )  # fmt: skip
    assert result.numbers["val/psnr"].value > 29
    assert result.numbers["val/codes_used"].value > 0.8
