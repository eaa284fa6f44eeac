"""`tokens=vqvae tokens.path=…`: what is found there, whose settings count, what is refused; a stage of a pipeline."""

import json
import re
import shutil
from pathlib import Path

import pytest
from hydra import initialize_config_dir

from igpt.app.compare import summarize_groups
from igpt.checkpoint.find import find_vqvae, find_weights
from igpt.metric.result import Result
from igpt.report.runs import read_run, summarize_metadata
from igpt.run.execute import stage_runner
from igpt.run.launch import run
from igpt.tokens.tokenizer_registry import TOKENIZER, save_tokenizer
from tests.configs import CONF, built
from tests.conftest import ROOT
from tests.tokens.test_every_tokenizer import CASES, NETWORK, Trained, make_vqvae

FAST = ("trainer=cpu", "callbacks=none", "logger=[csv]")
STEPS = "batch_size: 16, warmup_steps: 1, val_every: 2, log_every: 1, checkpoint_every: 2"
STAGES = f"""+task.stages={{
    tokenizer: {{steps: 4, {STEPS}, patches: false}},
    pretrain: {{steps: 2, {STEPS}}},
    evaluate: {{baseline_images: 0}}}}""".replace("\n", "")
TINY = ("tokens=vqvae", "tokens.codes=8", "tokens.code_width=2", "tokens.hidden=8", "tokens.residual_blocks=0",
        "tokens.unquantised_steps=1", "model.n_layer=1", "model.n_embd=16")  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as `task=tokenizer` leaves them: `one` and `other` of 8 pixels, `large` of 16, `shuffled`."""
    place = tmp_path_factory.mktemp("tokenizers")
    made = {
        "one": make_vqvae(8),
        "other": make_vqvae(8, codes=30),
        "large": make_vqvae(16),
        "shuffled": make_vqvae(8, order="random:3"),
    }
    for name, tokenizer in made.items():
        save_tokenizer(place / name / "model" / TOKENIZER, tokenizer)
    return place


def start(place: Path, *overrides: str) -> tuple[Result, Path]:
    where = (f"paths.runs={place / 'runs'}", f"paths.cache={place / 'cache'}")
    result, folder = run(*overrides, *FAST, *where, conf=CONF)
    assert folder is not None
    return result, folder


@pytest.fixture(scope="module")
def palette_run() -> Path:
    """A finished pretraining on the digits' palette."""
    (folder,) = (ROOT / "tests" / "older_runs").glob("*/finished/pretrain-*")
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    return start(tmp_path_factory.mktemp("pipeline"), "task=pipeline", *TINY, STAGES)


def test_its_settings_replace_the_defaults(tokenizers: Path) -> None:
    """Invariant: stated again or not, from the folder, `model/` or the file: the same settings, hash and sizes."""
    for place, stated in (("one", ()), ("one/model", ("tokens.codes=24",)), (f"one/model/{TOKENIZER}", ())):
        components = built("tokens=vqvae", f"tokens.path={tokenizers / place}", *stated)
        chosen = components.run.config["tokens"]
        assert (chosen["codes"], chosen["hidden"], chosen["factor"], chosen["order"]) == (24, 8, 2, "raster")
        assert components.run.input_hashes["tokens.path"] == components.tokenizer.hash == make_vqvae(8).hash
        assert (components.planned_network.n_ctx, components.planned_network.n_vocab) == (16, 24)
    orders = {
        stated: built("tokens=vqvae", f"tokens.path={tokenizers / 'shuffled'}", f"tokens.order={stated}").run
        for stated in ("raster", "random:3")
    }
    assert [of.config["tokens"]["order"] for of in orders.values()] == ["other", "random:3"]


REFUSED = [
    (("tokens.path={place}/large",), r"large: a VQ-VAE of 16×16 pixels, data=digits gives 8×8: train one of these"),
    (("tokens.path={place}/on",), r"tokens\.path=.*/on: there is nothing, did you mean one\? expected a finished"),
    (("tokens.path={place}/empty",), r"tokens\.path=.*: it holds no tokenizer, expected .*no config\.json"),
    (("tokens.path={place}",), r"it holds several, choose one: .*/large, .*/one, .*/other, .*/shuffled"),
    (("tokens.path={place}/bad/cut",), r"tokens\.path=.*cut/model/tokenizer\.json is not a JSON file"),
    (("tokens.path={place}/bad/newer",), r"tokens\.path=.*newer/model/tokenizer\.json.*format"),
    (("tokens.path={place}/bad/changed",), r"tokens\.path=.*changed/model/tokenizer\.json.*hash"),
    (("tokens.path={palette}",), r"its tokens are 17 colours, expected those of a VQ-VAE of task=tokenizer"),
    (("init={place}/one",), r"init=.*one: a tokenizer and no network: tokens=vqvae tokens\.path=.*one trains one"),
    (("init={place}/one/model/tokenizer.json",), r"init=.*tokenizer\.json: a tokenizer and no network"),
    (
        ("tokens.path={place}/one", "tokens.codes=512"),
        r"tokens\.codes=512, and the VQ-VAE in .* has 24: leave it out",
    ),
    (("tokens.path={place}/one", "tokens.loss=l1"), r"tokens\.loss=l1, and the VQ-VAE in .* has l2"),
    (("tokens.path={place}/one", "tokens.order=3"), r"^tokens\.order must be text, got 3"),
    (("tokens.path=5",), r"^tokens\.path must be text or null, got 5"),
    (("tokens.path={place}/one", "tokens.order=random:4"), r"tokens\.order=random:4, and the VQ-VAE in .* has raster"),
]


def test_what_is_refused(tokenizers: Path, palette_run: Path) -> None:
    """Invariant: in a line, when the config is read."""
    saved = json.loads((tokenizers / "one" / "model" / TOKENIZER).read_text())
    texts = {
        "cut": json.dumps(saved)[:4000],
        "newer": json.dumps(saved | {"format": 99}),
        "changed": json.dumps(saved | {"hash": "0" * 12}),
    }
    for name, text in texts.items():
        (tokenizers / "bad" / name / "model").mkdir(parents=True)
        (tokenizers / "bad" / name / "model" / TOKENIZER).write_text(text)
    (tokenizers / "empty").mkdir()
    for overrides, message in REFUSED:
        typed = [each.format(place=tokenizers, palette=palette_run) for each in overrides]
        with pytest.raises(ValueError, match=message) as error:
            built("tokens=vqvae", *typed)
        assert "\n" not in str(error.value)


def test_without_a_tokenizer_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokens=vqvae needs a trained tokenizer: tokens\.path=RUN_FOLDER"):
        start(tmp_path, "task=pretrain", "tokens=vqvae")
    assert not list(tmp_path.glob("runs/*"))


def test_a_network_brings_its_tokenizer(tokenizers: Path, pipeline: tuple[Result, Path]) -> None:
    """Invariant: by its run, a checkpoint or its `model/`; weights of another tokenizer are refused."""
    pretrained = pipeline[1] / "2_pretrain"
    own = find_vqvae(str(pretrained))
    for path in (pretrained / "model", pretrained / "checkpoints" / "step_0000002.ckpt"):
        assert find_vqvae(str(path)) == own
    components = built("task=evaluate", "tokens=vqvae", f"tokens.path={tokenizers / 'one'}", f"init={pretrained}")
    with pytest.raises(ValueError, match=rf"was trained on other tokens \(.*{own.hash}\) than .* \(VQ-VAE of 24"):
        components.check_weights()


def test_its_weights_are_in_no_record(pipeline: tuple[Result, Path]) -> None:
    """Invariant: only in what is read as weights; a summary has hash and settings."""
    pretrained = pipeline[1] / "2_pretrain"
    saved = json.loads((pretrained / "model" / "config.json").read_text())["tokenizer"]
    written = [path for path in pipeline[1].rglob("*") if path.is_file()]
    holding = {path.parent.name for path in written if saved["weights"].encode() in path.read_bytes()}
    assert holding == {"model", "checkpoints"}
    summary = summarize_metadata(find_weights(str(pretrained)).metadata.to_dict())
    assert summary["tokenizer"] == {key: saved[key] for key in ("kind", "hash", "config")}
    assert "weights" not in json.dumps(summary)


def test_losses_on_other_tokens_are_not_ranked(pipeline: tuple[Result, Path], palette_run: Path) -> None:
    runs = [read_run(pipeline[1] / "2_pretrain"), read_run(palette_run)]
    (summary,) = summarize_groups(runs, "val/loss_gen").values()
    assert summary.caution == "not comparable: these are of several tokenizers"
    assert "tokens.path" in summary.rows[0].settings  # which stands for the VQ-VAE's own settings
    assert not {"tokens.factor", "tokens.codes"} & summary.rows[0].settings.keys()


def test_other_held_out_images_are_said(pipeline: tuple[Result, Path], caplog: pytest.LogCaptureFixture) -> None:
    """Invariant: of the run that trained the tokenizer, also where its file is named."""
    path = f"tokens.path={pipeline[1] / '1_tokenizer' / 'model'}"
    for overrides, expected in (((), ""), (("data.split_seed=5",), "data.split_seed 0 ≠ 5")):
        caplog.clear()
        built("tokens=vqvae", path, *overrides).check_tokenizer()
        assert ("held out other images than this run does" in caplog.text) == bool(expected)
        assert expected in caplog.text
        assert "was trained on images of" not in caplog.text
    caplog.set_level("INFO")
    built("tokens=vqvae", path, "data=cifar10", "data.resolution=8").check_tokenizer()
    assert "was trained on images of digits: one trained on cifar10 may show these better" in caplog.text


def test_later_stages_take_the_tokenizer(pipeline: tuple[Result, Path]) -> None:
    """Invariant: the pipeline's own, in weights that are trained on it; it is no weights to start from."""
    result, folder = pipeline
    tokenizer = find_vqvae(str(folder))  # of its only stage that has one
    assert tokenizer == find_vqvae(str(folder / "1_tokenizer"))
    assert result.provenance["evaluate"]["tokenizer"] == tokenizer.hash
    assert find_weights(str(folder / "2_pretrain")).tokenizer == tokenizer
    record = read_run(folder / "2_pretrain")
    assert record.begun["files_sha256"] == {"init": None, "tokens.path": tokenizer.hash}
    assert record.config["tokens"]["path"] == str(folder / "1_tokenizer")


def test_features_are_cached_by_tokenizer(tokenizers: Path) -> None:
    """Invariant: the same weights on other tokens have other features, all else equal."""
    one, other = (
        built("task=pretrain", "tokens=vqvae", f"tokens.path={tokenizers / name}").cache_key
        for name in ("one", "other")
    )
    assert {key for key in one if one[key] != other[key]} == {"tokenizer"}


def test_it_is_fine_tuned_on(pipeline: tuple[Result, Path], tmp_path: Path) -> None:
    """Invariant: from scratch with `tokens.path`, or from weights: the same tokens."""
    pretrained = pipeline[1] / "2_pretrain"
    how = ("task=finetune", "task.test=false", "task.steps=2", *(each for each in NETWORK if "steps=4" not in each))
    ways = {
        "scratch": ("tokens=vqvae", f"tokens.path={pretrained}"),
        "weights": (f"init={pretrained}", "model=checkpoint", "tokens=checkpoint", "objective=checkpoint"),
    }
    for name, chosen in ways.items():
        size = how if name == "scratch" else tuple(each for each in how if not each.startswith("model."))
        trained = Trained(tmp_path / name, CASES["vqvae"], chosen)
        result = trained.run(name, *size, *chosen)
        assert result.provenance["tokenizer"] == find_vqvae(str(pretrained)).hash
        assert find_weights(str(tmp_path / name)).tokenizer == find_vqvae(str(pretrained))


def test_a_pipeline_goes_on(pipeline: tuple[Result, Path], tmp_path: Path) -> None:
    """Invariant: from a stage that was not finished, with the tokenizer of before, to the same loss."""
    result, folder = pipeline
    copy = shutil.copytree(folder, tmp_path / "runs" / folder.name)
    (copy / "result.json").unlink()
    shutil.rmtree(copy / "3_evaluate")
    again, _ = start(tmp_path, f"resume={copy}")
    assert again.numbers["evaluate/val/loss_gen"] == result.numbers["evaluate/val/loss_gen"]
    assert (copy / "1_tokenizer" / "result.json").read_bytes() == (folder / "1_tokenizer" / "result.json").read_bytes()


def test_finished_runs_stand_in(pipeline: tuple[Result, Path], tmp_path: Path) -> None:
    """Invariant: for the tokenizer and for what was trained on it; on another tokenizer it is another run."""
    result, folder = pipeline
    tokenizer, pretrain = (f"+task.stages.{name[2:]}.run={folder / name}" for name in ("1_tokenizer", "2_pretrain"))
    again, fresh = start(tmp_path, "task=pipeline", *TINY, STAGES, tokenizer, pretrain)
    assert again.numbers["evaluate/val/loss_gen"] == result.numbers["evaluate/val/loss_gen"]
    assert [path.parent.name for path in fresh.glob("*/run.json")] == ["3_evaluate"]
    with pytest.raises(ValueError, match=r"stages\.pretrain\.run=.*began from other files \(tokens\.path\)"):
        start(tmp_path / "other", "task=pipeline", *TINY, STAGES.replace("{steps: 4", "{steps: 2"), pretrain)


@pytest.mark.parametrize(
    ("stages", "overrides", "message"),
    [
        (STAGES, (*TINY, "model.n_head=3"), "n_head"),
        (STAGES, ("tokens=vqvae", "tokens.path={place}/one"), r"task=tokenizer trains a tokenizer, tokens\.path=.*one"),
        (STAGES, ("tokens=fitted",), "task=tokenizer trains a VQ-VAE: tokens=vqvae; tokens=fitted is"),
        (
            STAGES.replace("{baseline", "{from: tokenizer, baseline"),
            TINY,
            "that stage trains a tokenizer",
        ),
        (re.sub("tokenizer: {.*?}, *", "", STAGES), TINY, "tokens=vqvae needs a trained tokenizer"),
    ],
)
def test_a_pipeline_is_refused_before_its_first_stage(
    tokenizers: Path, stages: str, overrides: tuple[str, ...], message: str
) -> None:
    components = built("task=pipeline", *(each.format(place=tokenizers) for each in overrides), stages)
    with pytest.raises(ValueError, match=message), initialize_config_dir(str(CONF), version_base="1.3"):
        stage_runner(components)
