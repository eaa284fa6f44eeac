"""How igpt was started, as `python train.py` in a clone or as `igpt`, and where its files lie then."""

import os
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import igpt

PACKAGE = Path(__file__).parents[1]
COMMAND = "igpt"  # the console script of pyproject.toml


def find_clone() -> Path | None:
    """The clone whose `train.py` this process was started as, else the one in which the package lies; None: neither."""
    started = Path(sys.argv[0]).absolute()
    folders = [started.parent] if started.name == "train.py" else []
    return next((folder for folder in (*folders, PACKAGE.parents[1]) if _is_clone(folder)), None)


def _is_clone(folder: Path) -> bool:
    return all((folder / part).is_file() for part in ("train.py", "conf/config.yaml", "src/igpt/__init__.py"))


def find_conf() -> Path:
    """The folder of the config groups: that of a clone, else the copy in the installed package."""
    return (find_clone() or PACKAGE) / "conf"


def is_command() -> bool:
    """Whether this process is the installed command, `igpt` or `python -m igpt`, or there is no clone."""
    return _is_script() or _is_module() or find_clone() is None


def _is_script() -> bool:
    return Path(sys.argv[0]).name == COMMAND


def _is_module() -> bool:
    return Path(sys.argv[0]) == PACKAGE / "__main__.py"


def program_name() -> str:
    """What commands for a person begin with: `igpt`, or `python train.py` in a clone."""
    return COMMAND if is_command() else "python train.py"


def program_arguments() -> list[str]:
    """What commands of child processes begin with: this Python, and the program that this process was started as."""
    if _is_script():
        return [sys.executable, str(Path(sys.argv[0]).absolute())]
    clone = None if _is_module() else find_clone()
    return [sys.executable, *(["-m", COMMAND] if clone is None else [str(clone / "train.py")])]


def typed_command() -> str:
    """The command line of this process, quoted for a shell."""
    return shlex.join([COMMAND, *sys.argv[1:]] if _is_script() or _is_module() else ["python", *sys.argv])


def default_cache() -> str:
    """`.cache` in the working directory for commands of a clone or without a home, else igpt's folder in the user's."""
    try:
        return str(user_cache()) if is_command() else ".cache"
    except RuntimeError:
        return ".cache"


def user_cache() -> Path:
    """`$XDG_CACHE_HOME/igpt`, or `~/.cache/igpt`. Raises RuntimeError if the user has no home directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "igpt"


def find_commit() -> str:
    """The commit of the code that runs; `unknown` for an installed copy, whatever repository it may lie in."""
    clone = PACKAGE.parents[1]
    return describe_commit(clone) if _is_clone(clone) else "unknown"


def describe_versions() -> str:
    """The versions of igpt, with its commit if it is a clone, and of the libraries that decide what it computes."""
    commit = "" if (known := find_commit()) == "unknown" else f" ({known})"
    libraries = [f"{name} {version(name)}" for name in ("torch", "lightning", "hydra-core")]
    return f"igpt {igpt.__version__}{commit}\n{', '.join(libraries)}, Python {sys.version.split()[0]}"


def describe_commit(folder: Path) -> str:
    """The tag or commit of a git checkout, `-dirty` with changes; `unknown` without git. Writes nothing to it.

    `git describe --dirty` would write the index: killed meanwhile, it leaves a lock that blocks the next commit.
    """
    git = ["git", "--no-optional-locks", "-C", str(folder)]
    commands = ["describe", "--always", "--abbrev=12"], ["status", "--porcelain", "--untracked-files=no"]
    try:
        commit, changed = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"  # not a git checkout, or no git
    return f"{commit}-dirty" if changed else commit
