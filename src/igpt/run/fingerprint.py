"""Hashes of a run's input files; a warning where its weights may have been trained on its held-out images."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.kept import list_paths
from igpt.data.listing import ListFiles, hash_files
from igpt.data.shards import expand_shard_path
from igpt.data.split import split_differences
from igpt.settings.data import name_dataset
from igpt.settings.older_configs import read_record
from igpt.settings.paths import NO_PATHS, resolve_nearest
from igpt.settings.probing import name_encoder
from igpt.tokens.tokenizer_registry import TOKENIZER
from igpt.utils import files

log = logging.getLogger(__name__)

Hashes = dict[str, str | None]  # setting → SHA-256 of the file it names; None: no file


def input_hashes(config: Mapping[str, Any], *, init: str | None, runs: Hashes | None, list_files: ListFiles) -> Hashes:
    """SHA-256 of a run's input files: initial weights, palettes, images (of their names and sizes).

    `init`: the hash of the initial weights. `runs`: the hashes of the compared runs, for `task=compare`.
    """
    found_out: Hashes = {"init": init, "tokens.path": _hash_file(config["tokens"].get("path"))}
    probed = {"task.probe_data": settings} if (settings := config["task"].get("probe_data")) else {}
    sources = {"data": config["data"], **config["data"].get("streams", {}), **probed}
    stages = config["task"].get("stages") or {}
    for name, stage in ((f"task.stages.{name}", stage) for name, stage in stages.items() if stage is not None):
        if isinstance(data := stage.get("data"), dict):
            sources[f"{name}.data"] = data
        if isinstance(own := stage.get("init"), str):
            found_out[f"{name}.init"] = find_weights(own).sha256
    for option, settings in sources.items():
        images = settings.get("path")
        if images is not None and Path(images).exists():
            found_out[f"{option}.path"] = hash_files(Path(images), list_files)
        elif images is not None and (named := [Path(file) for file in expand_shard_path(images) or ()]):
            listed = [f"{file} {file.stat().st_size}" for file in named if file.is_file()]
            found_out[f"{option}.path"] = hashlib.sha256("\n".join(listed).encode()).hexdigest()
    if runs is not None:
        return found_out | runs
    palette = config["task"].get("palette") or config["data"].get("clusters")
    for position, run in enumerate(config["task"].get("runs", []), start=1):
        name = f"task.runs {Path(run).name}"
        found_out[f"{name} {position}" if name in found_out else name] = hash_steps(run, palette)
    if "encoder" in config["task"] and (path := Path(str(config["task"]["encoder"]))).exists():
        found_out["task.encoder"] = files.sha256(path)
    for spec in map(str, config["task"].get("baselines") or []):
        if spec not in NO_PATHS and Path(spec).exists():
            found_out[f"task.baselines {name_encoder(spec)}"] = files.sha256(Path(spec))
    for group, key in (("task", "palette"), ("data", "clusters")):
        if (sha := _hash_file(config[group].get(key))) is not None:
            found_out[f"{group}.{key}"] = sha
    return found_out | {
        f"task.compare_with {Path(file).name}": _hash_file(file) for file in config["task"].get("compare_with", [])
    }


def hash_steps(run: str, palette: str | None) -> str:
    """The SHA-256 of a run's final weights, which its other steps led to; where there are none, of all steps.

    Of a finished run without weights, such as one that measured them: of its result.
    """
    paths, result = list_paths(run), Path(run) / "result.json"
    if paths == [run] and result.is_file():
        return files.sha256(result)
    if len(paths) == 1 or Path(paths[-1]).name == "model":
        return find_weights(paths[-1], palette=palette).sha256
    return files.hash_json([find_weights(path, palette=palette).sha256 for path in paths])


def _hash_file(path: str | None) -> str | None:
    """SHA-256 of a file, or of the tokenizer in a run folder; None without one."""
    place = Path(path or "").expanduser()
    candidates = () if path is None else (place, place / TOKENIZER, place / "model" / TOKENIZER)
    file = next(filter(Path.is_file, candidates), None)
    return files.sha256(file) if file is not None else None


def read_training_config(folder: Path) -> dict[str, Any]:
    """The config of the run that trained the weights or tokenizer of a run directory, through imports; {}: unknown."""
    for _ in range(10):  # imports of imports
        if not (folder / "run.json").is_file():
            break
        config: dict[str, Any] = read_record(folder / "run.json")["config"]
        if {"network", "tokenizer"} & {*config["task"]["requires"]}:
            return config
        if config.get("init") is None:
            break
        if (run_folder := resolve_nearest(folder, str(config["init"]))) is None:
            break
        folder = next((p for p in (run_folder, *run_folder.parents[:2]) if (p / "run.json").is_file()), run_folder)
    return {}


def compare_splits(settings: Mapping[str, Any], run: Path) -> None:
    """Warns where the run of weights or of a tokenizer held out other images: it may have been trained on ours.

    Or was trained again on train and val, by `task.refit`. `settings`: the data settings of this run.
    """
    training = read_training_config(run)
    pretrained = training.get("data", {})
    if not pretrained or name_dataset(pretrained) != name_dataset(settings):
        return
    if training["task"].get("refit") is True and pretrained.get("labels_per_class") is None:
        log.warning("%s was trained again on train and val (task.refit): val is not held out from it, test is", run)
    differ = split_differences(settings, pretrained)
    other = [f"data.{key} {pretrained.get(key)} ≠ {settings.get(key)}" for key in differ]
    if other:
        log.warning(
            "%s held out other images than this run does (%s): it may have been trained on what is held out here",
            run, "; ".join(other),
        )  # fmt: skip


def compare_tokenizer_images(settings: Mapping[str, Any], path: str) -> None:
    """Logs where the run that trained the tokenizer at `path` held out other images, or was of another dataset.

    `settings`: the data settings of this run.
    """
    place = Path(path).expanduser()
    folder = next((p for p in (place, *place.parents[:2]) if (p / "run.json").is_file()), place)
    compare_splits(settings, folder)
    trained = read_training_config(folder).get("data")
    if trained and name_dataset(trained) != name_dataset(settings):
        log.info(
            "tokens.path=%s was trained on images of %s: one trained on %s may show these better",
            place, name_dataset(trained), name_dataset(settings),
        )  # fmt: skip
