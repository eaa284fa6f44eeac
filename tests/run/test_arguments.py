"""Paths among the arguments: `~`, and names of any characters."""

import os
import random
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from igpt.run.arguments import (
    _expand_home_in_argument,
    expand_home_paths,
    parse_overrides,
    prepare_arguments,
    resolve_paths,
)
from igpt.run.launch import run
from igpt.run.saved_overrides import record_overrides
from igpt.utils.overrides import format_text
from tests.conftest import ROOT

CONF = ROOT / "conf"
PIECES = [*"ab/ '\"\\${}=,:()[]~#&;*?!|<>`^%@\n\t", "${", "\\${", "\\'", "é", "写", "..", "\\\\"]
NAMES = (
    "a=b",
    "a,b",
    "a(1)",
    "set[1]",
    "~x",
    "it's",
    'say "x"',
    "a & b",
    "Süß",
    "two\nlines",
    "$HOME",
    "${x}",
    "a'\"b",
)


def read_back(override: str) -> object:
    """What a run sees: Hydra's value, in OmegaConf."""
    return OmegaConf.create({"value": parse_overrides([override])[0].value()})["value"]


def test_every_name_can_be_quoted() -> None:
    """Round trip, of made-up names: through quotes, Hydra's grammar and OmegaConf's."""
    draw = random.Random(0)
    for _ in range(250):
        path = "/" + "".join(draw.choice(PIECES) for _ in range(draw.randint(1, 8))).strip("/")
        path = str(Path(path))
        assert read_back(f"data.path={format_text(path)}") == path
        (saved,) = record_overrides([f"tokens.path={format_text(path)}"], OmegaConf.create({}))
        assert read_back(saved) == path


def test_what_has_to_be_quoted_is_told_how() -> None:
    """Independent source: bash reads the argument that each message names, and it is the name; each is one line."""
    requested, typed = [], []
    for name in NAMES:
        override = f"data.path=/photos/{name}"
        try:
            prepare_arguments(["data=folder", override], CONF)
        except ValueError as error:
            message = str(error)
            assert message.isprintable(), message
            requested.append(name)
            typed.append(message.partition("quote it: ")[2])
        else:
            assert read_back(override) == f"/photos/{name}"
    assert {"a=b", "a,b", "it's", "two\nlines", "${x}", "Süß"} <= set(requested)
    script = f"printf '%s\\0' {' '.join(typed)}"
    given = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout.decode().split("\0")[:-1]
    assert [read_back(argument) for argument in given] == [f"/photos/{name}" for name in requested]
    prepare_arguments(["data=folder", given[0]], CONF)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=2019", "a path is expected, this is read as int.* quote it: 'data.path=\"2019\"'"),
        ("data.path=[photos]", "read as list.* quote it: 'data.path=\"\\[photos\\]\"'"),
        ("paths.cache=true", "read as bool.* quote it: 'paths.cache=\"true\"'"),
        ("task.compare_with=[a=b,c]", 'quote it: \'task.compare_with=\\["a=b","c"\\]\''),
    ],
)
def test_what_hydra_reads_otherwise(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_arguments(["task=palette", "data=folder", override], CONF)


SETTINGS = ("init", "paths.runs", "paths.cache", "tokens.path", "data.path", "data.clusters", "task.palette",
            "data.streams.web.path", "+task.stages.x.run", "+task.stages.x.data.path", "hydra.sweep.dir")  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_home_is_meant_by_a_tilde(setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, in quotes of both kinds."""
    monkeypatch.setenv("HOME", str(tmp_path))
    groups = {"tokens.path": ["tokens=openai"], "data.clusters": ["data=openai_npy"], "task.palette": ["task=import"],
              "data.streams.web.path": ["data=imagenet64_web"], "data.path": ["data=folder"],
              "init": ["task=sample"]}  # fmt: skip
    pipeline = ["task=pipeline"] if "stages" in setting else []
    quote = "'\""[len(setting) % 2]
    arguments = [*groups.get(setting, []), *pipeline, f"{setting}={quote}~/a b{quote}"]
    assert read_back(prepare_arguments(arguments, CONF)[-1]) == f"{tmp_path}/a b"


def test_home_in_lists_sweeps_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand. What only looks like it (a deletion, a name with ~ within, nobody's home) is left as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for typed in ("data.path=~/photos", "+task.stages.x.run=~/a b", "paths.runs=~"):
        assert parse_overrides([_expand_home_in_argument(typed)])[0].value() == typed.partition("=")[2].replace(
            "~", str(tmp_path), 1
        )
    (lists,) = prepare_arguments(['task.compare_with=["~/x","y~/z","${paths.runs}/p"]', "task=palette"], CONF)[:1]
    assert parse_overrides([lists])[0].value() == [f"{tmp_path}/x", "y~/z", "${paths.runs}/p"]
    for left in ("~callbacks.samples", '+x="a~/b"', 'data.path="~/a","~/b"'):
        assert left in prepare_arguments([left, "data=folder", "-m"], CONF)
    assert expand_home_paths(["~", "~/", "~nobody_of_this_name/x", "a/~/b", 3, None]) == [
        str(tmp_path), f"{tmp_path}/", "~nobody_of_this_name/x", "a/~/b", 3, None,
    ]  # fmt: skip
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\npaths: {runs: ~/runs}\n")
    own = ["-m", f"--config-dir={tmp_path}", "experiment=mine", "seed=0,1"]
    assert f"paths.runs={tmp_path}/runs" in prepare_arguments(own, CONF)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=["tokens=openai", "+task.compare_with=['~/x',null]", "tokens.path='~/p.npy'"])
    resolve_paths(cfg)
    assert (cfg.tokens.path, cfg.task.compare_with[0]) == (f"{tmp_path}/p.npy", f"{tmp_path}/x")
    assert cfg.tokens.palette.path == f"{tmp_path}/p.npy"  # which refers to it
    assert cfg.paths.runs == "runs"


def test_a_resumed_run_is_found_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.json").write_text('{"overrides": ["seed=7"]}')
    assert prepare_arguments(['resume="~/"'], CONF)[0] == "seed=7"


def test_a_palette_at_home_is_read_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: a run of `~/p.npy` is that of its whole path; another palette there is another run."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    palette = tmp_path / "home" / "p.npy"
    common = ["task=palette", "tokens=openai", "trainer=cpu", "logger=none", "task.count=2"]
    home = ['tokens.path="~/p.npy"', 'paths.runs="~/runs"', 'paths.cache="~/cache"']
    folders = []
    for turn in (1, -1):
        np.save(palette, np.linspace(-1, 1, 51).reshape(17, 3).astype(np.float32)[::turn])
        folders.append(run(*common, *home, conf=CONF)[1])
    assert run(*common, f"tokens.path={palette}", f"paths.runs={tmp_path}/home/runs", conf=CONF)[1] == folders[1]
    assert folders[0] != folders[1]
    assert {folder.parent for folder in folders if folder} == {tmp_path / "home" / "runs"}
    assert os.listdir() in ([], [".cache"])


def test_what_is_left_out_or_has_no_value() -> None:
    """By hand: groups with an option `none` may be left out by Hydra's `~`; all else is right, or has a line."""
    assert prepare_arguments(["~logger", "~callbacks"], CONF) == ["logger=none", "callbacks=none"]
    right = ["-m", "+logger=wandb", "~logger.csv", "model=igpt_pico,igpt_nano", "resume=auto"]
    assert prepare_arguments(right, CONF) == right
    refused = {
        "~data": "~data: every run has data: choose another, data=OPTION; there are checkpoint, cifar10, ",
        "~seed": "~seed: every run has seed: change it, seed=VALUE, or leave the argument out",
        "~paths.runs": "~paths.runs: every run has paths.runs: ",
        **{f"~{key}": f"~{key}: no {key} is chosen unless one is typed: leave" for key in ("sweep", "debug")},
        "~logger,csv": "~logger,csv: a deletion is ~KEY: for a sweep, -m logger=none,csv",
        "~seed,model": "~seed,model: a deletion is ~KEY, and one at a time",
        "~logger=csv": "~logger=csv: logger=none leaves all out",
        "~nothing": "there is no setting or group 'nothing'",
        "logger=": "logger=: there is no such option; there are csv, ",
        "+callbacks=probe": "+callbacks=probe: callbacks=probe chooses it, in place of the default: leave out the +",
        "++logger=csv": "++logger=csv: logger=csv chooses it",
        "seed=0,1": "seed=0,1: this is several values, for a sweep (-m)",
        **{text: f"{text}: an argument is KEY=VALUE, +KEY=VALUE, or ~KEY" for text in ("++x", "logger", "~", "=x")},
    }
    for text, message in refused.items():
        with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
            prepare_arguments(["-m", text] if "," in text and text[0] == "~" else [text], CONF)
        assert "\n" not in str(error.value)
        assert "a + in front" not in str(error.value)
