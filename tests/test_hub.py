"""`igpt.load`: a network with its palette, in three lines."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import igpt
from igpt.data.crop import evaluation_crop
from igpt.hub import default_crop
from igpt.model.features import layer_features
from igpt.run.launch import build_components
from tests.configs import CONF


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


def save_as(pixels: np.ndarray, path: Path, mode: str, **how: Any) -> Path:
    Image.fromarray(pixels).convert(mode).save(path, **how)
    return path


def test_pictures_of_any_size(model: igpt.ImageGPT, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Independent source: the evaluation crop of `data=folder` on the same file. A large JPEG that is decoded already
    is the one case that differs, as the data's are decoded at a reduced size."""
    crop = evaluation_crop(
        build_components("data=folder", "data.resolution=8", f"data.path={tmp_path}", conf=CONF).run.config["data"]
    )
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 4), dtype=np.uint8)
    large = np.asarray(Image.fromarray(noise).resize((640, 400)))
    turned = Image.Exif()
    turned[0x0112] = 6
    files = [
        save_as(noise, tmp_path / "rgba.png", "RGBA"), save_as(noise, tmp_path / "grey.png", "L"),
        save_as(noise, tmp_path / "palette.gif", "P"), save_as(noise[:, :60], tmp_path / "tall.bmp", "RGB"),
        save_as(large, tmp_path / "large.jpg", "RGB"), save_as(large, tmp_path / "turned.jpg", "RGB", exif=turned),
        save_as(noise[:8, :8], tmp_path / "small.png", "RGB"),
    ]  # fmt: skip
    expected = torch.from_numpy(np.stack([crop(file.read_bytes(), 0) for file in files]))
    with caplog.at_level("INFO"):
        assert torch.equal(model.prepare_images(files), expected)
        opened = [Image.open(file) for file in files]
        assert torch.equal(model.prepare_images(opened), expected)
        assert torch.equal(model.prepare_images(opened), expected)  # and they are as they were
    assert caplog.text.count("cropped to a centred square and resized to 8×8") == 1
    opened[4].load()
    assert opened[4].size == (640, 400)
    assert (model.prepare_images(opened[4]).int() - expected[4]).abs().max() < 12
    assert torch.equal(model.prepare_images(str(files[0])), expected[:1])
    arrays = [np.asarray(Image.open(file)) for file in files[:2]]
    assert torch.equal(model.prepare_images(arrays), expected[:2])
    assert torch.equal(model.prepare_images(torch.from_numpy(arrays[1])[..., None]), expected[1:2])
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(ValueError, match=r"a\.png: its 4 bytes are no image"):
        model.encode([tmp_path / "a.png"])


def test_the_crop_of_the_training_run(quickstart: Path, tmp_path: Path) -> None:
    """Round trip: of a run whose data had a crop of its own; a damaged record means the default."""
    shutil.copytree(quickstart / "2_pretrain" / "model", tmp_path / "model")
    record = json.loads((quickstart / "2_pretrain" / "run.json").read_text())
    data = build_components("data=imagenet32", f"data.path={tmp_path}", conf=CONF).run.config["data"]
    (tmp_path / "run.json").write_text(json.dumps(record | {"config": record["config"] | {"data": data}}))
    assert igpt.load(tmp_path).crop == replace(evaluation_crop(data), resolution=8)
    for damaged in (
        "{",
        json.dumps(record | {"config": {"data": {"crop": 5}}}),
        json.dumps({"version": record["version"]}),
    ):
        (tmp_path / "run.json").write_text(damaged)
        assert igpt.load(tmp_path).crop == default_crop(8)


def test_classes(quickstart: Path, model: igpt.ImageGPT) -> None:
    """Independent source: the table of a fine-tuned run's scores, by hand. Invariant: without a head, a clear error."""
    tuned = igpt.load(quickstart / "7_finetune")
    images = model.sample(70)
    assert tuned.class_names == tuple("0123456789")
    with torch.no_grad():
        weight = load_file(quickstart / "7_finetune" / "model" / "head.safetensors")["wclf"]
        scores = tuned.net.trunk(tuned.encode(images)).mean(1) @ weight.T
    shares = tuned.classify(images)
    assert torch.allclose(shares, scores.softmax(-1), atol=1e-6)
    predictions = tuned.predict(images)
    assert [each.label for each in predictions] == shares.argmax(-1).tolist()
    assert predictions[3] == (str(predictions[3].label), pytest.approx(float(shares[3].max())), predictions[3].label)
    assert (model.class_names, tuned.predict(images[0])) == (None, predictions[:1])
    with pytest.raises(ValueError, match=r"has no class head: load a run of task=finetune or task=probe"):
        model.predict(images)
    with pytest.raises(ValueError, match="no image to classify"):
        tuned.predict([])


def test_images_that_do_not_fit(model: igpt.ImageGPT) -> None:
    for images in (np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 2), np.uint8), np.zeros((1, 0, 8, 3), np.uint8), 5):
        with pytest.raises(ValueError, match=r"uint8 of shape \(B, 8, 8, 3\)"):
            model.encode(images)


def test_it_says_what_it_is(model: igpt.ImageGPT, tmp_path: Path) -> None:
    assert repr(model).startswith("ImageGPT(igpt_nano on digits8, ar, step 6: 2 blocks of 16, 8×8 pixels in 17 colours")
    with pytest.raises(ValueError, match="give a finished run folder"):
        igpt.load(tmp_path / "nothing")
