"""A small pretraining run, in this process."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from igpt.checkpoint.native import Origin
from igpt.data.digits import Digits
from igpt.model.gpt import GPT
from igpt.objective.ar import AR
from igpt.task.fit import Machine, Runner
from igpt.task.pretrain import run as pretrain
from igpt.tokens.datamodule import TokenDataModule
from igpt.tokens.kmeans import fit
from igpt.tokens.palette import Palette
from igpt.tokens.raster import Raster

SIZES: dict[str, Any] = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_ctx": 64, "n_vocab": 17, "causal": True}


@pytest.fixture(scope="session")
def digits() -> Digits:
    return Digits(
        name="digits", resolution=8, val_fraction=0.05, test_fraction=0.8, split_seed=0, shift=1, shift_share=0.5
    )


@pytest.fixture(scope="session")
def palette(digits: Digits) -> Palette:
    return fit(digits.split("train").pixels, k=17, iterations=10, restarts=1, seed=0)


def machine(**changed: Any) -> Machine:
    plain: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "nodes": 1,
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
    """What a pretraining run needs, on the digits."""

    def __init__(self, digits: Digits, palette: Palette) -> None:
        self.digits, self.palette, self.raster = digits, palette, Raster.of(8, "raster")

    def tokens(self, **settings: Any) -> TokenDataModule:
        return TokenDataModule(
            source=self.digits, palette=self.palette, raster=self.raster, seed=0, num_workers=0, **settings
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
        sizes = SIZES | {"causal": objective is None or objective.causal}
        settings: dict[str, Any] = {
            "steps": 8,
            "batch_size": 100,
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
            net=partial(GPT, **sizes),
            objective=objective or AR(),
            origin=partial(
                Origin,
                network=sizes,
                palette=self.palette.centres.tolist(),
                palette_hash=self.palette.hash,
                permutation=list(self.raster.permutation),
                objective={"name": (objective or AR()).name},
                model="tiny",
                data="digits8",
                seed=0,
            ),
            weights=None,
            seed=0,
            **{**settings, **changed},
        )


@pytest.fixture
def lab(digits: Digits, palette: Palette) -> Lab:
    return Lab(digits, palette)
