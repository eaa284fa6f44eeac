"""The file of a fitted probe, `probe.safetensors` in a run of `task=probe`, and the weights that the run probed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from igpt.checkpoint.head_files import check_class_names, shorten_class_names
from igpt.checkpoint.tensors import is_finite, read_safetensors
from igpt.model.head import ProbeHead
from igpt.settings.older_configs import read_record
from igpt.settings.paths import resolve_nearest
from igpt.utils import files

PROBE = "probe.safetensors"
FORMAT = 1
ABOUT = "probe"  # key of the file's metadata: JSON
LAYERS = "layers"  # instead, in older files: numbers, separated by blanks
DTYPES = {"float16": torch.float16, "float32": torch.float32}  # of features
KINDS: dict[str, type] = {
    "norm": str, "dtype": str, "data": str, "weights": str, "resolution": int, "eval_masks": int, "seed": int,
}  # fmt: skip


@dataclass(frozen=True)
class ProbeMetadata:
    """Metadata of a probe: the features that it reads, and the weights and labels that it was fitted on."""

    norm: str
    dtype: str  # of the features, a key of DTYPES
    data: str  # name of the dataset
    weights: str  # SHA-256 of the network's weights
    resolution: int  # pixels a side, also where positions were interpolated to it
    eval_masks: int  # masks per image, combined by vote
    seed: int  # of the masks and of the vote
    class_names: tuple[str, ...] | None = None  # by label; None: unknown


def save_probe(path: Path, weight: Tensor, bias: Tensor, layers: list[int], about: ProbeMetadata | None) -> None:
    """Writes weight (K, D) and bias (K,) of a probe of `layers`, whose features are concatenated.

    `about`: None for the probe of an encoder that is not ours, which has no layers.
    """
    record: dict[str, Any] = {"format": FORMAT, "layers": layers}
    if about is not None:
        record |= vars(about) | {"class_names": shorten_class_names(about.class_names)}
    tensors = {"weight": weight.detach().cpu().contiguous(), "bias": bias.detach().cpu().contiguous()}
    with files.atomic_write(path) as file:
        file.write(
            save(tensors, metadata={ABOUT: json.dumps(record)})
        )  # one key: safetensors writes several in any order


def find_probe(place: Path) -> Path | None:
    """The probe's file in a run folder of `task=probe`, or `place` if it is that file; None without one."""
    file = place / PROBE if place.is_dir() else place
    return file if file.name == PROBE and file.is_file() else None


def read_probe(path: Path) -> tuple[ProbeHead, ProbeMetadata]:
    """The probe in a file.

    Older files hold layers and numbers alone: the rest is read from the run.json and result.json beside them.

    Raises:
        ValueError: a damaged file, one of a later release, or a probe of an encoder that is not ours.
    """
    tensors = read_safetensors(path)  # checks the header against the file's size
    try:
        with safe_open(path, framework="pt") as file:
            record = _read_record(file.metadata() or {}, path.parent)
        if not (layers := record.pop("layers")):
            raise ValueError("it is a probe of an encoder, task=probe_encoder, and not of a network of ours")
        if not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
            raise ValueError(f"layers is {layers!r:.60}, expected a list of numbers")
        about = _parse_metadata(record, n_class=tensors["bias"].shape[0])
        weight, bias = tensors["weight"].read(), tensors["bias"].read()
        is_probe = len(tensors) == 2 and weight.dim() == 2 and bias.shape == weight.shape[:1]
        if not (is_probe and is_finite(weight) and is_finite(bias)):
            raise ValueError("its tensors are not the finite weight (K, D) and bias (K,) of a probe")
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no probe that can be read ({str(error)!r:.200}): run task=probe anew") from error
    return ProbeHead(weight.float(), bias.float(), tuple(layers), about.norm, DTYPES[about.dtype]), about


def _read_record(metadata: dict[str, str], folder: Path) -> dict[str, Any]:
    """What the metadata of a probe's file says, with that of an older one completed from its run folder."""
    if ABOUT in metadata:
        return dict(json.loads(metadata[ABOUT]))
    layers = [int(layer) for layer in metadata[LAYERS].split()]
    return {"layers": layers, **(_read_older(folder) if layers else {})}


def _parse_metadata(record: dict[str, Any], *, n_class: int) -> ProbeMetadata:
    """Raises KeyError, TypeError or ValueError on a missing or unknown field, or one of another kind."""
    if record.pop("format") != FORMAT:
        raise ValueError("it was written by a later release")
    names = check_class_names(record.pop("class_names"), n_class)
    about = ProbeMetadata(**record, class_names=names)
    if bad := next((name for name, kind in KINDS.items() if type(getattr(about, name)) is not kind), None):
        raise ValueError(f"{bad} is {getattr(about, bad)!r:.60}, expected a {KINDS[bad].__name__}")
    if about.norm not in ("ln_1", "raw") or about.dtype not in DTYPES or not 1 <= about.eval_masks <= 10**4:
        raise ValueError("norm, dtype or eval_masks is none that a probe can have")
    return about


def _read_older(folder: Path) -> dict[str, Any]:
    """The metadata of a probe of before version 6 of the records: of its run's config and result."""
    config = read_record(folder / "run.json")["config"]
    result = files.read_json(folder / "result.json")
    provenance, task = result["provenance"], config["task"]
    is_stored = provenance["solver"] == "lbfgs"
    return {
        "format": FORMAT, "norm": provenance["norm"], "dtype": task["dtype"] if is_stored else "float32",
        "data": config["data"]["name"], "weights": provenance["weights"], "resolution": config["data"]["resolution"],
        "eval_masks": provenance["masks"], "seed": provenance["seed"],
        "class_names": result.get("class_names", {}).get("confusion"),
    }  # fmt: skip


def find_probed(path: Path) -> str:
    """The path of the weights that a probe's run read, from its run.json; it may have moved together with them.

    Raises:
        ValueError: no record, or weights that are not where it says, nor beside it.
    """
    folder = path.parent
    if not (folder / "run.json").is_file():
        raise ValueError(f"init={folder}: {PROBE} without the run.json that names its weights: copy both")
    init = read_record(folder / "run.json")["config"].get("init")
    place = resolve_nearest(folder, init) if isinstance(init, str) else None
    if place is None:
        raise ValueError(
            f"init={folder}: the weights that it probed, {init!s:.200}, are not there: init=WEIGHTS with "
            f"task.head={folder}"
        )
    return str(place)
