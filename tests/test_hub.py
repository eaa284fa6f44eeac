"""`igpt.load`: a network with its palette, in three lines."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import igpt
from igpt.model.features import layer_features


@pytest.fixture(scope="module")
def model(quickstart: Path) -> igpt.ImageGPT:
    return igpt.load(quickstart / "2_pretrain")


def test_what_the_tasks_do(quickstart: Path, model: igpt.ImageGPT) -> None:
    """Independent source: the tokens that `task=sample` drew with this seed, and the network's own features."""
    drawn = np.load(quickstart / "4_sample" / "samples_tokens.npy")
    assert np.array_equal(model.sample(len(drawn), seed=0), model.decode(torch.from_numpy(drawn).long()))
    tokens = model.encode(model.sample(3))
    features = model.features(tokens)
    assert features.shape == (3, 3, 16)  # two blocks and the embedding, three images, width 16
    assert torch.equal(features, layer_features(model.net, tokens))
    assert model.logits(tokens).shape == (3, 64, 17)
    assert not features.requires_grad


def test_round_trip_of_images(model: igpt.ImageGPT) -> None:
    """Round trip: every grey level is a colour of the digits' palette; arrays, one image, and pictures of PIL."""
    images = model.sample(4, seed=1)
    tokens = model.encode(images)
    assert np.array_equal(model.decode(tokens), images)
    assert torch.equal(model.encode(images[0]), tokens[:1])
    assert torch.equal(model.encode([Image.fromarray(image) for image in images]), tokens)
    assert torch.equal(model.encode(torch.from_numpy(images)), tokens)


def test_completions_keep_what_is_given(model: igpt.ImageGPT) -> None:
    """Invariant: the rows that are given stay, whatever the seed; all of them given, nothing changes."""
    images = model.sample(2, seed=1)
    one, other = (model.complete(images, rows=3, seed=seed) for seed in (0, 1))
    assert np.array_equal(one[:, :3], images[:, :3])
    assert np.array_equal(other[:, :3], images[:, :3])
    assert not np.array_equal(one, other)
    assert np.array_equal(model.complete(images, rows=8), images)


def test_images_that_do_not_fit(model: igpt.ImageGPT) -> None:
    for images in (np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 2), np.uint8), np.zeros((1, 0, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"uint8 of shape \(B, 8, 8, 3\)"):
            model.encode(images)


def test_it_says_what_it_is(model: igpt.ImageGPT, tmp_path: Path) -> None:
    assert repr(model).startswith("ImageGPT(igpt_nano on digits8, ar, step 6: 2 blocks of 16, 8×8 pixels in 17 colours")
    with pytest.raises(ValueError, match="give a finished run folder"):
        igpt.load(tmp_path / "nothing")
