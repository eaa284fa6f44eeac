"""Configs as older releases wrote them, read by the names and values of now: so that their runs go on."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

RENAMED = {"task.gen": "task.loss_weights.gen", "task.clf": "task.loss_weights.clf"}
NOW_SCRIPTS = {"task=trace": "python benchmarks/trace_network.py INIT TOKENS.npy"}
MOVED = {  # `_target_`
    "igpt.model.gpt.GPT": "igpt.model.config.GPTConfig",
    "igpt.tokens.kmeans.fitted": "igpt.tokens.kmeans.fit_cached",
    "igpt.tokens.palette.given": "igpt.tokens.palette.from_file",
}
NEEDS = {"origin": "metadata"}
# what a missing setting meant, where the group's `_target_` is this
MEANT = {
    ("model", "igpt.model.config.GPTConfig"): ("positions", "learned"),
    ("data", "igpt.data.images.Images"): ("layout", "auto"),
}


def updated(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config as this release would write it; one of this release is itself."""
    now: dict[str, Any] = _moved(deepcopy(dict(config)))
    tokens, task = now.get("tokens"), now.get("task")
    if isinstance(tokens, dict) and tokens.get("palette") is not None:
        tokens.setdefault("_target_", "igpt.tokens.palette_tokenizer.PaletteSettings")
    for (group, target), (name, value) in MEANT.items():
        settings = now.get(group)
        if isinstance(settings, dict) and settings.get("_target_") == target:
            settings.setdefault(name, value)
    if isinstance(task, dict):
        if isinstance(task.get("needs"), list):
            task["needs"] = [NEEDS.get(need, need) for need in task["needs"]]
        for old, new in RENAMED.items():
            if (name := old.removeprefix("task.")) in task:
                _, group, key = new.split(".")
                task.setdefault(group, {})[key] = task.pop(name)
    return now


def _moved(settings: Any) -> Any:
    if not isinstance(settings, dict):
        return settings
    return {
        key: MOVED.get(value, value) if key == "_target_" and isinstance(value, str) else _moved(value)
        for key, value in settings.items()
    }
