"""Tab completion: `igpt -sc install=bash` prints a function for the shell, which asks `igpt -sc query=bash`.

Hydra's own would run any script whose name follows `python`, show the parts of options (`_gpt`) but no option in a
folder (`paper/probe_cifar10`), and let the shell expand what it shows, names of files included.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from igpt.run.arguments import WITH_VALUE, expand_home_paths, find_config_dirs, search_path_as_override, split_flags
from igpt.run.saved_overrides import list_options
from igpt.settings.paths import is_path
from igpt.utils.overrides import format_value
from igpt.utils.program import COMMAND

FLAGS = ("--help", "--version", "--multirun", "--cfg", "--config-dir", "--shell-completion")
VALUES = {"--cfg": ("job", "hydra", "all"), "-c": ("job", "hydra", "all")}
FOLDERS = ("--config-dir", "-cd")
PLAIN = re.compile(r"[\w@%+=:,./\[~-]+")  # characters that a shell takes as they are, where nothing is quoted
BASH = r"""_igpt_complete() {
    local line=${COMP_LINE:0:COMP_POINT} candidate folder program=("$1")
    local word=${line##*[[:space:]]}
    if [[ ${1##*/} == python* ]]; then
        folder=$(dirname -- "${COMP_WORDS[1]/#\~/$HOME}")
        [[ ${COMP_WORDS[1]##*/} == train.py && -f $folder/src/igpt/cli.py ]] || return
        program+=("$folder/train.py")
    fi
    COMPREPLY=()
    while IFS= read -r candidate; do
        COMPREPLY+=("${candidate#"${word%"$2"}"}")
    done < <(COMP_LINE=$line "${program[@]}" -sc query=bash 2> /dev/null)
}
complete -o nospace -o bashdefault -o default -F _igpt_complete igpt python python3"""


def answer(arguments: Sequence[str], conf: Path) -> str:
    """What `-sc ARGUMENTS` prints: a script for the shell, or the candidates for the command line in COMP_LINE.

    Raises:
        ValueError: another argument than one of `install=bash`, `uninstall=bash`, `query=bash`.
    """
    match arguments:
        case ["install=bash"]:
            return BASH
        case ["uninstall=bash"]:
            return "complete -r igpt python python3; unset -f _igpt_complete"
        case ["query=bash"]:
            return "\n".join(list_candidates(os.environ.get("COMP_LINE", ""), conf))
    raise ValueError(
        f"-sc {' '.join(arguments)}: there is -sc install=bash and uninstall=bash, also for zsh (bashcompinit)"
    )


def list_candidates(line: str, conf: Path) -> list[str]:
    """The completions of the last word of a command line: groups, options, keys, values and paths."""
    *words, word = re.split(r"\s+", line.lstrip())
    start = next((i for i, each in enumerate(words, 1) if Path(each).name in (COMMAND, "train.py")), len(words))
    words = words[start:]
    folders = [conf, *find_config_dirs(split_flags(words)[0], ())]
    before = words[-1] if words else ""
    if before in FOLDERS:
        found: Iterable[str] = _list_paths(word)
    elif before in WITH_VALUE:
        found = VALUES.get(before, ())
    elif word.startswith("-"):
        found = FLAGS
    elif "=" in word:
        found = _list_values(word, words, folders)
    else:
        sign = word[: len(word) - len(word.lstrip("+~"))]
        name = word[len(sign) :]
        found = [sign + each for each in (*_list_groups(name, folders), *_list_keys(name, words, conf))]
    return sorted({each for each in found if each.startswith(word) and PLAIN.fullmatch(each)})


def _list_groups(name: str, folders: Sequence[Path]) -> Iterable[str]:
    """`data=`, `hydra/` for the groups in the group that a name begins with."""
    parent = name.rpartition("/")[0]
    for folder in folders:
        for path in (folder / parent).glob("*/"):
            yield f"{path.relative_to(folder).as_posix()}{'=' if next(path.glob('*.yaml'), None) else '/'}"


def _list_keys(name: str, words: Sequence[str], conf: Path) -> Iterable[str]:
    """`task.steps=`, `task.augment.` for the keys of the config in the part that a name begins with."""
    if "/" in name:
        return
    part = name.rpartition(".")[0]
    cfg = _compose(words, conf)
    settings = OmegaConf.select(cfg, part) if part else cfg
    keys: Any = OmegaConf.to_container(settings) if isinstance(settings, DictConfig) else {}
    for key, value in keys.items():
        if not str(key).startswith("_"):
            yield f"{part}{'.' * bool(part)}{key}{'.' if isinstance(value, dict) else '='}"


def _list_values(word: str, words: Sequence[str], folders: Sequence[Path]) -> Iterable[str]:
    """The options of a group, the paths or the values that a word `key=…` may go on to, each with the word's start."""
    key = word.partition("=")[0].lstrip("+~")
    typed = re.split(r"[=,\[]", word)[-1]
    start = word[: len(word) - len(typed)]
    group = key.partition("@")[0]
    if any((folder / group).is_dir() for folder in folders):
        values: Iterable[str] = list_options(group, folders)
    elif is_path(key):
        values = _list_paths(typed)
    else:
        value = OmegaConf.select(_compose(words, folders[0]), key)
        values = ("true", "false") if isinstance(value, bool) else [format_value(value, quoted=False)]
    return [start + value for value in values]


def _list_paths(typed: str) -> list[str]:
    """The files and folders, these with a slash, whose names begin with a path as it was typed."""
    parent = typed[: typed.rfind("/") + 1]
    folder = Path(expand_home_paths(parent) or ".")
    if not folder.is_dir():
        return []
    hidden = typed[len(parent) :].startswith(".")
    return [
        f"{parent}{path.name}{'/' if path.is_dir() else ''}"
        for path in folder.iterdir()
        if hidden or not path.name.startswith(".")
    ]


def _compose(words: Sequence[str], conf: Path) -> DictConfig:
    """The config of the words before the one that is typed; without those that do not compose, the default."""
    with initialize_config_dir(str(conf), version_base="1.3"):
        for overrides in (search_path_as_override(words), []):
            try:
                return compose("config", overrides=overrides)
            except (HydraException, OmegaConfBaseException):
                continue
    raise AssertionError("the default config composes")
