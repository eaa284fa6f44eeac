"""Groups runs that differ only in their seed, and finds the settings that differ between groups."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from igpt.report.facts import read_names
from igpt.report.identity import deciding
from igpt.report.runs import RunRecord, flatten
from igpt.utils.overrides import format_value

OF_THE_CODE = ("_target_", "_partial_")
CHOSEN = {"model.name": "model", "objective.name": "objective"}  # setting → its name on the command line
VARIANT = "variant"  # chosen option that sets others, recorded beside the config
# settings of a task that a variant sets, or that follow from it (steps: from the operations)
OF_VARIANTS = ("optimizer", "learning_rate", "schedule", "decay_share", "ema", "gradient_clip", "steps")
OF_ONE_TASK = {"task.name", "task.baselines"}  # not compared between tasks
# task → the one in whose tables its runs stand, as they have the same numbers by the same protocol
TABLES = {"probe_encoder": "probe"}
INIT, SCRATCH = "init.", "scratch"  # prefix of the settings of the run that made the weights; without weights
LONGEST = 48  # characters shown of a value
DATA = ("name", "path", "n_class", "classes", "label_column")  # settings of data that say which images and labels


def list_settings(run: RunRecord, *, deep: int = 3) -> dict[str, Any]:
    """The flat settings that determine a run, without seeds; under `init.` those of the runs that made its weights."""
    flat = flatten(deciding({"task": {}, "trainer": {"precision": None}} | run.config))
    settings = {
        key: value
        for key, value in flat.items()
        if key != "seed" and (key.startswith("callbacks.") or key.rpartition(".")[2] not in OF_THE_CODE)
    }
    if settings.get("tokens.path") is not None and "tokens.factor" in settings:  # a VQ-VAE, its settings are the file's
        settings = {key: value for key, value in settings.items() if key == "tokens.path" or key[:7] != "tokens."}
    history = run.init_history
    if run.config.get("init") is None:
        return settings
    if not history.runs or not deep:
        return settings | {"init": run.config["init"]}
    before = list_settings(history.runs[0], deep=deep - 1) | {"step": history.metadata.get("step")}
    return settings | {f"init.{key}": value for key, value in before.items()}


def group_by_seed(runs: Sequence[RunRecord]) -> tuple[list[list[RunRecord]], dict[RunRecord, RunRecord]]:
    """Groups of runs that differ only in seeds, in input order; and repetitions, older run → newest of the same seed.

    Only the newest repetition is in a group: the others add nothing to the spread over seeds.
    """
    same: dict[str, dict[tuple[Any, ...], list[RunRecord]]] = {}  # settings → seeds → repetitions
    for run in runs:
        settings = repr((run.task, sorted(list_settings(run).items(), key=lambda item: item[0])))
        seeds = tuple(other.config.get("seed") for other in (run, *run.init_history.runs))
        same.setdefault(settings, {}).setdefault(seeds, []).append(run)
    groups: list[list[RunRecord]] = []
    repeated: dict[RunRecord, RunRecord] = {}
    for group in same.values():
        newest = [max(again, key=lambda run: (run.folder / "result.json").stat().st_mtime) for again in group.values()]
        groups.append(newest)
        for again, new in zip(group.values(), newest, strict=True):
            repeated |= {run: new for run in again if run is not new}
    return groups, repeated


def group_by_data(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """The runs on the same images and labels, by the data settings that differ between groups; one group: "".

    Images are the same by their path, also where it was moved: the last name in it and the hash in `run.json`, of the
    names and sizes of the files.
    """
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        hashes = run.begun.get("files_sha256")
        images = hashes if isinstance(hashes, dict) else {}
        which = []
        for key, data in _list_data(run).items():
            path, sha256 = data.get("path"), images.get(f"{key}.path")
            which.append({**data, "path": [Path(str(path)).name, sha256] if sha256 else path})
        groups.setdefault(repr([[data.get(key) for key in DATA] for data in which]), []).append(run)
    settings = [
        {f"{group}.{key}": data.get(key) for group, data in _list_data(of[0]).items() for key in DATA}
        for of in groups.values()
    ]
    labels = [
        " ".join(f"{key}={value}" for key, value in row.items() if value != "null") for row in list_differing(settings)
    ]
    unique = [label if labels.count(label) == 1 else f"{label} ({i})".strip() for i, label in enumerate(labels, 1)]
    return dict(zip(unique, groups.values(), strict=True))


def _list_data(run: RunRecord) -> dict[str, dict[str, Any]]:
    """The data settings of a run, and those that stages of a pipeline have of their own, by where they stand."""
    data, stages = run.config.get("data", {}), run.config.get("task", {}).get("stages") or {}
    of_stages = {f"task.stages.{name}.data": of.get("data") for name, of in stages.items() if isinstance(of, dict)}
    return {key: dict(of) for key, of in ({"data": data} | of_stages).items() if isinstance(of, dict)}


def describe_groups(groups: Sequence[Sequence[RunRecord]]) -> list[dict[str, str]]:
    """For each group of runs that differ only in seeds, the settings that not all groups have in common, as text.

    Variants are told by their names, as `variant=local`: a name is no setting, so that runs with and without one are
    the same where their settings are. Where tasks differ, a group has the name of its network first; settings that not
    all tasks have are compared with those of its own task.
    """
    settings = []
    for group in groups:
        names = [name for run in group if (name := (run.begun.get("of") or {}).get(VARIANT)) is not None]
        settings.append(({VARIANT: names[0]} if names else {}) | list_settings(group[0]))
    settings = _name_scratch(settings)
    tasks = [group[0].task for group in groups]
    if len({*tasks}) < 2:
        return list_differing(settings)
    common = {*settings[0]}.intersection(*settings) - OF_ONE_TASK
    rows = list_differing([{key: value for key, value in some.items() if key in common} for some in settings])
    for task in dict.fromkeys(tasks):
        which = [i for i, other in enumerate(tasks) if other == task]
        for i, own in zip(which, list_differing([settings[i] for i in which]), strict=True):
            rows[i] = {"model": read_names(groups[i][0])["model"]} | rows[i] | own
    return rows


def _name_scratch(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings with `init=scratch` and `init=pretrain` (the task that made the weights), if there are both.

    Of the history of the weights only that is kept in which those with one differ.
    """
    begun = [some for some in settings if f"{INIT}task.name" in some]
    if len(begun) in (0, len(settings)) or any("init" in some for some in settings):
        return settings
    keys = dict.fromkeys(key for some in begun for key in some if key.startswith(INIT))
    alike = {key for key in keys if len({repr(some.get(key)) for some in begun}) == 1}
    named = []
    for some in settings:
        own = {key: value for key, value in some.items() if key not in alike}
        named.append({"init": some.get(f"{INIT}task.name", SCRATCH)} | own)
    return named


def list_differing(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """For each of several settings, the values that not all have in common, as text.

    Implied settings are left out: `model.n_layer` where `model.name` differs, a palette's size equal to the data's.
    """
    keys = list(dict.fromkeys(key for some in settings for key in some))
    values = {key: [format_typed(some[key]) if key in some else "–" for some in settings] for key in keys}
    varied = [key for key in keys if len(set(values[key])) > 1]
    shown = [key for key in varied if not any(_is_implied_by(key, other, values) for other in varied)]
    return [{CHOSEN.get(key, key): values[key][row] for key in shown} for row in range(len(settings))]


def _is_implied_by(key: str, other: str, values: Mapping[str, Sequence[str]]) -> bool:
    """Whether `other` determines `key` in `values`: the name or class of its group, the palette size of the data, or a
    variant's name what variants set.
    """  # fmt: skip
    group, _, last = other.rpartition(".")
    varied = other == VARIANT and (key.startswith("model.") or key.rpartition(".")[2] in OF_VARIANTS)
    names = last in ("name", "_target_") and key.startswith(f"{group}.")
    colours = key.endswith("tokens.palette.k") and other == f"{key.removesuffix('tokens.palette.k')}data.palette_size"
    if key == other or not (names or colours or varied):
        return False
    return len(set(zip(values[other], values[key], strict=True))) == len(set(values[other]))


def format_typed(value: Any) -> str:
    """A setting's value as on the command line; of a long one the end."""
    text = format_value(value, quoted=False)
    return text if len(text) <= LONGEST else f"…{text[-LONGEST:]}"
