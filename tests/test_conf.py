"""The configuration: every option composes and builds, and a misspelt one is answered with the right one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from igpt.checkpoint.find import find_weights
from igpt.metric.result import Number, Result
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.report.closing_table import closing_table
from igpt.report.folder import RunFolder
from igpt.run.arguments import parse_overrides, prepare_arguments
from igpt.run.execute import run_and_report, stage_runner
from igpt.run.recipes import CHECKPOINT
from igpt.run.saved_overrides import record_overrides
from tests.compositions import check_overrides
from tests.configs import CONF, built, save_small

OPTIONS = [
    (group.name, option.relative_to(group).with_suffix("").as_posix())
    for group in sorted(CONF.iterdir())
    if group.is_dir() and group.name != "hydra"
    for option in sorted(group.rglob("*.yaml"))
    if not option.name.startswith("_")
]


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
