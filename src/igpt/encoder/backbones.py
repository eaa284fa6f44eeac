"""Vision networks of Hugging Face's `transformers` (ResNet, ViT, DINOv2, MAE …) from a folder or the Hub.

Only `config.json`, `preprocessor_config.json` and safetensors files are read; no code of a model is ever run.
"""

import importlib.util
import inspect
import json
import logging
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igpt.checkpoint.find import HUB_NAME, download_from_hub
from igpt.checkpoint.huggingface import PREPROCESSOR, is_huggingface_folder, read_config
from igpt.checkpoint.igpt_format import CONFIG
from igpt.checkpoint.tensors import first_line, list_part_files
from igpt.encoder.encoder import Preprocessing, each_channel
from igpt.settings.fields import Pooling
from igpt.utils import files

log = logging.getLogger(__name__)

INSTALL = "needs transformers, which is not installed here: pip install transformers==5.23.0 (or igpt[baselines])"
PIXEL = 1 / 255  # scale of a pixel before mean and deviation, by default
LARGEST = 4096  # pixels a side, as of task.input_size
FETCHES_CODE = re.compile(r'"(_?attn_implementation(?:_internal)?|quantization_config)": ')  # kernels of the Hub


class Backbone:
    """A vision network of `transformers` as an `Encoder`.

    `pooling`: as of `load_backbone`; `has_pooler`: whether the weights of the network's own pooling, if any, are there.

    Raises:
        ValueError: the network does not encode such images, or has no class token for `cls`.
    """

    def __init__(
        self, network: Any, preprocess: Preprocessing, *,
        name: str, sha256: str, pooling: Pooling, has_pooler: bool, device: torch.device,
    ) -> None:  # fmt: skip
        self.network, self.preprocess = network.eval().requires_grad_(False).to(device), preprocess
        self.name, self.device, self.input_size = name, device, preprocess.size
        self.options = self._forward_options()
        black = torch.zeros(1, self.input_size, self.input_size, 3, dtype=torch.uint8)
        try:
            output = self._forward(black)
        except Exception as error:  # whatever such a network, of any library, says of such an image
            side = self.input_size
            raise ValueError(
                f"task.encoder={name} does not encode {side}×{side} pixels ({first_line(error)})"
            ) from error
        self.pooling: str = pooling
        if pooling == "auto":
            self.pooling = "pooler" if has_pooler and output.get("pooler_output") is not None else "cls"
        if self.pooling == "cls" and not count_prefix(network):
            raise ValueError(f"task.encoder={name} has no class token: task.pooling=mean")
        self.hash = files.hash_json([sha256, asdict(preprocess), self.pooling])
        self.width = self._pool(output).shape[1]

    def _forward_options(self) -> dict[str, Any]:
        """What `forward` is given beside the pixels: positions for this size; MAE no random order of the patches."""
        config = self.network.config
        known = inspect.signature(self.network.forward).parameters
        options: dict[str, Any] = {}
        if "interpolate_pos_encoding" in known and config.image_size != self.input_size:
            options["interpolate_pos_encoding"] = True
        if "noise" in known:  # patches are sorted by it; `read_backbone` has none of them masked
            n_patch = (self.input_size // config.patch_size) ** 2
            options["noise"] = torch.arange(n_patch, device=self.device).float()[None]
        return options

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Features of images: (B, R, R, 3) uint8 → (B, D) float32."""
        return self._pool(self._forward(images))

    @torch.inference_mode()
    def _forward(self, images: Tensor) -> Any:
        options = {
            key: value.expand(len(images), -1) if isinstance(value, Tensor) else value
            for key, value in self.options.items()
        }
        return self.network(pixel_values=self.preprocess(images, self.device), **options)

    def _pool(self, output: Any) -> Tensor:
        if self.pooling == "pooler":
            pooled: Tensor = output.pooler_output  # (B, D), or (B, D, 1, 1) of a convolutional network
            return pooled.flatten(1)
        hidden: Tensor = output.last_hidden_state
        if hidden.ndim == 4:  # (B, D, H, W) of a convolutional network
            return hidden.mean(dim=(2, 3))
        return hidden[:, 0] if self.pooling == "cls" else hidden[:, count_prefix(self.network) :].mean(dim=1)


def load_backbone(spec: str, *, device: torch.device, input_size: int | None, pooling: Pooling) -> Backbone:
    """A vision network of `transformers` at a folder, or by its name on the Hub.

    `input_size`: pixels a side; None: those of `preprocessor_config.json`. `pooling`: `cls`, the class token after the
    last norm; `mean` over the patches; `auto`: the network's own `pooler_output` (of a ResNet the mean over the image,
    of DINOv2 the class token), unless its weights are missing, or there is none, as for MAE: then the class token.

    Raises:
        ValueError: `transformers` is not installed, no such folder, no vision network, weights that are missing or in
            another format than safetensors, no preprocessing, or a pooling or size that the network does not have.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(f"task.encoder={spec} {INSTALL}")
    folder = Path(spec)
    if not folder.is_dir() and HUB_NAME.fullmatch(spec) and not Path(Path(spec).parts[0]).exists():
        folder = download_from_hub(spec)
    if not is_huggingface_folder(folder):
        raise ValueError(
            f"task.encoder={spec}: expected lite0, a folder of transformers with its {CONFIG}, a name on the Hub, or "
            "features (docs/baselines.md)"
        )
    preprocess = read_preprocessing(folder, input_size)
    network, missing = read_backbone(folder)
    patch = getattr(network.config, "patch_size", 1)
    if isinstance(patch, int) and preprocess.size % patch:
        raise ValueError(
            f"task.input_size={preprocess.size}: {spec} reads patches of {patch}×{patch} pixels, take a multiple"
        )
    sha256 = files.hash_json([files.sha256(path) for path in (folder / CONFIG, *list_part_files(folder))])
    return Backbone(
        network, preprocess, name=Path(spec).name, sha256=sha256, pooling=pooling, has_pooler=not missing, device=device
    )


def read_backbone(folder: Path) -> tuple[Any, set[str]]:
    """(network in float32, names of the weights that its files lack). Raises ValueError, as `load_backbone`."""
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers has no type for it
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers has no type for it
    if not all(path.is_file() for path in list_part_files(folder)):
        raise ValueError(f"task.encoder: {folder} has no model.safetensors, the only format that is read")
    if found := FETCHES_CODE.search(json.dumps(read_config(folder / CONFIG))):
        raise ValueError(
            f"task.encoder: {folder / CONFIG} has {found[1]}, which may fetch code from the Hub: expected weights "
            "and no such key, take it out if it is not needed"
        )
    own: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **own)
        if hasattr(config, "mask_ratio"):
            config.mask_ratio = 0.0  # MAE: every patch is seen
        network, report = transformers.AutoModel.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **own
        )
    except Exception as error:  # settings of someone else's: transformers checks few, and raises of every kind
        raise ValueError(f"task.encoder: transformers does not read {folder} ({first_line(error)})") from error
    if network.main_input_name != "pixel_values" or getattr(network.config, "num_channels", 3) != 3:
        raise ValueError(f"task.encoder: {folder} is no network of RGB images alone ({network.config.model_type})")
    missing = {*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])}
    if lacking := sorted(name for name in missing if not name.startswith("pooler.")):
        raise ValueError(f"task.encoder: {folder} lacks weights, as {lacking[0]}: download the whole folder again")
    if broken := [name for name, weight in network.named_parameters() if not weight.isfinite().all()]:
        raise ValueError(f"task.encoder: {folder}: {broken[0]} holds NaN or infinity")
    return network, missing


def count_prefix(network: Any) -> int:
    """Number of tokens before those of the patches: the class token and registers."""
    has_class = any(name.endswith("cls_token") for name, _ in network.named_parameters())
    return has_class + int(getattr(network.config, "num_register_tokens", 0)) if has_class else 0


def read_preprocessing(folder: Path, input_size: int | None) -> Preprocessing:
    """Size and normalisation in `preprocessor_config.json`; images are resized to it whole, without its crop.

    Raises:
        ValueError: no such file, or without size, mean or deviation where the network's input has them.
    """
    path = folder / PREPROCESSOR
    settings = read_config(path)
    crop = settings.get("crop_size") if settings.get("do_center_crop", True) else None
    try:
        size = input_size or _read_side(crop or settings["size"])
        scale = float(settings.get("rescale_factor", PIXEL)) if settings.get("do_rescale", True) else 1.0
        mean, std = each_channel(0.0), each_channel(1.0)
        if settings.get("do_normalize", True):
            mean, std = each_channel(settings["image_mean"]), each_channel(settings["image_std"])
        is_finite = all(map(math.isfinite, (scale, *mean, *std)))
        if not 1 <= size <= LARGEST or not is_finite or scale <= 0 or min(std) <= 0:
            raise ValueError(f"size {size}, rescale_factor {scale}, image_mean {mean}, image_std {std}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not say how pixels become the network's input ({error!r:.200})") from error
    red, green, blue = (value / scale for value in mean)
    return Preprocessing(size, (red, green, blue), each_channel([value / scale for value in std]))


def _read_side(size: Any) -> int:
    """Pixels a side of `224`, `{"shortest_edge": 224}` or `{"height": 224, "width": 224}`."""
    sides = {*size.values()} if isinstance(size, dict) else {size}
    (side,) = sides
    return int(side)
