"""The configuration: every option composes and builds, and a misspelt one is answered with the right one."""

import logging
import os
import re
import signal
import sys
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_object
from lightning.pytorch.callbacks import EarlyStopping
from omegaconf import OmegaConf

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.igpt_format import CheckpointMetadata, save_model
from igpt.distributed import ranks
from igpt.metric.result import Number, Result
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.report.closing_table import closing_table
from igpt.report.folder import RunFolder
from igpt.run.arguments import check_overrides, parse_overrides, prepare_arguments
from igpt.run.components import Components
from igpt.run.execute import run_and_report, stage_runner
from igpt.run.explained_errors import (
    explain_lost_rank,
    explain_lost_worker,
    explain_missing_metric,
    explain_out_of_memory,
)
from igpt.run.launch import launch
from igpt.run.launch import main as launch_main
from igpt.run.pipeline_stages import stage_configs
from igpt.run.run_config import CHECKPOINT, RunConfig
from igpt.run.run_dir import find_run_dir
from igpt.run.saved_overrides import record_overrides
from igpt.tokens.palette import Palette
from igpt.tokens.palette_tokenizer import PaletteTokenizer
from igpt.tokens.pixel_order import PixelOrder
from igpt.training import hardware as machines
from igpt.training.deepspeed import ZeRO
from tests.conftest import learned_numbers, small_net

CONF = Path(__file__).parents[1] / "conf"
OPTIONS = [
    (group.name, option.relative_to(group).with_suffix("").as_posix())
    for group in sorted(CONF.iterdir())
    if group.is_dir() and group.name != "hydra"
    for option in sorted(group.rglob("*.yaml"))
    if not option.name.startswith("_")
]


def built(*overrides: str) -> Components:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=list(overrides), return_hydra_config=True)
        choices = dict(cfg.hydra.runtime.choices)
        cfg = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
        return Components(RunConfig(cfg, choices))


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_resolves(group: str, option: str) -> None:
    """Invariant: no option leaves an interpolation or a mandatory value open."""
    value = f"[{option}]" if group == "logger" and option != "none" else option
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=[f"{group}={value}"])
    assert OmegaConf.missing_keys(cfg) == set()
    OmegaConf.resolve(cfg)
    assert cfg.task.name


@pytest.mark.parametrize("model", [option for group, option in OPTIONS if group == "model" and option != CHECKPOINT])
def test_every_size_builds_on_the_meta_device(model: str, tmp_path: Path) -> None:
    """Invariant: sizes come from the config, positions, colours and causality from the stages before."""
    build = built(f"model={model}", f"paths.cache={tmp_path}")
    with torch.device("meta"):
        net = build.build_network()
    sizes = {key: build.run.cfg.model[key] for key in ("n_layer", "n_embd", "n_head")}
    assert net.config == GPTConfig(**sizes, n_ctx=64, n_vocab=17, causal=True)
    assert all(weight.is_meta for weight in net.parameters())


@pytest.mark.parametrize("variant", [option for group, option in OPTIONS if group == "variant"])
def test_every_variant_builds_in_every_size_on_the_meta_device(variant: str) -> None:
    """Invariant: a variant of the network is one in every size; its settings are those of pretraining."""
    of_variant = OmegaConf.to_container(OmegaConf.load(CONF / "variant" / f"{variant}.yaml"))
    assert isinstance(of_variant, dict)
    assert {*of_variant.get("pretraining", {})} <= {*OmegaConf.load(CONF / "task" / "pretrain.yaml")}
    of_tokens = {"n_ctx": 64, "n_vocab": 17, "causal": True, "grid": (8, 8, 1)}
    for path in sorted((CONF / "model").glob("igpt_*.yaml")):
        sizes = {str(key): value for key, value in OmegaConf.load(path).items() if str(key).startswith("n_")}
        config = GPTConfig(**{**sizes, **of_tokens, **of_variant.get("model", {})})
        assert (config == GPTConfig(**{**sizes, **of_tokens})) == ("model" not in of_variant)
        with torch.device("meta"):
            net = GPT(replace(config, n_layer=2))
        assert all(weight.is_meta for weight in net.parameters())


def test_bert_sees_both_ways(tmp_path: Path) -> None:
    """Invariant: the network's causality is the objective's."""
    build = built("objective=bert", f"paths.cache={tmp_path}")
    with torch.device("meta"):
        assert build.build_network().causal is False
    assert "-bert-" in build.run.name


def test_the_papers_sizes_are_the_configs(tmp_path: Path) -> None:
    """Independent source: Chen et al. 2020, Table 1, layers and widths; heads from OpenAI's README."""
    table = {"igpt_s": (24, 512, 8), "igpt_m": (36, 1024, 8), "igpt_l": (48, 1536, 16)}
    for model, sizes in table.items():
        cfg = built(f"model={model}").run.cfg.model
        assert (cfg.n_layer, cfg.n_embd, cfg.n_head) == sizes
    xl = built("model=igpt_xl").run.cfg.model
    assert (xl.n_layer, xl.n_embd) == (60, 3072)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle=igpt_s", "did you mean model"),
        ("model=igpt_sm", "did you mean igpt_s.*there are checkpoint, igpt_l"),
        ("task.stepz=3", "did you mean task.steps"),
        ("stepz=3", "did you mean task.steps"),
        ("task.learning_rat=1", "did you mean task.learning_rate"),
        ("data.val_frction=0.2", "did you mean data.val_fraction"),
        ("logger=[csv,wandbb]", "logger=wandbb: there is no such option, did you mean wandb"),
        ("experiment=quikstart", "did you mean quickstart"),
        ("seed=[", "cannot read the arguments"),
        ("model=igpt_s,igpt_xll", "did you mean igpt_xl"),
        ("task=trace", "task=trace is a script now: python benchmarks/trace_network.py"),
        ("init=${inti}", "Interpolation key 'inti' not found"),
    ],
)
def test_did_you_mean(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_overrides([override], [CONF])
    with pytest.raises(ValueError, match=message):
        prepare_arguments([override], CONF)


@pytest.mark.parametrize(
    ("override", "setting", "values"),
    [
        ("model=igpt_s", "model.n_embd", [512]),
        ("model=glob(igpt_?)", "model.n_embd", [1536, 1024, 512]),  # l, m, s
        ("task.steps=3", "task.steps", [3]),
        ("+new=1", "new", [1]),
        ("seed=0,1", "seed", [0, 1]),
        ("logger=[csv,wandb]", "logger.wandb.offline", [False]),
        ("logger=none", "logger", [{}]),
        ("~callbacks", "callbacks", [{}]),
        ("hydra.verbose=true", "hydra.verbose", [True]),
    ],
)
def test_good_arguments_pass(override: str, setting: str, values: list[Any]) -> None:
    """Independent source: Hydra, which takes what is passed on to it, and makes the settings of it that are meant."""
    flags = ["-m", "rerun=false"] if len(values) > 1 else []
    *_, passed = prepare_arguments([*flags, override], CONF)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        options = GlobalHydra.instance().config_loader()
        (parsed,) = OverridesParser.create(options).parse_overrides([passed])
        sweep = parsed.is_sweep_override()
        jobs = [f"{parsed.key_or_group}={value}" for value in parsed.sweep_string_iterator()] if sweep else [passed]
        result = [compose("config", overrides=[job], return_hydra_config=True) for job in jobs]
        assert [OmegaConf.select(cfg, setting) for cfg in result] == values


@pytest.mark.parametrize("flag", ["--cfg", "-c", "--package", "--config-name"])
def test_a_flags_value_is_no_override(flag: str) -> None:
    """Independent source: Hydra's own parser takes the next argument for the flag's."""
    arguments = ["seed=1", flag, "job", "task.steps=3"]
    hydras, _ = get_args_parser().parse_known_args(["seed=1", "task.steps=3", flag, "job"])
    assert hydras.overrides == ["seed=1", "task.steps=3"]
    resolve = ["--resolve"] if flag in ("--cfg", "-c") else []  # so that values are shown
    assert prepare_arguments(arguments, CONF) == [flag, "job", *resolve, *hydras.overrides]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+task.stages.pretrain.stepz=3", "task.stages.pretrain has no setting 'stepz', did you mean steps"),
        ("task.stages.pretrain.steps=many", "task.stages.pretrain.steps must be a whole number, got 'many'"),
        ("+task.stages.complete.rows=half", r"task.stages.complete.rows must be a whole number or null, got 'half'"),
    ],
)
def test_a_bad_stage_is_found_before_the_first_one_starts(override: str, message: str) -> None:
    build = built("experiment=quickstart", override)
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(ValueError, match=message):
        stage_runner(build)


def save_small(
    folder: Path,
    *,
    n_ctx: int = 64,
    permutation: list[int] | None = None,
    causal: bool = True,
) -> Path:
    """A saved network with 17 grey levels, as the digits have."""
    net = small_net(n_ctx=n_ctx, n_vocab=17, causal=causal)
    grey = (np.rint(np.arange(17) * 255 / 16) / 127.5 - 1).astype(np.float32)
    palette = Palette(np.repeat(grey[:, None], 3, axis=1))
    order = PixelOrder(round(n_ctx**0.5), tuple(permutation or range(n_ctx)))
    metadata = CheckpointMetadata(
        network=net.config,
        tokenizer=PaletteTokenizer(palette, order),
        objective={"name": "ar"} if causal else {"name": "bert", "mask_probability": 0.15},
        model="small",
        data="toy",
        step=1,
        seed=0,
    )
    save_model(folder / "model", net.state_dict(), metadata)
    return folder


SMALL = ("model.n_layer=3", "model.n_embd=24", "model.n_head=3")


@pytest.mark.parametrize(
    ("saved", "overrides", "message"),
    [
        ({"n_ctx": 16}, ["task=evaluate"], r"reads 4×4 pixels \(toy\), data=digits gives 8×8"),
        (
            {},
            ["task=pretrain", *SMALL, "tokens.order=random"],
            r"was trained on other tokens .* in another order than row by row",
        ),
        (
            {"permutation": list(range(63, -1, -1))},
            ["task=pretrain", *SMALL],
            r"was trained on other tokens .* in another order than row by row",
        ),
        ({}, ["task=pretrain"], "n_embd 24 ≠ 64; n_head 3 ≠ 4; n_layer 3 ≠ 8"),
        (
            {},
            ["task=pretrain", *SMALL, "tokens.palette.k=5"],
            r"was trained on other tokens \(17 colours, .* \(5 colours",
        ),
        ({}, ["task=sample", "model=igpt_s"], "n_embd 24 ≠ 512"),
        ({}, ["task=sample", "tokens=fitted", "tokens.palette.k=5"], "was trained on other tokens"),
        ({}, ["task=evaluate", "model=igpt_s"], "n_embd 24 ≠ 512"),
        ({}, ["task=evaluate", "tokens.order=random"], "tokens=checkpoint takes the checkpoint's order"),
    ],
)
def test_weights_that_disagree_with_the_run(
    tmp_path: Path, saved: dict[str, Any], overrides: list[str], message: str
) -> None:
    init = save_small(tmp_path / "run", **saved)
    build = built(*overrides, f"init={init}", f"paths.cache={tmp_path}")
    folder = RunFolder(tmp_path / "new")
    folder.start(build.run.config, [], build.run.input_hashes)
    with pytest.raises(ValueError, match=message):
        build.run_dir = folder.path
        run_and_report(build)


def test_weights_that_agree_are_taken(tmp_path: Path) -> None:
    """Invariant: the same palette fitted again is the checkpoint's; and task=evaluate asks for nothing."""
    init = save_small(tmp_path / "run")
    for overrides in (["task=pretrain", *SMALL], ["task=evaluate"]):
        build = built(*overrides, f"init={init}", f"paths.cache={tmp_path}")
        assert build.build_network().config == find_weights(str(init)).metadata.network


@pytest.mark.parametrize("task", ["sample", "complete", "evaluate"])
def test_a_task_that_needs_weights_says_so(task: str) -> None:
    with pytest.raises(ValueError, match=f"task={task} needs trained weights: init=PATH"):
        built(f"task={task}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.steps=1.5", "task.steps must be a whole number, got 1.5"),
        ("task.learning_rate=high", "task.learning_rate must be a number, got 'high'"),
        ("task.val_every=true", "task.val_every must be a whole number, got true"),
        ("+task.stepz=3", "task has no setting 'stepz', did you mean steps"),
        ("trainer.precision=fp8", "trainer.precision must be .*bf16-mixed.*, got 'fp8'"),
        ("data.resolution=16", "data.resolution=16: the digits are 8×8"),
        ("callbacks.samples.count=0", "callbacks.samples.count"),
        ("model.n_head=3", "n_embd 64 is not divisible by n_head 3"),
        ("tokens.palette.k=1", "tokens.palette.k must be at least 2, got 1"),
        ("tokens.order=spiral", "tokens.order must be raster"),
    ],
)
def test_bad_values_are_found_before_work_starts(tmp_path: Path, override: str, message: str) -> None:
    """Every one is a ValueError, which the command shows in one line; nothing was trained."""
    build = built(override, f"paths.cache={tmp_path}", f"paths.runs={tmp_path}")
    folder = RunFolder(tmp_path / "run")
    folder.start(build.run.config, [], build.run.input_hashes)
    with pytest.raises(ValueError, match=message):
        build.run_dir = folder.path
        run_and_report(build)
    assert not (folder.path / "checkpoints").exists()


def test_the_network_has_as_many_colours_as_were_found(tmp_path: Path) -> None:
    """By hand: the digits have 17; nothing else of the network follows from what was asked for."""
    requested = built("tokens.palette.k=512", f"paths.cache={tmp_path}").build_network()
    assert requested.n_vocab == 17
    assert requested.config == built(f"paths.cache={tmp_path}").build_network().config


def test_what_decides_a_run_decides_its_name(tmp_path: Path) -> None:
    """Invariant: where and how a run is carried out does not change its identity; what it learns from does."""
    palettes = [tmp_path / name for name in ("a.npy", "b.npy")]
    for i, path in enumerate(palettes):
        np.save(path, np.linspace(-1, 1, 51).reshape(17, 3).astype(np.float32)[:: 1 - 2 * i])
    name = built().run.name
    same = ["paths.cache=x", "paths.runs=y", "rerun=true", "trainer=cpu", "trainer.micro_batch=8", "callbacks=none"]
    for override in [*same, "trainer.num_workers=3", "logger=[csv,wandb]"]:
        assert built(override).run.name == name
    others = ["seed=1", "task.steps=7", "trainer.precision=bf16-mixed", "data.shift=0", "tokens.order=random"]
    names = {built(override).run.name for override in others}
    names |= {built("tokens=openai", f"tokens.path={path}").run.name for path in palettes}
    before = built("tokens=openai", f"tokens.path={palettes[0]}").run.name
    palettes[1].rename(palettes[0])
    names.add(built("tokens=openai", f"tokens.path={palettes[0]}").run.name)
    assert before in names
    assert name not in names
    assert len(names) == 8


def test_a_sample_is_named_after_what_its_weights_saw(tmp_path: Path) -> None:
    """By hand: no image is read, so the data is the checkpoint's."""
    init = save_small(tmp_path / "run")
    assert built("task=sample", f"init={init}").run.name.startswith("sample-small-toy-ar-s0-")


def test_a_stopped_pipeline_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: finished stages are not run again, and the end is that of a pipeline that was never stopped."""
    small = ["experiment=quickstart", "data=digits", "callbacks=none"]
    small += ["model.n_layer=1", "model.n_embd=8", "model.n_head=2"]
    small += [f"task.stages.{stage}=null" for stage in ("probe", "finetune", "scratch")]
    steps = ["steps=4", "warmup_steps=1", "val_every=0", "log_every=1", "checkpoint_every=2"]
    overrides = [*small, *(f"task.stages.pretrain.{s}" for s in steps), f"paths.cache={tmp_path}"]

    def start(*more: str, runs: str) -> tuple[dict[str, Any], Path]:
        build = built(*overrides, *more, f"paths.runs={tmp_path / runs}")
        with initialize_config_dir(str(CONF), version_base="1.3"):
            result = launch(build.run.cfg, choices=build.run.choices, overrides=overrides)
        (folder,) = (tmp_path / runs).iterdir()
        return {key: of.value for key, of in learned_numbers(result).items() if "per_s" not in key}, folder

    full, _ = start(runs="whole")
    again: list[str] = []
    for stage in ("igpt.task.pretrain.run", "igpt.task.complete.run"):  # stopped, resumed, stopped again
        with monkeypatch.context() as patch:
            patch.setattr(stage, failing(get_object(stage)))
            with pytest.raises(KeyError):
                start(*again, runs="stopped")
        (folder,) = (tmp_path / "stopped").iterdir()
        again = [f"resume={folder}"]
    done = [folder / stage / "result.json" for stage in ("1_palette", "2_pretrain")]
    written = [path.stat().st_mtime_ns for path in done]
    resumed, _ = start(*again, runs="stopped")
    assert resumed == full
    assert [path.stat().st_mtime_ns for path in done] == written


def failing(task: Any) -> Any:
    """A task that takes the same settings, and stops."""

    @wraps(task)
    def stop(*_: Any, **__: Any) -> None:
        raise KeyError("stopped")

    return stop


def test_resume_and_force_together() -> None:
    with pytest.raises(ValueError, match="choose one of them"):
        find_run_dir(built("resume=x", "rerun=true").run)


def test_a_resumed_run_with_other_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What differs is named; what does not decide what is learned may differ, and is listed."""
    first = built(f"paths.runs={tmp_path}")
    folder = find_run_dir(first.run)
    folder.start(first.run.config, [], first.run.input_hashes)
    with caplog.at_level(logging.INFO):
        assert find_run_dir(built(f"resume={folder.path}", "trainer.num_workers=2").run).path == folder.path
    assert "has no checkpoint yet: it starts from the first step" in caplog.text
    with caplog.at_level(logging.INFO):
        find_run_dir(built(f"resume={folder.path}", "trainer.num_workers=2", "task.log_every=7").run)
    assert "trainer.num_workers None ≠ 2; task.log_every 20 ≠ 7" in caplog.text
    with pytest.raises(ValueError, match=r"another run .*: task.steps 600 ≠ 5; task.warmup_steps 60 ≠ 0; seed 0 ≠ 1$"):
        find_run_dir(built(f"resume={folder.path}", "task.steps=5", "seed=1", "task.log_every=7").run)
    for override, message in (
        ("model=igpt_micro", "model.n_embd 64 ≠ 128"),
        ("tokens.palette.k=5", "tokens.palette.k 17 ≠ 5"),
        ("data.shift=0", "data.shift 1 ≠ 0"),
        ("objective=bert", "objective.mask_probability None ≠ 0.15"),
    ):
        with pytest.raises(ValueError, match=message):
            find_run_dir(built(f"resume={folder.path}", override).run)


def test_resume_auto_takes_the_folder_this_command_has_begun(tmp_path: Path) -> None:
    """Invariant: begun or not, the folder is the one of the settings; without it a begun run is not touched."""
    build = built(f"paths.runs={tmp_path}", "resume=auto")
    folder = find_run_dir(build.run)
    assert folder.path == tmp_path / build.run.name == find_run_dir(built(f"paths.runs={tmp_path}").run).path
    folder.start(build.run.config, [], build.run.input_hashes)
    (folder.path / "checkpoints").mkdir()
    (folder.path / "checkpoints" / "latest").touch()
    assert find_run_dir(build.run).path == folder.path
    with pytest.raises(ValueError, match=r"was begun and is not finished: continue it with `python train.py resume="):
        find_run_dir(built(f"paths.runs={tmp_path}").run)


def test_a_sweep_goes_on_by_itself() -> None:
    assert prepare_arguments(["-m", "seed=0,1"], CONF) == ["-m", "seed=0,1", "resume=auto"]
    assert prepare_arguments(["-m", "seed=0,1", "rerun=true"], CONF) == ["-m", "seed=0,1", "rerun=true"]
    assert prepare_arguments(["seed=0"], CONF) == ["seed=0"]


def compose_hydra(*overrides: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=list(overrides), return_hydra_config=True)
    return OmegaConf.to_container(cfg.hydra.launcher, resolve=True)


def test_launchers_compose() -> None:
    """By hand: a SLURM job has a task for each process, and only settings that its launcher knows."""
    assert compose_hydra()["_target_"] == "hydra_plugins.igpt_processes.ProcessesLauncher"
    slurm = compose_hydra("hydra/launcher=slurm", "trainer=ddp", "trainer.devices=8", "trainer.nodes=2")
    assert (slurm["nodes"], slurm["tasks_per_node"], slurm["gpus_per_node"]) == (2, 8, 8)
    assert slurm["additional_parameters"]["requeue"] is True
    # the fields of hydra-submitit-launcher 1.2.0's SlurmQueueConf that we set
    known = "submitit_folder timeout_min cpus_per_task gpus_per_node tasks_per_node mem_gb nodes name stderr_to_stdout "
    known += "_target_ partition qos constraint gres account signal_delay_s max_num_timeout additional_parameters "
    known += "array_parallelism setup"
    assert set(slurm) == set(known.split())


def test_resume_reads_the_saved_arguments(tmp_path: Path) -> None:
    """Round trip: saved overrides come first, in front of new ones; quotes and another directory do no harm."""
    folder = RunFolder(tmp_path / "a run")
    folder.start({}, ["task.steps=7", "rerun=true"], {})
    arguments = [f"resume='{folder.path}'", "trainer.num_workers=1"]
    assert prepare_arguments(arguments, CONF) == ["task.steps=7", *arguments]
    stage = RunFolder(folder.path / "2_pretrain")
    stage.start({}, None, {})
    with pytest.raises(ValueError, match=r"stage of a pipeline; continue that: resume=.*a run"):
        prepare_arguments([f"resume='{stage.path}'"], CONF)


def test_settings_of_ones_own_beside_ours(tmp_path: Path) -> None:
    """A folder given by --config-dir has options that ours has not; others are still found out."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 7\n")
    arguments = ["--config-dir", str(tmp_path), "experiment=mine", "task.steps=5"]
    assert prepare_arguments(arguments, CONF) == arguments
    with pytest.raises(ValueError, match=r"experiment=mime: there is no such option, did you mean mine\?"):
        prepare_arguments([*arguments[:2], "experiment=mime"], CONF)
    with pytest.raises(ValueError, match="there is no such folder"):
        prepare_arguments(["--config-dir=nowhere", "seed=1"], CONF)


def test_files_to_read_are_remembered_by_their_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand. Of what may be a name on the Hub, only what is here, or is the beginning of a checkpoint's files."""
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/a b", "conf", "openai"):
        Path(folder).mkdir(parents=True)
    Path("openai/model.ckpt-1.index").touch()
    here = Path.cwd()
    cfg = OmegaConf.create({})
    assert record_overrides(["seed=1", "tokens.path=/p.npy"], cfg) == ["seed=1", "tokens.path=/p.npy"]
    (with_blank,) = record_overrides(["init='runs/a b'"], cfg)
    assert parse_overrides([with_blank])[0].value() == f"{here}/runs/a b"
    for key in ("data.path=conf", "init=openai", "init=openai/model.ckpt-1", "task.palette=p.npy", "data.clusters=c"):
        name, _, value = key.partition("=")
        assert record_overrides([key], cfg) == [f"{name}={here / value}"]
    for unchanged in ("data.path=uoft-cs/cifar10", "init=openai/imagegpt-small", "init=null"):
        assert record_overrides([unchanged], cfg) == [unchanged]


def planned(caplog: pytest.LogCaptureFixture, *overrides: str) -> str:
    build = built("trainer.plan=true", "logger=none", *overrides)
    caplog.clear()
    with caplog.at_level("INFO"):
        launch(build.run.cfg, choices=build.run.choices, overrides=[])
    return caplog.text


def test_the_plan_of_a_run(caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: iGPT-L on eight machines of eight; no image, palette, folder or process is needed for it."""
    monkeypatch.chdir(tmp_path)
    eight = ("trainer=fsdp", "trainer.accelerator=gpu", "trainer.devices=8", "trainer.nodes=8", "task.batch_size=128")
    message = planned(
        caplog, "model=igpt_l", "data=imagenet32", *eight, "trainer.memory_gb=80", "trainer.peak_tflops=100",
        "task.steps=1000",
    )  # fmt: skip
    assert re.search(r"weights +1,362,250,752", message)
    assert re.search(r"device: weights +0\.09 GB", message)  # 4 bytes each, of 64 devices one
    assert re.search(r"optimiser +0\.17 GB", message)
    assert re.search(r"images in all +128,000", message)
    assert re.search(r"a step .* at 40% of 100 TFLOP/s \(assumed\) on 64 device", message)
    assert re.search(r"fits +yes: .* of 80\.00 GB", message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("side", [96, 192])
def test_the_plan_of_the_first_version(side: int, caplog: pytest.LogCaptureFixture) -> None:
    """By hand: iGPT-L with 48×48 positions and 4,096 codes; and as many vectors in a step of either tokenizer."""
    n, d, positions, codes = 48, 1536, 48**2, 4096
    weights = n * (12 * d**2 + 2 * d) + d + 2 * codes * d + positions * d + d
    assert f"{weights:,}" in planned(caplog, f"experiment=paper/pretrain_l_vq{side}")
    for name in (f"vqvae_{side}", f"vqvae_{side}_l1"):
        assert f"{128 * positions:,}, enough for {codes:,} codes" in planned(caplog, f"experiment=paper/{name}")


@pytest.mark.parametrize("name", ["vqvae_photographs", "vqvae_cifar10"])
def test_a_pipeline_through_a_vqvae_starts(name: str, tmp_path: Path) -> None:
    """Invariant: every stage has valid settings, the tokens of later ones are those of the first."""
    build = built(f"experiment={name}", f"data.path={tmp_path}", "task.stages.probe={}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        stages = stage_configs(build.run)
    assert [stage.trains_tokenizer for stage in stages.values()] == [True] + [False] * 5
    assert stages["pretrain"].cfg.tokens._target_.endswith("VQVAESettings")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("task.batch_size=100", "trainer.devices=8"), "cannot be shared by 8 devices"),
        (("trainer.micro_batch=48",), "does not divide the 128 images"),
        (("trainer.utilisation=0",), "utilisation must be above 0 or null, got 0"),
        (("task=palette",), "is for tasks that train a network"),
        (("experiment=quickstart",), "not task=pipeline: plan its pretraining, task=pretrain with the same model"),
    ],
)
def test_a_plan_that_cannot_be(caplog: pytest.LogCaptureFixture, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(caplog, "trainer.accelerator=cpu", *overrides)


def test_memory_that_ran_out() -> None:
    """What PyTorch raises when it is asked for 2^60 bytes names the plan; any other error is left as it is."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    message = explain_out_of_memory(raised.value)
    assert message is not None
    assert "the memory of this machine is full" in message
    assert "trainer.plan=true" in message
    assert explain_out_of_memory(RuntimeError("shape mismatch")) is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_of_a_gpu_that_ran_out(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent source: what PyTorch raises. Of several ranks it says which; what to lower, and how to go on."""
    monkeypatch.setattr(ranks, "this_rank", lambda: ranks.Rank(3, 1, 4, 2))
    message = explain_out_of_memory(error)
    assert message is not None
    assert len(message.splitlines()) == 1
    told = explain_out_of_memory(RuntimeError("rank 1: MemoryError: Unable to allocate 2.00 GiB"))
    assert str(told).startswith("the memory of the machine of rank 1 is full")
    for part in ("the GPU of rank 3 (on ", "trainer.micro_batch", "activation_checkpointing", "fsdp", "resume="):
        assert part in message


def test_a_worker_that_was_lost() -> None:
    """PyTorch's own words for a worker that is killed, as it reads and as it is waited for, become a line."""

    class Killed(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> int:
            os.kill(os.getpid(), signal.SIGBUS)
            return index

    with pytest.raises(RuntimeError) as caught:
        list(torch.utils.data.DataLoader(Killed(), num_workers=1))
    message = explain_lost_worker(caught.value)
    assert message is not None
    assert message.startswith("a process that reads images has died (killed by signal: Bus error)")
    assert "trainer.num_workers=0" in message
    waited = explain_lost_worker(RuntimeError("DataLoader worker (pid(s) 48, 49) exited unexpectedly"))
    assert waited is not None
    assert "(it ended unexpectedly)" in waited
    assert explain_lost_worker(RuntimeError("shapes differ")) is None


def test_a_metric_that_is_not_logged_is_said_in_a_line() -> None:
    """Independent source: the error of Lightning's own callback."""
    with pytest.raises(RuntimeError) as caught:
        EarlyStopping("val/x")._validate_condition_metric({})
    text = str(explain_missing_metric(caught.value))
    assert text.startswith("callbacks: Early stopping conditioned on metric `val/x`")
    assert explain_missing_metric(RuntimeError("shapes differ")) is None


def test_a_rank_that_is_left_alone_says_so_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exit code is not 2: the launcher would take the end of all ranks for bad input, and not name the first."""
    lost = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    assert explain_lost_rank(lost) is None
    monkeypatch.setattr(ranks, "this_rank", lambda: ranks.Rank(0, 0, 2, 2))
    assert str(explain_lost_rank(lost)).startswith("another process of this run has ended")
    assert explain_lost_rank(RuntimeError("shapes differ")) is None
    network = dist.DistBackendError("NCCL error in: a.cpp:9, unhandled system error\nLast error:\nno route to host")
    assert "no route to host; NCCL_DEBUG=WARN tells more" in str(explain_lost_rank(network))
    remote = dist.DistBackendError("NCCL error in: a.cpp:9, remote process exited\nncclRemoteError: a peer is gone")
    assert str(explain_lost_rank(remote)).startswith("another process of this run has ended")
    monkeypatch.setattr("igpt.run.launch.launch", lambda *_, **__: (_ for _ in ()).throw(lost))
    monkeypatch.setattr("igpt.run.launch.HydraConfig.get", lambda: MagicMock())
    with pytest.raises(SystemExit) as caught:
        launch_main(OmegaConf.create({}))
    assert caught.value.code == 1


def test_sharding_needs_several_processes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.devices=auto, or more than 1"):
        _ = built("trainer=fsdp", "trainer.devices=1", "trainer.accelerator=cpu").hardware


@pytest.mark.parametrize("trainer", ["deepspeed_2", "deepspeed_2_offload", "deepspeed_3", "deepspeed_3_offload"])
def test_deepspeed(trainer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is composed and made. Without CUDA, with what it cannot, or without its package, it says so at once.

    But for what it cannot, only where it trains: what is read needs no DeepSpeed.
    """
    with pytest.raises(ValueError, match=f"trainer={trainer}, but PyTorch sees no GPU here.*: choose trainer=fsdp"):
        _ = built(f"trainer={trainer}", "trainer.devices=1").hardware
    settings = ("trainer.accelerator=cpu", "trainer.devices=1", f"trainer={trainer}")
    with pytest.raises(ValueError, match="trains on CUDA GPUs, this would run on a CPU"):
        built(*settings).hardware.check_training()
    monkeypatch.setattr(machines, "DEEPSPEED_RUNS_ON", ("cpu",))
    if trainer.endswith("offload"):  # one process will do
        built(*settings).hardware.check_training()
    else:
        with pytest.raises(ValueError, match=r"more than 1; on one GPU trainer=deepspeed_2_offload"):
            built(*settings).hardware.check_training()
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    settings = ("trainer.accelerator=cpu", "trainer.devices=2", f"trainer={trainer}")
    machine = built(*settings).hardware
    stage = int(trainer.split("_")[1])
    result = ZeRO(zero_stage=machine.zero_stage, offload=machine.is_offloaded, n_weight=1000)
    assert result.config["zero_optimization"]["stage"] == machine.zero_stage == stage
    assert ("offload_param" in result.config["zero_optimization"]) == (trainer == "deepspeed_3_offload")
    assert ("offload_optimizer" in result.config["zero_optimization"]) == trainer.endswith("offload")
    with pytest.raises(ValueError, match=r"native reads float32 weights on a CPU, .*=bf16-mixed under"):
        _ = built(*settings, "trainer.decoding=native").hardware  # a whole copy's are bfloat16, ...
    assert built(*settings, "trainer.decoding=native", "trainer.precision=32-true").hardware.decoding == "native"
    for wrong in ("trainer.compile=true", "trainer.precision=bf16-true"):
        with pytest.raises(ValueError, match=f"does not go with {wrong}"):
            _ = built(*settings, wrong).hardware
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"DeepSpeed, which is not installed here: pip install deepspeed"):
        machine.check_training()


def test_deepspeed_is_told_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: DeepSpeed takes LOCAL_RANK for the index of the GPU, which is 0 where a rank sees one GPU only."""
    monkeypatch.setitem(sys.modules, "deepspeed", MagicMock())
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr(ZeRO, "set_world_ranks", lambda self: None)
    for device, there, told in (("cuda:0", "3", "0"), ("cuda:3", "3", "3"), ("cuda:2", None, "2"), ("cpu:0", "1", "1")):
        monkeypatch.setattr(ZeRO, "root_device", torch.device(device))
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if there is not None:
            monkeypatch.setenv("LOCAL_RANK", there)
        ZeRO.setup_distributed(object.__new__(ZeRO))
        assert os.environ["LOCAL_RANK"] == told


PAPER = sorted(path.stem for path in (CONF / "experiment" / "paper").glob("*.yaml"))


@pytest.mark.parametrize("name", PAPER)
def test_a_protocol_of_the_paper_starts_and_carries_its_number(name: str) -> None:
    """Round trip: what the file says is what is printed; only pretraining that the paper has no number of has none."""
    assert prepare_arguments([f"experiment=paper/{name}"], CONF) == [f"experiment=paper/{name}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=[f"experiment=paper/{name}"])
    text = (CONF / "experiment" / "paper" / f"{name}.yaml").read_text()
    assert list(cfg.published) == (OmegaConf.create(text).get("published") or [])
    unpublished = {"pretrain_l_48", "pretrain_s_bert", "pretrain_m_bert", "pretrain_l_bert"}
    unpublished |= {"pretrain_l_vq96", "pretrain_l_vq192", "samples_vq96", "figure3"} | {
        n for n in PAPER if n.startswith("vqvae")
    }
    assert (name in unpublished) == (not cfg.published)


def test_published_numbers_stand_below_ones_own() -> None:
    """Invariant: neither in the results nor in the run's name."""
    result = Result(numbers={"test/accuracy": Number(0.5, "share", 10)})
    lines = closing_table(result, Path("run"), 1.0, published=["test/accuracy 0.963: iGPT-L"]).splitlines()
    assert lines.index("  test/accuracy 0.963: iGPT-L") > next(i for i, x in enumerate(lines) if "50.0 %" in x)
    assert built("published=[a]").run.name == built().run.name


def test_quality_of_weights_or_of_runs(tmp_path: Path) -> None:
    """Invariant: sample quality takes either, not both, and says so before work."""
    save_small(tmp_path)
    place = f"init={tmp_path}", f"task.runs=[{tmp_path}]"
    for each in place:
        assert built("task=quality", each).trained_weights.folder == tmp_path / "model"
    with pytest.raises(ValueError, match=r"task=quality: init=.* and task\.runs=.*: give one of them"):
        built("task=quality", *place)
    with pytest.raises(ValueError, match="task=quality needs trained weights"):
        built("task=quality")


def test_scaling_without_runs() -> None:
    with pytest.raises(ValueError, match=r"task=scaling compares runs: task\.runs="):
        built("task=scaling")


STAGES = "++task.stages={pretrain: {steps: 2, warmup_steps: 1, val_every: 0, checkpoint_every: 2}, sample: {count: 1}}"
SMALLEST = ("task=pipeline", "model.n_layer=1", "model.n_embd=8", "model.n_head=2", "callbacks=none", "logger=none")


def test_a_finished_run_stands_for_a_stage(tmp_path: Path) -> None:
    """Invariant: nothing of it is computed again; one with other settings, or begun from other weights, is refused."""
    paths = (f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path}")

    def start(stages: str, *more: str) -> Result:
        build = built(*SMALLEST, *more, stages, *paths)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return launch(build.run.cfg, choices=build.run.choices, overrides=[])

    first = start(STAGES)
    (full_path,) = (tmp_path / "runs").iterdir()
    given = STAGES.replace("steps: 2", f"run: '{full_path / '1_pretrain'}', steps: 2")
    second = start(given)
    assert second.numbers["pretrain/val/loss_gen"] == first.numbers["pretrain/val/loss_gen"]
    assert [path.name for path in (tmp_path / "runs").glob("*/1_*") if (path / "run.json").exists()] == ["1_pretrain"]
    with pytest.raises(ValueError, match=r"task\.stages\.pretrain\.run=.*: that run is another: seed 0 ≠ 1"):
        start(given, "seed=1")
    with pytest.raises(ValueError, match="no finished run is there"):
        start(given.replace("1_pretrain", "2_pretrain"))
    other = start(
        STAGES.replace("sample: {count: 1}", f"again: {{task: sample, count: 1, run: '{full_path / '2_sample'}'}}")
    )
    assert {key.replace("again/", "sample/") for key in other.numbers} == first.numbers.keys()
    swapped = "{pretrain: {steps: 3, warmup_steps: 1, val_every: 0, checkpoint_every: 2}, "
    swapped += f"sample: {{count: 1, run: '{full_path / '2_sample'}'}}}}"
    with pytest.raises(ValueError, match=r"task\.stages\.sample\.run=.*: it began from other files \(init\)"):
        start(f"++task.stages={swapped}")
