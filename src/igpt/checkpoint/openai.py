"""OpenAI's released checkpoints: TensorFlow variables in shards, read one at a time.

TensorFlow (version 2, the extra `openai`) only reads the shards. Names, shapes and layouts: `openai/image-gpt`,
`src/model.py`.
"""

import glob
import logging
import os
import re
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igpt.checkpoint import tensors
from igpt.checkpoint.igpt_format import CheckpointMetadata, Weights, combined_hash
from igpt.checkpoint.sizes import size_name
from igpt.checkpoint.tensors import LazyTensor, State
from igpt.distributed.process_state import environment
from igpt.model.config import GPTConfig
from igpt.tokens.palette import Palette
from igpt.tokens.palette_tokenizer import PaletteTokenizer
from igpt.tokens.pixel_order import PixelOrder
from igpt.utils import files

log = logging.getLogger(__name__)

SCOPE = "model/"
PALETTE = "kmeans_centers.npy"
BERT_MASKED = 0.15  # mask probability of OpenAI's BERT models (Chen et al. 2020, §2.2)
HEAD = "clf/wclf"  # class head, trained only with `--clf`; zeros in the released checkpoints
SHARD = re.compile(r"(?P<prefix>.+)\.data-(?P<which>\d{5})-of-(?P<of>\d{5})")
INSTALL = "TensorFlow reads OpenAI's shards and is not installed: pip install tensorflow-cpu"
MOST_INDEX = 16 << 20  # bytes; the released ones have 20 kB
_LEAST_BYTES = 2  # of a floating-point number
Shapes = Mapping[str, tuple[int, ...]]


def find_prefix(start: Path) -> Path | None:
    """TensorFlow's checkpoint prefix, from the prefix itself, one of its files, or their folder; None: no checkpoint.

    Raises:
        ValueError: several checkpoints in the folder, a missing index or shard, or shards of two downloads.
    """
    if start.is_dir():
        prefixes = {path.with_suffix("") for path in start.glob("*.index") if path.is_file()}
        prefixes |= {Path(m["prefix"]) for path in start.iterdir() if (m := SHARD.fullmatch(str(path)))}
        if not prefixes:
            return None
        if len(prefixes) > 1:
            raise ValueError(f"{start} holds several checkpoints, give one of {', '.join(map(str, sorted(prefixes)))}")
        prefix = prefixes.pop()
    elif start.is_file():
        shard = SHARD.fullmatch(str(start))
        if start.name == "checkpoint":  # TensorFlow's pointer to the newest
            return find_prefix(start.parent)
        if shard is None and start.suffix not in (".index", ".meta"):
            return None
        prefix = Path(shard["prefix"]) if shard else start.with_suffix("")
    else:
        prefix = start
    index = Path(f"{prefix}.index")
    beside = sorted(prefix.parent.glob(f"{glob.escape(prefix.name)}.data-*"))
    shards = [m for path in beside if (m := SHARD.fullmatch(str(path)))]
    if not index.is_file() and not shards:
        return None
    if not index.is_file():
        raise ValueError(f"{index} is missing, its {len(shards)} shards alone tell nothing: download it, too")
    if not shards:
        raise ValueError(f"{index} has no shards beside it, {prefix.name}.data-00000-of-…: download them, too")
    (n, *other) = sorted({int(shard["of"]) for shard in shards})
    if other:
        raise ValueError(f"{prefix}: shards of {n} and of {other[0]}: two downloads are mixed up, keep one")
    there = {int(shard["which"]) for shard in shards}
    missing = [f"{prefix.name}.data-{i:05d}-of-{n:05d}" for i in range(n) if i not in there]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{prefix.parent}: {', '.join(missing[:3])}{more} missing, of {n} shards: download them, too")
    return prefix


def read(prefix: Path, *, palette: str | None, n_head: int | None) -> Weights:
    """The weights of a checkpoint, AR or BERT, with sizes inferred from its variables.

    Raises:
        ValueError: no TensorFlow, no palette, a missing or misshapen variable (named), or a damaged file.
    """
    reader = _VariableReader(prefix)
    shapes = {name.removeprefix(SCOPE): shape for name, shape in reader.shapes.items() if name.startswith(SCOPE)}
    network = infer_network(prefix, shapes, n_head)
    wanted = list_variables(network)
    head = {HEAD: (*shapes[HEAD][:1], network.n_embd)} if HEAD in shapes else {}
    check_variables(prefix, shapes, wanted | head)
    check_size(prefix, wanted | head)
    wclf = reader.read_lazily(SCOPE + HEAD) if head else None
    if wclf is not None and not wclf.read().any():
        wclf = None
    skipped = sorted(reader.shapes.keys() - {SCOPE + name for name in wanted | head})
    log.info(
        "%s: %s, %d blocks of width %d, %d heads, %d positions, %d colours, %s",
        prefix, "next pixels" if network.causal else "masked pixels", network.n_layer, network.n_embd,
        network.n_head, network.n_ctx, network.n_vocab,
        f"a head of {wclf.shape[0]} classes" if wclf else "no trained class head",
    )  # fmt: skip
    if skipped:
        shown = ", ".join(skipped[:5]) + (", …" if len(skipped) > 5 else "")
        log.info("skipped %d variables that the network does not have (of its training): %s", len(skipped), shown)
    colours = find_palette(prefix, palette, network.n_vocab)
    side = round(network.n_ctx**0.5)
    metadata = CheckpointMetadata(
        network=network,
        tokenizer=PaletteTokenizer(colours, PixelOrder.from_name(side, "raster")),
        objective={"name": "ar"} if network.causal else {"name": "bert", "mask_probability": BERT_MASKED},
        model=size_name(network),
        data=f"imagenet{side}",
        step=int(step[1]) if (step := re.search(r"-(\d+)$", prefix.name)) else 0,
        seed=0,
    )
    state = import_state({name: reader.read_lazily(SCOPE + name) for name in wanted}, network)
    sha256 = combined_hash(files.sha256(Path(f"{prefix}.index")), metadata)  # it holds a checksum of every variable
    return Weights(prefix, prefix.parent, metadata, sha256, lambda: state, wclf)


def infer_network(where: Path, shapes: Shapes, n_head: int | None) -> GPTConfig:
    """The network's config, inferred from the variables' shapes; `n_head` is needed if they have no head dimension.

    Raises:
        ValueError: no such network, an unknown or contradicting number of heads, or positions that are no square.
    """
    blocks = {int(m[1]) for name in shapes if (m := re.match(r"h(\d{1,9})/", name))}
    if not blocks or not {"wte", "wpe"} <= shapes.keys():
        raise ValueError(
            f"{where} has no variables {SCOPE}wte, {SCOPE}wpe and {SCOPE}h0/…: it is a checkpoint of something else"
        )
    if max(blocks) >= len(shapes):
        raise ValueError(f"{where} names the block h{max(blocks)} and has {len(shapes)} variables: it is not complete")
    if len(shapes["wte"]) != 2 or len(shapes["wpe"]) != 2:
        raise ValueError(f"{where}: {SCOPE}wte is {shapes['wte']}, {SCOPE}wpe {shapes['wpe']}, expected two dimensions")
    n_vocab, n_embd = shapes["wte"]
    heads = shapes.get("h0/attn/q_proj", ())
    if len(heads) == 3:
        if n_head not in (None, heads[0]):
            raise ValueError(f"{where} has {heads[0]} heads, task.n_head={n_head} says otherwise: leave it out")
        n_head = heads[0]
    if n_head is None:
        raise ValueError(
            f"{where} does not tell how many heads its attention has: import it with task=import task.n_head=…"
        )
    if n_head < 1 or n_embd % n_head:
        raise ValueError(f"{where}: task.n_head={n_head} does not divide its width of {n_embd}")
    n_ctx = shapes["wpe"][0]
    if round(n_ctx**0.5) ** 2 != n_ctx:
        raise ValueError(f"{where}: {n_ctx} positions are no square image")
    return GPTConfig(
        n_layer=max(blocks) + 1, n_embd=n_embd, n_head=n_head, n_ctx=n_ctx, n_vocab=n_vocab, causal="sos" in shapes
    )


def list_variables(network: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Variable names (without scope) and shapes of a network in the released files."""
    c, t, v, h = network.n_embd, network.n_ctx, network.n_vocab, network.n_head
    shapes: dict[str, tuple[int, ...]] = {"wpe": (t, c), "wte": (v, c), "wtet": (v, c), "ln_f/g": (c,)}
    if network.causal:
        shapes["sos"] = (c,)
    for block in range(network.n_layer):
        at = f"h{block}"
        shapes |= {f"{at}/ln_1/g": (c,), f"{at}/ln_2/g": (c,)}
        shapes |= {f"{at}/attn/{name}_proj": (h, c // h, c) for name in "qkvc"}
        shapes |= {f"{at}/mlp/c_fc/w": (c, 4 * c), f"{at}/mlp/c_proj/w": (4 * c, c)}
    return shapes


def check_variables(where: Path, shapes: Shapes, wanted: Shapes) -> None:
    """Raises ValueError, naming them, if variables are missing or misshapen."""
    missing = sorted(wanted.keys() - shapes.keys())
    wrong = [
        f"{SCOPE}{name}: {shapes[name]} in the file, expected {shape}"
        for name, shape in wanted.items()
        if name in shapes and shapes[name] not in (shape, _merge_heads(name, shape))
    ]
    if missing:
        raise ValueError(f"{where} has no {', '.join(SCOPE + name for name in missing[:5])}: it is not complete")
    if wrong:
        raise ValueError(f"{where}: {'; '.join(wrong[:5])}")


def check_size(prefix: Path, wanted: Shapes) -> None:
    """Raises ValueError if the shards hold fewer bytes than the variables, which are not compressed, need."""
    shards = [path for path in prefix.parent.glob(f"{glob.escape(prefix.name)}.data-*") if SHARD.fullmatch(str(path))]
    there, needed = sum(path.stat().st_size for path in shards), sum(map(prod, wanted.values())) * _LEAST_BYTES
    if needed > there:
        raise ValueError(f"{prefix}: its shards have {there:,} bytes, its variables {needed:,}: download both again")


def _merge_heads(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an attention matrix that was saved with its head dimensions merged."""
    return (shape[0] * shape[1], shape[2]) if "/attn/" in name else shape


def import_state(foreign: State, network: GPTConfig) -> State:
    """Converts their variables to our names and layout; q, k and v of a block become one matrix."""
    c = network.n_embd

    def stack_projections(parts: list[LazyTensor]) -> LazyTensor:  # each [H, D, in]: no transpose (`bsf,hef->bhse`)
        shape = (len(parts) * c, c)
        return LazyTensor(shape, parts[0].dtype, lambda: torch.cat([part.read().reshape(c, c) for part in parts]))

    def transpose(tensor: LazyTensor, n_out: int, n_in: int) -> LazyTensor:  # [in, out], with heads or without
        return tensor.reshape((n_out, n_in), lambda w: w.reshape(n_in, n_out).t().contiguous())

    state: State = {name: foreign[name] for name in ("wte", "wpe", "wtet", "sos") if name in foreign}
    state["ln_f.g"] = foreign["ln_f/g"]
    for block in range(network.n_layer):
        at, to = f"h{block}/", f"h.{block}."
        state |= {f"{to}ln_1.g": foreign[f"{at}ln_1/g"], f"{to}ln_2.g": foreign[f"{at}ln_2/g"]}
        state[f"{to}attn.c_attn.weight"] = stack_projections([foreign[f"{at}attn/{name}_proj"] for name in "qkv"])
        state[f"{to}attn.c_proj.weight"] = transpose(foreign[f"{at}attn/c_proj"], c, c)
        state[f"{to}mlp.c_fc.weight"] = transpose(foreign[f"{at}mlp/c_fc/w"], 4 * c, c)
        state[f"{to}mlp.c_proj.weight"] = transpose(foreign[f"{at}mlp/c_proj/w"], c, 4 * c)
    return {name: tensor.to_float32() for name, tensor in state.items()}


def find_palette(prefix: Path, file: str | None, k: int) -> Palette:
    """The palette, which OpenAI's checkpoints lack: from the path `file`, else from a folder beside or above.

    Raises:
        ValueError: no palette, or one of another number of colours.
    """
    folders = [prefix.absolute().parent, *prefix.absolute().parent.parents[:3]]
    candidates = [folder / sub / PALETTE for folder in folders for sub in (".", "color-clusters")]
    path = Path(file).expanduser() if file is not None else next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise ValueError(
            f"{prefix} does not hold the colours its {k} tokens stand for: put OpenAI's {PALETTE} beside it, or import "
            f"it with task=import task.palette=PATH/{PALETTE}"
        )
    palette = Palette.load(path)
    if palette.k != k:
        raise ValueError(f"{path} has {palette.k} colours, and the network {k}: it is the palette of another")
    log.info("palette: %s", path)
    return palette


class _VariableReader:
    """TensorFlow's checkpoint reader: shapes and dtypes of all variables, and each as a tensor.

    Raises:
        ValueError: TensorFlow is not installed, or the checkpoint is damaged.
    """

    def __init__(self, prefix: Path) -> None:
        if wild := [letter for letter in "*?[]{}\\" if letter in str(prefix)]:
            raise ValueError(
                f"{prefix}: TensorFlow takes {wild[0]} in a name for a pattern: rename the files or folders"
            )
        if Path(f"{prefix}.index").stat().st_size > MOST_INDEX:
            raise ValueError(f"{prefix}.index has more than {MOST_INDEX:,} bytes: it is no index of a network")
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}  # no lines about the processor
        with environment(**{**quiet, **{name: os.environ[name] for name in quiet if name in os.environ}}):
            try:
                import tensorflow as tf
            except ImportError as error:
                raise ValueError(INSTALL) from error
            self.prefix, self.errors = prefix, (tf.errors.OpError, ValueError, IndexError, RuntimeError)
            self.reader = self._read_or_raise(lambda: tf.train.load_checkpoint(str(prefix)))
        shapes = self._read_or_raise(self.reader.get_variable_to_shape_map)
        self.shapes = {str(name): tuple(shape) for name, shape in shapes.items()}
        kinds = self._read_or_raise(self.reader.get_variable_to_dtype_map)
        self.dtypes = {str(name): getattr(torch, kind.name, None) for name, kind in kinds.items()}

    def _read_or_raise(self, read: Callable[[], Any], name: str = "") -> Any:
        try:
            return read()
        except self.errors as error:
            message = tensors.first_line(error)
            at = f", at {name}" if name else ""
            raise ValueError(f"{self.prefix} is damaged or not downloaded to its end{at} ({message})") from error

    def read_lazily(self, name: str) -> LazyTensor:
        """One variable, read on demand, bfloat16 as float32. Raises ValueError if it is not floating point."""
        dtype = self.dtypes[name]
        if dtype not in tensors.DTYPES:
            raise ValueError(f"{self.prefix}: {name} does not hold floating-point numbers")
        wide = torch.float32 if dtype is torch.bfloat16 else dtype

        def read() -> Tensor:
            array = self._read_or_raise(lambda: self.reader.get_tensor(name), name)
            return torch.from_numpy(array.astype("f4") if dtype is torch.bfloat16 else array)

        return LazyTensor(self.shapes[name], wide, read)
