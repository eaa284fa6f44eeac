"""What `resume=` takes from a run's record: options of conf/ and plain values; paths are places; the rest is typed."""

import json
import os
import random
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from igpt.checkpoint.resume import read_best
from igpt.report.folder import RunFolder
from igpt.report.page import render_page
from igpt.run.arguments import parse_overrides, prepare_arguments
from igpt.run.finished import complete_finished
from igpt.run.launch import run
from igpt.run.pipeline_stages import stage_configs
from igpt.run.run_config import RunConfig, to_dict
from igpt.run.run_dir import resume_command
from igpt.run.saved_overrides import is_plain, record_overrides
from igpt.utils.files import read_json
from igpt.utils.overrides import train_command
from tests.conftest import ROOT

CONF = ROOT / "conf"
SMALL = ("task=palette", "tokens=openai", "trainer=cpu", "logger=none", "task.count=2")


def record(folder: Path, **changed: Any) -> Path:
    """A run folder whose run.json says something else."""
    RunFolder(folder).start({}, [], {})
    path = folder / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    return folder


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a run is started in: with a palette, and nothing else."""
    folder = tmp_path / "start"
    folder.mkdir()
    np.save(folder / "p.npy", np.linspace(-1, 1, 51).reshape(17, 3).astype(np.float32))
    monkeypatch.chdir(folder)
    return folder


HOSTILE = (
    "+callbacks.x._target_=tests.run.test_saved_overrides.plant",
    "+callbacks.x={_target_:tests.run.test_saved_overrides.plant}",
    "callbacks={x:{_target_:tests.run.test_saved_overrides.plant}}",
    "+logger.x.deep=[{_target_:tests.run.test_saved_overrides.plant}]",
    "task._target_=tests.run.test_saved_overrides.plant",
    "data._target_=igpt.model.c_library.compile_library",
    "tokens.palette={_target_:tests.run.test_saved_overrides.plant,_partial_:true}",
    "+callbacks.x._args_=[1]",
    "task.requires=[]",
    "++task.run_folder=false",
    "task.stages.x.needs=[network]",
    "hydra.searchpath=[file:///somewhere]",
    "hydra/launcher=slurm",
    "hydra.run.dir=/somewhere",
    "model=../../elsewhere/conf/model/igpt_s",
    "+experiment=/elsewhere",
    "model=_gpt",
    "logger=[csv,mine]",
    "model@callbacks.x=igpt_s",
    "data@callbacks.x=digits",
    "data@task.probe_data=../../elsewhere",
    "task.probe_data._target_=tests.run.test_saved_overrides.plant",
    "+task.probe_data={_target_:tests.run.test_saved_overrides.plant}",
    "data.name=${oc.env:HOME}",
    "published=['\\\\${oc.env:HOME}']",
    "seed=1,2",
    "seed=range(3)",
    "seed=",
    "a b=1",
    "x=" + "[" * 900,
    "x=" + "[" * 900 + "]" * 900,
    "+x=" + "y" * 100_000,
)


def plant(*_: Any, **__: Any) -> None:
    raise AssertionError("a file decided what is executed")


@pytest.mark.parametrize("override", HOSTILE, ids=lambda text: text[:50])
def test_a_record_chooses_options_and_plain_values_only(override: str, tmp_path: Path) -> None:
    """By hand. Refused in one line with the command to type; nothing is executed, and no folder is made."""
    folder = record(tmp_path / "sent", overrides=["seed=3", override])
    if override == "seed=":
        assert is_plain(override, [CONF])  # an empty text: refused as a seed, later
        return
    with pytest.raises(ValueError, match=r"^resume=.*never taken from a file; if you trust it, type it: ") as caught:
        run(f"resume={folder}", f"paths.runs={tmp_path / 'runs'}", conf=CONF)
    assert len(str(caught.value).splitlines()) == 1
    typed = shlex.split(str(caught.value).rpartition("type it: ")[2])
    assert typed[:2] == ["python", "train.py"]
    assert {override, f"resume={folder}"} <= {*typed}
    assert os.listdir(tmp_path) == ["sent"]


@pytest.mark.parametrize("group", ["task", "model", "objective"])
def test_a_stage_chooses_options_of_the_config_folders_only(group: str, tmp_path: Path) -> None:
    """Refused before Hydra reads it: a file of the run folder that was sent, by a path as the option of a stage."""
    folder = tmp_path / "sent"
    folder.mkdir()
    (folder / "own.yaml").write_text("_target_: tests.run.test_saved_overrides.plant\nname: own\n")
    option = os.path.relpath(folder / "own", CONF / group)
    saved = [f"+task.stages.pretrain.{group}={option}", "task=pipeline", "tokens=openai", "tokens.path=null"]
    record(folder, overrides=saved)
    with pytest.raises(ValueError, match=rf"^task\.stages\.pretrain\.{group} must be the name of an option"):
        run(f"resume={folder}", conf=CONF)


def test_a_text_in_a_stage_stays_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: what is no interpolation in the record is none in the stage's config, or in a path below ~."""
    monkeypatch.setenv("SECRET", "canary")
    monkeypatch.chdir(tmp_path)
    saved = [
        "task=pipeline",
        r"+task.stages.sample={data:{path:'\${oc.env:SECRET}',image_column:['\${oc.env:SECRET}']},task:sample}",
        "data=folder",
    ]
    saved += [r"data.classes='\${oc.env:SECRET}'", r"paths.cache='~/\${oc.env:SECRET}'", "data.path=x"]
    folder = record(tmp_path / "sent", overrides=saved)
    arguments = prepare_arguments([f"resume='{folder}'"], CONF)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=arguments, return_hydra_config=True)
        composed = RunConfig(
            OmegaConf.masked_copy(cfg, [*map(str, cfg.keys() - {"hydra"})]), dict(cfg.hydra.runtime.choices)
        )
        (tmp_path / "${oc.env:SECRET}").mkdir()  # a stage's images are looked for before it starts
        (stage,) = stage_configs(composed).values()
    texts = [*leaves(to_dict(stage.cfg)), *leaves(composed.config)]
    assert ("path", "${oc.env:SECRET}") in texts
    assert not any("canary" in str(value) for _, value in texts), texts


def test_a_record_rewrites_no_page(tmp_path: Path) -> None:
    """A task without a run folder is none to resume: its record would choose the runs whose pages are written."""
    folder = record(tmp_path / "sent", overrides=["task=report", f"task.runs=[{tmp_path / 'mine'}]"])
    with pytest.raises(ValueError, match=r"^task=report leaves no run: it cannot be resumed"):
        run(f"resume={folder}", conf=CONF)


@pytest.mark.parametrize("name", ["log.txt", "checkpoints", "metrics"])
def test_nothing_is_written_through_a_link(name: str, start: Path, tmp_path: Path, caplog: Any) -> None:
    """A run folder that was sent, with a link: not resumed, nor completed; what the link names stays as it is."""
    _, folder = run(*SMALL, "tokens.path=p.npy", conf=CONF)
    assert folder is not None
    (folder / "report.html").unlink()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "step_0000001.ckpt").write_text("mine")
    (folder / name).unlink(missing_ok=True)
    (folder / "model").symlink_to(".")  # one that stays inside is none to refuse
    (folder / name).symlink_to(mine if name != "log.txt" else mine / "step_0000001.ckpt")
    complete_finished(folder, {"csv": {"_target_": "igpt.training.loggers.csv"}})
    assert f"{name} is a link to {mine}" in caplog.text
    (folder / "result.json").unlink()
    with pytest.raises(ValueError, match=rf"{name} is a link to {mine}.*, outside of the run folder: nothing is writ"):
        run(f"resume={folder}", conf=CONF)
    assert not (folder / "report.html").exists()
    assert {path.name: path.read_text() for path in mine.iterdir()} == {"step_0000001.ckpt": "mine"}


def test_a_damaged_result_is_named_when_its_command_is_given_again(start: Path) -> None:
    _, folder = run(*SMALL, "tokens.path=p.npy", conf=CONF)
    assert folder is not None
    (folder / "result.json").write_text('{"version": 3, "numbers": 5}')
    with pytest.raises(ValueError, match=rf"^{folder}.*result\.json is"):
        run(*SMALL, "tokens.path=p.npy", conf=CONF)


def test_a_pipe_in_a_run_folder_stops_nothing(tmp_path: Path) -> None:
    """A record or log that would wait for another process is refused, not waited for."""
    folder = RunFolder(record(tmp_path / "sent"))
    os.mkfifo(folder.path / "log.txt")
    with pytest.raises(ValueError, match=r"log\.txt is no file"):
        folder.check_links()
    (folder.path / "checkpoints").mkdir()
    os.mkfifo(folder.path / "checkpoints" / "best.json")
    assert read_best(folder.path) is None
    with pytest.raises(ValueError, match=r"log\.txt is not a JSON file \(it is no regular file\)"):
        read_json(folder.path / "log.txt")


PIECES = (
    "task", "callbacks", "logger", "data", "model", "seed", "x", "_target_", "_partial_", "hydra", "requires", ".", ".",
    "/", "@", "+", "++", "~", "=", "=", "=", "{", "}", "[", "]", ":", ",", "'", '"', "\\", "$", "${",
    "${oc.env:SECRET}", "oc.env:SECRET}", "csv", "fit", "1", "null", " ", "\n",
)  # fmt: skip


def test_a_made_up_override_brings_no_target_and_no_interpolation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant, of made-up overrides: what is taken holds no target, and no value from outside."""
    monkeypatch.setenv("SECRET", "canary")
    draw = random.Random(0)
    taken: list[tuple[str, Any]] = []
    for _ in range(4000):
        key = ".".join(draw.choices(PIECES[:11], k=draw.randint(1, 3)))
        value = "".join(draw.choices(PIECES[:11] + PIECES[19:], k=draw.randint(1, 7)))
        text = f"{draw.choice(['', '+'])}{key}={value}" if draw.random() < 0.7 else "".join(draw.choices(PIECES, k=9))
        if is_plain(text, [CONF]):
            override = parse_overrides([text])[0]
            taken.append((override.key_or_group, override.value()))
    assert len(taken) > 100
    assert any("\\${" in str(value) for _, value in taken)
    for key, value in taken:
        cfg = OmegaConf.create({})
        OmegaConf.update(cfg, key.replace("/", "."), value, force_add=True)
        texts = [*leaves(OmegaConf.to_container(cfg, resolve=True))]
        assert not any(name.startswith("_") or name in ("hydra", "requires") for name, _ in texts), (key, value)
        assert not any("canary" in str(value) for _, value in texts), (key, value)


def leaves(settings: Any, key: str = "") -> Any:
    """Every (key, value) of nested settings, groups included."""
    yield key, None if isinstance(settings, dict | list) else settings
    if isinstance(settings, dict | list):
        pairs = settings.items() if isinstance(settings, dict) else ((key, each) for each in settings)
        for name, value in pairs:
            yield from leaves(value, str(name))


def test_what_a_run_records_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round trip: an interpolation is recorded as its value, so that `resume=` takes it in any environment."""
    monkeypatch.setenv("WHERE", "/a b")
    typed = ["seed=5", "data=folder", "data.path='${oc.env:WHERE}/${data.name}'", "task.warmup_steps=${seed}",
             "hydra.job.chdir=false", "rerun=true", r"published=['\${x}']"]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=typed)
        recorded = record_overrides(typed, cfg)
        assert len(recorded) == 5
        assert all(is_plain(text, [CONF]) for text in recorded)
        monkeypatch.delenv("WHERE")
        again = compose("config", overrides=recorded)
    assert (again.data.path, again.task.warmup_steps, again.published[0]) == ("/a b/folder", 5, "${x}")


def test_a_target_that_was_typed_is_typed_again(start: Path) -> None:
    """Round trip: the command in the error resumes the run; another target in its place is refused."""
    own = "+callbacks.mine._target_=lightning.pytorch.callbacks.Timer"
    _, folder = run(*SMALL, "tokens.path=p.npy", own, conf=CONF)
    assert folder is not None
    with pytest.raises(ValueError, match="never taken from a file") as caught:
        run(f"resume={folder}", conf=CONF)
    typed = shlex.split(str(caught.value).rpartition("type it: ")[2])[2:]
    assert own in typed
    assert run(*typed, conf=CONF)[1] == folder
    hint = resume_command(folder, (), ["seed=0", own, "resume=auto", "hydra.job.name=x", "logger=none"])
    assert hint == train_command(own, f"resume={folder}")  # of a run that was interrupted


def test_paths_are_places(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: a run begun with a relative path is resumed from another folder, through a link, and after a move."""
    _, folder = run(*SMALL, "tokens.path=p.npy", conf=CONF)
    assert folder is not None
    assert RunFolder(folder).read_run()["working_directory"] == str(start)
    assert run(*SMALL, f"tokens.path={start}/p.npy", conf=CONF)[1] == folder  # the same run
    here = folder.absolute()
    monkeypatch.chdir(tmp_path)
    assert run(f"resume={here}", conf=CONF)[1] == here
    (tmp_path / "link").symlink_to(start)
    assert run(f"resume={here}", "tokens.path=link/p.npy", conf=CONF)[1] == here
    moved = tmp_path / "elsewhere" / "moved"
    shutil.move(here, moved.parent / here.name)
    (moved.parent / here.name).rename(moved)
    assert run(f"resume={moved}", conf=CONF)[1] == moved
    np.save(tmp_path / "p.npy", np.linspace(-1, 0, 51).reshape(17, 3).astype(np.float32))
    with pytest.raises(ValueError, match=r"another run .*tokens\.path .*start/p\.npy ≠ .*the file of tokens\.path"):
        run(f"resume={moved}", "tokens.path=p.npy", conf=CONF)


def test_a_relative_path_of_an_older_record_is_a_place_too(start: Path, tmp_path: Path) -> None:
    """Records of version 2 held paths as they were typed, relative to the folder that `paths.runs` was relative to."""
    _, folder = run(*SMALL, "tokens.path=p.npy", conf=CONF)
    assert folder is not None
    for name in ("run.json", "result.json"):
        old = json.loads((folder / name).read_text()) | {"version": 2}
        old["config"]["tokens"]["path"] = old["config"]["tokens"]["palette"]["path"] = "p.npy"
        (folder / name).write_text(json.dumps(old))
    older = folder.rename(folder.with_name(folder.name[:-8] + "01234567"))
    assert run(f"resume={older}", conf=CONF)[1] == older
    assert run(*SMALL, "tokens.path=p.npy", conf=CONF)[1] == older  # by its command: named by another hash


def test_the_search_path_is_printed_and_typed(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Round trip: resume and the page name the config folder, absolute; a changed option in it is refused."""
    mine = start / "my conf" / "experiment" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("# @package _global_\nseed: 7\n")
    _, folder = run(*SMALL, "tokens.path=p.npy", "experiment=mine", "--config-dir", "my conf", conf=CONF)
    assert folder is not None
    with pytest.raises(ValueError, match="never taken from a file") as caught:
        run(f"resume={folder}", conf=CONF)
    typed = shlex.split(str(caught.value).rpartition("type it: ")[2])[2:]
    assert any(str(mine.parents[1]) in argument for argument in typed)
    monkeypatch.chdir("/")
    assert run(*typed[:-1], f"resume={start / folder}", conf=CONF)[1] == start / folder
    page = render_page(start / folder).read_text()
    assert page.count("my conf") >= 2
    mine.write_text("# @package _global_\nseed: 8\n")
    with pytest.raises(ValueError, match="this is another run than the one that was begun: seed 7 ≠ 8"):
        run(*typed[:-1], f"resume={start / folder}", conf=CONF)


def test_a_config_folder_by_its_flag(tmp_path: Path) -> None:
    """By hand: flags stand before the saved overrides, which may choose options of the typed folder."""
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 7\n")
    flag = ["--config-dir", str(tmp_path / "conf")]
    folder = record(tmp_path / "a run", overrides=["experiment=mine", "task.steps=9"], search_path=flag)
    assert prepare_arguments([*flag, f"resume='{folder}'", "task.steps=8"], CONF) == [
        *flag, "experiment=mine", f"resume='{folder}'", "task.steps=8",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="never taken from a file") as caught:
        prepare_arguments([f"resume='{folder}'"], CONF)
    assert shlex.split(str(caught.value).rpartition("type it: ")[2])[2:4] == flag


@pytest.mark.parametrize(
    "changed",
    [{"overrides": ["seed=1"], "search_path": 3}, {"search_path": {"a": 1}}, {"overrides": ["seed=1"] * 2000}],
)
def test_a_damaged_record_is_said(changed: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.json is damaged: its (overrides|search_path) are no list of texts"):
        prepare_arguments([f"resume={record(tmp_path / 'sent', **changed)}"], CONF)
