"""Hugging Face's ImageGPT folders, read and written: `config.json`, `model.safetensors`, `preprocessor_config.json`.

Unlike OpenAI's and ours, its network has biases, its token table has the start vector as an additional last row, and
its matrices are stored transposed. Source: transformers 5.23, `models/imagegpt`.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt.checkpoint import tensors, torch_files
from igpt.checkpoint.igpt_format import (
    CONFIG,
    Weights,
    combined_hash,
    meta_model,
    network_shapes,
    read_metadata,
    weights_sha256,
)
from igpt.checkpoint.sizes import size_name
from igpt.checkpoint.tensors import LazyTensor, State
from igpt.model.config import SIZES, GPTConfig
from igpt.tokens.palette import Palette
from igpt.tokens.palette_tokenizer import PaletteTokenizer
from igpt.tokens.pixel_order import PixelOrder
from igpt.tokens.tokenizer_registry import tokenizer_to_dict
from igpt.utils import files

PREPROCESSOR, TORCH = "preprocessor_config.json", "pytorch_model.bin"
MODEL_TYPE = "imagegpt"
OURS = "igpt"  # key in config.json of our exports for the weights' model, data, step and seed
# Settings of the format that Image GPT fixes: setting → the only supported value.
FIXED: dict[str, Any] = {
    "activation_function": "quick_gelu",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": False,
}
BUFFER = r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"  # causal masks, saved by older releases


def is_huggingface_folder(folder: Path) -> bool:
    """Whether `transformers` wrote this folder, for any of its models."""
    if not (folder / CONFIG).is_file():
        return False
    try:
        config = files.read_json(folder / CONFIG)
    except ValueError:
        return False
    return isinstance(config, dict) and ("model_type" in config or "transformers_version" in config)


def read(folder: Path) -> Weights:
    """The weights in a Hugging Face folder.

    Raises:
        ValueError: another model, unsupported sizes or settings, missing, misshapen or damaged tensors, nonzero biases
            (named), or no palette.
    """
    config = read_config(folder / CONFIG)
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{folder / CONFIG}: model_type {config.get('model_type')!r:.60}, expected {MODEL_TYPE!r}")
    other = [
        f"{key} {config[key]!r:.60} ≠ {value!r}" for key, value in FIXED.items() if config.get(key, value) != value
    ]
    try:
        sizes = [config[key] for key in ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size")]
        if not all(type(size) is int for size in sizes):
            raise ValueError(f"{sizes!r:.60}")
        n_layer, n_embd, n_head, n_ctx, n_vocab = *sizes[:4], sizes[4] - 1  # the last is the start of the sequence
        network = GPTConfig(n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_ctx=n_ctx, n_vocab=n_vocab, causal=True)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{folder / CONFIG} does not say the network's sizes ({error!r:.200}): copy it again"
        ) from error
    if config.get("n_inner") not in (None, 4 * n_embd):
        other.append(f"n_inner {config['n_inner']!r:.60} ≠ {4 * n_embd}")
    if other:
        raise ValueError(f"{folder / CONFIG}: {'; '.join(other)}: such a network is no Image GPT")
    side = round(n_ctx**0.5)
    if side**2 != n_ctx:
        raise ValueError(f"{folder / CONFIG}: {n_ctx} positions are no square image")
    foreign, path, sha256 = _open_tensors(folder)
    state = import_state(foreign, network, path)
    palette = _read_palette(folder, network.n_vocab)
    saved = config.get(OURS, {})
    own = saved if isinstance(saved, dict) else {"said": saved}
    unknown = {"model": size_name(network), "data": f"huggingface{side}", "step": 0, "seed": 0}
    meaning = {
        "network": network.to_dict(),
        "tokenizer": tokenizer_to_dict(PaletteTokenizer(palette, PixelOrder.from_name(side, "raster"))),
        "objective": {"name": "ar"},
    }
    metadata = read_metadata({**unknown, **own, **meaning}, folder / CONFIG)
    return Weights(path, folder, metadata, combined_hash(sha256, metadata), lambda: state)


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a JSON file. Raises ValueError if it is missing or does not hold an object."""
    settings = files.read_json(path) if path.is_file() else None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is missing or is not a JSON file of settings: copy the whole folder")
    return settings


def _open_tensors(folder: Path) -> tuple[State, Path, str]:
    """Returns (tensors, path of their file or folder, its SHA-256)."""
    if not (folder / tensors.WEIGHTS).is_file() and not (folder / tensors.INDEX).is_file():
        if not (path := folder / TORCH).is_file():
            raise ValueError(f"{folder} has a {CONFIG} and no {tensors.WEIGHTS}: the download was not finished")
        state = torch_files.read_torch(path)
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise ValueError(f"{path} is no plain table of tensors: save the model again with save_pretrained")
        state = {str(name): tensor for name, tensor in state.items() if not re.fullmatch(BUFFER, str(name))}
        torch_files.check_total_size(state, path)
        return tensors.unwrapped_state(state), path, files.sha256(path)
    state, (first, *more) = tensors.read(folder, ignore=BUFFER), tensors.list_part_files(folder)
    return state, folder if more else first, weights_sha256(folder)


def _read_palette(folder: Path, k: int) -> Palette:
    """The palette: `clusters` of the image processor."""
    where = folder / PREPROCESSOR
    if not where.is_file():
        raise ValueError(f"{folder} has no {PREPROCESSOR}: it holds the colours that the tokens stand for, copy it too")
    try:
        clusters = read_config(where).get("clusters")
        palette = Palette(np.array(clusters, dtype=np.float32))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{where}: its clusters are no palette ({error})") from error
    if palette.k != k:
        raise ValueError(f"{where}: {palette.k} clusters, and the network has {k} colours")
    return palette


def import_state(foreign: State, network: GPTConfig, where: Path) -> State:
    """Converts their tensors to our names and layout.

    Raises:
        ValueError: missing, unexpected or misshapen tensors, or nonzero biases, which our network does not have.
    """
    if "lm_head.weight" not in foreign:
        raise ValueError(
            f"{where} has no lm_head.weight: it is not of ImageGPTForCausalImageModeling, and cannot tell colours"
        )
    network_shapes(where, network, foreign)
    expected = export_state(tensors.unwrapped_state(meta_model(network).state_dict()), network)
    tensors.check_fit(where, foreign, {name: tensor.shape for name, tensor in expected.items()})
    biases = [name for name in foreign if name.endswith(".bias")]
    if nonzero := [name for name in biases if bool(foreign[name].read().any())]:
        raise ValueError(
            f"{where}: {', '.join(nonzero[:3])}{f' and {len(nonzero) - 3} more' if len(nonzero) > 3 else ''} not zero: "
            "it was trained on by Hugging Face's code, with biases that OpenAI's network does not have. Dropping them "
            "would give another network (logits off by up to 9), so it is refused"
        )
    foreign = {name: tensor.to_float32() for name, tensor in foreign.items()}
    table, names = foreign["transformer.wte.weight"], _names(network)
    return {
        "wte": table.reshape((network.n_vocab, network.n_embd), lambda rows: rows[:-1]),
        "sos": table.reshape((network.n_embd,), lambda rows: rows[-1]),
        **{own: _transpose(foreign[name]) if _is_linear(own) else foreign[name] for own, name in names.items()},
    }


def export_state(state: State, network: GPTConfig) -> State:
    """Converts our tensors to their names and layout, with zero biases."""
    state = {name: tensor.to_float32() for name, tensor in state.items()}
    wte, sos = state["wte"], state["sos"]
    shape = (wte.shape[0] + 1, wte.shape[1])
    table = LazyTensor(shape, torch.float32, lambda: torch.cat([wte.read(), sos.read()[None]]))
    foreign = {"transformer.wte.weight": table}
    for own, name in _names(network).items():
        foreign[name] = _transpose(state[own]) if _is_linear(own) else state[own]
        if _is_linear(own):
            n_out = state[own].shape[0]
            foreign[name.replace(".weight", ".bias")] = LazyTensor((n_out,), torch.float32, partial(torch.zeros, n_out))
    return foreign


def _names(network: GPTConfig) -> dict[str, str]:
    """Our name → theirs, of every tensor but `wte` and `sos`, which are one table of theirs."""
    names = {"wpe": "transformer.wpe.weight", "wtet": "lm_head.weight"}
    modules = [own for own in meta_model(network).state_dict() if own.startswith(("h.", "ln_f."))]
    return names | {own: f"transformer.{own.removesuffix('.g').removesuffix('.weight')}.weight" for own in modules}


def _is_linear(own: str) -> bool:
    return own.startswith("h.") and own.endswith(".weight")


def _transpose(matrix: LazyTensor) -> LazyTensor:
    return matrix.reshape((matrix.shape[1], matrix.shape[0]), lambda w: w.t().contiguous())


def write(folder: Path, weights: Weights) -> None:
    """Writes model and image processor, without a class head, for `from_pretrained`; the folder appears atomically.

    Raises:
        ValueError: a network that the format cannot hold (`check_exportable`), or `folder` exists.
    """
    palette = check_exportable(weights)
    metadata = weights.metadata
    network, side = metadata.network, metadata.tokenizer.side
    config = {
        "architectures": ["ImageGPTForCausalImageModeling"],
        "model_type": MODEL_TYPE,
        "vocab_size": network.n_vocab + 1,  # with the start token
        "n_positions": network.n_ctx,
        "n_embd": network.n_embd,
        "n_layer": network.n_layer,
        "n_head": network.n_head,
        "n_inner": None,
        **FIXED,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": network.n_vocab,
        "dtype": "float32",
        OURS: {"model": metadata.model, "data": metadata.data, "step": metadata.step, "seed": metadata.seed},
    }
    processor = {
        "image_processor_type": "ImageGPTImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 2,  # bilinear
        "do_normalize": True,
        "do_color_quantize": True,
        "clusters": palette.centres.tolist(),
    }
    with files.atomic_folder(folder) as temporary:
        tensors.write(temporary, export_state(weights.state(), network), label="exporting")
        files.write_json(temporary / CONFIG, config)
        files.write_json(temporary / PREPROCESSOR, processor)


def check_exportable(weights: Weights) -> Palette:
    """Checks that Hugging Face's format can hold these weights; returns their palette.

    Raises:
        ValueError: a network other than the paper's, a tokenizer other than a palette in raster order, or BERT.
    """
    metadata, hint = weights.metadata, "export it as task.format=igpt instead"
    tokenizer = metadata.tokenizer
    if unsupported := metadata.network.unsupported(SIZES):
        raise ValueError(f"{weights.path} has {unsupported}, which Hugging Face's ImageGPT does not know: {hint}")
    if not isinstance(tokenizer, PaletteTokenizer) or tokenizer.kind != PaletteTokenizer.kind:
        raise ValueError(
            f"{weights.path} reads {tokenizer.describe()}, Hugging Face's ImageGPT a palette of colours only: {hint}"
        )
    if not metadata.network.causal:
        raise ValueError(f"{weights.path} was trained on masked pixels, Hugging Face's ImageGPT is causal only: {hint}")
    if not tokenizer.order.is_raster:
        raise ValueError(f"{weights.path} reads pixels in another order, Hugging Face's ImageGPT row by row: {hint}")
    return tokenizer.palette
