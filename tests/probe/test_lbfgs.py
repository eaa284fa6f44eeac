"""Logistic regression on many layers at once."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from igpt.probe.duality import bound_minima
from igpt.probe.lbfgs import TOLERANCE, logistic_regression

STRENGTHS = [1.0, 0.01, 0.1]  # in no order
WIDE_GRID = [1e-4, 0.01, 1.0, 100.0, 1e4]


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Three "layers" of 600 digits: the pixels, the pixels turned and moved, and noise."""
    found = load_digits()
    x = torch.tensor(found.data[:900] / 16)
    generator = torch.Generator().manual_seed(0)
    turn = torch.randn(64, 64, generator=generator, dtype=torch.float64) / 8
    layers = [x, x @ turn + 3, torch.randn(900, 64, generator=generator, dtype=torch.float64)]
    return torch.stack(layers), torch.tensor(found.target[:900])


def objective(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, strength: float) -> float:
    return float(F.cross_entropy(x @ weight.T + bias, y) + weight.square().sum() / (2 * strength * len(y)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_optimum_of_scikit_learn(digits: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> None:
    """Independent source: scikit-learn's LogisticRegression on each layer: objective, and classes of unseen images."""
    x, y = digits
    heads = logistic_regression(x[:, :600].to(dtype), y[:600], n_class=10, C_grid=STRENGTHS)
    predictions = heads.scores(x[:, 600:].to(dtype)).argmax(dim=-1)
    assert predictions.shape == (3, 3, 300)
    for layer in range(3):
        for i, strength in enumerate(STRENGTHS):
            reference = LogisticRegression(C=strength, tol=1e-9, max_iter=10000).fit(x[layer, :600], y[:600])
            weight, bias = torch.tensor(reference.coef_), torch.tensor(reference.intercept_)
            least = objective(x[layer, :600], y[:600], weight, bias, strength)
            own = objective(
                x[layer, :600], y[:600], heads.weight[layer, i].double(), heads.bias[layer, i].double(), strength
            )
            assert least - 1e-9 <= own <= least + 2e-6
            assert float(heads.objective[layer, i]) == pytest.approx(own, rel=1e-5)
            agree = predictions[layer, i].numpy() == reference.predict(x[layer, 600:])
            assert agree.mean() > 0.99 if layer < 2 else 0.97


def test_layers_do_not_touch_one_another(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Invariant: a layer's heads are the same in any company, but for where its steps end."""
    x, y = digits
    together = logistic_regression(x, y, n_class=10, C_grid=[0.1], tolerance=1e-10)
    alone = logistic_regression(x[:1], y, n_class=10, C_grid=[0.1], tolerance=1e-10)
    assert torch.allclose(together.weight[:1], alone.weight, atol=1e-4)


def test_two_classes_by_hand() -> None:
    """By hand: of one feature ±1 and C → 0, the weights are C times the slope at zero, ± C · n / 2."""
    x = torch.tensor([-1.0, 1.0] * 50, dtype=torch.float64).view(1, 100, 1)
    y = torch.tensor([0, 1] * 50)
    heads = logistic_regression(x, y, n_class=2, C_grid=[1e-6], tolerance=1e-14)
    assert heads.weight[0, 0, :, 0].tolist() == pytest.approx([-50e-6, 50e-6], rel=1e-3)
    assert np.allclose(heads.bias, 0, atol=1e-12)


def test_features_that_repeat_or_never_change(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Invariant: a covariance without full rank, in float32, is no trouble."""
    x, y = digits
    pixels = x[:1].float()
    doubled = torch.cat([pixels, pixels, torch.full_like(pixels, 7.0)], dim=-1)
    heads = logistic_regression(doubled, y, n_class=10, C_grid=[1.0])
    # two copies of a feature share its weight: half the penalty, as twice the strength on one of them
    once = logistic_regression(pixels.double(), y, n_class=10, C_grid=[2.0])
    assert float(heads.objective) == pytest.approx(float(once.objective), rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_features_are_named(digits: tuple[torch.Tensor, torch.Tensor], bad: float) -> None:
    x, y = digits[0].clone(), digits[1]
    x[1, 5, 3] = bad
    with pytest.raises(ValueError, match=r"features of layer\(s\) 1 hold NaN or infinity"):
        logistic_regression(x, y, n_class=10, C_grid=[1.0])
    with pytest.raises(ValueError, match="labels must lie in 0 … 4, found 0 … 9"):
        logistic_regression(digits[0], y, n_class=5, C_grid=[1.0])


def make_problem(kind: str, n: int = 250, width: int = 24, n_class: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (1, N, D) float32 with a falling spectrum, and labels; `kind` names how they are ill-conditioned."""
    generator = np.random.default_rng(0)
    spectrum = 1 / np.sqrt(np.arange(1, width + 1))
    y = np.concatenate([np.arange(n_class), generator.integers(0, n_class, n - n_class)])
    x = generator.normal(size=(n, width)) * spectrum + (generator.normal(size=(n_class, width)) * spectrum * 0.7)[y]
    name, _, times = kind.partition(" x")
    if name == "row":
        x[3] *= float(times)
    elif name == "rows":
        x[3:60:6] *= float(times)
    elif name == "column":
        x[:, 3] *= float(times)
    elif name == "nearly constant":
        x[:, 5:20] = x[:, 5:20] * 1e-6 + 3
    elif name == "repeated":
        x = np.concatenate([x, x, x[:, :9]], axis=1)
    elif name == "separable":
        x[:, :n_class] += 5 * np.eye(n_class)[y]
    elif name == "far from zero":
        x += 1000
    return torch.tensor(x, dtype=torch.float32)[None], torch.tensor(y)


def minimum(x: torch.Tensor, y: torch.Tensor, strength: float) -> float:
    """The objective at scikit-learn's optimum in float64, by Newton's method."""
    mean = x.double().mean(dim=0)
    fit = LogisticRegression(C=strength, solver="newton-cholesky", tol=1e-10, max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it may go on by its own L-BFGS
        fit.fit((x.double() - mean).numpy(), y.numpy())
    weight = torch.tensor(fit.coef_)
    return objective(x.double(), y, weight, torch.tensor(fit.intercept_) - weight @ mean, strength)


ILL_CONDITIONED = ["row x1e2", "row x1e3", "row x1e4", "rows x1e3", "column x1e4"]
PROBLEMS = ["plain", *ILL_CONDITIONED, "nearly constant", "repeated", "separable", "far from zero"]


@pytest.mark.parametrize(
    ("kind", "shape"), [*((kind, {}) for kind in PROBLEMS), ("plain", {"n": 40, "width": 90}), ("plain", {"n": 6})]
)
def test_ill_conditioned_features_end_at_scikit_learns_optimum(kind: str, shape: dict[str, int]) -> None:
    """Independent source: scikit-learn's minimum in float64. The reported bound is no smaller than the true distance.

    The last two shapes have more features than images, and as many images as classes and one.
    """
    x, y = make_problem(kind, **shape)
    heads = logistic_regression(x, y, n_class=5, C_grid=WIDE_GRID)
    for i, strength in enumerate(WIDE_GRID):
        own = objective(x[0].double(), y, heads.weight[0, i].double(), heads.bias[0, i].double(), strength)
        assert float(heads.objective[0, i]) == pytest.approx(own, abs=1e-12)
        distance, bound = own - minimum(x[0], y, strength), float(heads.suboptimality[0, i])
        assert distance - 1e-12 <= bound <= TOLERANCE


@pytest.mark.parametrize("kind", ["plain", *ILL_CONDITIONED])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_heads_that_stop_early_say_so(kind: str, steps: int) -> None:
    """Independent source: scikit-learn's minimum; after few steps the bound is still no smaller than the distance."""
    x, y = make_problem(kind)
    heads = logistic_regression(x, y, n_class=5, C_grid=[100.0], max_iterations=steps)
    own = objective(x[0].double(), y, heads.weight[0, 0].double(), heads.bias[0, 0].double(), 100.0)
    distance = own - minimum(x[0], y, 100.0)
    assert distance > TOLERANCE
    assert float(heads.suboptimality) >= distance


@pytest.mark.parametrize("kind", ["plain", "row x1e4", "column x1e5"])
def test_the_grid_does_not_matter(kind: str) -> None:
    """Invariant: by another path of C the objective is the same within the bounds, and so is the class of an image."""
    x, y = make_problem(kind)
    grids = [[100.0], [1e-4, 100.0], WIDE_GRID, [1e-3, 0.1, 10.0, 100.0]]
    fits = [logistic_regression(x, y, n_class=5, C_grid=grid) for grid in grids]
    places = [grid.index(100.0) for grid in grids]
    objectives = [float(heads.objective[0, i]) for heads, i in zip(fits, places, strict=True)]
    bound = max(float(heads.suboptimality[0, i]) for heads, i in zip(fits, places, strict=True))
    assert max(objectives) - min(objectives) <= bound <= TOLERANCE
    classes = [heads.scores(x)[0, i].argmax(dim=-1) for heads, i in zip(fits, places, strict=True)]
    assert all((other == classes[0]).double().mean() > 0.99 for other in classes[1:])


def test_the_bound_by_hand() -> None:
    """By hand: of a head without weights, the entropy of the classes less ‖xᵀ (p - hot) / N‖² / (2 · penalty)."""
    x = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    hot = torch.eye(2, dtype=torch.float64)[[0, 0, 0, 1]]
    bias = torch.tensor([[0.75, 0.25]]).log()
    objectives, minima = bound_minima(x, hot, torch.zeros(1, 2, 1), bias, [0.5])
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert float(objectives) == pytest.approx(entropy)
    # errors of class 0: -¼, -¼, -¼, ¾; times x over 4: -¼; of class 1 the opposite
    assert float(minima) == pytest.approx(entropy - 2 * 0.25**2 / (2 * 0.5))


@pytest.mark.parametrize("kind", ["plain", "row x1e3", "column x1e4"])
def test_no_head_has_a_bound_above_the_minimum(kind: str) -> None:
    """Independent source: scikit-learn's minimum; heads at random, from small to huge, and a class without images."""
    x, y = make_problem(kind)
    generator = torch.Generator().manual_seed(0)
    hot = F.one_hot(y, 6).double()
    grid = [0.01, 1.0, 100.0] * 4
    scale = torch.logspace(-3, 2, len(grid))
    weight = torch.randn(len(grid), 6, x.shape[2], generator=generator) * scale[:, None, None]
    bias = torch.randn(len(grid), 6, generator=generator) * scale[:, None]
    objectives, minima = bound_minima(x[0], hot, weight, bias, [1 / (c * len(y)) for c in grid])
    for strength, value, bound in zip(grid, objectives.tolist(), minima.tolist(), strict=True):
        least = minimum(x[0], y, strength)
        assert bound <= least + 1e-12
        assert value > least


def test_features_too_large_to_square() -> None:
    """Finite in float32, but their covariance is not: an error that names the layer."""
    x, y = make_problem("plain")
    with pytest.raises(ValueError, match=r"features of layer\(s\) 1 hold NaN or infinity, or values too large"):
        logistic_regression(torch.cat([x, x * 1e30]), y, n_class=5, C_grid=[1.0])
