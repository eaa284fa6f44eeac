"""Our own format: a folder with `model.safetensors` and `config.json`, independent of the current `conf/`.

`config.json` holds everything needed to use the weights: the network's config, the tokenizer (palette and pixel order
included), the objective, the step and the seed. Loading never executes code from a file.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igpt.checkpoint import tensors, torch_files
from igpt.checkpoint.resume import checksum_path, matches_checksum
from igpt.checkpoint.tensors import LazyTensor, State, select_prefix
from igpt.distributed import ranks
from igpt.distributed.sharding import copy_into_sharded, unsharded_shape
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.model.patterns import TokenLayout
from igpt.tokens.tokenizer import Tokenizer
from igpt.tokens.tokenizer_registry import tokenizer_from_dict, tokenizer_to_dict
from igpt.utils import files

log = logging.getLogger(__name__)

FORMAT = 2
PALETTE_FORMAT = 1  # older: every tokenizer was a palette, every network the paper's
CONFIG = "config.json"
METADATA_KEY = "origin"  # key of the metadata in a training checkpoint
NAME = re.compile(r"\w[\w.+-]{0,63}")


@dataclass(frozen=True)
class CheckpointMetadata:
    """Network, tokenizer, objective and origin of weights: `config.json` without the hash of the weights.

    Raises:
        ValueError: an invalid field, named; the file may come from a stranger.
    """

    network: GPTConfig
    tokenizer: Tokenizer
    objective: dict[str, Any]  # name and settings
    model: str  # names, for run folders and tables
    data: str
    step: int
    seed: int

    def __post_init__(self) -> None:
        kinds: dict[str, type] = {"objective": dict, "model": str, "data": str, "step": int, "seed": int}
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} is {getattr(self, name)!r:.60}, expected a {kind.__name__}")
        for name in ("step", "seed"):
            if not 0 <= getattr(self, name) < 1 << 63:
                raise ValueError(f"{name} is {getattr(self, name)!r:.60}, expected a whole number of 64 bits")
        for name in ("model", "data"):
            if not NAME.fullmatch(getattr(self, name)):  # it becomes the name of a folder
                raise ValueError(f"{name} is {getattr(self, name)!r:.60}, expected letters, digits, . + - and _")
        if not isinstance(self.objective.get("name"), str):
            raise ValueError(f"objective is {self.objective!r:.60}, expected its name and settings")
        sizes = (self.network.n_ctx, self.network.n_vocab)
        if sizes != (self.tokenizer.grid.n_ctx, self.tokenizer.n_vocab):
            raise ValueError(
                f"its network reads {sizes[0]} tokens of {sizes[1]}, its tokenizer ({self.tokenizer.describe()}) makes "
                f"{self.tokenizer.grid.n_ctx} of {self.tokenizer.n_vocab}"
            )
        layout, order = self.network.layout, self.tokenizer.order
        permutation = None if order.is_raster else order.permutation
        if layout is not None and layout != TokenLayout(*self.tokenizer.grid, permutation):
            raise ValueError(
                f"its network reads tokens of a grid of {layout.rows} × {layout.columns} × {layout.channels}, or in an "
                "order, that are not its tokenizer's"
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, in format `FORMAT`."""
        nested = {"network": self.network.to_dict(), "tokenizer": tokenizer_to_dict(self.tokenizer)}
        return {**{field.name: getattr(self, field.name) for field in fields(self)}, **nested}

    @staticmethod
    def from_dict(saved: Any, format: int) -> "CheckpointMetadata":
        """Inverse of `to_dict`, also for the older format. Raises ValueError on anything else."""
        if not isinstance(saved, Mapping):
            raise ValueError(f"it is {saved!r:.60}")
        values = dict(saved)
        if format == PALETTE_FORMAT:
            older = {"centres": "palette", "hash": "palette_hash", "permutation": "permutation"}
            palette = {name: values.pop(old, None) for name, old in older.items()}
            values["tokenizer"] = {"kind": "palette", **palette}
        field_names = {field.name for field in fields(CheckpointMetadata)}
        for key in sorted(map(str, field_names ^ values.keys())):
            raise ValueError(f"{key} is {'missing' if key in field_names else 'no field of it'}")
        if not isinstance(values["network"], Mapping):
            raise ValueError(f"its network is {values['network']!r:.60}")
        values["network"] = GPTConfig.from_dict(values["network"])
        values["tokenizer"] = tokenizer_from_dict(values["tokenizer"])
        return CheckpointMetadata(**values)


@dataclass(frozen=True)
class Weights:
    """Weights of a network, from any format; tensors are read by `load_into`.

    Raises:
        ValueError: tensors with other names or shapes than the network's, before it is built.
    """

    path: Path  # the file, or the folder of several
    folder: Path  # the folder that also holds the class head; its parent is the run directory
    metadata: CheckpointMetadata
    sha256: str
    state: Callable[[], State]  # lazy tensors by name
    wclf: LazyTensor | None = None  # class head (K, C), if the same file has one
    resized_from: int | None = None  # pixels a side that its positions were interpolated from
    probe: Path | None = None  # the probe of these weights that they were found by

    def __post_init__(self) -> None:
        tensors.check_fit(self.path, self.state(), network_shapes(self.path, self.metadata.network, self.state()))

    @property
    def n_parameter(self) -> int:
        """Number of parameters."""
        return sum(tensor.n_parameter for tensor in self.state().values())

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer saved with the weights."""
        return self.metadata.tokenizer

    def build_network(self) -> GPT:
        """The network, its weights not yet read: for `HardwareConfig.build_frozen`, with `load_into`."""
        return GPT(self.metadata.network)

    def net(self) -> GPT:
        """The network with these weights, on the CPU, in float32."""
        net = meta_model(self.metadata.network)
        net.allocate("cpu")
        self.load_into(net)
        return net

    @torch.no_grad()
    def load_into(self, net: GPT) -> None:
        """Copies every weight into `net`; names and shapes must match exactly.

        Raises:
            ValueError: another config, missing, unexpected or misshapen tensors, NaN or infinity, or a damaged file.
        """
        check_equal("network", asdict(self.metadata.network), asdict(net.config), self.folder)
        state, weights = self.state(), net.state_dict(keep_vars=True)
        tensors.check_fit(self.path, state, {name: unsharded_shape(weight) for name, weight in weights.items()})
        for name, weight in weights.items():
            values = state[name].read()
            if not tensors.is_finite(values):
                raise ValueError(
                    f"{self.path} holds NaN or infinity in {name}: training had broken down, take an earlier one"
                )
            copy_into_sharded(weight, values)


def meta_model(config: GPTConfig) -> GPT:
    """The network of a config on the meta device: shapes without memory."""
    with torch.device("meta"):
        return GPT(config)


def network_shapes(path: Path, config: GPTConfig, state: State) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's tensors. Raises ValueError if the file's tensors are fewer than its blocks."""
    if config.n_layer > len(state):
        raise ValueError(f"{path} holds {len(state)} tensors, too few for the n_layer={config.n_layer} that it states")
    return {name: tuple(weight.shape) for name, weight in meta_model(config).state_dict().items()}


def save_model(
    folder: Path, state: Mapping[str, Tensor] | State, metadata: CheckpointMetadata, *, label: str = "saving"
) -> None:
    """Writes `folder/model.safetensors`, then `folder/config.json`, each atomically, on rank 0.

    Sharded weights: every rank must call it. The config holds the weights' hash, so a mix of two saves is detected.

    Raises:
        ValueError: names or shapes other than the network's, NaN or infinity.
        OSError: the disk refused.
    """
    lazy: State = {}
    for name, tensor in state.items():
        lazy |= {name: tensor} if isinstance(tensor, LazyTensor) else tensors.unwrapped_state({name: tensor})
    tensors.check_fit(folder / tensors.WEIGHTS, lazy, network_shapes(folder, metadata.network, lazy))
    try:
        tensors.write(folder, lazy, label=label)
    except OSError as error:
        raise OSError(f"{folder / tensors.WEIGHTS} could not be written ({error}): is the disk full?") from error
    if ranks.this_rank().is_first:
        config = {"format": FORMAT, **metadata.to_dict(), "weights_sha256": weights_sha256(folder)}
        files.write_json(folder / CONFIG, config)


def weights_sha256(folder: Path) -> str:
    """SHA-256 of the safetensors file in a folder, or of the hashes of all its parts."""
    sums = [files.sha256(part) for part in tensors.list_part_files(folder)]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def combined_hash(sha256: str, metadata: CheckpointMetadata) -> str:
    """Hash of foreign weights with their network, tokenizer and objective."""
    return files.hash_json([sha256, metadata.network.to_dict(), metadata.tokenizer.hash, metadata.objective])


def read_model(folder: Path) -> Weights:
    """Reads a folder written by `save_model`.

    Raises:
        ValueError: another format version, a damaged file, or files of two different saves.
    """
    config = files.read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} holds no settings: copy it again")
    format = check_format(config.pop("format", None), folder / CONFIG)
    saved = config.pop("weights_sha256", None)
    metadata = read_metadata(config, folder / CONFIG, format)
    if weights_sha256(folder) != saved:
        raise ValueError(
            f"{folder}: {tensors.WEIGHTS} is not the file {CONFIG} was written for: damaged or half replaced"
        )
    first, *more = tensors.list_part_files(folder)
    return Weights(folder if more else first, folder, metadata, saved, lambda: tensors.read(folder))


def check_format(saved: Any, where: Path) -> int:
    """The format version of a file, `FORMAT` or an older one. Raises ValueError on any other."""
    if type(saved) is not int or saved not in (PALETTE_FORMAT, FORMAT):
        raise ValueError(
            f"{where}: format {saved!r:.60}, this version reads {PALETTE_FORMAT} and {FORMAT}: use the release that "
            "wrote it"
        )
    return saved


def read_training_checkpoint(path: Path) -> Weights:
    """The network in a training checkpoint, `checkpoints/step_0001000.ckpt`.

    Raises:
        ValueError: a damaged file, a missing checksum, another format, or no network in it.
    """
    checksum, sha256 = checksum_path(path), files.sha256(path)
    if not checksum.is_file():
        raise ValueError(f"{path} has no {checksum.name} beside it, which tells whether it is whole: copy both")
    if not matches_checksum(path, sha256):
        raise ValueError(f"{path} is damaged or was not written to its end: its SHA-256 is not that beside it")
    checkpoint = torch_files.read_torch(path)
    metadata, state = extract_metadata(checkpoint, path), extract_tensors(checkpoint, path)
    return Weights(path, path.parent, metadata, sha256, lambda: select_prefix("net.", state), state.get("head.wclf"))


def extract_metadata(checkpoint: Any, path: Path) -> CheckpointMetadata:
    """The metadata in a training checkpoint. Raises ValueError if it has none."""
    saved = checkpoint if isinstance(checkpoint, dict) else {}
    if "tokenizer" in saved:
        raise ValueError(f"{path} is of a tokenizer, not a network: tokens=vqvae tokens.path=RUN_FOLDER takes it")
    if METADATA_KEY not in saved or "format" not in saved:
        raise ValueError(f"{path} is no checkpoint of a network that this project trained: it does not say what it is")
    return read_metadata(saved[METADATA_KEY], path, check_format(saved["format"], path))


def read_metadata(saved: Any, where: Path, format: int = FORMAT) -> CheckpointMetadata:
    """The metadata in a file. Raises ValueError, naming the file, if it is incomplete or invalid."""
    try:
        return CheckpointMetadata.from_dict(saved, format)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} is not complete ({error}): export the model again") from error


def extract_tensors(checkpoint: Mapping[str, Any], path: Path) -> State:
    """A LightningModule's tensors under their plain names. Raises ValueError on anything but tensors."""
    state = checkpoint.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no tensors of a network: it is damaged, or something else")
    torch_files.check_total_size(state, path)
    return tensors.unwrapped_state({str(name): tensor for name, tensor in state.items()})


def check_equal(what: str, saved: Any, expected: Any, where: Path) -> None:
    """Raises ValueError, naming every difference, unless the checkpoint's value equals the run's."""
    if saved == expected:
        return
    detail = f"{saved} ≠ {expected}"
    if isinstance(saved, dict) and isinstance(expected, dict):
        keys = sorted(saved.keys() | expected.keys())
        unequal = (key for key in keys if saved.get(key) != expected.get(key))
        detail = "; ".join(f"{key} {saved.get(key)!s:.60} ≠ {expected.get(key)!s:.60}" for key in unequal)
    raise ValueError(
        f"{where}: its {what} is not this run's ({detail}): choose what the checkpoint has, or other weights"
    )
