"""Overrides in a run's `run.json`: how they are recorded, and what `resume=` takes from them.

A file that is read back only chooses options of `conf/` and sets plain values. A `_target_`, a search path or an
interpolation is used only if it is typed.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from igpt.settings.older_configs import read_record
from igpt.settings.paths import READ, absolute_path
from igpt.utils.overrides import escape_text, format_text, format_value, quote_for_hydra, train_command

KEY = re.compile(r"\w[\w-]*([./]\w[\w-]*)*", re.ASCII)
INTERPOLATION = re.compile(r"(?<!\\)(\\\\)*\$\{")  # `${` after an odd number of backslashes is plain text
OF_CODE = ("hydra", "requires", "needs", "run_folder")  # parts of keys that decide what is executed
NOT_RECORDED = ("resume=", "rerun=", "hydra.", "hydra/")
LONGEST = 10_000  # characters of an override
MOST = 1_000  # overrides of a run
MOST_BRACKETS = 50  # in an override
PLACES = {("data", "task.probe_data")}  # (group, package) of options that are chosen for another place
SEARCH_PATH = "hydra.searchpath"
# Hydra's name of the source of a config folder → how it was typed
TYPED_AS = {"command-line": "--config-dir", f"{SEARCH_PATH} in command-line": SEARCH_PATH}


def record_overrides(overrides: Sequence[str], cfg: DictConfig) -> list[str]:
    """The overrides to record: paths to read absolute, interpolations replaced by their values in the composed `cfg`.

    They compose the same config in another working directory and environment. Left out: `resume`, `rerun`, Hydra's own.
    """
    recorded = []
    for text in overrides:
        if not text.lstrip("+~").startswith(NOT_RECORDED):
            override = OverridesParser.create().parse_override(text)
            has_value = not (override.is_delete() or override.is_sweep_override())
            recorded.append(_resolve_override(text, override, cfg) if has_value else text)
    return recorded


def _resolve_override(text: str, override: Override, cfg: DictConfig) -> str:
    key, value = override.key_or_group, override.value()
    if _interpolates(value):
        value = OmegaConf.select(cfg, key)
        if OmegaConf.is_dict(value):
            return text
    elif not READ.fullmatch(key):
        return text
    plain: Any = OmegaConf.to_container(OmegaConf.create([value]), resolve=True)  # reads `\${` as `${`
    return f"{text.partition('=')[0]}={format_plain(absolute_path(key, plain[0]))}"


def format_plain(value: Any) -> str:
    """A resolved value in override syntax; its texts are no interpolations, and quoted only if needed."""
    if isinstance(value, list):
        return f"[{','.join(map(format_plain, value))}]"
    return format_text(value) if isinstance(value, str) else format_value(value)


def search_path_arguments(hydra_cfg: Any) -> list[str]:
    """The arguments that gave a composed config its additional config folders, absolute: `--config-dir FOLDER`, …"""
    named: dict[str, list[str]] = {}
    for source in hydra_cfg.runtime.config_sources:
        if source.provider in TYPED_AS:
            path = os.path.abspath(source.path) if source.schema == "file" else f"{source.schema}://{source.path}"
            named.setdefault(TYPED_AS[source.provider], []).append(str(path))
    arguments = [part for path in named.get("--config-dir", ()) for part in ("--config-dir", path)]
    if others := named.get(SEARCH_PATH):
        arguments.append(f"{SEARCH_PATH}=[{','.join(map(quote_for_hydra, others))}]")
    return arguments


def resume_overrides(
    folder: Path, typed: Sequence[Override], flags: Sequence[str], config_dirs: Sequence[Path]
) -> list[str]:
    """The overrides that `resume=` takes from the record of a run; without those of settings that are typed, too.

    `typed`, `flags`: the command's overrides and other arguments. `config_dirs`: `conf/`, then the typed search path.

    Raises:
        ValueError: `folder` is no run folder, or a stage of a pipeline; or the run needs a search path, `_target_` or
            interpolation that is not typed: the message has the whole command.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise ValueError(f"resume={folder}: no run.json there; give the folder of a run, as in runs/pretrain-…")
    record = read_record(path)
    if record.get("overrides", ()) is None:
        raise ValueError(f"resume={folder}: this is a stage of a pipeline; continue that: resume={folder.parent}")
    saved, search_path = (read_texts(record, key, path) for key in ("overrides", "search_path"))
    known = {
        str(override.get_key_element()).lstrip("+~") for override in typed
    }  # with the place, as data@task.probe_data
    new = [text for text in saved if text.partition("=")[0].lstrip("+~") not in known | {"resume", "rerun"}]
    missing = [
        *(search_path if len(config_dirs) == 1 else ()),
        *(text for text in new if not is_plain(text, config_dirs)),
    ]
    if missing:
        command = train_command(*flags, *missing, *(override.input_line or "" for override in typed))
        raise ValueError(
            f"resume={folder}: this run needs {escape_text(' '.join(missing))}, which is never taken from a file; "
            f"if you trust it, type it: {command}"
        )
    return new


def read_texts(record: dict[str, Any], key: str, path: Path) -> list[str]:
    """The list of texts `key` of the record in `path`. Raises ValueError if it is something else."""
    texts = record.get(key, [])
    if not isinstance(texts, list) or len(texts) > MOST or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{path} is damaged: its {key} are no list of texts; restore it, or start the run anew")
    return texts


def is_plain(text: str, config_dirs: Sequence[Path]) -> bool:
    """Whether an override only chooses options that exist in the config folders, or sets plain values."""
    if len(text) > LONGEST or sum(map(text.count, "[{(")) > MOST_BRACKETS:  # nested ones would exceed the stack
        return False
    try:
        override = OverridesParser.create().parse_override(text)
    except (HydraException, RecursionError):
        return False
    key = override.key_or_group
    is_elsewhere = override.package is not None and (key, override.package) not in PLACES
    if is_elsewhere or override.is_sweep_override() or not _is_plain_key(key):
        return False
    if override.is_delete():
        return True
    value = override.value()
    if any((folder / key).is_dir() for folder in config_dirs):
        options = value if isinstance(value, list) else [value]
        return all(option is None or str(option) in list_options(key, config_dirs) for option in options)
    return _is_plain_value(value)


def list_options(group: str, config_dirs: Iterable[Path]) -> list[str]:
    """The options of a config group in some config folders; those that start with `_` are parts of others."""
    places = [folder / group for folder in config_dirs]
    names = {path.relative_to(root).with_suffix("").as_posix() for root in places for path in root.rglob("*.yaml")}
    return sorted(name for name in names if not name.rpartition("/")[2].startswith("_"))


def _is_plain_key(key: str) -> bool:
    parts = re.split(r"[./]", key)
    return KEY.fullmatch(key) is not None and not any(part.startswith("_") or part in OF_CODE for part in parts)


def _is_plain_value(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain_value, value))
    if isinstance(value, dict):
        return all(_is_plain_key(str(key)) and _is_plain_value(each) for key, each in value.items())
    return (
        value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and not _interpolates(value))
    )


def _interpolates(value: Any) -> bool:
    """Whether a value of `override.value()` is or holds an interpolation."""
    if isinstance(value, list | dict):
        return any(map(_interpolates, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and INTERPOLATION.search(value) is not None
