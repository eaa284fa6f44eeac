"""What a run is: the settings and files that decide its result, their hash in its name, and differences between two."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from igpt.settings.lightning_arguments import deciding_arguments
from igpt.settings.paths import is_same_place

# Settings of where and whether to run: not part of a run's identity.
OUTSIDE_IDENTITY = ("paths", "resume", "rerun", "init", "logger", "published")
# Callbacks that declare that they only watch (`is_observer`): by name, as nothing named in a file is imported.
OBSERVERS = (
    "igpt.training.progress_bar.ProgressBar",
    "igpt.training.callbacks.SampleGrid",
    "igpt.training.online_probe.OnlineLinearProbe",
    # `training/lightning_callbacks.py` has their classes
    "lightning.pytorch.callbacks.DeviceStatsMonitor",
    "lightning.pytorch.callbacks.LearningRateMonitor",
    "lightning.pytorch.callbacks.ModelSummary",
    "lightning.pytorch.callbacks.RichModelSummary",
    "lightning.pytorch.callbacks.RichProgressBar",
    "lightning.pytorch.callbacks.ThroughputMonitor",
    "lightning.pytorch.callbacks.TQDMProgressBar",
)
# requirement of a task → groups that are not part of the identity of its runs, as it reads none of them
UNUSED = {"tokenizer": ("model", "objective"), "images": ("model", "objective", "tokens")}
OUTSIDE_TASK = ("requires", "run_folder", "paper", "init")  # keys of a task: constants, a label; a stage's weights
NULL_OUTSIDE_TASK = ("push", "private")  # keys of a task that count unless they are null
OFTEN = (".log_every", ".val_every", ".checkpoint_every", ".checkpoint_keep", ".keep_steps")
OF_THE_MACHINE = "precision"  # besides `lightning`, the only identity setting of the trainer: others change rounding
STREAM = "residual"  # another one, unless it is the default, which older runs do not state
DEBUG = "debug"  # key of a config, and folder in `paths.runs`, of runs that try something out and count for nothing


def deciding(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that determines a run's result. Raises ValueError for what is no config of a run."""
    if bad := [key for key in ("task", "trainer") if not isinstance(config.get(key), dict)]:
        raise ValueError(f"a config without {bad[0]} is no run's: restore run.json, or start the run anew")
    of_others = [group for part in config["task"].get("requires") or () for group in UNUSED.get(part, ())]
    chosen = {key: value for key, value in config.items() if key not in (*OUTSIDE_IDENTITY, *of_others, "callbacks")}
    trainer = {OF_THE_MACHINE: config["trainer"].get(OF_THE_MACHINE)}
    if config["trainer"].get(STREAM, "float32") != "float32":
        trainer[STREAM] = config["trainer"][STREAM]
    if lightning := deciding_arguments(config["trainer"]):
        trainer["lightning"] = lightning
    callbacks = deciding_callbacks(config)
    return (
        chosen
        | {"task": _task_settings(config["task"]), "trainer": trainer}
        | ({"callbacks": callbacks} if callbacks else {})
    )


def deciding_callbacks(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of `callbacks` that may change training: all but null and OBSERVERS."""
    entries = config.get("callbacks")
    return {
        key: entry
        for key, entry in (entries if isinstance(entries, dict) else {}).items()
        if entry is not None and not (isinstance(entry, dict) and entry.get("_target_") in OBSERVERS)
    }


def _task_settings(task: dict[str, Any]) -> dict[str, Any]:
    """The settings of a task that determine its result; recursively for a pipeline's stages."""
    own = {key: value for key, value in task.items() if key not in OUTSIDE_TASK}
    own = {key: value for key, value in own.items() if value is not None or key not in NULL_OUTSIDE_TASK}
    if isinstance(stages := own.get("stages"), dict):
        own["stages"] = {name: _task_settings(of) if isinstance(of, dict) else of for name, of in stages.items()}
    return own


def identity(config: dict[str, Any], files_sha256: dict[str, str | None]) -> str:
    """8 hex digits of the SHA-256 of everything that determines a run's result: config and input files."""
    text = json.dumps([deciding(config), files_sha256], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def format_run_name(task: Mapping[str, Any], names: Mapping[str, str], seed: int, digest: str) -> str:
    """The name of a run's directory, from the names of model, data and objective; of `task=compare` without them."""
    if "finished_runs" in task["requires"]:
        return f"{task['name']}-{digest}"
    return f"{task['name']}-{names['model']}-{names['data']}-{names['objective']}-s{seed}-{digest}"


def changes(saved: dict[str, Any], requested: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Differences between a saved config and the one to resume with: (forbidden, harmless).

    Harmless: intervals of logging, validation and checkpoints (though part of the run's name), and hardware settings.
    `resume`, `rerun` and `init` are not compared.
    """
    decisive = differences(deciding(saved), deciding(requested))
    refused = [line for line in decisive if not line.split(" ")[0].endswith(OFTEN)]
    outside = {"resume": None, "rerun": None, "init": None}
    full_list = [{**config, **outside, "task": _task_settings(config["task"])} for config in (saved, requested)]
    every = differences(full_list[0], full_list[1])
    return refused, [line for line in every if line not in refused]


def differences(saved: Any, requested: Any, key: str = "") -> list[str]:
    """Every setting that differs between two configs, as `task.steps 100 ≠ 200`."""
    if saved == requested or is_same_place(key, saved, requested):
        return []
    if isinstance(saved, dict) and isinstance(requested, dict):
        pairs = [(saved.get(name), requested.get(name), f"{key}.{name}".strip(".")) for name in saved | requested]
        return [line for old, new, path in pairs for line in differences(old, new, path)]
    return [f"{key} {saved} ≠ {requested}"]
