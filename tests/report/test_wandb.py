"""Weights & Biases, offline: what a run leaves there, and that it is closed whatever happens."""

import csv
import http.server
import json
import threading
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import wandb
import yaml
from hydra import compose, initialize_config_dir
from lightning.pytorch.loggers import WandbLogger

from igpt.data.classes import label_classes
from igpt.metric.result import Curve, Result
from igpt.report.folder import RunFolder
from igpt.run import launch, sweep
from igpt.run.finished import complete_finished
from igpt.training import loggers
from igpt.training.nan_guard import NonFiniteLossError
from tests.configs import built
from tests.conftest import ROOT
from tests.offline import OfflineRun, offline_runs
from tests.test_photographs import run as run_here

OFFLINE = ("logger=[csv,wandb]", "logger.wandb.offline=true", "logger.wandb.tags=[mine]")
PRETRAIN = (
    "trainer=cpu", "model=igpt_nano", "model.n_layer=2", "model.n_embd=16", "task.batch_size=16", "task.steps=6",
    "task.warmup_steps=1", "task.val_every=3", "task.log_every=1",
)  # fmt: skip


def unreachable(folder: Path, about: loggers.RunInfo) -> Any:
    """Somebody's own logger, to a server that is gone."""
    raise RuntimeError("the server is gone")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OfflineRun]:
    """A pretraining run and a probe of it, by task."""
    place = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IGPT_SWEEP", "my-sweep")
        _, folder = run_here(place, *PRETRAIN, *OFFLINE)
        run_here(place, "task=probe", f"init={folder}", "trainer=cpu", *OFFLINE, "task.C_grid=[0.1,1]")
    wandb.teardown()  # its own process writes some time later; this waits for that
    return {run.job_type: run for run in offline_runs(place)}


def find_run_folder(run: OfflineRun) -> Path:
    """The run folder that holds what W&B keeps."""
    return run.folder.parents[1]


def test_one_run_a_job_closed_with_what_it_is(runs: dict[str, OfflineRun]) -> None:
    assert set(runs) == {"pretrain", "probe"}
    for task, run in runs.items():
        assert run.exit_code == 0
        assert run.group == "my-sweep"
        assert run.tags == [task, "igpt_nano", "digits8", "ar", "mine"]
        assert run.config["task"]["name"] == task
        assert run.config["data"]["name"] == "digits"
    assert runs["pretrain"].config["task"]["steps"] == 6


def test_losses_speed_and_samples(runs: dict[str, OfflineRun]) -> None:
    """Round trip: what was logged is what the CSV file beside it says, step for step; two grids of samples."""
    with (find_run_folder(runs["pretrain"]) / "metrics" / "from_0000000" / "metrics.csv").open() as file:
        written = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    assert [row["images_seen"] for row in written if "train/loss_gen" in row] == [16, 32, 48, 64, 80, 96]
    history = [row for row in runs["pretrain"].history if "images_seen" in row]
    logged = [{name: row[name if name != "step" else "trainer/global_step"] for name in written[i]}
              for i, row in enumerate(history)]  # fmt: skip
    assert logged == [pytest.approx(row, rel=1e-6) for row in written]
    assert runs["pretrain"].summary["val/loss_gen"] == pytest.approx(written[-1]["val/loss_gen"], rel=1e-6)
    images = runs["pretrain"].folder / "files" / "media" / "images"
    samples = {path.read_bytes() for path in (find_run_folder(runs["pretrain"]) / "samples").iterdir()}
    assert len(samples) == 2
    assert {path.read_bytes() for path in images.glob("samples_*.png")} == samples
    (curves,) = (images / "pictures").glob("curves_*.png")
    assert curves.read_bytes() == (find_run_folder(runs["pretrain"]) / "curves.png").read_bytes()


def test_accuracy_over_layers_and_confusion(runs: dict[str, OfflineRun]) -> None:
    """Round trip: accuracies of every layer, the counts of the confusion matrix and the numbers of `result.json`."""
    tables = {
        path.name.split("_table")[0]: json.loads(path.read_text())["data"]
        for path in (runs["probe"].folder / "files").rglob("*.table.json")
    }
    assert tables.keys() == {"accuracy over layer", "confusion_cells"}
    found = json.loads((find_run_folder(runs["probe"]) / "result.json").read_text())
    assert found["curves"]["probe, val"]["x"] == [0, 1, 2]
    assert tables["accuracy over layer"] == [
        [x, name, y] for name, curve in found["curves"].items() for x, y in zip(curve["x"], curve["y"], strict=True)
    ]
    counts = np.load(find_run_folder(runs["probe"]) / "confusion_counts.npy")
    assert tables["confusion_cells"] == [[str(i), str(j), int(counts[i, j])] for i in range(10) for j in range(10)]
    assert counts.sum() == 300
    accuracy = runs["probe"].summary["test/accuracy"]
    assert accuracy == pytest.approx(np.trace(counts) / 300)
    for name, number in found["numbers"].items():
        assert runs["probe"].summary[name] == number["value"]
        assert runs["probe"].summary.get(f"{name}_stderr") == number["stderr"]
        ends = [runs["probe"].summary.get(f"{name}_{end}") for end in ("low", "high")]
        assert ends == (number["interval"] or [None, None])


def test_classes_of_a_chart_are_told_apart() -> None:
    """By hand: by name, with the number where two are shown alike; by number where there are no names."""
    assert label_classes(3, ("cat", "dog\n", "dog")) == ["cat", "dog (1)", "dog (2)"]
    assert list(label_classes(3, None)) == ["class 0", "class 1", "class 2"]


def test_a_run_that_fails_is_closed_as_failed(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError):
        run_here(tmp_path, *PRETRAIN, *OFFLINE, "task.learning_rate=1e30", "task.warmup_steps=0")
    wandb.teardown()
    (run,) = offline_runs(tmp_path)
    assert run.exit_code == 1


@pytest.mark.ci
def test_a_sweep_over_finished_runs_shows_one_run_a_job(tmp_path: Path) -> None:
    """Invariant: runs made without W&B are told to it when they are asked for with it, and not trained again.

    Round trip: ids, numbers, curves and pictures are those of the run folders; nothing in these is changed.
    """
    settings = [*PRETRAIN, "callbacks=none", f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]
    made = [launch.run(*settings, f"seed={seed}", conf=ROOT / "conf") for seed in (0, 1)]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    several = ["logger=[csv,wandb,tensorboard]", *OFFLINE[1:]]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        jobs = [
            compose("config", overrides=[*settings, f"seed={seed}", *several], return_hydra_config=True)
            for seed in (0, 1)
        ]
    returned = sweep.launch(jobs[0], jobs, first=0, n_jobs=None, metric="val/loss_gen")
    wandb.teardown()
    told = offline_runs(tmp_path)
    assert len(told) == len(returned) == 2
    assert len({each.group for each in told}) == 1
    for (result, folder), each, job in zip(made, told, returned, strict=True):
        assert folder is not None
        assert job.return_value == result.numbers["val/loss_gen"].value
        assert each.run_id == f"{folder.name}-{json.loads((folder / 'run.json').read_text())['id']}"
        assert (each.exit_code, each.config["task"]["steps"]) == (0, 6)
        assert {name: each.summary[name] for name in result.numbers} == {
            name: number.value for name, number in result.numbers.items()
        }
        losses = [row["train/loss_gen"] for row in each.history if "train/loss_gen" in row]
        assert losses == pytest.approx(result.curves["train/loss_gen"].y)
        assert list((each.folder / "files" / "media" / "images" / "pictures").glob("*.png"))
        assert len(list((folder / "tensorboard").glob("events.*"))) == 1
    assert written == {path: path.stat().st_mtime_ns for path in written}
    sweep.launch(jobs[0], jobs, first=0, n_jobs=None, metric="val/loss_gen")
    wandb.teardown()
    assert len(offline_runs(tmp_path)) == 2  # the same command sends nothing again


def test_a_logger_that_fails_for_a_finished_run_is_logged(tmp_path: Path, caplog: Any) -> None:
    """Invariant: whatever it raises, the command that meets the run shows the result, and a sweep goes on."""
    config = {"task": {"name": "sample", "requires": []}, "trainer": {}, "seed": 0, "objective": {"name": "ar"}}
    folder = RunFolder(tmp_path / "run")
    folder.start(config, [], {})
    folder.finish("sample", Result(), seconds=1.0)
    complete_finished(folder.path, {"mine": {"_target_": f"{__name__}.unreachable"}})
    assert (
        "logger=mine was not told: ValueError: logger.mine cannot be built from its settings: the serv" in caplog.text
    )
    assert (folder.path / "report.html").is_file()


def test_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, or no account: one sentence before anything is trained, and what to do."""
    wandb.teardown()  # it reads its environment once a process, and Lightning writes to that
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    online = ("logger=wandb", "logger.wandb.timeout=2")
    with pytest.raises(ValueError, match=r"logger=wandb: .*logger\.wandb\.offline=true"):
        run_here(tmp_path, *PRETRAIN, *online)
    assert not list((tmp_path / "runs").iterdir())
    wandb.teardown()
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"logger=wandb: .*[Ll]og in"):
        run_here(tmp_path, *PRETRAIN, *online, "seed=1")
    wandb.teardown()


class Forbidding(http.server.BaseHTTPRequestHandler):
    """A W&B server that lets nobody write."""

    def do_POST(self) -> None:  # the name that http.server asks for
        body = b'{"errors": [{"message": "permission denied"}]}'
        self.send_response(403)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None: ...


def test_an_account_without_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the server says is passed on, before anything is trained."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forbidding)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    wandb.teardown()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with pytest.raises(ValueError, match=r"logger=wandb: .*(403|[Pp]ermission).*logger\.wandb\.entity"):
        run_here(tmp_path, *PRETRAIN, "logger=wandb", "logger.wandb.timeout=20")
    assert not list((tmp_path / "runs").iterdir())
    wandb.teardown()
    server.shutdown()


def test_a_wandb_that_fails_at_the_end_ends_no_run(tmp_path: Path, caplog: Any) -> None:
    class Broken:
        def __init__(self) -> None:
            self.summary: dict[str, Any] = {}

        def log(self, shown: Any) -> None:
            raise OSError("no room")

    broken = MagicMock(spec=WandbLogger, experiment=Broken())
    loggers.show([broken], Result(curves={"a": Curve([0, 1], [0, 1], "layer", "accuracy")}), tmp_path)
    assert "was not told all that was found: OSError: no room; the run goes on" in caplog.text


def test_the_sweep_file_speaks_hydras_syntax() -> None:
    """Each command that an agent would call composes: dotted keys, no hyphens, values of the file's own ranges."""
    sweep = yaml.safe_load((ROOT / "docs" / "wandb_sweep.yaml").read_text())
    assert sweep["command"][:3] == ["${env}", "${interpreter}", "${program}"]
    assert "${args_no_hyphens}" in sweep["command"]
    assert (ROOT / sweep["program"]).is_file()
    fixed = [word for word in sweep["command"] if "=" in word]
    ends = [[spec["value"]] if "value" in spec else spec.get("values") or [spec["min"], spec["max"]]
            for spec in sweep["parameters"].values()]  # fmt: skip
    for pick in (0, -1):
        arguments = [f"{key}={values[pick]}" for key, values in zip(sweep["parameters"], ends, strict=True)]
        build = built(*fixed, *arguments)
        for argument in arguments:
            key, _, value = argument.partition("=")
            if "." in key:
                assert str(build.run.cfg.task[key.removeprefix("task.")]) == value
    assert sweep["metric"]["name"] == "val/loss_gen"
