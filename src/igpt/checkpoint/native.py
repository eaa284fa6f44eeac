"""Our own format: a folder with `model.safetensors` and `config.json`, read back without today's `conf/`.

`config.json` holds all that is needed to use the weights: the network's sizes, the colours themselves, the order of
the pixels, the objective, the step and the seed. Loading executes nothing that is in a file.
"""

import inspect
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from igpt import files
from igpt.checkpoint.resume import AtomicCheckpointIO, checksum_path
from igpt.model.gpt import GPT

log = logging.getLogger(__name__)

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True)
class Origin:
    """Where weights come from and what their tokens mean: all of `config.json` but the hash of the weights."""

    network: dict[str, Any]  # arguments of GPT
    palette: list[list[float]]  # (k, 3) in [-1, 1]
    palette_hash: str  # of these colours in this order
    permutation: list[int]  # position → pixel
    objective: dict[str, Any]  # name and settings
    model: str  # names, for run folders and tables
    data: str
    step: int
    seed: int

    @property
    def centres(self) -> np.ndarray:
        """The palette's colours, (k, 3) float32, bit for bit those of training."""
        return np.asarray(self.palette, dtype=np.float32)


def save_model(folder: Path, state: dict[str, Tensor], origin: Origin) -> None:
    """Writes `folder/model.safetensors`, then `folder/config.json`, each whole or not at all.

    The config names the hash of its weights, so a folder whose two files are not of one save is recognised.
    """
    plain = {name: weight.detach().to("cpu", copy=False).contiguous() for name, weight in state.items()}
    try:
        with files.atomic_path(folder / WEIGHTS) as temporary:
            save_file(plain, temporary)
    except SafetensorError as error:
        raise OSError(f"{folder / WEIGHTS} could not be written ({error}): is the disk full?") from error
    config = {"format": FORMAT, **vars(origin), "weights_sha256": files.sha256(folder / WEIGHTS)}
    files.write_json(folder / CONFIG, config)


@dataclass(frozen=True)
class Weights:
    """A checkpoint that was found and understood; `load_into` reads the tensors."""

    folder: Path
    origin: Origin
    sha256: str

    def net(self) -> GPT:
        """The network these weights are of, loaded, on the CPU, in float32."""
        with torch.device("meta"):
            net = GPT(**self.origin.network)
        net.to_empty(device="cpu")
        self.load_into(net)
        return net

    @property
    def path(self) -> Path:
        """The file the tensors are in."""
        return self.folder / WEIGHTS

    def state(self) -> dict[str, Tensor]:
        """The tensors by name. Raises ValueError when their file is damaged."""
        try:
            return load_file(self.path)
        except SafetensorError as error:
            raise ValueError(f"{self.path} is damaged ({error}): copy or export it again") from error

    def load_into(self, net: GPT) -> None:
        """Copies every weight into `net`; keys and shapes must be exactly its own.

        Raises:
            ValueError: a network of other sizes, missing, unexpected or misshapen tensors, or a damaged file.
        """
        check_same("network", self.origin.network, net.config, self.folder)
        path, state, own = self.path, self.state(), net.state_dict()
        wrong = [
            f"{name}: {tuple(weight.shape)} in the file, {tuple(own[name].shape)} in the network"
            for name, weight in state.items()
            if name in own and weight.shape != own[name].shape
        ]
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unexpected or wrong:
            raise ValueError(f"{path} does not fit: missing {missing}, unexpected {unexpected}, misshapen {wrong}")
        if bad := [name for name, weight in state.items() if not torch.isfinite(weight).all()]:
            raise ValueError(
                f"{path} holds NaN or infinity in {', '.join(bad[:3])}: training had broken down, take an earlier one"
            )
        net.load_state_dict(state)


@dataclass(frozen=True)
class OnTheWay(Weights):
    """The network inside a checkpoint that training wrote, `checkpoints/step_0001000.ckpt`."""

    @property
    def path(self) -> Path:
        return self.folder / f"step_{self.origin.step:07d}.ckpt"

    def state(self) -> dict[str, Tensor]:
        state = AtomicCheckpointIO().load_checkpoint(self.path)["state_dict"]
        return {name.removeprefix("net."): weight for name, weight in state.items() if name.startswith("net.")}

    @staticmethod
    def read(path: Path) -> "OnTheWay":
        """Raises ValueError when it is damaged, of another format, or not of a network that generates."""
        checksum, sha256 = checksum_path(path), files.sha256(path)
        if not checksum.is_file() or checksum.read_text().strip() != sha256:
            raise ValueError(f"{path} is damaged or was not written to its end: its SHA-256 is not that beside it")
        checkpoint = AtomicCheckpointIO().load_checkpoint(path)
        check_same("format", checkpoint.get("format"), FORMAT, path)
        origin = Origin(**checkpoint["origin"])
        return OnTheWay(path.parent, origin, sha256)


def find(path: str) -> Weights:
    """The weights that `init=` names: a run folder, its `model/`, either file in it, or a checkpoint on the way.

    Raises:
        ValueError: nothing there, another format version, or two files that are not of one save.
    """
    place = Path(path)
    if place.suffix == ".ckpt" and place.is_file():
        return OnTheWay.read(place)
    candidates = [place.parent] if place.is_file() else [place, place / "model"]
    folder = next((c for c in candidates if (c / CONFIG).is_file() and (c / WEIGHTS).is_file()), None)
    if folder is None:
        stages = sorted(p.parent.parent.name for p in place.glob(f"*/model/{CONFIG}"))
        hint = f"; did you mean {place / stages[-1]}" if stages else ""
        raise ValueError(
            f"init={path}: no {CONFIG} with {WEIGHTS} there or in its model/; give a finished run folder{hint}"
        )
    config = files.read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else None
        raise ValueError(
            f"{folder / CONFIG}: format {found!r}, this version reads {FORMAT}: use the release that wrote it"
        )
    config.pop("format")
    sha256 = config.pop("weights_sha256", None)
    try:
        origin = Origin(**config)
        inspect.signature(GPT).bind(**origin.network)
    except TypeError as error:
        raise ValueError(f"{folder / CONFIG} is not complete ({error}): export the model again") from error
    if files.sha256(folder / WEIGHTS) != sha256:
        raise ValueError(f"{folder}: {WEIGHTS} is not the file {CONFIG} was written for: damaged or half replaced")
    return Weights(folder, origin, sha256)


def check_same(what: str, saved: Any, asked: Any, where: Path) -> None:
    """Raises ValueError, naming every difference, unless what a checkpoint holds is what the run asks for."""
    if saved == asked:
        return
    if isinstance(saved, dict) and isinstance(asked, dict):
        keys = sorted(saved.keys() | asked.keys())
        differs = [f"{k} {saved.get(k)} ≠ {asked.get(k)}" for k in keys if saved.get(k) != asked.get(k)]
        detail = "; ".join(differs)
    elif isinstance(saved, list):
        detail = "too long to print"
    else:
        detail = f"{saved} ≠ {asked}"
    raise ValueError(
        f"{where}: its {what} is not this run's ({detail}): choose what the checkpoint has, or other weights"
    )
