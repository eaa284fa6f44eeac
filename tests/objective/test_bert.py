"""Masked-pixel prediction."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from igpt.objective import registry
from igpt.objective.bert import BERT
from igpt.utils import keyed
from tests.model.test_gpt import openai_case

KEYS = keyed.per_example_keys(keyed.key(0, "test"), torch.arange(400))
TOKENS = torch.zeros(400, 64, dtype=torch.int64)


def test_loss_equals_openais(shared: Path) -> None:
    """Independent source: gen_loss of OpenAI's model.py with its mask, to 1e-5; the global mean is another number."""
    net, _, reference = openai_case(shared, "bert")
    tokens, visible = torch.from_numpy(reference["tokens"]).long(), torch.from_numpy(reference["visible"])
    with torch.no_grad():
        logits = net(tokens, visible)
    loss = BERT(mask_probability=0.15).loss(logits, tokens, visible).item()
    assert abs(loss - reference["gen_loss"]) < 1e-5
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
    assert abs(nats[~visible.flatten()].mean().item() - loss) > 0.01


def test_loss_by_hand() -> None:
    """By hand: hidden pixels of probability 1/2 and 1/8 in the first image, 1/4 in the second; no other counts."""
    right = torch.tensor([[0.5, 0.9, 0.125], [0.99, 0.25, 0.9]])
    logits = torch.stack([right.log(), (1 - right).log()], dim=-1)  # (B, T, 2), the right colour is 0
    visible = torch.tensor([[False, True, False], [True, False, True]])
    objective = BERT(mask_probability=0.15)
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    ln2 = math.log(2)
    assert objective.per_example_loss(logits, tokens, visible).tolist() == pytest.approx([2 * ln2, 2 * ln2])
    assert objective.loss(logits, tokens, torch.ones_like(visible)).item() == 0.0  # no hidden pixel: not NaN


@pytest.mark.parametrize("p", [0.15, 0.5])
def test_masks_are_independent_draws(p: float) -> None:
    """Invariant: p of the pixels are hidden, within 5 standard errors, of every position alike; images differ."""
    hidden = ~BERT(mask_probability=p).visible_mask(TOKENS, KEYS)
    spread = math.sqrt(p * (1 - p))
    assert abs(hidden.double().mean() - p) < 5 * spread / math.sqrt(hidden.numel())
    assert (hidden.double().mean(0) - p).abs().max() < 5 * spread / math.sqrt(400)
    assert len({tuple(row) for row in hidden.tolist()}) == 400


def test_a_mask_is_its_images_own() -> None:
    """Invariant: neither the batch nor the order changes it."""
    objective = BERT(mask_probability=0.15)
    full = objective.visible_mask(TOKENS, KEYS)
    assert torch.equal(objective.visible_mask(TOKENS[7:9], KEYS[7:9].flip(0)), full[7:9].flip(0))


def test_every_image_hides_a_pixel() -> None:
    """Invariant: also where chance would hide none, as for almost every image of 4 pixels at p = 0.01."""
    hidden = ~BERT(mask_probability=0.01).visible_mask(TOKENS[:, :4], KEYS)
    assert (hidden.sum(1) >= 1).all()
    assert np.isclose(hidden.sum(1).double().mean(), 1, atol=0.05)


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1])
def test_bad_probability(p: float) -> None:
    with pytest.raises(ValueError, match=r"objective\.mask_probability must be (above 0|below 1)"):
        registry.build_objective(name="bert", mask_probability=p)
