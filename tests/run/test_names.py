"""Names of runs: the data they are named for, and runs that older releases named otherwise."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from igpt.checkpoint.igpt_format import save_model
from igpt.metric.result import Result
from igpt.model.gpt import GPT
from igpt.report.facts import NAME, describe_images
from igpt.report.runs import RunRecord
from igpt.run.launch import describe_run
from igpt.run.run_config import RunConfig
from igpt.run.run_dir import find_run_dir
from igpt.settings.data import name_images
from igpt.training.loggers import RunInfo
from igpt.utils import files
from tests.configs import built
from tests.task.conftest import Lab
from tests.tokens.test_palette import random_palette


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (("digits", None, 8), "digits8"),
        (("imagenet", "ILSVRC/imagenet-1k", 32), "imagenet32"),
        (("cifar10", "uoft-cs/cifar10", 8), "cifar10-8"),
        (("cifar100", "/data/x", 32), "cifar100-32"),
        (("folder", "/data/my photos/", 8), "my_photos8"),
        (("folder", "~/photos", 16), "photos16"),
        (("folder", "someone/flowers-102", 16), "flowers_102-16"),
        (("folder", "/shards/web-{000..099}.tar", 16), "web16"),
        (("folder", "/shards/*.tar.gz", 16), "shards16"),
        (("folder", "https://host/a/birds.parquet?raw=1", 16), "birds16"),
        (("folder", "/data/2024", 16), "folder_2024-16"),
        (("folder", None, 16), "folder16"),
        (("mine", "/data/x", 16), "mine16"),
    ],
)  # fmt: skip
def test_data_are_named_by_what_they_are(data: tuple[Any, ...], name: str) -> None:
    """By hand; and a run folder of that name is read back, also where its data and resolution ran together."""
    config = dict(zip(("name", "path", "resolution"), data, strict=True))
    assert name_images(config) == name
    for named in (name, f"{data[0]}{data[2]}"):
        match = NAME.fullmatch(f"pretrain-openai-gpt-2-{named}-ar-s0-0123abcd-2")
        assert match is not None
        assert match.group("model", "data", "objective") == ("openai-gpt-2", named, "ar")
        run = RunRecord(Path(match[0]), {}, {"task": "pretrain", "config": {"data": config}}, Result())
        assert describe_images(run) == f"{name.removesuffix(str(data[2])).removesuffix('-')} at {data[2]}×{data[2]}"


def test_a_task_that_reads_no_images_is_named_by_those_of_its_weights(tmp_path: Path) -> None:
    """Invariant: in its first line, too; one that reads images is named by those."""
    metadata = Lab.metadata(Lab(None, random_palette(17)))(data="cifar108", step=1)  # type: ignore[arg-type]  # no images are read
    net = GPT(metadata.network)
    net.init_weights(0)
    save_model(tmp_path / "model", net.state_dict(), metadata)
    for task, data in (("sample", "cifar108"), ("export", "cifar108"), ("import", "cifar108"), ("complete", "digits8")):
        run = built(f"task={task}", f"init={tmp_path}").run
        assert describe_run(run) == f"{task}: tiny on {data}, ar"
        assert run.subject["data"] == data
        assert run.name.startswith(f"{task}-tiny-{data}-ar-s0-")


def note(folder: Path, about: RunInfo) -> None:
    """A logger that only notes which run it would be of."""
    (folder / "id.txt").write_text(about.run_id)


def begin(runs: Path, name: str, run: RunConfig) -> Path:
    """What an older release left of a run: its record and a checkpoint."""
    record = {"version": 2, "id": "0123", "overrides": [], "config": run.config, "files_sha256": run.input_hashes}
    record["of"] = run.subject | {"data": f"{run.cfg.data.name}{run.cfg.data.resolution}"}
    files.write_json(runs / name / "run.json", record)
    (runs / name / "checkpoints").mkdir()
    (runs / name / "checkpoints" / "latest").write_text("step_0000002.ckpt")
    return runs / name


def test_runs_named_by_older_releases_are_found(tmp_path: Path) -> None:
    """Invariant: finished, such a run is reused; unfinished, it is resumed, in the same run of its loggers."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "a.png")
    how = ["data=folder", f"data.path={tmp_path / 'photos'}", "data.resolution=8", f"paths.runs={tmp_path / 'runs'}"]
    run = built(*how).run
    assert run.name.startswith("pretrain-igpt_nano-photos8-ar-s0-")
    assert not find_run_dir(run).is_started
    older = begin(tmp_path / "runs", run.name.replace("photos8", "folder8"), run)
    with pytest.raises(ValueError, match=f"{older.name} was begun and is not finished"):
        find_run_dir(run)
    resumed = built(*how, "resume=auto", f"+logger.own._target_={__name__}.note")
    resumed.run_dir = find_run_dir(resumed.run).path
    assert resumed.run_dir == older
    resumed.build_loggers()
    assert (older / "id.txt").read_text() == f"{older.name}-0123"
    files.write_json(older / "result.json", {})
    assert find_run_dir(run).path == older
    assert find_run_dir(built(*how, "rerun=true").run).path == tmp_path / "runs" / run.name
    assert not find_run_dir(built(*how, "seed=1").run).is_started


def test_a_name_that_an_older_release_gave_to_another_run(tmp_path: Path) -> None:
    """Invariant: callbacks that change training were outside its hash; by their record they are told apart."""
    runs = f"paths.runs={tmp_path}"
    stop = "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss_gen}"
    plain, stopped = built(runs).run, built(runs, stop).run
    older = begin(tmp_path, plain.name, stopped)
    files.write_json(older / "result.json", {})
    assert find_run_dir(stopped).path == older
    own = find_run_dir(plain).path
    assert own == tmp_path / f"{plain.name}-2"
    files.write_json(begin(tmp_path, own.name, plain) / "result.json", {})
    assert find_run_dir(plain).path == own
