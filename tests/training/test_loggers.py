"""TensorBoard, read back by its own reader, and any other Lightning logger by `_target_`."""

import csv
import json
import shutil
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.fabric.loggers import tensorboard as of_fabric
from lightning.pytorch import loggers as of_lightning
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from igpt.metric.result import Curve, Number, Result
from igpt.run.entries import logger_builder
from igpt.run.finished import complete_finished
from igpt.run.launch import run
from igpt.run.targets import checked_partial
from igpt.training import loggers
from igpt.training.loggers import RunInfo
from tests.conftest import ROOT

ABOUT = RunInfo("pretrain", "tiny", "digits8", "ar", run_id="run-1", first_step=0, trains=True, pipeline=None)
TENSORBOARD = {"_target_": "igpt.training.loggers.tensorboard"}
TINY = (
    "trainer=cpu", "model=igpt_nano", "model.n_layer=1", "model.n_embd=8", "model.n_head=2", "task.steps=4",
    "task.batch_size=8", "task.warmup_steps=1", "task.val_every=2", "task.log_every=1", "task.checkpoint_every=2",
    "callbacks.samples.count=4",
)  # fmt: skip


class Recorder(Logger):
    """Somebody's own logger: keeps what it is told; fails where it is asked to."""

    name, version = "recorder", "0"

    def __init__(self, save_dir: str, *, label: str, fails: str = "") -> None:
        super().__init__()
        self.save_dir_given, self.label, self.fails = save_dir, label, fails
        self.rows: list[tuple[Any, dict[str, float]]] = []
        self.images: dict[str, list[str]] = {}
        self._fail("init")

    def _fail(self, where: str) -> None:
        if self.fails == where:
            raise ConnectionError("the server\nis gone")

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._fail("metrics")
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._fail("hyperparams")

    def log_image(self, key: str, images: list[str], step: int | None = None) -> None:
        self.images[key] = images


def read_events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag → step → value."""
    events = read_events(folder)
    return {tag: {each.step: each.value for each in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def read_hyperparameters(folder: Path) -> tuple[dict[str, Any], set[str]]:
    """What TensorBoard's HParams tab shows of a run: its settings, and the names of its metrics."""
    plugin = read_events(folder).PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(plugin["_hparams_/session_start_info"]).session_start_info
    experiment = HParamsPluginData.FromString(plugin["_hparams_/experiment"]).experiment
    values = {key: getattr(value, value.WhichOneof("kind")) for key, value in start.hparams.items()}
    return values, {info.name.tag for info in experiment.metric_infos}


def start(folder: Path, spec: dict[str, Any], about: RunInfo = ABOUT) -> Any:
    return logger_builder(spec, "logger.mine")(folder, about, {"task": {"name": "pretrain", "steps": 4}})


def test_tensorboard_has_what_the_run_has(tmp_path: Path) -> None:
    """Round trip: curves are those of metrics.csv, samples the pictures of the folder, results those of result.json.

    A second one by `_target_` and a logger that fails beside them change nothing.
    """
    broken = f"{{_target_: {__name__}.Recorder, label: a, fails: metrics}}"
    elsewhere = f"{{_target_: lightning.pytorch.loggers.TensorBoardLogger, save_dir: {tmp_path / 'all'}}}"
    result, folder = run(
        *TINY, "logger=[csv,tensorboard]", f"+logger.own={broken}", f"+logger.tb={elsewhere}",
        f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}", conf=ROOT / "conf",
    )  # fmt: skip
    assert folder is not None
    with (folder / "metrics" / "from_0000000" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    scalars = read_scalars(folder / "tensorboard")
    for name in ("train/loss_gen", "val/loss_gen", "lr", "images_seen"):
        written = {int(row["step"]): float(row[name]) for row in rows if row[name]}
        assert scalars[name] == pytest.approx(written, rel=1e-3 if name == "val/loss_gen" else 1e-6)
    for name, number in result.numbers.items():
        assert scalars[name][4] == pytest.approx(number.value, rel=1e-6), name
    assert scalars["val/loss_gen_low"][4] < result.numbers["val/loss_gen"].value < scalars["val/loss_gen_high"][4]
    settings, metrics = read_hyperparameters(folder / "tensorboard")
    assert (settings["task/steps"], settings["model/n_embd"], settings["data/name"]) == (4, 8, "digits")
    assert not [key for key in settings if "_target_" in key or key.startswith("callbacks")]
    assert metrics == set(result.numbers)
    events = read_events(folder / "tensorboard")
    pictures = {f"samples/{each.step}": each for each in events.Images("samples")}
    assert set(pictures) == {"samples/2", "samples/4"}
    for each in events.Images("samples"):
        shown = np.asarray(Image.open(BytesIO(each.encoded_image_string)))
        assert np.array_equal(shown, np.asarray(Image.open(folder / "samples" / f"step_{each.step:07d}.png")))
    (curves,) = events.Images("pictures/curves")
    assert (curves.width, curves.height) == Image.open(folder / "curves.png").size
    (place,) = (tmp_path / "all" / "lightning_logs").iterdir()
    assert place.name.startswith(folder.name)
    assert read_scalars(place) == scalars


def test_a_resumed_run_goes_on_in_the_same_curves(tmp_path: Path) -> None:
    """By hand: after a kill at step 4 and a resume from step 2, the curve has the steps of the second process alone."""
    for first, values in ((0, {1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0}), (2, {3: 2.5})):
        logger = start(tmp_path, TENSORBOARD, RunInfo(**{**vars(ABOUT), "first_step": first}))
        for step, value in values.items():
            logger.log_metrics({"train/loss_gen": value}, step=step)
        logger.finalize("success")
    points = [(each.step, each.value) for each in read_events(tmp_path / "tensorboard").Scalars("train/loss_gen")]
    assert points == [(1, 5.0), (2, 4.0), (3, 2.5)]


def test_a_finished_probe_is_sent_to_tensorboard(quickstart: Path, tmp_path: Path, caplog: Any) -> None:
    """Round trip: accuracy over layers, confusion matrix and hyper-parameters are those of the folder; sent once."""
    folder = tmp_path / "probe"
    shutil.copytree(next(quickstart.glob("*_probe")), folder)
    had_tensorflow = "tensorflow" in sys.modules
    for _ in range(2):
        complete_finished(folder, {"tensorboard": TENSORBOARD})
    found = json.loads((folder / "result.json").read_text())
    scalars, events = read_scalars(folder / "tensorboard"), read_events(folder / "tensorboard")
    curve = found["curves"]["probe, val"]
    assert scalars["accuracy over layer/probe val"] == pytest.approx(dict(zip(curve["x"], curve["y"], strict=True)))
    assert len(events.Scalars("test/accuracy")) == 1
    assert scalars["test/accuracy"][0] == pytest.approx(found["numbers"]["test/accuracy"]["value"])
    assert "test/accuracy" in read_hyperparameters(folder / "tensorboard")[1]
    (confusion,) = events.Images("pictures/confusion")
    shown = np.asarray(Image.open(BytesIO(confusion.encoded_image_string)))
    assert np.array_equal(shown, np.asarray(Image.open(folder / "confusion.png").convert("RGB")))
    assert "was not told" not in caplog.text
    assert had_tensorflow == ("tensorflow" in sys.modules)  # TensorBoard would import it, for seconds


def test_tensorboard_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_fabric, "_TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr(of_fabric, "_TENSORBOARDX_AVAILABLE", False)
    with pytest.raises(ValueError, match=r"^logger=tensorboard needs the package of that name: pip install tensorbo"):
        start(tmp_path, TENSORBOARD)
    with pytest.raises(ValueError, match=r"^logger\.mine cannot be built from its settings: Neither `tensorboard` nor"):
        start(tmp_path, {"_target_": "lightning.pytorch.loggers.TensorBoardLogger"})


@pytest.mark.parametrize("name", sorted(of_lightning.__all__))
def test_each_logger_of_lightning(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: it writes into the run's folder, or one line says what is missing, also for those that need a server."""
    monkeypatch.chdir(tmp_path)
    spec: dict[str, Any] = {"_target_": f"lightning.pytorch.loggers.{name}"}
    if name == "WandbLogger":  # not started here; `tags`: one of W&B's own settings, which it passes on
        kind = of_lightning.WandbLogger
        logger = checked_partial(spec | {"offline": True, "tags": ["mine"]}, "logger.mine")(
            **loggers.own_settings(kind, spec, tmp_path / "run", ABOUT)
        )
        assert (logger.save_dir, logger.version, logger.name) == (str(tmp_path / "run"), "run-1", "lightning_logs")
        return
    works = {"CSVLogger": "lightning_logs", "TensorBoardLogger": "tensorboard"}
    if name not in works:
        reason = "abstract class" if name == "Logger" else "mlflow|comet|litlogger"
        with pytest.raises(ValueError, match=rf"^logger\.mine cannot be built from its settings: .*({reason})") as info:
            start(tmp_path / "run", spec)
        assert "\n" not in str(info.value)
        return
    logger = start(tmp_path / "run", spec)
    logger.log_metrics({"train/loss": 1.0}, step=1)
    loggers.show([logger], Result(numbers={"val/loss": Number(0.5, "nats", 1)}), tmp_path / "run")
    loggers.close([logger], failed=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == [works[name]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"_target_": "nobody.Logger"}, r"_target_=nobody\.Logger cannot be imported: No module named 'nobody'$"),
        ({"_target_": "lightning.pytorch.loggers.TensorBordLogger"}, r".*, did you mean .*\.TensorBoardLogger\?$"),
        ({"_target_": "pytorch_lightning.loggers.CSVLogger"}, r".* did you mean lightning\.pytorch\.loggers\.CSVLog"),
        ({"_target_": f"{__name__}.Recorder"}, r" cannot be built from its settings: .* missing .* 'label'$"),
        ({"_target_": f"{__name__}.Recorder", "lable": "a"}, r" has no setting 'lable', did you mean label\?$"),
        ({"_target_": f"{__name__}.Recorder", "label": 1}, r"\.label must be text, got 1$"),
        ({"_target_": f"{__name__}.Recorder", "label": "a", "fails": "init"}, r" cannot be .*: the server is gone$"),
        ({"_target_": f"{__name__}.Recorder", "label": "a", "fails": "hyperparams"}, r" cannot be started: Conn.*r$"),
    ],
)
def test_loggers_that_are_refused(spec: dict[str, Any], message: str, tmp_path: Path) -> None:
    """By hand: one line that names the entry, before anything is trained."""
    with pytest.raises(ValueError, match=rf"^logger\.mine\.?{message}"):
        start(tmp_path, spec)


def test_any_logger_is_shown_the_result(tmp_path: Path, caplog: Any) -> None:
    """By hand: numbers with their ends at the last step, curves over layers by layer, pictures; errors said once."""
    spec = {"_target_": f"{__name__}.Recorder", "label": "a"}
    logger = start(tmp_path, spec)
    assert logger.save_dir_given == tmp_path
    (tmp_path / "curves.png").write_bytes(b"")
    result = Result(
        numbers={"val/accuracy": Number(0.5, "share", 4, interval=(0.25, 0.75))},
        curves={
            "probe, val": Curve([0, 1], [0.25, 0.5], "layer", "accuracy"),
            "train/loss": Curve([1, 6], [2, 1], loggers.STEPS, "nats"),
            "loss": Curve([0.1, 0.2], [2, 1], "C", "nats"),  # no whole numbers to be steps
        },
        files={"curves": Path("curves.png"), "model": Path("model")},
    )
    loggers.show([logger], result, tmp_path)
    assert logger.rows == [
        (6, {"val/accuracy": 0.5}),
        (6, {"val/accuracy_low": 0.25, "val/accuracy_high": 0.75}),
        (0, {"accuracy over layer/probe val": 0.25}),
        (1, {"accuracy over layer/probe val": 0.5}),
    ]
    assert logger.images == {"pictures/curves": [str(tmp_path / "curves.png")]}
    failing = start(tmp_path, spec | {"fails": "metrics"})
    loggers.show([failing, logger], result, tmp_path)
    assert len(logger.rows) == 8
    assert [line for line in caplog.messages if "the run goes on" in line] == [
        "logger Recorder: ConnectionError: the server; the run goes on"
    ]


def test_loggers_share_a_logger_class_unchanged() -> None:
    """Invariant: TensorBoard's class itself is not changed by what one of its objects is given."""
    assert not hasattr(TensorBoardLogger, "log_image")
