"""What `task=inspect` shows: losses of pixels, attention over the image, neighbours, k-NN and the map."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier

from igpt.metric.result import Result, Scatter
from igpt.model.attention_maps import iterate_attention
from igpt.model.features import layer_features
from igpt.report.folder import RunFolder
from igpt.report.scatter import scatter_figure
from igpt.run.components import Components
from igpt.run.execute import prepare_task
from igpt.run.launch import run
from igpt.task.attention_pictures import draw_attention_maps
from igpt.task.heat_maps import draw_heat, find_token_pixels, locate_pixel, spread_over_pixels
from igpt.tokens.patches import PatchTokenizer
from igpt.tokens.pixel_order import PixelOrder
from igpt.tokens.rgb import RGBTokenizer
from tests.configs import CONF, built, save_small
from tests.conftest import small_net
from tests.data.conftest import photo
from tests.task.conftest import check_bad_settings

DIGITS = ("data=digits", "data.val_fraction=0.05", "data.test_fraction=0.8")
SETTINGS: dict[str, Any] = {
    "split": "val", "count": 5, "eval_masks": 2, "attention_images": 1, "queries": 2, "attention_layers": None,
    "attention_heads": None, "train_images": 50, "val_images": 9, "layer": None, "k": 5, "neighbours": 3,
    "norm": "ln_1", "dtype": "float32", "batch_size": 4,
}  # fmt: skip


def inspect(
    place: Path, *overrides: str, with_page: bool = False, **saved: Any
) -> tuple[Result, dict[str, np.ndarray], Components]:
    """The result, what `inspect.npz` holds, and the parts of the run."""
    save_small(place / "weights", **saved)
    paths = f"init={place / 'weights'}", f"paths.runs={place / 'runs'}", f"paths.cache={place / 'cache'}"
    how = *overrides, "task.dtype=float32", *paths, "trainer=cpu", "logger=none"
    components = built("task=inspect", *how)
    components.run_dir = Path(components.run.cfg.paths.runs) / components.run.name
    if with_page:
        result, _ = run("task=inspect", *how, conf=CONF)
    else:
        components.run_dir.mkdir(parents=True)
        result = prepare_task(components)(components)
    with np.load(components.run_dir / "inspect.npz") as arrays:
        return result, dict(arrays), components


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, dict[str, np.ndarray], Components]:
    sizes = "task.count=18", "task.train_images=150", "task.k=7", "task.batch_size=7"
    return inspect(tmp_path_factory.mktemp("inspect"), *DIGITS, *sizes, with_page=True)


def losses_of_evaluation(components: Components) -> torch.Tensor:
    """The loss of every validation image, in batches as `task=evaluate` reads them."""
    data, net = components.build_datamodule(), components.trained_weights.net().eval()
    objective, seen = components.objective, []
    for pixels in data.val_dataloader():
        batch = data.on_after_batch_transfer(pixels)
        with torch.no_grad():
            visible = objective.visible_mask(batch.tokens, batch.rng_keys)
            seen.append(objective.per_example_loss(net(batch.tokens, visible), batch.tokens, visible))
    return torch.cat(seen).double()


def test_losses_of_pixels_average_to_those_of_evaluate(found: Any) -> None:
    """Invariant: over an image the mean is its loss, over the images `loss_gen`."""
    result, arrays, components = found
    expected = losses_of_evaluation(components)
    assert arrays["shown"].tolist() == list(range(len(expected)))  # all
    np.testing.assert_allclose(arrays["token_nats"].mean(1), expected, rtol=1e-6)
    np.testing.assert_allclose(arrays["image_nats"], expected, rtol=1e-6)
    number = result.numbers["shown/loss_gen"]
    assert (number.value, number.n) == (pytest.approx(float(expected.mean()), rel=1e-6), 18)
    grid = result.grids["loss_per_pixel"]
    assert grid.captions[1] == f"{expected[0]:.2f} nats"
    brightest = grid.images[0, 1].astype(int).sum(-1).argmax()
    assert brightest == arrays["token_nats"][0].argmax() or grid.images[0, 1].max() == 255


def test_knn_neighbours_and_map_are_those_of_scikit_learn(found: Any) -> None:
    """Independent source: scikit-learn on features computed here, image by image."""
    result, arrays, components = found
    data, net = components.build_datamodule(), components.trained_weights.net().eval()
    train, val = components.source.split("train"), components.source.split("val")

    def features(split: Any, rows: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return layer_features(net, data.encode(torch.from_numpy(split.pixels[rows]))).double().numpy()

    of_train, of_val = features(train, arrays["train_rows"]), features(val, arrays["rows"])
    labels, expected = train.labels[arrays["train_rows"]], val.labels[arrays["rows"]]
    shares = []
    for x, asked in zip(of_train, of_val, strict=True):
        judge = KNeighborsClassifier(7, metric="cosine", weights=lambda far: np.exp((1 - far) / 0.07)).fit(x, labels)
        shares.append(judge.score(asked, expected))
    curve = result.curves["k-NN, val"]
    assert curve.y == pytest.approx(shares)
    best = int(np.argmax(shares))
    assert (result.provenance["layer"], result.numbers["val/knn_accuracy"].value) == (best, max(shares))
    assert result.numbers["val/knn_accuracy"].interval == curve.y_intervals[best]
    mean = of_train[best].mean(0)
    judge = KNeighborsClassifier(7, metric="cosine").fit(of_train[best] - mean, labels)
    nearest = arrays["train_rows"][judge.kneighbors(of_val[best] - mean)[1]]
    assert np.array_equal(arrays["nearest"], nearest)
    grid = result.grids["neighbours"]
    assert np.array_equal(grid.images[3, 2], train.pixels[nearest[3, 1]])
    assert grid.captions[8 * 3 + 2] == str(train.labels[nearest[3, 1]])
    fitted = PCA(2).fit(of_val[best])
    np.testing.assert_allclose(np.abs(arrays["map"]), np.abs(fitted.transform(of_val[best])), atol=1e-4)
    scatter = result.scatters["feature_map"]
    assert f"{100 * fitted.explained_variance_ratio_[1]:.0f} %" in scatter.y_label
    assert (scatter.classes.tolist(), scatter.class_names) == (expected.tolist(), tuple("0123456789"))


def test_the_page_shows_everything(found: Any) -> None:
    """By hand: five pictures, under their headings, and a plot for every unit."""
    result, _, components = found
    page = (components.run_dir / "report.html").read_text()
    for heading in ("Attention", "Loss per pixel", "Nearest training images", "Map of features"):
        assert f"<h2>{heading}</h2>" in page
    for title in ("Accuracy", "Attention distance in pixels", "Attention entropy in nats"):
        assert f"<h3>{title} over depth</h3>" in page
    assert "warning" not in result.provenance
    assert RunFolder(components.run_dir).read_result()["files"]["inspect"] == "inspect.npz"


def test_masked_and_unlabelled(tmp_path: Path) -> None:
    """By hand and as above: no k-NN and no colours, which is said; a pixel that was not hidden has no loss."""
    for i in range(16):
        (tmp_path / "photographs").mkdir(exist_ok=True)
        photo(i).save(tmp_path / "photographs" / f"{i:02}.png")
    data = "data=folder", f"data.path={tmp_path / 'photographs'}", "data.resolution=8", "data.val_fraction=0.5"
    how = "task.eval_masks=1", "task.queries=[[2,5]]", "task.attention_heads=[3]", "task.layer=0.5"
    result, arrays, components = inspect(tmp_path, *data, *how, causal=False)
    assert not any("knn" in name for name in [*result.numbers, *arrays])
    assert result.provenance["warning"] == "folder has no labels in train or none in val: no k-NN accuracy"
    assert result.provenance["layer"] == 1
    assert set(result.scatters["feature_map"].classes.tolist()) == {-1}
    expected = losses_of_evaluation(components)
    np.testing.assert_allclose(np.nanmean(arrays["token_nats"], axis=1), expected, rtol=1e-6)
    assert 0.6 < np.isnan(arrays["token_nats"]).mean() < 0.95  # a mask hides 15 %
    assert result.grids["attention"].images.shape[:2] == (2, 1 + 3)
    assert result.grids["attention"].captions[:2] == ("pixel 2, 5", "layer 1, head 3")
    assert not any(name.startswith("start") for name in result.curves)


@pytest.mark.parametrize("order", ["raster", "random"])
@pytest.mark.parametrize("kind", ["rgb", "patches"])
def test_values_of_tokens_lie_at_their_pixels(kind: str, order: str) -> None:
    """Invariant: the mean over pixels is that over tokens; a pixel's token is drawn at this pixel alone."""
    palette = np.zeros((5, 12), dtype=np.float32)
    pixels = PixelOrder.from_name(4, order)
    tokenizer = RGBTokenizer(pixels) if kind == "rgb" else PatchTokenizer(palette, 2, pixels)
    values = torch.rand(3, 2, tokenizer.grid.n_ctx, generator=torch.Generator().manual_seed(0))
    drawn = spread_over_pixels(values, tokenizer)
    assert drawn.shape == (3, 2, tokenizer.side, tokenizer.side)
    np.testing.assert_allclose(drawn.mean((2, 3)), values.mean(2), rtol=1e-6)
    side, channels = tokenizer.side, tokenizer.grid.channels
    image = torch.zeros(1, side, side, 3, dtype=torch.uint8)
    for row, column in ((0, 0), (1, side - 1), (2, 1)):
        position = locate_pixel(tokenizer, row, column)
        cell = find_token_pixels(tokenizer, position)
        assert cell[row, column]
        assert cell.sum() == (1 if kind == "rgb" else 4)
        assert position % channels == channels - 1  # the last, which sees the cell's others
        first = position - position % channels
        expected = values[2, 1, first : first + channels].mean()
        np.testing.assert_allclose(drawn[2, 1][cell], float(expected), rtol=1e-6)
        if kind == "rgb":  # independent source: the tokenizer itself
            image[0, row, column] = 9
            changed = tokenizer.encode(image)[0].nonzero()[:, 0]
            assert changed.tolist() == [first, first + 1, first + 2]
            image[0, row, column] = 0
    with pytest.raises(ValueError, match=rf"^task\.queries: \[0, {side}\] lies outside of images of {side}×{side}"):
        locate_pixel(tokenizer, 0, side)


def test_attention_is_drawn_where_its_keys_tokens_lie() -> None:
    """By hand: key j of a causal network carries token j - 1; the largest weight is the brightest."""
    net = small_net(n_ctx=16)
    tokenizer = PatchTokenizer(np.zeros((11, 3), dtype=np.float32), 1, PixelOrder.from_name(4, "random"))
    tokens = torch.randint(11, (2, 16), generator=torch.Generator().manual_seed(1))
    images = np.full((2, 4, 4, 3), 200, dtype=np.uint8)
    grid = draw_attention_maps(
        net, tokens, images, tokenizer, visible=None, queries=[9, 14], layers=[1, 3], heads=[2]
    )  # fmt: skip
    assert grid is not None
    assert grid.images.shape == (4, 3, 4, 4, 3)
    assert grid.titles == ("query", "layer 1", "layer 3")
    attention = [*iterate_attention(net, tokens)][2]
    assert attention is not None
    weights = attention.weights(torch.tensor([9, 14]))[:, 1]  # of head 2: (B, Q, T)
    places = [divmod(cell, 4) for cell in tokenizer.order.permutation]
    brightest, expected = [], []
    for row, query in enumerate((9, 14, 9, 14)):
        drawn = grid.images[row, 2].astype(int)
        brightest.append(max(range(query), key=lambda i, drawn=drawn: drawn[places[i]].sum()))
        expected.append(int(weights[row // 2, row % 2, 1 : query + 1].argmax()))
        assert drawn[places[query]].tolist() == [0, 230, 118]
        assert {tuple(drawn[places[i]]) for i in range(query + 1, 16)} == {(50, 50, 50)}  # a quarter of 200
    assert brightest == expected
    assert draw_heat(np.array([[0.0, np.nan]]), most=1)[0, 1].tolist() == [128, 128, 128]


@pytest.mark.parametrize(("n_class", "expected"), [(3, 3), (21, 0)])
def test_points_have_the_colours_of_their_classes(n_class: int, expected: int, tmp_path: Path) -> None:
    """By hand: a colour for each class; all grey where there are too many to tell apart."""
    points = np.random.default_rng(0).normal(size=(63, 2))
    scatter_figure(tmp_path / "map.png", Scatter(points, np.arange(63) % n_class, ("cat", "dog"), "x", "y", "title"))
    drawn = {tuple(colour) for colour in np.asarray(Image.open(tmp_path / "map.png").convert("RGB")).reshape(-1, 3)}
    table = {tuple(round(255 * part) for part in matplotlib.colormaps["tab20"](i)[:3]) for i in range(20)}
    assert len(table & drawn) == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"queries": [[1, 2, 3]]}, r"^task\.queries"),
        ({"queries": 0}, r"^task\.queries must be"),
        ({"attention_heads": [0]}, r"^task\.attention_heads\.0 must be at least 1, got 0"),
        ({"layer": "first"}, r"^task\.layer must be a layer's number"),
    ],
)
def test_what_is_refused(changed: dict[str, Any], message: str) -> None:
    check_bad_settings("inspect", SETTINGS, changed, message)
