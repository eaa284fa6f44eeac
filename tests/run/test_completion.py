"""Tab completion: what is offered for a line, and the function that asks for it, in bash."""

import subprocess
from pathlib import Path

import pytest

from igpt.run.completion import BASH, answer, list_candidates
from igpt.utils.program import find_conf
from tests.conftest import ROOT

CONF = find_conf()


def test_every_group_and_option_is_offered() -> None:
    """Independent source: the files of conf/. Parts of options (`_gpt`) are none."""
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    offered = list_candidates("python train.py ", CONF)
    assert {f"{group}=" for group in groups - {"hydra"}} | {"hydra/", "seed=", "paths."} <= {*offered}
    for group in ("model", "task", "data", "trainer", "hydra/launcher"):
        options = {path.stem for path in (CONF / group).glob("*.yaml") if not path.name.startswith("_")}
        assert {*list_candidates(f"igpt {group}=", CONF)} == {f"{group}={option}" for option in options}
    assert "experiment=paper/figure2" in list_candidates("igpt experiment=paper/f", CONF)


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("igpt data=cifar10,cifar100,stl", ["data=cifar10,cifar100,stl10"]),
        ("./train.py logger=[csv,wan", ["logger=[csv,wandb"]),
        ("igpt task=sample task.temp", ["task.temperature="]),
        ("igpt task=probe ++task.sgd.ba", ["++task.sgd.batch_size="]),
        ("igpt rerun=", ["rerun=false", "rerun=true"]),
        ("igpt task=no_task paths.ru", ["paths.runs="]),  # does not compose
        ("igpt --mul", ["--multirun"]),
        ("igpt -c j", ["job"]),
        ("python -m igpt hydra/sw", ["hydra/sweeper="]),
    ],
)
def test_a_line(line: str, offered: list[str]) -> None:
    """By hand."""
    assert list_candidates(line, CONF) == offered


def test_files_and_own_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand. Invariant: a name that a shell would expand is not offered."""
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "mine.yaml").write_text("defaults: [_gpt]\nname: mine\n")
    (tmp_path / "runs" / "pretrain-a").mkdir(parents=True)
    for name in ("$(touch x)", "`a`", "a b", ".hidden", "ok.npy"):
        (tmp_path / "runs" / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list_candidates("igpt init=ru", CONF) == ["init=runs/"]
    assert list_candidates("igpt init=runs/", CONF) == ["init=runs/ok.npy", "init=runs/pretrain-a/"]
    assert list_candidates("igpt task.runs=[x,~/runs/p", CONF) == ["task.runs=[x,~/runs/pretrain-a/"]
    assert list_candidates("igpt --config-dir o", CONF) == ["own/"]
    assert list_candidates("igpt --config-dir own model=mi", CONF) == ["model=mine"]


def test_the_function_in_bash(tmp_path: Path) -> None:
    """Independent source: bash, whose words end at `=`. Invariant: no other script than igpt's is run."""
    script = f"""{BASH}
igpt() {{ echo model=igpt_s; echo "[$COMP_LINE $*]" >> {tmp_path}/ran; }}
python() {{ echo "task=sample"; echo "[$*]" >> {tmp_path}/ran; }}
ask() {{ COMP_POINT=${{#COMP_LINE}}; _igpt_complete "$@"; echo "${{COMPREPLY[@]}}"; COMPREPLY=(none); }}
COMP_LINE="igpt model=igpt_" COMP_WORDS=(igpt model = igpt_); ask igpt igpt_ =
cd {ROOT}
COMP_LINE="python train.py ta" COMP_WORDS=(python train.py ta); ask python ta train.py
COMPREPLY=(none) COMP_LINE="python setup.py ta" COMP_WORDS=(python setup.py ta); ask python ta setup.py
cd {tmp_path}; touch train.py
COMP_LINE="python train.py ta" COMP_WORDS=(python train.py ta); ask python ta train.py
complete -p igpt python"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    first, second, *others = done.stdout.splitlines()
    assert (first, second, others[:2], done.stderr) == ("igpt_s", "task=sample", ["none", "none"], "")
    assert all("-F _igpt_complete" in line for line in others[2:]), others
    ran = (tmp_path / "ran").read_text().splitlines()
    assert ran == ["[igpt model=igpt_ -sc query=bash]", "[./train.py -sc query=bash]"]


def test_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand; another shell is an error of one line."""
    assert answer(["install=bash"], CONF) == BASH
    monkeypatch.setenv("COMP_LINE", "igpt task=eval")
    assert answer(["query=bash"], CONF) == "task=evaluate"
    with pytest.raises(ValueError, match=r"^-sc install=fish: there is -sc install=bash"):
        answer(["install=fish"], CONF)
