"""Logistic regression on many layers at once."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from igpt.probe.lbfgs import logistic_regression

STRENGTHS = [1.0, 0.01, 0.1]  # in no order


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
