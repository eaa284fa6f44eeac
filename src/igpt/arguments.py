"""Command-line arguments, looked at before Hydra composes: `resume=`, and "did you mean" for what is misspelt."""

import difflib
import glob
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

AUTO = "resume=auto"


def prepare(arguments: list[str], conf: Path) -> list[str]:
    """The arguments Hydra is to see: a resumed run's own ones first, then the new ones.

    Raises:
        ValueError: a group, option or key that does not exist, with the nearest that does; a `resume=` that is no run.
    """
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    several = {"-m", "--multirun"} & {*arguments}
    if several and not any(override.startswith(("resume=", "force=")) for override in overrides):
        arguments, overrides = [*arguments, AUTO], [*overrides, AUTO]  # a sweep that was interrupted goes on
    resumed = [override.value() for override in parse(overrides) if override.key_or_group == "resume"]
    if resumed and resumed[-1] not in (None, "auto"):
        saved = saved_overrides(Path(str(resumed[-1])))
        arguments = [*saved, *arguments]
        overrides = [*saved, *overrides]
    check(overrides, [conf, *_beside(arguments)])
    return arguments


def _beside(arguments: list[str]) -> list[Path]:
    """Folders of settings that are given beside ours: `--config-dir FOLDER`, `-cd FOLDER`, `--config-dir=FOLDER`."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    named = [after for argument, after in pairs if argument in ("--config-dir", "-cd")]
    named += [a.partition("=")[2] for a in arguments if a.startswith("--config-dir=")]
    return [Path(name) for name in named]


def saved_overrides(folder: Path) -> list[str]:
    """The overrides a run was started with. Raises ValueError when `folder` is no run folder."""
    record = folder / "run.json"
    if not record.is_file():
        raise ValueError(f"resume={folder}: no run.json there; give the folder of a run, as in runs/pretrain-…")
    try:
        overrides = json.loads(record.read_text())["overrides"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{record} is damaged ({error!r}): restore it, or start the run anew") from error
    if overrides is None:
        raise ValueError(f"resume={folder}: this is a stage of a pipeline; continue that: resume={folder.parent}")
    return [str(override) for override in overrides if not str(override).startswith(("resume=", "force="))]


def parse(overrides: list[str]) -> list[Override]:
    """The overrides as Hydra reads them. Raises ValueError when it cannot."""
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ValueError(f"cannot read the arguments: {str(error).splitlines()[0]}") from error


def check(overrides: list[str], folders: list[Path]) -> None:
    """Raises ValueError, naming the nearest right name, when some override names nothing that is in these folders."""
    parsed = parse(overrides)
    conf, *beside = folders
    for folder in beside:
        if not folder.is_dir():
            raise ValueError(f"--config-dir {folder}: there is no such folder")
        parsed += parse([f"hydra.searchpath=[file://{folder.resolve()}]"])
    groups = sorted({path.name for folder in folders for path in folder.iterdir() if path.is_dir()})
    chosen = [override for override in parsed if _is_group(override, groups)]
    for override in chosen:
        _check_options(override, folders)
    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        where = [override for override in parsed if override.key_or_group == "hydra.searchpath"]
        keys = list(_flat_keys(_composed([*where, *chosen])))
        for override in parsed:
            key = override.key_or_group
            added = override.is_add() or override.is_force_add()
            if override in chosen or added or key.startswith("hydra") or key in keys:
                continue
            near = suggestion(key, [*groups, *keys])
            raise ValueError(f"there is no setting or group {key!r}{near}; a new key needs a + in front")
        _composed(parsed)


def _composed(overrides: list[Override]) -> DictConfig:
    """The resolved config of the overrides that are no sweep. Raises ValueError where they do not fit together."""
    lines = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
    try:
        cfg = compose("config", overrides=lines)
        OmegaConf.resolve(cfg)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"these settings do not fit together: {str(error).splitlines()[0]}") from error
    return cfg


def _is_group(override: Override, groups: list[str]) -> bool:
    return override.key_or_group in groups and not override.is_delete()


def _check_options(override: Override, folders: list[Path]) -> None:
    group = override.key_or_group
    places = [folder / group for folder in folders]
    found = {p.relative_to(place).with_suffix("").as_posix() for place in places for p in place.rglob("*.yaml")}
    options = sorted(name for name in found if not name.rpartition("/")[2].startswith("_"))
    asked: list[Any] = []
    if override.value_type in (ValueType.CHOICE_SWEEP, ValueType.SIMPLE_CHOICE_SWEEP):
        asked = list(override.sweep_string_iterator())
    elif override.is_sweep_override():
        return  # a glob or a range: Hydra knows what it means
    elif (value := override.value()) is not None:
        asked = value if isinstance(value, list) else [value]
    for option in asked:
        name = str(option).strip("'\"")
        if name not in ("null", "[]") and not name.startswith("[") and name not in options:
            near = suggestion(name, options)
            raise ValueError(f"{group}={name}: there is no such option{near}; there are {', '.join(options)}")


READ = ("tokens.path", "data.clusters", "task.palette", "task.tokens", "task.keep")  # settings that name files to read


def absolute(overrides: list[str]) -> list[str]:
    """Overrides that mean the same from another working directory: paths of files to read become absolute.

    `init` and `data.path` may be names on the Hub instead, and then there is nothing of that name here.
    """
    whole = []
    for text, override in zip(overrides, parse(overrides), strict=True):
        key, value = override.key_or_group, override.value()
        reads = key in READ or (key in ("init", "data.path") and is_here(str(value)))
        reads = reads or re.fullmatch(r"task\.stages\.\w+\.run", key) is not None
        plus = "+" * (len(text) - len(text.lstrip("+")))
        if (reads and isinstance(value, str)) or (key == "task.runs" and isinstance(value, str)):
            whole.append(f"{plus}{key}={quoted(value)}")
        elif key == "task.runs" and isinstance(value, list):
            whole.append(f"{plus}{key}=[{','.join(quoted(str(path)) for path in value)}]")
        else:
            whole.append(text)
    return whole


def is_here(path: str) -> bool:
    """Whether something on this machine has this path, or (a checkpoint of OpenAI's) begins with it."""
    place = Path(path)
    return place.exists() or next(place.parent.glob(f"{glob.escape(place.name)}.*"), None) is not None


def quoted(path: str) -> str:
    """A path, absolute, as Hydra reads it back."""
    path = str(Path(path).expanduser().absolute())
    return path if re.fullmatch(r"[\w./-]+", path) else "'" + path.replace("'", "\\'") + "'"


def suggestion(name: str, known: Iterable[str]) -> str:
    """`, did you mean …?` with the nearest known name, or nothing when none is near."""
    known = list(known)
    tails = {
        key.rpartition(".")[2]: key for key in known
    }  # `task.stepz` when `stepz` was typed, and the other way round
    whole = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    last = difflib.get_close_matches(name.rpartition(".")[2], list(tails), n=1, cutoff=0.6)

    def alike(ours: str, theirs: str) -> float:
        return difflib.SequenceMatcher(None, ours, theirs).ratio()

    if whole and (not last or alike(name, whole[0]) >= alike(name.rpartition(".")[2], last[0])):
        return f", did you mean {whole[0]}?"
    return f", did you mean {tails[last[0]]}?" if last else ""


def _flat_keys(cfg: DictConfig, prefix: str = "") -> Iterable[str]:
    for key in map(str, cfg):
        path = f"{prefix}{key}"
        yield path
        node = cfg._get_node(key)
        if isinstance(node, DictConfig) and not OmegaConf.is_missing(cfg, key) and not node._is_none():
            yield from _flat_keys(node, f"{path}.")
