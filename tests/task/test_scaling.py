"""Loss against features over checkpoints: each point is what evaluation and probe say of that checkpoint alone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import initialize_config_dir
from PIL import Image
from scipy.stats import ttest_1samp

from igpt.checkpoint import huggingface
from igpt.checkpoint.find import find_weights
from igpt.checkpoint.igpt_format import save_model
from igpt.checkpoint.resume import find_checkpoints
from igpt.metric.result import Number, Result
from igpt.model.gpt import GPT
from igpt.objective.bert import BERT
from igpt.probe.lbfgs import TOLERANCE
from igpt.run.arguments import prepare_arguments
from igpt.run.launch import build_components, run
from igpt.run.pipeline_stages import StageConfig, stage_configs
from igpt.task import scaling
from igpt.tokens.palette import Palette
from igpt.tokens.palette_tokenizer import PaletteTokenizer
from igpt.tokens.pixel_order import PixelOrder
from igpt.utils.files import read_json
from tests.conftest import ROOT, perturbed
from tests.task.conftest import Arrays, Lab, smooth_pictures
from tests.tokens.test_palette import random_palette


def scaled(lab: Lab, folder: Path, runs: list[Path], **changed: Any) -> Result:
    settings: dict[str, Any] = {
        "runs": [str(run) for run in runs],
        "norm": "ln_1",
        "dtype": "float32",
        "batch_size": 64,
        "C_grid": [1.0, 0.01],
        "probe_data": None,
        "split": "val",
        "eval_masks": 2,
    }
    return lab.execute("scaling", folder, **{**settings, **changed})


def started(run: Path, **task: Any) -> Path:
    """Adds what launch writes before a run begins, as far as it is read."""
    config = {"task": {"batch_size": 100, "requires": ["tokens", "network"], **task}}
    (run / "run.json").write_text(json.dumps({"config": config}))
    return run


def test_every_point_is_what_evaluation_and_probe_say(
    tmp_path: Path, few: Arrays, palette: Palette, pretrained: Path
) -> None:
    """Round trip: loss and best-layer accuracy of the checkpoint at step 4 are those of a run that went no further."""
    lab = Lab(few, palette)
    lab.pretrain(tmp_path / "run", val_every=4, steps=8)
    losses = lab.pretrain(tmp_path / "again", val_every=4, steps=8).curves["val/loss_gen"].y
    result = scaled(lab, tmp_path / "scaling", [started(tmp_path / "run")])
    checkpoint = find_weights(str(tmp_path / "run" / "checkpoints" / "step_0000004.ckpt"))
    assert checkpoint.metadata.step == 4
    for seen, loss in ((400, losses[0]), (800, losses[1])):
        assert result.numbers[f"tiny/{seen}_images/loss_gen"].value == pytest.approx(loss, rel=1e-6)
    probe = lab.probe(tmp_path / "probe", checkpoint, test=False, C_grid=[1.0, 0.01])
    assert result.numbers["tiny/400_images/accuracy"].value == probe.numbers["val/accuracy"].value
    assert result.numbers["tiny/400_images/layer"].value == probe.numbers["probe/layer"].value
    curve = result.curves["tiny"]
    assert curve.x == [result.numbers[f"tiny/{seen}_images/loss_gen"].value for seen in (400, 800)]
    assert result.curves["tiny: loss"].x == [400.0, 800.0]
    assert 0 < result.provenance["suboptimality"] <= TOLERANCE


def test_of_a_run_that_cools_down_the_cooled_ones_count(tmp_path: Path, few: Arrays, palette: Palette) -> None:
    """By hand: checkpoints of steps 3, 4, 6 and 8, of which 4 and 6 have a rate that was high."""
    lab = Lab(few, palette)
    recipe: dict[str, Any] = {"schedule": "wsd", "decay_share": 0.4, "cooled_at": [3], "warmup_steps": 1}
    lab.pretrain(tmp_path / "run", checkpoint_every=2, checkpoint_keep=3, **recipe)
    assert len(find_checkpoints(tmp_path / "run")) == 4
    result = scaled(lab, tmp_path / "scaling", [started(tmp_path / "run", steps=8, **recipe)])
    assert result.curves["tiny: loss"].x == [300.0, 800.0]


def test_runs_that_do_not_compare(
    tmp_path: Path, few: Arrays, palette: Palette, pretrained: Path, masked: Path
) -> None:
    """Invariant: another objective, no run, no checkpoints: clear errors."""
    lab = Lab(few, palette)
    with pytest.raises(ValueError, match=r"another objective \(bert\) than .* \(ar\): their losses cannot") as caught:
        scaled(lab, tmp_path, [started(pretrained), started(masked)])
    assert all(str(place) in str(caught.value) for place in (pretrained, masked))
    for network, palettes, what in ((4, palette, "resolution"), (8, random_palette(17), "tokens")):
        tokenizer = PaletteTokenizer(palettes, PixelOrder.from_name(network, "raster"))
        of = replace(
            lab.metadata()(step=8),
            network=replace(lab.metadata()(step=8).network, n_ctx=network**2),
            tokenizer=tokenizer,
        )
        save_model(tmp_path / what / "model", perturbed(GPT(of.network)).state_dict(), of)
        with pytest.raises(
            ValueError, match=rf"{what}/model/\S+ has another {what} \(.*\) than \S+ \(.*\): their losses"
        ):
            scaled(lab, tmp_path, [pretrained, tmp_path / what])
    (tmp_path / "other").mkdir()
    other = Path(shutil.copytree(pretrained, tmp_path / "other" / "run"))
    for data, message in (
        ({"name": "few", "split_seed": 1}, r"held out other images \(data\.split_seed\)"),
        ({"name": "imagenet"}, r"was pretrained on imagenet, and the loss would be that of few: choose data=imagenet"),
    ):
        task = {"batch_size": 100, "requires": ["tokens", "network"]}
        (other / "run.json").write_text(json.dumps({"config": {"data": data, "task": task}}))
        with pytest.raises(ValueError, match=message):
            scaled(lab, tmp_path, [pretrained, other])
    with pytest.raises(ValueError, match=r"no config\.json"):
        scaled(lab, tmp_path, [tmp_path])


def test_a_damaged_checkpoint_is_no_start(tmp_path: Path, lab: Lab) -> None:
    """Invariant: a checkpoint that is not what its checksum says is not read."""
    lab.pretrain(tmp_path, val_every=0, steps=4, objective=BERT(mask_probability=0.15))
    path = tmp_path / "checkpoints" / "step_0000004.ckpt"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="its SHA-256 is not that beside it"):
        find_weights(str(path))


TINY = (
    "trainer=cpu", "callbacks=none", "logger=none", "model.n_layer=1", "model.n_embd=16", "model.n_head=1",
)  # fmt: skip
PROBE = ("task.C_grid=[1.0,0.01]", "task.dtype=float32", "trainer=cpu", "logger=none")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures of two classes in `photographs/`, 16×16."""
    place = tmp_path_factory.mktemp("scaling")
    for name, shift in (("cats", 0), ("dogs", 40)):
        (place / "photographs" / name).mkdir(parents=True)
        for i, picture in enumerate(smooth_pictures(40, side=16, seed=shift)):
            Image.fromarray((picture // 2 + shift).astype("uint8")).save(place / "photographs" / name / f"{i}.png")
    return place


@pytest.fixture(scope="module")
def digit_runs(place: Path) -> list[Path]:
    """Two runs on the digits, with weights of steps 2, 4 and 5."""
    steps = ("task.steps=5", "task.batch_size=32", "task.warmup_steps=1", "task.val_every=0", "task.keep_steps=[2,4]")
    found = []
    for width in (16, 32):
        _, folder = here(place, *TINY, *steps, f"model.n_embd={width}", f"model.name=wide_{width}")
        assert folder is not None
        found.append(folder)
    return found


def here(place: Path, *overrides: str) -> tuple[Result, Path | None]:
    return run(*overrides, f"paths.runs={place / 'runs'}", f"paths.cache={place / 'cache'}", conf=ROOT / "conf")


def test_two_datasets_are_those_of_the_single_commands(place: Path, digit_runs: list[Path]) -> None:
    """Round trip: a point is the loss of task=evaluate on digits and the accuracy of task=probe on photographs.

    To the bit; the features of one are read by the other. The run is resumed by its record; its picture is on its page.
    """
    photographs = ("path={place}/photographs", "resolution=8", "n_class=2", "val_fraction=0.25")
    of = [f"data.{each.format(place=place)}" for each in photographs]
    runs = f"task.runs=[{','.join(map(str, digit_runs))}]"
    probed = ("data@task.probe_data=folder", *(f"task.probe_{each}" for each in of))
    result, folder = here(place, "task=scaling", "data=digits", runs, *probed, *PROBE)
    features = sorted((place / "cache" / "features").iterdir())
    for i, name, seen in ((0, "model_step_0000002", 64), (1, "", 160)):
        init = f"init={digit_runs[i] / name}"
        loss, _ = here(place, "task=evaluate", init, "data=digits", "trainer=cpu", "logger=none")
        probe, _ = here(place, "task=probe", init, "data=folder", *of, *PROBE, "task.test=false", "task.baselines=[]")
        point = f"wide_{(16, 32)[i]}/{seen}_images"
        assert result.numbers[f"{point}/loss_gen"] == loss.numbers["val/loss_gen"]
        assert result.numbers[f"{point}/accuracy"] == probe.numbers["val/accuracy"]
        assert result.numbers[f"{point}/layer"].value == probe.numbers["probe/layer"].value
    assert sorted((place / "cache" / "features").iterdir()) == features
    assert folder is not None
    assert (folder / "figure3.png").is_file()
    assert "figure3" in (folder / "report.html").read_text()
    again, same = here(place, f"resume={folder}")
    assert (again.numbers, same) == (result.numbers, folder)
    record = read_json(folder / "run.json")
    assert "data@task.probe_data=folder" in record["overrides"]
    assert "task.probe_data.path" in record["files_sha256"]
    with pytest.raises(ValueError, match=r"this is another run .*task\.probe_data\.val_fraction 0\.25 ≠ 0\.5"):
        here(place, f"resume={folder}", "task.probe_data.val_fraction=0.5")
    typed = prepare_arguments([f"resume={folder}", "data@task.probe_data=cifar100"], ROOT / "conf")
    assert [each for each in typed if each.startswith("data")] == ["data=digits", "data@task.probe_data=cifar100"]


def test_statistics_by_hand(place: Path) -> None:
    """By hand: two lines that rise, the larger 0.1 above the smaller where both have a loss."""
    lines = {
        "small": [(3.0, Number(0.3, "share", 10)), (2.0, Number(0.4, "share", 10))],
        "large": [(2.5, Number(0.45, "share", 10)), (1.5, Number(0.55, "share", 10)), (1.0, Number(0.5, "share", 10))],
    }
    rng = np.random.default_rng(0)
    right = {name: [rng.permutation(20) < round(20 * share.value) for _, share in line] for name, line in lines.items()}
    numbers = scaling.compare_points(lines, right)
    assert {name: number.value for name, number in numbers.items()} == pytest.approx(
        {
            "small/rank_correlation": 1, "large/rank_correlation": 0.5, "final/rank_correlation": 1,
            "all/rank_correlation": 0.8, "equal_loss/large - small": 0.1,
        }
    )  # fmt: skip
    assert numbers["small/rank_correlation"].interval == pytest.approx((-1, 1), abs=0.01)
    # the losses overlap on [2, 2.5]: small is 0.375 there on average, half of it at each end's line
    small, large = right["small"], right["large"]
    gaps = 0.75 * large[0] + 0.25 * large[1] - 0.25 * small[0] - 0.75 * small[1]
    interval = numbers["equal_loss/large - small"].interval
    assert interval == pytest.approx(ttest_1samp(gaps, 0).confidence_interval(), abs=1e-9)
    of_one = scaling.compare_points(lines, {name: [image[:1] for image in line] for name, line in right.items()})
    assert of_one["equal_loss/large - small"].interval is None  # NaN cannot be written


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("data@task.probe_data=digits", "task.probe_data.resolution=9"), r"^task\.probe_data: data\.resolution=9"),
        (
            ("data@task.probe_data=folder", "task.probe_data.path={place}/photographs", "task.probe_data.resolution=4"),
            r"^task\.probe_data: \S+/model reads 8×8 pixels \(digits8\), data=folder gives 4×4",
        ),
        (
            ("data@task.probe_data=folder", "task.probe_data.path=nowhere/x", "task.probe_data.resolution=8"),
            "nowhere/x",
        ),
        (("data@task.probe_data=digts",), "there is no such option, did you mean digits"),
        (("data@task.probe=digits",), "do not fit together: Could not override"),
    ],
)
def test_a_second_dataset_that_is_refused(
    typed: tuple[str, ...], message: str, place: Path, digit_runs: list[Path]
) -> None:
    """Before work starts: no folder is left."""
    before = sorted((place / "runs").iterdir())
    with pytest.raises(ValueError, match=message):
        second = [override.format(place=place) for override in typed]
        here(place, "task=scaling", "data=digits", f"task.runs=[{digit_runs[0]}]", *second)
    assert sorted((place / "runs").iterdir()) == before


def test_a_stage_has_a_second_dataset() -> None:
    """By hand: by an option's name, or with settings of its own; another name, and a path to a file, are refused."""
    stage = "task.stages.figure3.probe_data"

    def compose_last(override: str) -> StageConfig:
        run = build_components("experiment=figure3_small", override, conf=ROOT / "conf").run
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return list(stage_configs(run).values())[-1]

    for override, n_label in ((f"{stage}.labels_per_class=30", 30), (f"{stage}=digits", None)):
        config = compose_last(override)
        assert config.cfg.task.probe_data.name == config.choices["data@task.probe_data"] == "digits"
        assert config.cfg.task.probe_data.labels_per_class == n_label
    for given, message in (
        ("{option: null}", "figure3.probe_data must be the name of an option, as in conf/data/, got None"),
        ("../../elsewhere", r"must be the name of an option, as in conf/data/, got '\.\./\.\./elsewhere'"),
        ("{option: digits, pth: x}", "figure3.probe_data has no setting 'pth'"),
    ):
        with pytest.raises(ValueError, match=message):
            compose_last(f"+{stage}={given}" if "{" in given else f"{stage}={given}")


def test_single_weights_are_joined_by_size(place: Path, digit_runs: list[Path], tmp_path: Path) -> None:
    """By hand: steps named one by one, in any order, a Hugging Face folder among them; a run is a line of its own."""
    small, large = digit_runs
    huggingface.write(tmp_path / "hf", find_weights(str(large)))
    named = [str(large / "model_step_0000004"), str(tmp_path / "hf"), str(large / "model_step_0000002"), str(small)]
    lines = scaling.collect_lines([*named, *named])  # twice is once
    assert [(line.name, [weights.metadata.step for weights in line.weights]) for line in lines] == [
        ("model_step_0000004", [2, 4]), ("hf", [5]), (small.name, [2, 4, 5]),
    ]  # fmt: skip
    assert scaling.check_data(lines[:1], lines[0].config["data"], "val") == []
    (warning,) = scaling.check_data(lines[1:2], {"name": "digits"}, "val")
    assert "hf (digits8) does not say which images it held out" in warning
    assert scaling.check_data(lines[1:2], {"name": "digits"}, "test") == []
