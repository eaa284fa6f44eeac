"""How igpt was started, and what follows from it: commands, config folder, caches, versions."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import igpt
from igpt.run.arguments import prepare_arguments
from igpt.run.run_dir import resume_command
from igpt.utils import program
from igpt.utils.overrides import train_command
from tests.conftest import ROOT

PACKAGE = ROOT / "src" / "igpt"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package as in an environment that lies in somebody's repository, a Hydra project."""
    package = tmp_path / "project" / "venv" / "igpt"
    (tmp_path / "project" / "conf").mkdir(parents=True)
    (tmp_path / "project" / "conf" / "config.yaml").touch()
    (tmp_path / "project" / "train.py").touch()
    subprocess.run(["git", "init", "-q", tmp_path / "project"], check=True)
    monkeypatch.setattr(program, "PACKAGE", package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return package


@pytest.mark.parametrize("started", ["train.py", "/venv/bin/igpt", str(PACKAGE / "__main__.py"), "/venv/bin/pytest"])
def test_a_clone(started: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: a clone's `train.py` and Python use the clone as before; `igpt` there is the installed command."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [started, "task=probe", "data.path=a b"])
    assert program.find_conf() == ROOT / "conf"
    assert (PACKAGE / "conf").resolve() == ROOT / "conf"  # what the wheel takes
    again = program.program_arguments()
    if Path(started).name in ("train.py", "pytest"):
        assert again == [sys.executable, str(ROOT / "train.py")]
        assert train_command("task=sample") == "python train.py task=sample"
        assert program.typed_command() == f"python {started} task=probe 'data.path=a b'"
        assert program.default_cache() == ".cache"
    else:
        assert again[1:] == (["-m", "igpt"] if "__main__" in started else [started])
        assert resume_command(Path("runs/a"), ()) == "igpt resume=runs/a"
        assert program.typed_command() == "igpt task=probe 'data.path=a b'"
        assert program.default_cache() == str(tmp_path / "igpt")


def test_an_installed_package(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand. Invariant: a `train.py`, a `conf/` or a repository of others is not taken for igpt's."""
    for started in ("/venv/bin/igpt", str(tmp_path / "project" / "train.py"), "-c"):
        monkeypatch.setattr(sys, "argv", [started])
        assert program.find_conf() == installed / "conf"
        assert train_command("task=sample") == "igpt task=sample"
        assert program.default_cache() == str(tmp_path / "cache" / "igpt")
    assert program.program_arguments() == [sys.executable, "-m", "igpt"]
    assert program.typed_command() == "python -c"
    assert program.find_commit() == "unknown"
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py")])  # of a clone beside it: its conf/ may have been changed
    assert program.find_conf() == ROOT / "conf"
    assert program.program_arguments() == [sys.executable, str(ROOT / "train.py")]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somebody")
    monkeypatch.setattr(sys, "argv", ["igpt"])
    assert program.default_cache() == "/somebody/.cache/igpt"


@pytest.mark.parametrize("started", ["train.py", "igpt"])
def test_the_config_asks_how_it_was_started(started: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the cache, and the commands of --help."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.setattr(sys, "argv", [started])
    overrides = prepare_arguments(["seed=1"], ROOT / "conf")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=overrides, return_hydra_config=True)
    assert cfg.paths.cache == {"train.py": ".cache", "igpt": "/caches/igpt"}[started]
    command = {"train.py": "python train.py", "igpt": "igpt"}[started]
    assert f"\n  {command} task=sample init=RUN_FOLDER " in cfg.hydra.help.template
    assert ("train.py" in cfg.hydra.help.template) == (started == "train.py")


def test_versions(tmp_path: Path) -> None:
    """Independent source: pip's records; `torch` is not imported for it, nor for a completion."""
    code = (
        "import sys; sys.argv = ['igpt', '-sc', 'query=bash']\n"
        "from igpt import cli; cli.main()\n"
        "cli.ASKED[:] = ['--version']; cli.main(); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "COMP_LINE": "igpt objective=", "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    *options, ours, libraries, imported = done.stdout.splitlines()
    assert options == [f"objective={name}" for name in ("ar", "bert", "checkpoint")]
    assert ours.startswith(f"igpt {igpt.__version__}")
    assert libraries.startswith(f"torch {version('torch')}, lightning {version('lightning')}, hydra-core 1.3")
    assert imported == "False"
