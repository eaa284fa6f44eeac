"""Networks with settings beyond the paper's: composed, planned, trained, resumed, read by every task, or refused."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

import igpt
from igpt.checkpoint import huggingface
from igpt.checkpoint.find import find_weights
from igpt.checkpoint.igpt_format import FORMAT, CheckpointMetadata, save_model
from igpt.metric.result import Result
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.run import launch as launching
from igpt.run.components import Components
from igpt.run.run_config import RunConfig
from igpt.training.plan import plan_run
from tests.configs import CONF, save_small
from tests.conftest import perturbed
from tests.model.test_options import OPTIONS

SIZES = sorted(path.stem for path in (CONF / "model").glob("igpt_*.yaml"))
MIXED = (
    "model.positions=factorised+rope_2d", "model.attention=[local,full]", "model.radius=1", "model.qk_norm=true",
    "model.value_residual=true", "model.activation=swiglu",
)  # fmt: skip
LINEAR = ("model.positions=factorised", "model.attention=[local,linear]", *MIXED[2:])
FEW = ("data=digits", "trainer=cpu", "logger=none", "callbacks=none")
SMALLEST = ("model.n_layer=3", "model.n_embd=16", "model.n_head=2", "task.batch_size=20", "task.warmup_steps=1")
PRETRAIN = ("task=pretrain", *FEW, *SMALLEST, "task.val_every=0", "task.checkpoint_every=2")


def compose_config(*typed: str) -> tuple[DictConfig, dict[str, Any]]:
    """A composed config and its choices."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=list(typed), return_hydra_config=True)
    choices = dict(cfg.hydra.runtime.choices)
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]), choices


def start(place: Path, *typed: str) -> tuple[Result, Path]:
    """The result of a command, and its run folder."""
    result = launching.run(*typed, f"paths.runs={place / 'runs'}", f"paths.cache={place / 'cache'}", conf=CONF)[0]
    return result, max((place / "runs").iterdir(), key=lambda path: path.stat().st_mtime)


def saved_weights(run: Path) -> dict[str, torch.Tensor]:
    return find_weights(str(run)).net().state_dict()


@pytest.mark.parametrize(
    "size", [pytest.param(size, marks=pytest.mark.slow if size in ("igpt_l", "igpt_xl") else ()) for size in SIZES]
)
def test_every_size_has_every_option(size: str) -> None:
    """Invariant: each is composed and planned, and those with weights of their own have another number of them."""
    cfg, choices = compose_config(f"model={size}", "trainer.plan=true")
    build = Components(RunConfig(cfg, choices))
    plain = build.planned_network
    weights = dict(plan_run(build.hardware, plain, batch_size=128, steps=1))["weights"]
    for changed in OPTIONS.values():
        for key, value in changed.items():
            cfg.model[key] = value
        network = Components(RunConfig(cfg, choices)).planned_network
        for key in changed:
            cfg.model[key] = getattr(plain, key)
        rows = dict(plan_run(build.hardware, network, batch_size=128, steps=1))
        more = not changed.keys().isdisjoint(("relative_bias", "qk_norm", "value_residual"))
        more |= "learned" not in changed.get("positions", "learned")
        if changed.get("activation") != "swiglu":  # whose three matrices may have as many weights as two
            assert (rows["weights"] != weights) == more, changed


REFUSED = [
    ("model.positions=rope_2d model.n_head=32", r"heads of 2 \(n_embd 64 / n_head 32\) must be a multiple of 4$"),
    ("model.attention=local model.radius=0", r"^model\.radius must be at least 1 or null, got 0$"),
    ("model.attention=local model.radius=x", r"^model\.radius must be a whole number or null, got 'x'$"),
    ("model.attention=local model.radius=1.5", r"^model\.radius must be a whole number or null, got 1\.5$"),
    ("model.attention=local", r"^model\.attention=local needs the radius of its window: model\.radius=3, in cells$"),
    ("model.attention=axial model.radius=3", r"^model\.radius=3 is for model\.attention=local: leave it out$"),
    ("model.attention=strided model.stride=7", r"^model\.stride=7 does not divide the 64 tokens of an image"),
    ("model.attention=fixed model.stride=64", r"^model\.stride=64 does not divide the 64 tokens of an image"),
    (
        "model.attention=linear model.relative_bias=true",
        r"^model\.relative_bias=true changes attention scores, model\.",
    ),
    ("model.attention=linear model.positions=rope_2d", r"^model\.positions=rope_2d changes attention scores, model\."),
    ("model.attention=[full,linear] trainer.attention_backend=bmm", r"attention_backend=bmm computes attention scores"),
    (
        "model.relative_bias=true trainer.attention_backend=native",
        r"native does not compute relative_bias=True: choose",
    ),
    (
        "model.relative_bias=true trainer.attention_backend=blocks",
        r"blocks does not compute relative_bias=True: choose",
    ),
    ("model.attention=[full,full,full] model.n_layer=2", r"^model\.attention lists 3 patterns, .* list 1 to 2$"),
    ("model.attention=[]", r"^model\.attention lists 0 patterns"),
    ("model.attention=[full,band]", r"^model\.attention must be one of full, .*, or a list: got 'band'$"),
    ("model.attention=null", r"^model\.attention must be text or a list, got null$"),
    ("model.attention=[full,[local]]", r"^model\.attention must be text or a list, got \['full', \['local'\]\]$"),
    ("model.positions=band", r"^model\.positions must be one of learned, factorised, rope_2d: got 'band'$"),
    ("model.positions=learned+factorised", r"learned and factorised are both a table: choose one$"),
    ("model.activation=gelu", r"^model\.activation must be one of quick_gelu, relu2, swiglu, got 'gelu'$"),
    ("model.attention=axial data.resolution=192", r"^36,864 positions: .* up to 16,384"),
    ("model.grid=[8,8,1]", r"^model\.grid comes from the tokens and the objective: leave it out$"),
]


def test_settings_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: one line that names the setting, before a folder is made."""
    monkeypatch.chdir(tmp_path)
    composed, choices = compose_config("task=pretrain", "data=digits", "trainer=cpu", "model=igpt_nano")
    for typed, message in REFUSED:
        cfg = composed.copy()
        OmegaConf.set_struct(cfg, False)
        for key, value in OmegaConf.from_dotlist(typed.split(" ")).items():
            for name, of in value.items():
                cfg[key][name] = of
        with pytest.raises(ValueError, match=message) as refused:
            launching.launch(cfg, choices=choices, overrides=[])
        assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", OPTIONS)
def test_hugging_faces_format_refuses_by_name(name: str, tmp_path: Path) -> None:
    """Invariant: the first setting that its ImageGPT does not know, and the format that holds it."""
    weights = find_weights(str(save_small(tmp_path / "small")))
    config = replace(weights.metadata.network, n_layer=3, grid=(8, 8, 1), **OPTIONS[name])
    metadata = replace(weights.metadata, network=config)
    save_model(tmp_path / "a", perturbed(GPT(config)).state_dict(), metadata)
    own = find_weights(str(tmp_path / "a"))
    assert own.metadata.network == config
    first = next(key for key in GPTConfig.__dataclass_fields__ if key in OPTIONS[name])
    with pytest.raises(ValueError, match=rf"has {first}=.*Hugging Face's ImageGPT does not know.*task\.format=igpt"):
        huggingface.write(tmp_path / "hf", own)
    assert not (tmp_path / "hf").exists()


def test_weights_of_another_network(tmp_path: Path) -> None:
    """By hand: a network's own weights, and those that Hugging Face's format held, name the setting they lack."""
    weights = find_weights(str(save_small(tmp_path / "small")))
    huggingface.write(tmp_path / "hf", weights)
    sizes = [f"model.{key}={getattr(weights.metadata.network, key)}" for key in ("n_layer", "n_embd", "n_head")]
    for place, options, named in (
        ("small", ["model.qk_norm=true"], "qk_norm False ≠ True"),
        ("hf", ["model.attention=local", "model.radius=2"], "attention full ≠ local"),
    ):
        with pytest.raises(ValueError, match=named) as refused:
            start(
                tmp_path, "task=finetune", "data=digits", "trainer=cpu", f"init={tmp_path / place}", "model=igpt_nano",
                *sizes, *options,
            )  # fmt: skip
        assert len(str(refused.value)) < 500
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("options", [pytest.param(MIXED, marks=pytest.mark.slow), LINEAR], ids=["mixed", "linear"])
def test_training_goes_on_to_the_bit(options: tuple[str, ...], tmp_path: Path) -> None:
    """Invariant: 2 + 2 steps give the weights of 4. Every task reads what was saved."""
    typed = [*PRETRAIN, *options, "task.steps=4"]
    _, run = start(tmp_path / "a", *typed)
    shutil.copytree(run, there := tmp_path / "b" / "runs" / run.name)
    for path in [there / "result.json", *(there / "checkpoints").glob("*4.*"), there / "checkpoints" / "latest"]:
        path.unlink(missing_ok=True)
    shutil.rmtree(there / "model")
    start(tmp_path / "b", *typed, "resume=auto")
    expected = saved_weights(run)
    assert all(torch.equal(weight, expected[name]) for name, weight in saved_weights(there).items())
    model = igpt.load(run)
    assert model.net.config.activation == "swiglu"
    assert model.sample(1, seed=0).shape == (1, 8, 8, 3)
    if options is LINEAR:
        return
    given = (f"init={run}", *FEW)
    for task, settings in {
        "complete": ("task.count=2", "task.completions=1"),
        "probe": ("task.baselines=[]", "task.C_grid=[1.0]"),
        "finetune": (
            "model=checkpoint",
            "task.steps=2",
            "task.batch_size=20",
            "task.warmup_steps=1",
            "task.val_every=2",
        ),
        "evaluate": (),
    }.items():
        result, _ = start(tmp_path / task, f"task={task}", *given, *settings)
        assert result.numbers or task == "complete"


@pytest.mark.parametrize(
    "typed",
    [
        ("objective=bert", *MIXED, "model.relative_bias=true"),
        ("tokens=rgb", "tokens.order=random", *MIXED),
        ("tokens.order=random", *LINEAR, "trainer.activation_checkpointing=true"),
    ],
    ids=["bert", "rgb", "recomputed"],
)
def test_other_tokens_and_objectives(typed: tuple[str, ...], tmp_path: Path) -> None:
    """Round trip: grid and order of the tokens are saved with the network; weights of another grid are refused."""
    _, run = start(tmp_path, *PRETRAIN, *typed, "task.steps=2")
    weights = find_weights(str(run))
    channels = 3 if "tokens=rgb" in typed else 1
    assert weights.metadata.network.grid == (8, 8, channels)
    order = weights.tokenizer.order
    assert weights.metadata.network.permutation == (None if order.is_raster else order.permutation)
    assert order.is_raster == ("tokens.order=random" not in typed)
    other = {**weights.metadata.to_dict(), "network": weights.metadata.network.to_dict() | {"grid": [4, 16, channels]}}
    with pytest.raises(ValueError, match="grid"):
        CheckpointMetadata.from_dict(other, FORMAT)


@pytest.mark.slow
@pytest.mark.parametrize("options", [MIXED, LINEAR], ids=["mixed", "linear"])
def test_compiled_blocks(options: tuple[str, ...], tmp_path: Path) -> None:
    """Invariant: compiled, the losses are those of eager blocks."""
    losses = [
        start(tmp_path / how, *PRETRAIN, *options, "task.steps=3", "task.log_every=1", f"trainer.compile={how}")[0]
        .curves["train/loss_gen"].y
        for how in ("true", "false")
    ]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) == 3
