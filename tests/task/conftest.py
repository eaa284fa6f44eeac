"""Small runs of pretraining, probing and fine-tuning, in this process."""

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from hydra.utils import get_object
from safetensors.torch import load_file

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.igpt_format import CheckpointMetadata, Weights, save_model
from igpt.data.digits import Digits
from igpt.data.source import ArraySplit, JoinedSplit, Split
from igpt.distributed.launcher import run_ranks
from igpt.metric.result import Result
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.objective.ar import AR
from igpt.objective.bert import BERT
from igpt.run.components import Components
from igpt.run.targets import task_settings
from igpt.settings.fields import parse_settings
from igpt.tokens.datamodule import PixelDataModule, TokenDataModule
from igpt.tokens.kmeans import fit_palette
from igpt.tokens.palette import Palette
from igpt.tokens.palette_tokenizer import PaletteTokenizer
from igpt.tokens.pixel_order import PixelOrder
from igpt.tokens.vqvae_tokenizer import VQVAESettings
from igpt.training.hardware import HardwareConfig
from igpt.training.trainer import Runner
from tests.conftest import ROOT, parts_of_run, perturbed

SIZES: dict[str, Any] = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_ctx": 64, "n_vocab": 17, "causal": True}


@pytest.fixture(scope="session")
def digits() -> Digits:
    return Digits(
        name="digits", resolution=8, val_fraction=0.05, test_fraction=0.8, split_seed=0, shift=1, shift_share=0.5
    )


@pytest.fixture(scope="session")
def palette(digits: Digits) -> Palette:
    return fit_palette(digits.split("train").pixels, k=17, iterations=10, restarts=1, seed=0)


@dataclass
class Arrays:
    """A source of arrays. A split it does not have is a KeyError to whoever asks for it."""

    splits: dict[str, ArraySplit]
    n_class: int | None = 10
    class_names: tuple[str, ...] | None = tuple("0123456789")
    name: str = "few"
    resolution: int = 8
    labels_per_class: int | None = None

    def split(self, name: str) -> ArraySplit:
        return self.splits[name]

    def training(self, *, with_val: bool = False) -> Split:
        train = self.splits["train"]
        return JoinedSplit(train, self.splits["val"]) if with_val else train


@pytest.fixture(scope="session")
def few(digits: Digits) -> Arrays:
    """200 digits to train on, 60 to validate, 100 to test; every class is in train."""
    train, held_out = digits.split("train"), digits.split("test")
    parts = {"train": (train, 0, 200), "val": (held_out, 0, 60), "test": (held_out, 60, 160)}
    return Arrays({name: ArraySplit(of.pixels[a:b], of.labels[a:b]) for name, (of, a, b) in parts.items()})


def machine(**changed: Any) -> HardwareConfig:
    plain: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "nodes": 1,
        "strategy": "ddp",
        "sharded_checkpoint": "auto",
        "precision": "32-true",
        "micro_batch": None,
        "compile": False,
        "activation_checkpointing": False,
        "attention_backend": "auto",
        "matmul_precision": "auto",
        "num_workers": 0,
        "peak_tflops": 1.0,
    }
    return parse_settings(HardwareConfig, {**plain, **changed}, "trainer")


PRETRAIN: dict[str, Any] = {
    "steps": 8,
    "operations": None,
    "schedule": "cosine",
    "decay_share": None,
    "cooled_at": [],
    "ema": None,
    "gradient_clip": None,
    "batch_size": 100,
    "optimizer": "adam",
    "learning_rate": 0.01,
    "beta1": 0.9,
    "beta2": 0.95,
    "weight_decay": 0.0,
    "warmup_steps": 2,
    "val_every": 4,
    "log_every": 1,
    "checkpoint_every": 4,
    "checkpoint_keep": 2,
    "keep_steps": [],
}
SGD: dict[str, Any] = {
    "rates": [0.1, 1.0],
    "steps": 6,
    "batch_size": 50,
    "momentum": 0.9,
    "gradient_clip": None,
    "weight_decay": 0.0,
    "val_every": 3,
    "log_every": 1,
    "checkpoint_every": 2,
    "search": "together",
    "augment": True,
}
PROBE: dict[str, Any] = {
    "norm": "ln_1",
    "dtype": "float32",
    "batch_size": 64,
    "solver": "lbfgs",
    "C_grid": [10.0, 0.1],
    "sgd": SGD,
    "layer": None,
    "concat_layers": None,
    "eval_masks": 5,
    "folds": None,
    "refit": "auto",
    "resize_positions": False,
    "test": True,
    "baselines": [],
}
FINETUNE: dict[str, Any] = {
    "gradient_clip": None,
    "steps": 6,
    "batch_size": 50,
    "learning_rate": 0.003,
    "beta1": 0.9,
    "beta2": 0.95,
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "loss_weights": {"gen": 1.0, "clf": 1.0},
    "eval_masks": 3,
    "val_every": 2,
    "patience": None,
    "log_every": 1,
    "checkpoint_every": 2,
    "checkpoint_keep": 1,
    "dropout": 0.0,
    "resize_positions": False,
    "refit": False,
    "test": True,
}
EVALUATE: dict[str, Any] = {
    "split": "val",
    "batch_size": 100,
    "baseline_images": 0,
    "accuracy": "auto",
    "eval_masks": 5,
}
VQVAE: dict[str, Any] = {
    "path": None,
    "order": "raster",
    "factor": 2,
    "codes": 32,
    "quantizer": "ema",
    "code_width": 4,
    "hidden": 8,
    "residual_blocks": 1,
    "loss": "l2",
    "commitment": 0.25,
    "decay": 0.8,
    "unquantised_steps": 3,
    "restart_below": 0.5,
}
TOKENIZER: dict[str, Any] = {
    "steps": 12,
    "batch_size": 8,
    "learning_rate": 0.01,
    "beta1": 0.9,
    "beta2": 0.99,
    "weight_decay": 0.0,
    "gradient_clip": None,
    "warmup_steps": 2,
    "decay_share": 0.4,
    "crop": 8,
    "val_every": 4,
    "log_every": 1,
    "checkpoint_every": 4,
    "checkpoint_keep": 9,
    "compare_with": [],
    "patches": False,
}
PARTS = ("on", "callbacks", "loggers", "objective", "cache", "network")  # of `Lab.components`, not settings of a task


class Lab:
    """What a pretraining, probing or fine-tuning run needs, on the digits."""

    def __init__(self, digits: Digits | Arrays, palette: Palette) -> None:
        self.digits, self.palette = digits, palette

    @property
    def tokenizer(self) -> PaletteTokenizer:
        return PaletteTokenizer(self.palette, PixelOrder.from_name(8, "raster"))

    def tokens(self, seed: int = 0, **settings: Any) -> TokenDataModule:
        return TokenDataModule(source=self.digits, tokenizer=self.tokenizer, seed=seed, num_workers=0, **settings)

    def metadata(self, objective: Any = None) -> Any:
        return partial(
            CheckpointMetadata,
            network=GPTConfig(**SIZES | {"causal": objective is None or objective.causal}),
            tokenizer=self.tokenizer,
            objective={"name": (objective or AR()).name},
            model="tiny",
            data="digits8",
            seed=0,
        )

    def components(
        self,
        folder: Path,
        weights: Weights | None = None,
        *,
        on: HardwareConfig | None = None,
        callbacks: Any = (),
        loggers: Any = (),
        objective: Any = None,
        cache: Path | None = None,
        seed: int = 0,
        network: GPTConfig | None = None,
    ) -> Components:
        """The parts of a run on the digits, each as it is, whatever a config would say."""
        objective, on, metadata = objective or AR(), on or machine(), self.metadata(objective)
        network = network or metadata.keywords["network"]
        metadata = partial(metadata, network=network)
        key = {"data": {"name": self.digits.name}, "precision": "32-true", "seed": seed}
        return parts_of_run(
            runner=Runner(machine=on, folder=folder, callbacks=list(callbacks), loggers=list(loggers)),
            hardware=on,
            run_dir=folder,
            cache_dir=cache or folder / "cache",
            cache_key=key | {"objective": {"name": objective.name}},
            seed=seed,
            weights=weights,
            source=self.digits,
            tokenizer=self.tokenizer,
            objective=objective,
            network=network,
            build_network=partial(GPT, network),
            build_datamodule=partial(self.tokens, seed=seed),
            checkpoint_metadata=metadata,
        )

    def execute(
        self, task: str, folder: Path, weights: Weights | None = None, *, seed: int = 0, **settings: Any
    ) -> Result:
        """What `task`, a module of `igpt.task`, finds with these settings."""
        parts = {name: settings.pop(name) for name in PARTS if name in settings}
        target = f"igpt.task.{task}.run"
        found: Result = get_object(target)(
            self.components(folder, weights, seed=seed, **parts),
            task_settings(target, settings),
        )
        return found

    def pretrain(self, folder: Path, *, weights: Weights | None = None, **changed: Any) -> Any:
        settings = {**PRETRAIN, **changed}
        settings["warmup_steps"] = min(settings["warmup_steps"], settings["steps"] - 1)
        return self.execute("pretrain", folder, weights, **settings)

    def probe(self, folder: Path, weights: Weights, *, sgd: dict[str, Any] | None = None, **changed: Any) -> Any:
        return self.execute("probe", folder, weights, **{**PROBE, "sgd": SGD | (sgd or {}), **changed})

    def finetune(self, folder: Path, weights: Weights | None, **changed: Any) -> Any:
        return self.execute("finetune", folder, weights, **{**FINETUNE, **changed})

    def evaluate(self, folder: Path, weights: Weights, **changed: Any) -> Any:
        return self.execute("evaluate", folder, weights, **{**EVALUATE, **changed})


def smooth_pictures(n: int, *, side: int = 12, seed: int = 0) -> np.ndarray:
    """Pictures of colours that change slowly, (n, side, side, 3) uint8."""
    colours = torch.from_numpy(np.random.default_rng(seed).uniform(0, 255, (n, 3, 4, 4)))
    pixels = F.interpolate(colours, size=(side, side), mode="bilinear", align_corners=True)
    return pixels.round().byte().permute(0, 2, 3, 1).numpy()


def pictures(side: int = 12) -> Arrays:
    """60 smooth pictures to train on, 21 to validate."""
    parts = {"train": (60, 0), "val": (21, 1)}
    splits = {name: smooth_pictures(n, side=side, seed=seed) for name, (n, seed) in parts.items()}
    full = {name: ArraySplit(pixels, np.zeros(len(pixels), dtype=np.int64)) for name, pixels in splits.items()}
    return Arrays(full, n_class=None, class_names=None, resolution=side)


def train_tokenizer(
    folder: Path,
    *,
    on: HardwareConfig | None = None,
    callbacks: Any = (),
    source: Any = None,
    tokens: dict[str, Any] | None = None,
    **changed: Any,
) -> Result:
    """`task=tokenizer` with TOKENIZER's settings and VQVAE's, on smooth pictures."""
    on, source = on or machine(), source or pictures()
    components = parts_of_run(
        runner=Runner(machine=on, folder=folder, callbacks=list(callbacks)),
        hardware=on,
        run_dir=folder,
        cache_dir=folder / "cache",
        seed=0,
        source=source,
        vqvae_settings=parse_settings(VQVAESettings, VQVAE | (tokens or {}), "tokens"),
        build_pixel_datamodule=lambda plan: PixelDataModule(source=source, seed=0, num_workers=0, plan=plan),
    )
    target = "igpt.task.train_tokenizer.run"
    found: Result = get_object(target)(components, task_settings(target, {**TOKENIZER, **changed}))
    return found


def check_bad_settings(task: str, good: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    """The settings `good` are taken; with `changed`, they are refused by `message`."""
    target = f"igpt.task.{task}.run"
    assert task_settings(target, good)
    with pytest.raises(ValueError, match=message):
        task_settings(target, {**good, **changed})


@pytest.fixture
def lab(digits: Digits, palette: Palette) -> Lab:
    return Lab(digits, palette)


def drawn(folder: Path, palette: Palette, objective: Any) -> Weights:
    """A network with every weight drawn: more can be read from it than after a few steps of training."""
    metadata = Lab(Arrays({}), palette).metadata(objective)(step=0)
    save_model(folder / "model", perturbed(GPT(metadata.network)).state_dict(), metadata)
    return find_weights(str(folder))


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory, digits: Digits, palette: Palette) -> Path:
    """The folder of one small pretraining run."""
    folder = tmp_path_factory.mktemp("pretrained")
    Lab(digits, palette).pretrain(folder, val_every=0)
    return folder


@pytest.fixture(scope="session")
def ar(pretrained: Path) -> Weights:
    return find_weights(str(pretrained))


@pytest.fixture(scope="session")
def masked(tmp_path_factory: pytest.TempPathFactory, digits: Digits, palette: Palette) -> Path:
    """The folder of one that predicts masked pixels."""
    folder = tmp_path_factory.mktemp("masked")
    Lab(digits, palette).pretrain(folder, objective=BERT(mask_probability=0.15), val_every=0)
    return folder


def read_finetuned(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of network and head that fine-tuning has left."""
    return load_file(folder / "model" / "model.safetensors") | load_file(folder / "model" / "head.safetensors")


def have_equal_weights(a: Path, b: Path) -> bool:
    """Whether the weights that two fine-tunings have left are equal to the bit."""
    own, reference = read_finetuned(a), read_finetuned(b)
    return own.keys() == reference.keys() and all(torch.equal(own[name], reference[name]) for name in own)


def worked(place: Path, *part: str, count: int = 2) -> Path:
    """The same folder, after so many ranks have done their work in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert run_ranks([sys.executable, "-m", "tests.task.ranks_work", str(place), *part], count) == 0
    return place


def answers_in(place: Path) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = torch.load(place / "answers.pt", weights_only=True)
    return answers


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks did the work of `ranks_work.py` and of the modules it calls: once, for the whole suite."""
    of_run = os.environ.get("PYTEST_XDIST_TESTRUNUID", os.getpid())
    place = tmp_path_factory.getbasetemp().parent / f"ranks-{of_run}"
    with FileLock(f"{place}.lock"):
        if not (place / "answers.pt").is_file():
            place.mkdir(exist_ok=True)
            worked(place)
    return place


@pytest.fixture(scope="session")
def answers(place: Path) -> list[dict[str, Any]]:
    """What each of these ranks answered."""
    return answers_in(place)


@pytest.fixture(scope="session")
def one_process() -> Lab:
    """What the ranks do, on one process, to hold them against it."""
    from tests.task.ranks_work import a_lab  # which imports this module

    return a_lab()
