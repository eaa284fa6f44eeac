"""Runs beside the numbers that the paper and others print."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir

from igpt.app.against import PaperComparison, compare_with_paper
from igpt.metric.result import Number
from igpt.report.paper import load_paper
from igpt.report.runs import read_run
from igpt.run.launch import launch
from tests.configs import CONF, built
from tests.report.records import RUNS, loss, made

LARGE = {"n_layer": 48, "n_embd": 1536, "n_head": 16}


def large(tmp_path: Path, **settings: Any) -> Path:
    """iGPT-L, pretrained as the paper's, on paper."""
    sizes = {f"model.{key}": value for key, value in LARGE.items()}
    recipe = load_paper().recipes["pretrain_l"].expects | sizes | {"data.resolution": 32}
    given = {
        **recipe, "model.name": "igpt_l", "data.palette_size": 512,
        "tokens.palette._target_": "igpt.tokens.palette.from_file", **settings,
    }  # fmt: skip
    folder = made(tmp_path / RUNS / "pretrain-l", {"parameters": Number(1_362_250_752, "weights", 1)}, **given)
    origin = {
        "network": {
            **LARGE, "n_vocab": given["data.palette_size"], "n_ctx": given.get("n_ctx", 1024),
            "positions": given.get("model.positions", "learned"),
        },
        "tokenizer": {"kind": given.get("kind", "palette")},
        "model": "igpt_l", "step": given["task.steps"], "objective": {"name": "ar"},
        "permutation": [0, 1, 2], "weights_sha256": "f" * 64,
    }  # fmt: skip
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(origin))
    return folder


def probe(tmp_path: Path, key: str = "test/accuracy", n: int = 10_000, **settings: Any) -> Path:
    """A probe of it by the paper's protocol, on paper."""
    lbfgs = next(row.expects for row in load_paper().rows if row.key == "probe_cifar100")
    given = {
        **lbfgs, "task.name": "probe", "task.paper": "probe_cifar10", "data.name": "cifar10",
        "data.resolution": 32, "data.palette_size": 512,
        "tokens.order": None, "model.name": "checkpoint", "objective.name": "checkpoint",
        "init": f"{RUNS}/pretrain-l", **settings,
    }  # fmt: skip
    number = Number(0.96, "share", n, 0.002, (0.956, 0.964))
    record = {"weights": "f" * 64, "refitted_on_val": True}
    return made(tmp_path / RUNS / "probe-l", {key: number}, provenance=record, **given)


def beside(*folders: Path) -> list[PaperComparison]:
    """The rows of the paper that have runs."""
    return [row for row in compare_with_paper([read_run(folder) for folder in folders]) if row.runs]


def test_a_run_as_the_papers_differs_in_nothing(tmp_path: Path) -> None:
    """Invariant: what is said of the runs below is said of what was changed in them, and of nothing else."""
    large(tmp_path)
    (row,) = beside(probe(tmp_path))
    assert row.published.value == 0.963
    assert row.differs == []
    assert isinstance(row.ours, Number)
    assert row.ours.interval == (0.956, 0.964)


def test_the_compute_of_a_pretraining_stands_beside_the_published(tmp_path: Path) -> None:
    """By hand: 33 device-days beside about 2,500 V100-days, and beside its size."""
    folder = large(tmp_path, **{"task.paper": "pretrain_l"})
    path = folder / "result.json"
    record = json.loads(path.read_text())
    record["numbers"]["train/device_days"] = {"value": 33.0, "unit": "device-days", "n": 32}
    path.write_text(json.dumps(record))
    rows = beside(folder)
    assert [(row.published.printed, row.published.unit) for row in rows] == [
        ("1362M", "weights"), ("≈ 2,500 V100-days", "V100-days"),
    ]  # fmt: skip
    assert isinstance(rows[1].ours, Number)
    assert rows[1].ours.value == 33.0
    assert rows[1].differs == []


@pytest.mark.parametrize(
    ("of_probe", "of_pretraining", "message"),
    [
        ({"data.resolution": 16}, {}, "data.resolution 16 (paper: 32)"),
        ({"data.name": "digits"}, {}, "data.name digits (paper: cifar10)"),
        ({"data.labels_per_class": 100}, {}, "data.labels_per_class 100 (paper: null)"),
        ({"task.norm": "raw"}, {}, "task.norm raw (paper: ln_1)"),
        ({"task.solver": "sgd"}, {}, "task.solver sgd (paper: lbfgs)"),
        ({"trainer.precision": "bf16-mixed"}, {}, "trainer.precision bf16-mixed (paper: 32-true)"),
        ({"data.path": "/copies/cifar"}, {}, "images from a copy, cifar"),
        ({"n": 500}, {}, "on 500 images (paper: 10,000)"),
        ({"key": "val/accuracy"}, {}, "measured on val, not test"),
        ({}, {"data.palette_size": 128}, "n_vocab 128 (paper: 512)"),
        ({}, {"kind": "patches"}, "tokenizer patches (paper: palette)"),
        ({}, {"model.positions": "rope"}, "model.positions rope (paper: learned)"),
        ({}, {"task.steps": 3000}, "pretraining.task.steps 3,000 (paper: 1,000,000)"),
        ({}, {"task.steps": 3000}, "pretraining.images 384,000 (paper: 128,000,000)"),
        ({}, {"data.name": "cifar10"}, "pretraining.data.name cifar10 (paper: imagenet)"),
        ({}, {"task.learning_rate": 0.01}, "pretraining.task.learning_rate 0.01 (paper, from memory: 0.001)"),
        ({}, {"trainer.precision": "bf16-mixed"}, "pretraining.trainer.precision bf16-mixed (paper: 32-true)"),
        ({"init": "elsewhere/model"}, {}, "not known: how its weights were trained (elsewhere/model is not there"),
    ],
)
def test_what_differs_is_said(
    tmp_path: Path, of_probe: dict[str, Any], of_pretraining: dict[str, Any], message: str
) -> None:
    """Invariant: each setting that is not the paper's is in its row."""
    large(tmp_path, **of_pretraining)
    rows = [row for row in beside(probe(tmp_path, **of_probe)) if row.published.value]
    assert rows[0].published.value == 0.963
    assert all(any(message in line for line in row.differs) for row in rows), rows[0].differs


def test_a_record_without_its_length_is_not_known(tmp_path: Path) -> None:
    large(tmp_path, **{"task.steps": None})
    (row,) = beside(probe(tmp_path))
    assert row.differs == [
        "pretraining.task.steps null (paper: 1,000,000)",
        "pretraining.images not known (paper: 128,000,000)",
    ]


def test_settings_of_older_runs_are_read_by_their_names_of_now(tmp_path: Path) -> None:
    folder = made(tmp_path / "tuned", loss(1.0), task__gen=0.0, task__clf=1.0)
    record = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**record, "version": 1}))
    settings = read_run(folder).settings
    assert (settings["task.loss_weights.gen"], settings["task.loss_weights.clf"]) == (0.0, 1.0)
    assert not [key for key in settings if key.endswith(".gen") and "loss_weights" not in key]


def test_a_small_network_of_a_large_name_is_small(tmp_path: Path) -> None:
    """Invariant: sizes are compared, not names."""
    folder = large(tmp_path)
    origin = json.loads((folder / "model" / "config.json").read_text())
    origin["network"] |= {"n_layer": 2, "n_embd": 16}
    (folder / "model" / "config.json").write_text(json.dumps(origin))
    (row,) = beside(probe(tmp_path))
    assert row.differs == ["model.n_layer 2 (paper: 48)", "model.n_embd 16 (paper: 1,536)"]


def test_a_checkpoint_read_training_checkpoint_has_seen_less(tmp_path: Path) -> None:
    """By hand: 131,000 steps of 128 images are 16,768,000."""
    folder = large(tmp_path)
    place = folder / "checkpoints" / "step_0131000.ckpt"
    place.parent.mkdir()
    place.touch()
    init = f"{RUNS}/pretrain-l/checkpoints/{place.name}"
    (row,) = beside(probe(tmp_path, init=init))
    assert row.differs == ["pretraining.images 16,768,000 (paper: 128,000,000)"]


def test_weights_that_were_exchanged_are_not_described(tmp_path: Path) -> None:
    """Invariant: a folder that holds other weights now tells nothing of those a run began with."""
    folder = large(tmp_path)
    origin = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(origin | {"weights_sha256": "0" * 64}))
    row, of_bert = beside(probe(tmp_path))  # of which objective it is, is not known
    assert (row.published.objective, of_bert.published.objective) == ("ar", "bert")
    assert any("holds others now" in line for line in row.differs)
    assert {"objective.name not known (paper: ar)", "model.n_layer not known (paper: 48)"} <= {*row.differs}


def test_a_run_belongs_to_the_numbers_it_names(tmp_path: Path) -> None:
    """By hand: of a key's rows those of its own objective and size, where there are; without a key none."""
    large(tmp_path)
    folder = probe(tmp_path, **{"task.paper": None})
    assert beside(folder) == []
    shutil.rmtree(folder)
    (last,) = beside(probe(tmp_path, **{"task.paper": "probe_cifar10_last_layer"}))
    assert last.published.value == 0.939
    assert "task.layer null (paper: last)" in last.differs
    for layer in ("last", 48):  # the number of blocks, as older runs have it
        shutil.rmtree(folder)
        (last,) = beside(probe(tmp_path, **{"task.paper": "probe_cifar10_last_layer", "task.layer": layer}))
        assert not any(line.startswith("task.layer") for line in last.differs)
    sizes = {"model.n_layer": 24, "model.n_embd": 512, "model.n_head": 8, "model.name": "igpt_s"}
    tuned = {
        **sizes, "task.name": "finetune", "task.paper": "finetune_imagenet32", "data.name": "imagenet",
        "objective.name": "bert", "data.resolution": 32,
    }  # fmt: skip
    numbers = {name: Number(value, "share", 50_000) for name, value in
               (("test/accuracy", 0.4), ("test/accuracy_one_mask", 0.38))}  # fmt: skip
    found_rows = beside(made(tmp_path / RUNS / "tuned", numbers, provenance={"from": "scratch"}, **tuned))
    values = [row.ours.value for row in found_rows if isinstance(row.ours, Number)]
    assert [row.published.value for row in found_rows] == [0.665, 0.01]
    assert values == pytest.approx([0.4, 0.02])
    assert all("from weights that were never trained" in row.differs for row in found_rows)
    losses = {"test/loss_gen": Number(3.0, "nats/token", 50_000)}
    scored = {"task.name": "evaluate", "task.paper": "loss_imagenet32", "data.name": "imagenet"}
    (of_its_size,) = beside(made(tmp_path / RUNS / "s", losses, **scored, **sizes))
    assert of_its_size.published.value == 2.0895
    of_none = beside(made(tmp_path / RUNS / "nano", losses, **scored, **{"model.n_layer": 8, "model.n_embd": 64}))
    assert [row.published.method for row in of_none] == ["iGPT-S", "iGPT-M", "iGPT-L"]


def test_an_older_run_belongs_to_the_numbers_of_its_experiment(tmp_path: Path) -> None:
    """Round trip: its record has no `task.paper`, but the command that made it."""
    large(tmp_path)
    folder = probe(tmp_path)
    for name in ("run.json", "result.json"):
        record = json.loads((folder / name).read_text())
        del record["config"]["task"]["paper"]
        (folder / name).write_text(json.dumps(record | {"overrides": ["experiment=paper/probe_cifar10", "init=x"]}))
    assert [row.published.value for row in beside(folder)] == [0.963]
    begun = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(begun | {"overrides": ["task=probe"]}))
    assert beside(folder) == []


def density(tmp_path: Path, number: str, n: int = 10_000, **settings: Any) -> Path:
    """An evaluation of a network on RGB tokens of CIFAR-10, on paper."""
    tokens = {"tokens._target_": "igpt.tokens.rgb.RGBSettings", "model.n_layer": 12, "model.n_embd": 256}
    of_data = {"data.name": "cifar10", "data.resolution": 32}
    first = made(tmp_path / RUNS / "pretrain-rgb", loss(2.2), **{**tokens, **of_data, "task.batch_size": 64})
    (first / "model").mkdir()
    origin = {
        "network": {"n_layer": 12, "n_embd": 256, "n_vocab": 256, "n_ctx": 3072}, "objective": {"name": "ar"},
        "tokenizer": {"kind": "rgb", "permutation": list(range(1024))}, "step": 10, "weights_sha256": "f" * 64,
    }  # fmt: skip
    (first / "model" / "config.json").write_text(json.dumps(origin))
    given = {
        **of_data, "task.name": "evaluate", "task.paper": "bits_per_dim_cifar10", "init": f"{RUNS}/pretrain-rgb",
        "task.split": number.partition("/")[0], "model.name": "checkpoint", "objective.name": "checkpoint", **settings,
    }  # fmt: skip
    numbers = {number: Number(3.21, "bits/dim", n, 0.01)}
    return made(tmp_path / RUNS / "evaluate-rgb", numbers, provenance={"weights": "f" * 64}, **given)


def test_a_density_stands_among_the_published_ones(tmp_path: Path) -> None:
    """By hand: in the last row of its table, with its number; the other methods' rows have none."""
    rows = compare_with_paper([read_run(density(tmp_path, "test/bits_per_dim"))])
    assert [row.published.value for row in rows] == [3.14, 3.03, 2.92, 2.90, 2.85, 2.80, 2.65, 2.56, None]
    assert [row.ours for row in rows[:-1]] == [None] * 8
    assert isinstance(rows[-1].ours, Number)
    assert (rows[-1].ours.value, rows[-1].ours.interval) == (3.21, pytest.approx((3.1904, 3.2296)))
    assert rows[-1].differs == []
    assert rows[-1].published.command == "python train.py experiment=paper/bits_per_dim_cifar10 init=RUN"


@pytest.mark.parametrize(
    ("number", "settings", "message"),
    [
        ("test/bits_per_dim_of_these_pixels", {}, "of these pixels, not of the published images"),
        ("val/bits_per_dim", {"n": 5000}, "measured on val, not test"),
        ("test/bits_per_dim", {"n": 500}, "on 500 images (paper: 10,000)"),
        ("test/bits_per_dim_of_these_pixels", {"data.resolution": 16}, "data.resolution 16 (paper: 32)"),
    ],
)
def test_what_a_density_differs_in_is_said(tmp_path: Path, number: str, settings: dict[str, Any], message: str) -> None:
    """Invariant: a number of lossy, resized or other pixels does not pass for one of the published images."""
    (row,) = beside(density(tmp_path, number, **settings))
    assert isinstance(row.ours, Number)
    assert any(line.startswith(message) for line in row.differs), row.differs


def test_a_key_is_a_label(tmp_path: Path) -> None:
    """Invariant: neither a run's name nor a pipeline's depends on it; one that is none is refused, with the nearest."""
    assert built("task.paper=pretrain_s").run.name == built().run.name
    stages = "task.stages={pretrain: {steps: 5PAPER}}"
    full_list = [built("task=pipeline", f"++{stages.replace('PAPER', own)}") for own in ("", ", paper: pretrain_s")]
    assert full_list[0].run.name == full_list[1].run.name
    for overrides, where in ((["task.paper=pretrain_x"], "task"),
                             (["task=pipeline", "++task.stages={pretrain: {paper: pretrain_x}}"],
                              "task.stages.pretrain")):  # fmt: skip
        build = built(*overrides, f"paths.runs={tmp_path}")
        message = rf"{where}\.paper=pretrain_x: no published number has this key, did you mean pretrain_"
        with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(ValueError, match=message):
            launch(build.run.cfg, choices=build.run.choices, overrides=overrides)


@pytest.mark.parametrize(
    ("of_pretraining", "differs"),
    [
        ({}, []),
        ({"kind": "palette"}, ["tokenizer palette (paper: vqvae)"]),
        ({"n_ctx": 576}, ["model.n_ctx 576 (paper: 2,304)"]),
        ({"data.palette_size": 512}, ["n_vocab 512 (paper: 4,096)"]),
        ({"tokens.factor": 4}, ["pretraining.tokens.factor 4 (paper: 2)"]),
    ],
)
def test_the_first_versions_tokens_are_a_vqvaes(
    tmp_path: Path, of_pretraining: dict[str, Any], differs: list[str]
) -> None:
    """Invariant: its rows ask for 48×48 tokens of 4,096 codes, and for no recipe, as none was read."""
    vqvae = {"kind": "vqvae", "n_ctx": 2304, "data.palette_size": 4096, "data.resolution": 96, "tokens.factor": 2}
    large(tmp_path, **{**vqvae, "task.steps": 3000, **of_pretraining})
    own = {"task.paper": "probe_stl10_vq96", "data.name": "stl10", "data.resolution": 96}
    (row,) = beside(probe(tmp_path, n=8000, **own))
    assert (row.published.value, row.differs) == (0.971, differs)
