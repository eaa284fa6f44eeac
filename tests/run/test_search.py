"""Searches: what is tried, when they stop, how they go on. What a run would reach is a function here, no run."""

import json
import logging
import math
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest
from hydra import compose as compose_config
from hydra import initialize_config_dir
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

from igpt.distributed.launcher import SWEEP
from igpt.run import search
from tests.configs import CONF


class Runs:
    """Stands for the launcher: notes the jobs, and returns what `reach` says of each."""

    def __init__(self, reach: Callable[[dict[str, str]], float]) -> None:
        self.reach, self.jobs = reach, list[dict[str, str]]()

    def __call__(self, jobs: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
        returned = []
        for job in jobs:
            settings = dict(line.split("=", 1) for line in job)
            self.jobs.append(settings)
            done = JobReturn(overrides=list(job), working_dir=f"run_{len(self.jobs)}", status=JobStatus.COMPLETED)
            done.return_value = self.reach(settings)
            returned.append(done)
        return returned


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DictConfig:
    monkeypatch.setenv(SWEEP, "to be put back")  # a search names itself to the processes it starts
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = [f"paths.runs={tmp_path}", "sweep=learning_rate"]
        return compose_config("config", overrides=overrides, return_hydra_config=True)


def composed(overrides: Sequence[str]) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose_config("config", overrides=list(overrides))


def in_turn(config: DictConfig, runs: Runs, *arguments: str, **changed: Any) -> list[float]:
    """The rates tried, in turn."""
    how = {"key": "task.learning_rate", "values": [0.01, 0.003, 0.001, 0.0003], "direction": "minimize", **changed}
    search.in_turn(config, list(arguments), launch=runs, compose=composed, **how)
    return [float(job["task.learning_rate"]) for job in runs.jobs]


def test_it_stops_where_the_loss_begins_to_rise(config: DictConfig) -> None:
    """The paper's rule: from large to small, until validation loss is worse than at the last."""
    assert in_turn(config, Runs(lambda job: abs(math.log10(float(job["task.learning_rate"])) + 2.5))) == [
        0.01,
        0.003,
        0.001,
    ]
    assert in_turn(config, Runs(lambda job: float(job["task.learning_rate"]))) == [0.01, 0.003, 0.001, 0.0003]
    assert in_turn(config, Runs(lambda job: 1.0), direction="maximize") == [0.01, 0.003]


def test_a_rate_that_broke_down_is_no_reason_to_stop(config: DictConfig) -> None:
    losses = {"0.01": math.nan, "0.003": 2.0, "0.001": math.nan}
    assert in_turn(config, Runs(lambda job: losses[job["task.learning_rate"]])) == [0.01, 0.003, 0.001]


def test_files_of_a_search_that_fail(
    config: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: temporary files of a killed search go at the next one; without a folder, exit code 2 and a line."""
    in_turn(config, Runs(lambda job: 1.0))
    (place,) = (path.parent for path in tmp_path.rglob("search.json"))
    config.hydra.sweep.dir = str(place.parent)
    (part := place / ".search.json.abcdefgh.part").touch()
    in_turn(config, Runs(lambda job: 1.0))
    assert not part.exists()
    config.hydra.sweep.dir = str(tmp_path / "file")
    (tmp_path / "file").touch()
    monkeypatch.setattr(logging.getLogger(), "handlers", [caplog.handler])
    monkeypatch.setattr(search, "set_up_logging", lambda: None)
    with pytest.raises(SystemExit) as caught:
        in_turn(config, Runs(lambda job: 1.0))
    assert caught.value.code == 2
    assert f"error: [Errno 20] Not a directory: '{tmp_path / 'file'}" in caplog.text


def test_every_combination_is_searched_for_itself(config: DictConfig) -> None:
    best = {"igpt_pico": 0.003, "igpt_nano": 0.0003}
    runs = Runs(lambda job: abs(math.log(float(job["task.learning_rate"]) / best[job["model"]])))
    in_turn(config, runs, "model=igpt_pico,igpt_nano", "seed=3")
    assert [(job["model"], job["task.learning_rate"]) for job in runs.jobs] == [
        *(("igpt_pico", rate) for rate in ("0.01", "0.003", "0.001")),
        *(("igpt_nano", rate) for rate in ("0.01", "0.003", "0.001", "0.0003")),
    ]
    assert {job["seed"] for job in runs.jobs} == {"3"}


def optuna(config: DictConfig, runs: Runs, *arguments: str, **changed: Any) -> None:
    how: dict[str, Any] = {
        "space": {"task.learning_rate": {"low": 0.0001, "high": 0.1, "log": True}, "model": {"choices": ["igpt_nano"]}},
        "n_trials": 12, "at_once": 2, "direction": "minimize", "seed": 0, **changed,
    }  # fmt: skip
    search.optuna(config, list(arguments), launch=runs, compose=composed, **how)


def bowl(job: dict[str, str]) -> float:
    return (math.log10(float(job["task.learning_rate"])) + 2.5) ** 2


def test_optuna_learns_and_goes_on_with_its_study(config: DictConfig, tmp_path: Path) -> None:
    """Invariant: 26 trials, then none more, then 4 more; the last ones are nearer to the optimum than the first."""
    runs = Runs(bowl)
    optuna(config, runs, "seed=0", n_trials=26)
    assert len(runs.jobs) == 26
    sweeps = str(tmp_path / "sweeps")
    for n_trials in (26, 30):
        config.hydra.sweep.dir = sweeps
        optuna(config, runs, "seed=0", n_trials=n_trials)
        assert len(runs.jobs) == n_trials
    losses = [bowl(job) for job in runs.jobs]
    assert sum(losses[-10:]) < sum(losses[:10]) / 2
    assert {job["model"] for job in runs.jobs} == {"igpt_nano"}
    assert len(list(Path(sweeps).glob("optuna-*/study.db"))) == 1


def test_an_interrupted_trial_is_taken_up_again(config: DictConfig, tmp_path: Path) -> None:
    """Invariant: the settings that were running when it ended come first when it goes on."""

    class Interrupted(Runs):
        def __call__(self, jobs: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
            if len(self.jobs) == 2:
                self.lost = [dict(line.split("=", 1) for line in job) for job in jobs]
                raise SystemExit(75)
            return super().__call__(jobs, first)

    stopped = Interrupted(bowl)
    with pytest.raises(SystemExit):
        optuna(config, stopped, n_trials=6)
    config.hydra.sweep.dir = str(tmp_path / "sweeps")
    runs = Runs(bowl)
    optuna(config, runs, n_trials=6)
    assert runs.jobs[:2] == stopped.lost
    assert len(runs.jobs) == 4
    proposed = [job["task.learning_rate"] for job in [*stopped.jobs, *runs.jobs]]
    assert len(set(proposed)) == 6  # going on proposes nothing again


@pytest.mark.parametrize("damage", ["value", "choice", "file"])
def test_a_study_that_was_changed_proposes_nothing(
    damage: str, config: DictConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By hand: a value outside the space, another choice, no database: refused in a line, no job starts."""

    def stop(jobs: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
        raise SystemExit(75)

    with pytest.raises(SystemExit):
        optuna(config, cast(Any, stop))
    (path,) = (tmp_path / "sweeps").glob("optuna-*/study.db")
    if damage == "file":
        path.write_bytes(b"no database" * 1000)
    else:
        with closing(sqlite3.connect(path)) as database, database:
            if damage == "value":
                database.execute("UPDATE trial_params SET param_value = 5 WHERE param_name = 'task.learning_rate'")
            else:
                hostile = json.dumps({"name": "CategoricalDistribution", "attributes": {"choices": ["igpt_s seed=9"]}})
                database.execute("UPDATE trial_params SET distribution_json = ? WHERE param_name = 'model'", [hostile])
    config.hydra.sweep.dir = str(tmp_path / "sweeps")
    runs = Runs(bowl)
    with pytest.raises(SystemExit):
        optuna(config, runs)
    assert runs.jobs == []
    assert "study.db" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_trial_that_failed_is_not_the_best(config: DictConfig, capsys: pytest.CaptureFixture[str]) -> None:
    runs = Runs(lambda job: math.nan if float(job["task.learning_rate"]) > 0.003 else bowl(job))
    optuna(config, runs)
    assert len(runs.jobs) == 12
    assert "best of 12: val/loss_gen" in (message := capsys.readouterr().err)
    reached = min(loss for loss in map(runs.reach, runs.jobs) if not math.isnan(loss))
    assert f"{reached:.4f}" in message


@pytest.mark.parametrize(
    ("what", "arguments", "changed", "message"),
    [
        (in_turn, (), {"key": "task.rate"}, "task.rate"),
        (in_turn, (), {"values": []}, "one value or more"),
        (in_turn, (), {"direction": "down"}, "must be minimize or maximize"),
        (optuna, (), {"space": {"task.rate": {"low": 0.0, "high": 1.0}}}, "task.rate"),
        (optuna, (), {"space": {"seed": {"from": 0}}}, "hydra.sweeper.space.seed is {choices: […]}"),
        (optuna, (), {"space": {"task.learning_rate": {"low": 1.0, "high": 0.1}}}, "task.learning_rate"),
        (optuna, ("seed=0,1",), {}, "several values go there"),
        (optuna, (), {"n_trials": 0}, "start at 1"),
    ],
)
def test_searches_that_cannot_be(
    config: DictConfig, capsys: pytest.CaptureFixture[str], what: Any, arguments: Any, changed: Any, message: str
) -> None:
    """Refused before the first job."""
    runs = Runs(lambda job: 0.0)
    with pytest.raises(SystemExit) as ended:
        what(config, runs, *arguments, **changed)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert runs.jobs == []


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "sweep").glob("*.yaml")))
def test_every_sweep_composes(name: str) -> None:
    """Each names settings that there are."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = compose_config("config", overrides=[f"sweep={name}"], return_hydra_config=True).hydra
    keys = [hydra.sweeper.key] if "key" in hydra.sweeper else list(hydra.sweeper.get("space") or hydra.sweeper.params)
    assert keys
    for key in keys:
        value = {"model": "igpt_s"}.get(key, "1")
        cfg = composed([f"{key}={value}"])
        assert str(OmegaConf.select(cfg, f"{key}.name" if key == "model" else key)) == value
