"""Every setting of every task with values of other types: success or one line that names the setting, before any work.

A sample of them; all: IGPT_EVERY_SETTING=1 python -m pytest -n 0 tests/settings/test_every_setting.py (minutes).
"""

import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from igpt.distributed.launcher import count_devices
from igpt.run import launch as launching
from igpt.run.arguments import prepare_arguments
from tests.compositions import check_overrides
from tests.configs import CONF, save_small
from tests.conftest import ROOT

EVERY = os.environ.get("IGPT_EVERY_SETTING") == "1"
SAMPLE = 15  # cases of each task
VALUES: list[Any] = [None, 5, -1, [], {}, [5], {"a": 1}, "text", True, math.nan, math.inf]
TASKS = sorted(path.stem for path in (CONF / "task").glob("[a-z]*.yaml"))
STAGES = "++task.stages={pretrain: {steps: 2, warmup_steps: 1}, complete: {from: pretrain, count: 2}}"


class ReadyError(Exception):
    """The task would start now."""


def is_ready(*given: Any, **named: Any) -> Any:
    raise ReadyError


def arguments(task: str, place: Path) -> list[str]:
    """The least command of a task."""
    init = place / "run"
    given = [f"task={task}", f"paths.runs={place / 'runs'}", f"paths.cache={place / 'cache'}"]
    if task == "pipeline":
        return [*given, STAGES]
    if task in ("report", "scaling"):
        return [*given, f"task.runs=[{init}]"]
    if task == "advise":
        return [*given, f"task.study={init}", "task.operations=1e9"]
    without_weights = ("pretrain", "tokenizer", "palette", "compare", "isoflop", "probe_encoder")
    return given if task in without_weights else [*given, f"init={init}"]


def names(cfg: DictConfig, group: str = "") -> Iterator[str]:
    """Every key of the config, groups included."""
    for key in cfg:
        yield f"{group}{key}"
        if isinstance(node := cfg._get_node(key), DictConfig):
            yield from names(node, f"{group}{key}.")


def prepare(cfg: DictConfig, choices: dict[str, Any]) -> None:
    """What a command does before its task starts."""
    count_devices(cfg.trainer)
    launching.launch(cfg, choices=choices, overrides=[])


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    save_small(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launching.ranks, "process_group", is_ready)
    monkeypatch.setattr(launching, "run_interactive", is_ready)
    monkeypatch.setattr(launching, "show_plan", is_ready)
    check = launching.checked_task
    monkeypatch.setattr(launching, "checked_task", lambda spec: is_ready(check(spec)))
    return tmp_path


@pytest.mark.parametrize("task", TASKS)
def test_a_setting_of_another_type_is_named(task: str, nothing_starts: Path) -> None:
    """By enumeration: each key of the composed config, groups included, with each of VALUES."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", overrides=arguments(task, nothing_starts), return_hydra_config=True)
        choices = dict(composed.hydra.runtime.choices)
        cfg = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
        with pytest.raises(ReadyError):
            prepare(cfg.copy(), choices)
        cases = [(key, value) for key in names(cfg) for value in VALUES]
        random.Random(task).shuffle(cases)
        problems = [
            f"{key}={value}: {problem}"
            for key, value in (cases if EVERY else cases[:SAMPLE])
            if (problem := find_problem(cfg, choices, key, value))
        ]
    assert problems == []


def find_problem(cfg: DictConfig, choices: dict[str, Any], key: str, value: Any) -> str | None:
    """None if the config with this value is ready, or refused in a line that names the key or a group of it."""
    changed = cfg.copy()
    OmegaConf.set_struct(changed, False)
    OmegaConf.update(changed, key, value, merge=False)
    OmegaConf.set_struct(changed, True)
    try:
        prepare(changed, choices)
    except ReadyError:
        return None
    except (ValueError, OmegaConfBaseException) as error:  # OmegaConf's: `main` prints their first line
        line = str(error) if type(error) is ValueError else str(error).splitlines()[0]
        if "\n" in line:
            return f"several lines: {line}"
        known = [key.rpartition(".")[2], key.rpartition(".")[0] or key, "tokens.palette.k"]  # of data.palette_size
        return None if any(name in line for name in known) else f"names no setting: {line}"
    except Exception as error:  # each is a failure of this test
        return repr(error)
    return "it started"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=null", r"^seed must be a whole number, got null$"),
        ("data.name=../../elsewhere", r"^data\.name must be the name of a file.*got '../../elsewhere'$"),
        ("seed=nan", r"^seed must be a finite number, got nan$"),
        ("seed=1e400", r"^seed must be a finite number, got inf$"),
        ("++task.stages.pretrain.learning_rate=nan", r"^task\.stages\.pretrain\.learning_rate must be a finite number"),
        ("paths.cache=null", r"^paths\.cache must be text, got null$"),
        ("paths=null", r"^paths must be settings, as \{name: value\}, got null$"),
        ("data.path=5", r"^data\.path=5: a path is expected, this is read as int"),
        ("logger=null", r"^logger=null: choose an option; there are csv, none, tensorboard, wandb$"),
        ("data=null", r"^data=null: choose an option; there are checkpoint, cifar10, "),
        ("++logger.csv=5", r"^logger\.csv must be settings, as \{name: value\}, got 5$"),
        ("callbacks.samples=5", r"^callbacks\.samples must be settings, as \{name: value\}, got 5$"),
        ("callbacks.samples._target_=no.Such", r"^callbacks\.samples\._target_=no\.Such cannot be imported: No module"),
        ("task=compare task.runs=[5]", r"^task\.runs=\[5\]: a path is expected"),
        ("task=pipeline task.stages=null", r"^task\.stages must be settings, as \{name: value\}, got null$"),
        (
            "task=pipeline ++task.stages={a: {task: sample, from: 5}}",
            r"^task\.stages\.a\.from must be the name of a stage",
        ),
        ("hydra.sweeper.params={seed: '0,1'}", r"^these settings do not fit together: hydra\.sweeper\.params: "),
        ("trainer.devices=1000", r"^trainer\.devices=1000 starts 1000 processes; this machine has \d+ (cores|GPUs)"),
        ("trainer.devices=0", r"^trainer\.devices must be at least 1 or auto, got 0$"),
    ],
)
def test_commands_that_are_refused(override: str, message: str, nothing_starts: Path) -> None:
    """By hand: the whole message, from the command's text on."""
    task, space, rest = override.partition(" ")
    typed = ["trainer=cpu", *([task, rest] if task.startswith("task=") and space else [override])]
    if "stages.pretrain" in override:
        typed = ["experiment=quickstart", *typed]
    with pytest.raises(ValueError, match=message) as refused:
        count_devices(check_overrides(prepare_arguments(typed, CONF), [CONF]).trainer)
        launching.run(*typed, conf=CONF)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("typed", ["callbacks.samples=null", "logger.csv=null"])
def test_an_entry_may_be_null(typed: str, nothing_starts: Path) -> None:
    """By hand: that turns one callback or logger off, as it does for a run's identity."""
    with pytest.raises(ReadyError):
        launching.run(*arguments("pretrain", nothing_starts), typed, conf=CONF)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("EarlyStopping", "missing 1 required positional argument: 'monitor'"),
        ("EarlyStopping, monitor: val/loss_gen, mode: best", "`mode` can be"),
        ("Timer, duration: soon", "is not a valid duration"),
    ],
)
def test_a_callback_that_refuses_its_settings(settings: str, message: str, tmp_path: Path) -> None:
    """By hand: one line that names the entry, and no run folder is left."""
    places = [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]
    own = f"+callbacks.own={{_target_: lightning.pytorch.callbacks.{settings}}}"
    with pytest.raises(ValueError, match=rf"^callbacks\.own cannot be built from its settings: .*{message}"):
        launching.run("trainer=cpu", "data=digits", "model=igpt_pico", own, *places, conf=CONF)
    with pytest.raises(ValueError, match=r"^callbacks\.own\._target_=os\.getcwd builds a str, expected .*Callback"):
        launching.run("trainer=cpu", "+callbacks.own._target_=os.getcwd", *places, conf=CONF)
    assert not [*(tmp_path / "runs").iterdir()]


def test_an_interrupt_while_modules_are_imported(tmp_path: Path) -> None:
    """Invariant: exit code 130 as in shells, and no traceback. Hydra is one that is interrupted."""
    (tmp_path / "hydra").mkdir()
    (tmp_path / "hydra" / "__init__.py").write_text("import os, time\nos.kill(os.getpid(), 2)\ntime.sleep(20)\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py")], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    assert (done.returncode, done.stdout + done.stderr) == (128 + signal.SIGINT, "")
