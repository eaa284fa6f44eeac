"""Probes of networks whose weights are drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.igpt_format import Weights, save_model
from igpt.metric.result import Result
from igpt.model.features import layer_features
from igpt.model.gpt import GPT
from igpt.objective.ar import AR
from igpt.objective.bert import BERT
from igpt.tokens.palette import Palette
from igpt.utils import keyed
from tests.task.conftest import Arrays, Lab, drawn

MASKED = BERT(mask_probability=0.15)


@pytest.fixture
def lab(few: Arrays, palette: Palette) -> Lab:
    return Lab(few, palette)


@pytest.fixture(scope="session")
def ar(tmp_path_factory: pytest.TempPathFactory, palette: Palette) -> Weights:
    return drawn(tmp_path_factory.mktemp("ar"), palette, AR())


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory, palette: Palette) -> Weights:
    return drawn(tmp_path_factory.mktemp("bert"), palette, MASKED)


def features(lab: Lab, net: GPT, split: str, *, objective: Any = None, mask: int = 0, norm: str = "ln_1") -> np.ndarray:
    """All images in one plain pass: (L + 1, N, C)"""
    tokens = lab.tokens().sample_tokens(split).long()
    visible = None
    if objective is not None:
        rng_keys = keyed.per_example_keys(keyed.key(0, split, 0), torch.arange(len(tokens)))
        visible = objective.visible_mask(tokens, keyed.fold_in(rng_keys, 100 + mask) if mask else rng_keys)
    with torch.no_grad():
        return layer_features(net, tokens, visible, norm=norm).numpy()


def labels(lab: Lab, split: str) -> np.ndarray:
    return lab.digits.split(split).labels


def heads(folder: Path) -> dict[str, torch.Tensor]:
    """What the newest checkpoint holds of them."""
    newest = sorted((folder / "checkpoints").glob("step_*.ckpt"))[-1]
    state: dict[str, torch.Tensor] = torch.load(newest, weights_only=True)["state_dict"]
    return state


def kept_features(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache" / "features").glob("*.npy") if ".labels." not in path.name)


def perturbed(weights: Weights, *, times: float = 1.01) -> dict[str, torch.Tensor]:
    state = weights.net().state_dict()
    return state | {"wte": state["wte"] * times}


def save_state(folder: Path, lab: Lab, state: dict[str, torch.Tensor]) -> Weights:
    save_model(folder / "model", state, lab.metadata()(step=0))
    return find_weights(str(folder))


@pytest.fixture(scope="session")
def sgd(tmp_path_factory: pytest.TempPathFactory, few: Arrays, palette: Palette, ar: Weights) -> tuple[Path, Result]:
    """One with task.solver=sgd, of six steps without a break."""
    folder = tmp_path_factory.mktemp("sgd")
    return folder, Lab(few, palette).probe(folder, ar, solver="sgd")
