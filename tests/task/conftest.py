"""Small runs of pretraining, probing and fine-tuning, in this process."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from igpt.checkpoint.find import find
from igpt.checkpoint.native import CheckpointMetadata, Weights, save_model
from igpt.data.digits import Digits
from igpt.data.source import ArraySplit
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.objective.ar import AR
from igpt.objective.bert import BERT
from igpt.task.finetune import run as finetune
from igpt.task.fit import Runner
from igpt.task.machine import Machine
from igpt.task.pretrain import run as pretrain
from igpt.task.probe import run as probe
from igpt.tokens.datamodule import TokenDataModule
from igpt.tokens.kmeans import fit
from igpt.tokens.palette import Palette
from igpt.tokens.palette_tokenizer import PaletteTokenizer
from igpt.tokens.pixel_order import PixelOrder
from tests.conftest import perturbed

SIZES: dict[str, Any] = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_ctx": 64, "n_vocab": 17, "causal": True}


@pytest.fixture(scope="session")
def digits() -> Digits:
    return Digits(
        name="digits", resolution=8, val_fraction=0.05, test_fraction=0.8, split_seed=0, shift=1, shift_share=0.5
    )


@pytest.fixture(scope="session")
def palette(digits: Digits) -> Palette:
    return fit(digits.split("train").pixels, k=17, iterations=10, restarts=1, seed=0)


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

    def training(self) -> ArraySplit:
        return self.splits["train"]


@pytest.fixture(scope="session")
def few(digits: Digits) -> Arrays:
    """200 digits to train on, 60 to validate, 100 to test; every class is in train."""
    train, held_out = digits.split("train"), digits.split("test")
    parts = {"train": (train, 0, 200), "val": (held_out, 0, 60), "test": (held_out, 60, 160)}
    return Arrays({name: ArraySplit(of.pixels[a:b], of.labels[a:b]) for name, (of, a, b) in parts.items()})


def machine(**changed: Any) -> Machine:
    plain: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "nodes": 1,
        "strategy": "ddp",
        "checkpoint_in_pieces": "auto",
        "precision": "32-true",
        "micro_batch": None,
        "compile": False,
        "activation_checkpointing": False,
        "attention": "auto",
        "matmul_precision": "auto",
        "num_workers": 0,
        "peak_tflops": 1.0,
    }
    return Machine(**{**plain, **changed})


class Lab:
    """What a pretraining, probing or fine-tuning run needs, on the digits."""

    def __init__(self, digits: Digits | Arrays, palette: Palette) -> None:
        self.digits, self.palette = digits, palette

    @property
    def tokenizer(self) -> PaletteTokenizer:
        return PaletteTokenizer(self.palette, PixelOrder.of(8, "raster"))

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

    def pretrain(
        self,
        folder: Path,
        *,
        on: Machine | None = None,
        callbacks: tuple[Any, ...] = (),
        loggers: Any = (),
        objective: Any = None,
        **changed: Any,
    ) -> Any:
        metadata = self.metadata(objective)
        settings: dict[str, Any] = {
            "steps": 8,
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
        }
        return pretrain(
            runner=Runner(machine=on or machine(), folder=folder, callbacks=list(callbacks), loggers=list(loggers)),
            tokens=self.tokens,
            net=partial(GPT, metadata.keywords["network"]),
            objective=objective or AR(),
            metadata=metadata,
            **{"weights": None, "seed": 0, **settings, **changed},
        )

    def probe(
        self,
        folder: Path,
        weights: Weights,
        *,
        on: Machine | None = None,
        callbacks: tuple[Any, ...] = (),
        objective: Any = None,
        cache: Path | None = None,
        sgd: dict[str, Any] | None = None,
        seed: int = 0,
        **changed: Any,
    ) -> Any:
        settings: dict[str, Any] = {
            "norm": "ln_1",
            "dtype": "float32",
            "batch_size": 64,
            "solver": "lbfgs",
            "strengths": [10.0, 0.1],
            "layer": None,
            "concat": None,
            "masks": 5,
            "folds": None,
            "refit": True,
            "test": True,
            "untrained": False,
            "pixels": False,
        }
        of_sgd: dict[str, Any] = {
            "rates": [0.1, 1.0],
            "steps": 6,
            "batch_size": 50,
            "momentum": 0.9,
            "weight_decay": 0.0,
            "val_every": 3,
            "log_every": 1,
            "checkpoint_every": 2,
        }
        made_by = {"data": {"name": self.digits.name}, "precision": "32-true", "seed": seed}
        return probe(
            runner=Runner(machine=on or machine(), folder=folder, callbacks=list(callbacks)),
            tokens=partial(self.tokens, seed=seed),
            weights=weights,
            objective=objective or AR(),
            cache=cache or folder / "cache",
            made_by=made_by | {"objective": {"name": (objective or AR()).name}},
            seed=seed,
            sgd=of_sgd | (sgd or {}),
            **{**settings, **changed},
        )

    def finetune(
        self,
        folder: Path,
        weights: Weights | None,
        *,
        on: Machine | None = None,
        callbacks: tuple[Any, ...] = (),
        objective: Any = None,
        **changed: Any,
    ) -> Any:
        metadata = self.metadata(objective)
        settings: dict[str, Any] = {
            "steps": 6,
            "batch_size": 50,
            "learning_rate": 0.003,
            "beta1": 0.9,
            "beta2": 0.95,
            "weight_decay": 0.0,
            "warmup_steps": 0,
            "loss_weights": {"gen": 1.0, "clf": 1.0},
            "masks": 3,
            "val_every": 2,
            "patience": None,
            "log_every": 1,
            "checkpoint_every": 2,
            "checkpoint_keep": 1,
            "test": True,
        }
        return finetune(
            runner=Runner(machine=on or machine(), folder=folder, callbacks=list(callbacks)),
            tokens=self.tokens,
            net=partial(GPT, metadata.keywords["network"]),
            objective=objective or AR(),
            metadata=metadata,
            weights=weights,
            seed=0,
            **{**settings, **changed},
        )


@pytest.fixture
def lab(digits: Digits, palette: Palette) -> Lab:
    return Lab(digits, palette)


def drawn(folder: Path, palette: Palette, objective: Any) -> Weights:
    """A network with every weight drawn: more can be read from it than after a few steps of training."""
    metadata = Lab(Arrays({}), palette).metadata(objective)(step=0)
    save_model(folder / "model", perturbed(GPT(metadata.network)).state_dict(), metadata)
    return find(str(folder))


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory, digits: Digits, palette: Palette) -> Path:
    """The folder of one small pretraining run."""
    folder = tmp_path_factory.mktemp("pretrained")
    Lab(digits, palette).pretrain(folder, val_every=0)
    return folder


@pytest.fixture(scope="session")
def masked(tmp_path_factory: pytest.TempPathFactory, digits: Digits, palette: Palette) -> Path:
    """The folder of one that predicts masked pixels."""
    folder = tmp_path_factory.mktemp("masked")
    Lab(digits, palette).pretrain(folder, objective=BERT(mask_probability=0.15), val_every=0)
    return folder
