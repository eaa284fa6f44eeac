"""Networks of transformers: their features are those of transformers' own call; folders that are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from igpt.encoder.backbones import Backbone
from igpt.encoder.find_encoder import find_encoder

CPU = torch.device("cpu")
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
PREPROCESSOR = {"image_mean": MEAN, "image_std": STD, "size": {"height": 16, "width": 16}}
VIT: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
}  # fmt: skip
WIDE = VIT | {"intermediate_size": 16}
RESNET = {"embedding_size": 4, "hidden_sizes": [4, 8, 12], "depths": [1, 1, 1], "layer_type": "basic"}
NETWORKS: dict[str, Callable[[], Any]] = {
    "resnet": lambda: hf.ResNetModel(hf.ResNetConfig(**RESNET)),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**WIDE)),
    "vit of a classifier": lambda: hf.ViTForImageClassification(hf.ViTConfig(**WIDE)),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**VIT, mlp_ratio=1)),
    "registers": lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**VIT, mlp_ratio=1)),
    "mae": lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**WIDE, mask_ratio=0.75)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**{k: v for k, v in WIDE.items() if "size" not in k or k[0] in "hi"})),
}


def saved(folder: Path, name: str, **preprocessor: Any) -> tuple[Path, Any]:
    """(folder, network in evaluation mode) of a random network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = NETWORKS[name]().eval()
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **preprocessor}))
    return folder, network


def images(side: int = 16) -> Tensor:
    return torch.randint(0, 256, (5, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def found(folder: Path, **settings: Any) -> Backbone:
    encoder = find_encoder(str(folder), device=CPU, resolution=16, **settings)
    assert isinstance(encoder, Backbone)
    return encoder


@pytest.mark.parametrize(
    ("name", "pooling", "chosen"),
    [
        ("resnet", "auto", "pooler"), ("resnet", "mean", "mean"), ("vit", "auto", "pooler"), ("vit", "cls", "cls"),
        ("vit of a classifier", "auto", "cls"), ("dinov2", "auto", "pooler"), ("registers", "mean", "mean"),
        ("mae", "auto", "cls"),
    ],
)  # fmt: skip
def test_features_are_those_of_transformers(tmp_path: Path, name: str, pooling: Any, chosen: str) -> None:
    """Independent source: the network called by hand on pixels normalised by hand; MAE's patches in another order."""
    folder, network = saved(tmp_path / name, name)
    encoder = found(folder, pooling=pooling)
    assert (encoder.pooling, encoder.name, encoder.input_size) == (chosen, name, 16)
    x = ((images() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    if name == "mae":
        network.config.mask_ratio = network.embeddings.config.mask_ratio = 0.0
    network = getattr(network, "vit", network)
    with torch.no_grad():
        output = network(pixel_values=x)
    hidden = output.last_hidden_state
    expected = {
        "pooler": lambda: output.pooler_output.flatten(1),
        "cls": lambda: hidden[:, 0],
        "mean": lambda: hidden[:, 5:].mean(1) if name == "registers" else hidden.mean((2, 3)),
    }[chosen]()
    features = encoder.encode(images())
    assert features.shape == (5, encoder.width)
    assert torch.allclose(features, expected, atol=1e-5)
    assert torch.equal(features, encoder.encode(images()))


@pytest.mark.parametrize("name", ["resnet", "vit", "dinov2", "mae"])
def test_another_size(tmp_path: Path, name: str) -> None:
    """Invariant: images are resized to the size of the file, or to the one that is asked for; each has its own hash."""
    folder, _ = saved(tmp_path / name, name)
    own, larger = found(folder), found(folder, input_size=32)
    assert (own.input_size, larger.input_size, own.width) == (16, 32, larger.width)
    assert own.encode(images(8)).shape == larger.encode(images(8)).shape
    assert own.hash != larger.hash
    assert own.hash == found(folder).hash != found(folder, pooling="mean").hash
    if name != "resnet":
        with pytest.raises(ValueError, match=r"task\.input_size=18: .* reads patches of 4×4 pixels, take a multiple"):
            found(folder, input_size=18)


def test_the_size_of_the_file(tmp_path: Path) -> None:
    """By hand: the crop, if one is made, else the shortest edge; no rescaling and no normalisation where it says so."""
    folder, _ = saved(tmp_path / "a", "resnet", size={"shortest_edge": 24}, crop_size=20, do_normalize=False)
    encoder = found(folder)
    assert encoder.input_size == 20
    assert encoder.preprocess.mean == (0, 0, 0)
    assert encoder.preprocess.std == pytest.approx((255, 255, 255))
    saved(folder, "resnet", size={"shortest_edge": 24}, crop_size=20, do_center_crop=False, do_rescale=False)
    assert found(folder).input_size == 24
    assert found(folder).preprocess.mean == tuple(MEAN)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("text", "is no network of RGB images alone"),
        ("no preprocessing", "preprocessor_config.json is missing"),
        ("no mean", "does not say how pixels become the network's input.*image_mean"),
        ("no weights", "has no model.safetensors, the only format that is read"),
        ("lacking", "lacks weights, as encoder"),
        ("nan", "holds NaN or infinity"),
        ("code", "transformers does not read"),
        ("kernel", "config.json has attn_implementation, which may fetch code from the Hub"),
        ("depth", "transformers does not read"),
        ("large", r"does not say how pixels become the network's input.*size 200000"),
        ("mean", r"does not say how pixels become the network's input.*nan"),
        ("no class token", r"task\.encoder=it has no class token: task\.pooling=mean"),
        ("nothing", "expected lite0, a folder of transformers with its config.json"),
    ],
)
def test_a_folder_that_is_refused(tmp_path: Path, fault: str, message: str) -> None:
    folder, _ = saved(tmp_path / "it", "bert" if fault == "text" else "resnet")
    weights = folder / "model.safetensors"
    if fault == "no preprocessing":
        (folder / "preprocessor_config.json").unlink()
    if fault == "no mean":
        (folder / "preprocessor_config.json").write_text(json.dumps({"size": 16}))
    if fault == "no weights":
        weights.rename(folder / "pytorch_model.bin")
    if fault in ("lacking", "nan"):
        state = load_file(weights)
        name = next(name for name in state if name.startswith("encoder") and name.endswith("weight"))
        state |= {name: torch.full_like(state[name], torch.nan)}
        save_file(
            {key: value for key, value in state.items() if fault == "nan" or key != name}, weights, {"format": "pt"}
        )
    if fault in ("large", "mean"):
        preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
        own = {"size": 200_000} if fault == "large" else {"image_mean": [float("nan")] * 3}
        (folder / "preprocessor_config.json").write_text(json.dumps({**preprocessor, "do_center_crop": False, **own}))
    if fault in ("kernel", "depth"):
        config = json.loads((folder / "config.json").read_text())
        own = {"attn_implementation": "someone/kernel"} if fault == "kernel" else {"depths": "deep"}
        (folder / "config.json").write_text(json.dumps(config | own))
    if fault == "code":
        config = json.loads((folder / "config.json").read_text())
        own = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
        (folder / "config.json").write_text(json.dumps(config | own))
        (folder / "mine.py").write_text("raise SystemExit('it was run')")
    if fault == "nothing":
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match=message):
        found(folder, pooling="cls" if fault == "no class token" else "auto")


def test_features_are_no_encoder(tmp_path: Path) -> None:
    """A file of features is refused where images are to be encoded."""
    with pytest.raises(ValueError, match=r"holds features.*expected a network; task=probe_encoder takes features"):
        found(tmp_path / "mine.npy")
