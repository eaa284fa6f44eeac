"""Settings: what cannot be meant is refused by its name, before anything heavy is imported or built."""

import math
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import OmegaConf
from pydantic import BaseModel

import igpt.settings
from igpt.run.launch import run
from igpt.run.targets import OF_LAUNCH
from igpt.settings.devices import HardwareSettings
from igpt.settings.fields import Settings, format_setting, parse_settings
from igpt.utils.overrides import suggest_name
from tests.conftest import ROOT

CONF = ROOT / "conf"
TASKS = sorted(path.stem for path in (CONF / "task").glob("[!_]*.yaml"))
MODULES = [module.name for module in pkgutil.iter_modules(igpt.settings.__path__, "igpt.settings.")]


@pytest.mark.parametrize("module", MODULES)
def test_they_import_neither_torch_nor_lightning(module: str) -> None:
    """Invariant: settings are checked, and documented, without what computes."""
    code = f"import sys, {module}; print([name for name in ('torch', 'lightning') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def load_task_settings(task: str) -> tuple[type[Settings], dict[str, Any]]:
    """The class of a task's settings, and the values that `conf/task/` gives them."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        spec = OmegaConf.to_container(compose("config", overrides=[f"task={task}"]).task, resolve=True)
    assert isinstance(spec, dict)
    if task == "advise":
        spec["operations"] = 1e9  # compute is always asked for
    model: type[Settings] = get_type_hints(get_object(spec["_target_"]))["settings"]
    return model, {str(key): value for key, value in spec.items() if key not in OF_LAUNCH}


def fields(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every field, also of settings inside settings, with its type."""
    for name, field in model.model_fields.items():
        yield (*path, name), field.annotation
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, (*path, name))


def changed(settings: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    first, *rest = path
    return {**settings, first: changed(settings[first], tuple(rest), value) if rest else value}


@pytest.mark.parametrize("task", [*TASKS, "trainer"])
def test_every_field_refuses_what_it_cannot_be(task: str) -> None:
    """Invariant, over all fields of all tasks: NaN, infinity, null where a value is needed, another type."""
    if task == "trainer":
        with initialize_config_dir(str(CONF), version_base="1.3"):
            values = OmegaConf.to_container(compose("config").trainer, resolve=True)
        assert isinstance(values, dict)
        model: type[Settings] = HardwareSettings
        good: dict[str, Any] = {str(key): value for key, value in values.items() if key != "_target_"}
    else:
        model, good = load_task_settings(task)
    assert parse_settings(model, good, "task").model_dump(exclude_unset=True) == good
    for path, annotation in fields(model):
        bad: list[Any] = [math.nan, math.inf, -math.inf, object(), b"bytes"]
        if NoneType not in (annotation, *get_args(annotation)):
            bad.append(None)
        if annotation is not bool and bool not in get_args(annotation):
            bad += [True, False]
        for value in bad:
            with pytest.raises(ValueError, match=rf"^task\.{'.'.join(path)}\b") as error:
                parse_settings(model, changed(good, path, value), "task")
            assert "\n" not in str(error.value)
            assert " must be " in str(error.value)
    with pytest.raises(ValueError, match=r"^task has no setting 'unheard_of'$"):
        parse_settings(model, {**good, "unheard_of": 1}, "task")
    for name in model.model_fields:
        if model.model_fields[name].is_required():
            with pytest.raises(ValueError, match=rf"^task\.{name} is not given$"):
                parse_settings(model, {key: value for key, value in good.items() if key != name}, "task")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.shift=100",), "data.shift must be at most 7, got 100"),
        (("trainer.peak_tflops=0",), "trainer.peak_tflops must be at least 0.001 or null, got 0"),
        (("task.beta1=2",), "task.beta1 must be below 1, got 2"),
        (("task.learning_rate=nan",), "task.learning_rate must be a finite number, got nan"),
        (("task.weight_decay=-1",), "task.weight_decay must be at least 0, got -1"),
        (("task.steps=null",), "task.steps must be a whole number, got null"),
        (("task.steps=1e3",), "task.steps must be a whole number, got 1000.0"),
        (("task.optimizer=sgd",), "task.optimizer must be one of adam, muon, got 'sgd'"),
        (("seed=x",), "seed must be a whole number, got 'x'"),
        (("model.n_embd=0",), "model.n_embd must be at least 1, got 0"),
        (("objective=bert", "objective.mask_probability=1"), "objective.mask_probability must be below 1, got 1"),
        (("tokens=patches", "tokens.k=1"), "tokens.k must be at least 2, got 1"),
        (("tokens.palette.k=5000",), "tokens.palette.k must be at most 4096, got 5000"),
        (("callbacks.samples.every=0",), "callbacks.samples.every must be at least 1, got 0"),
        (("logger=wandb", "logger.wandb.timeout=0"), "logger.wandb.timeout must be at least 1, got 0"),
        (("experiment=quickstart", "data.turn=200"), "data.turn must be at most 180, got 200"),
        (
            ("experiment=quickstart", "task.stages.sample.temperature=0"),
            "task.stages.sample.temperature must be at least",
        ),
        (("data=imagenet64_web", "data.weights.web=inf"), "data.weights.web must be a finite number, got inf"),
        (("data=imagenet64_web", "data.streams.web.crop.draft=0"), "data.streams.web.crop.draft must be at least 1"),
    ],
)
def test_a_command_is_refused_before_a_folder_is_made(
    tmp_path: Path, overrides: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: the setting, what was expected, what came; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}"):
        run(*overrides, "trainer.accelerator=cpu", conf=CONF)
    assert not (tmp_path / "runs").exists()


def test_a_temperature_that_is_nothing() -> None:
    """By hand: a number that float32 cannot hold."""
    model, good = load_task_settings("sample")
    with pytest.raises(ValueError, match=r"^task\.temperature must be at least 0\.001, got 1e-320$"):
        parse_settings(model, {**good, "temperature": 1e-320}, "task")


def test_several_settings_together() -> None:
    """By hand: the message of a check over several fields names them as the config does, in a stage, too."""
    model, good = load_task_settings("pretrain")
    for where in ("task", "task.stages.long"):
        with pytest.raises(ValueError, match=rf"^{where}\.warmup_steps 9 must be below {where}\.steps 9: lower"):
            parse_settings(model, {**good, "steps": 9, "warmup_steps": 9}, where)


@pytest.mark.parametrize(
    ("typed", "known", "expected"),
    [
        ("trainer.max_epochs", ["trainer.matmul_precision", "trainer.micro_batch", "task.steps"], ""),
        ("task.stepz", ["task.steps", "task.sgd.steps"], ", did you mean task.steps?"),
        ("stepz", ["task.steps", "seed"], ", did you mean task.steps?"),
        ("igpt_sm", ["igpt_l", "igpt_m", "igpt_s"], ", did you mean igpt_s?"),
        ("modle", ["data", "model"], ", did you mean model?"),
        ("x", [], ""),
    ],
)
def test_only_what_is_near_is_suggested(typed: str, known: list[str], expected: str) -> None:
    """By hand."""
    assert suggest_name(typed, known) == expected


def test_values_are_shown_as_a_config_writes_them() -> None:
    """By hand."""
    assert [format_setting(value) for value in (None, True, 1.5, "a")] == ["null", "true", "1.5", "'a'"]
