"""Fits of made-up studies, whose laws are known."""

from dataclasses import replace

import numpy as np
import pytest

from igpt.scaling_law.parabola import Samples, fit_curves, fit_minima
from igpt.scaling_law.surface import fit_surface

ALPHA, BETA = 0.34, 0.28  # Hoffmann et al. 2022, §3.3
A, B = BETA / (ALPHA + BETA), ALPHA / (ALPHA + BETA)  # of C = 6ND
CENTRE = 1e5, 1e13  # N* at a budget


def study(*, noise: float = 0.0, seed: int = 0, n_size: int = 5, step: float = 2.0, shift: float = 1.0) -> Samples:
    """Four budgets of C = 6ND, sizes around the optimum, where α A N^-α = β B D^-β (Lagrange)."""
    operations = np.repeat([1e12, 3e12, 1e13, 3e13], n_size)
    optimum = CENTRE[0] * (operations / CENTRE[1]) ** A
    weights = shift * optimum * step ** (np.tile(np.arange(n_size), 4) - (n_size - 1) / 2)
    tokens = operations / 6 / weights
    in_weights, in_tokens = weights / CENTRE[0], tokens / (CENTRE[1] / 6 / CENTRE[0])
    values = 1.6 + 0.3 * in_weights**-ALPHA + 0.3 * ALPHA / BETA * in_tokens**-BETA
    return Samples(
        weights, tokens, operations, values + noise * np.random.default_rng(seed).standard_normal(4 * n_size)
    )


@pytest.mark.parametrize("huber", [None, 0.001])
def test_the_surface_of_known_exponents_is_recovered(huber: float | None) -> None:
    """Closed form: α, β, E, a and b of a surface without noise, and its optimum at a budget."""
    fit = fit_surface(study(), huber=huber, bootstrap=0, seed=0)
    assert fit is not None
    expected = {"alpha": ALPHA, "beta": BETA, "E": 1.6, "a": A, "b": B}
    assert {name: value for name, (value, _) in fit.exponents.items()} == pytest.approx(expected, rel=1e-4)
    assert (fit.gamma, 10**fit.log_factor) == pytest.approx((1, 6))
    assert fit.find_optimum(1e15)[0] == pytest.approx(CENTRE[0] * 100**A, rel=1e-3)


def test_hubers_loss_passes_over_a_run_that_went_wrong() -> None:
    """Invariant: one value 0.2 too high moves the exponents of squares by far more than 2 %, of Huber's by less."""
    samples = study()
    values = samples.values.copy()
    values[7] += 0.2
    errors = []
    for huber in (None, 0.001):
        fit = fit_surface(replace(samples, values=values), huber=huber, bootstrap=0, seed=0)
        assert fit is not None
        errors.append(abs(fit.surface.alpha / ALPHA - 1))
    assert errors[0] > 0.1
    assert errors[1] < 0.02


def test_costs_that_do_not_grow_as_the_weights_change_the_exponents() -> None:
    """Closed form: where a token costs N^0.8, N* ∝ C^(β / (α + 0.8 β)); N* is the lowest on the IsoFLOP line."""
    samples = study()
    samples = replace(samples, operations=50 * samples.weights**0.8 * samples.tokens)
    fit = fit_surface(samples, huber=None, bootstrap=0, seed=0)
    assert fit is not None
    assert fit.gamma == pytest.approx(0.8)
    assert fit.exponents["a"][0] == pytest.approx(BETA / (ALPHA + 0.8 * BETA), rel=1e-4)
    sizes = np.geomspace(1e4, 1e7, 20001)
    along = fit.surface.predict(sizes, 1e14 / (50 * sizes**0.8))
    assert fit.find_optimum(1e14)[0] == pytest.approx(sizes[along.argmin()], rel=1e-3)


def test_parabolas_recover_the_exponents() -> None:
    """Closed form, within 2 %: a and b, N* and D* of each budget."""
    minima = fit_minima(fit_curves(study(), width=8), bootstrap=0, seed=0)
    assert minima.of_weights is not None
    assert minima.of_tokens is not None
    assert minima.of_weights.exponent == pytest.approx(A, rel=0.02)
    assert minima.of_tokens.exponent == pytest.approx(B, rel=0.02)
    expected = CENTRE[0] * (np.array([1e12, 3e12, 1e13, 3e13]) / CENTRE[1]) ** A
    assert 10**minima.log_weights == pytest.approx(expected, rel=0.05)
    assert 10**minima.log_tokens * 10**minima.log_weights * 6 == pytest.approx([1e12, 3e12, 1e13, 3e13])


def test_an_exact_parabola_is_exact() -> None:
    """By hand: minima at 10^(4 + i / 2), so that a = 1 / 2 with budgets 10 times apart; the interval is a point."""
    x = np.concatenate([4 + i / 2 + np.array([-0.5, -0.2, 0.1, 0.4, 0.6]) for i in range(3)])
    operations = np.repeat([1e12, 1e13, 1e14], 5)
    values = 2 + 0.3 * (x - np.repeat([4, 4.5, 5], 5)) ** 2
    minima = fit_minima(
        fit_curves(Samples(10**x, operations / 10**x, operations, values), width=None), bootstrap=50, seed=0
    )
    assert minima.of_weights is not None
    assert minima.log_weights == pytest.approx([4, 4.5, 5])
    assert minima.of_weights.exponent == pytest.approx(0.5)
    assert minima.of_weights.interval == pytest.approx((0.5, 0.5))


def test_minima_at_the_edge_are_called_so() -> None:
    """Invariant: sizes that are all too small, or too large, have no minimum, no exponent; one such budget is out."""
    for shift, side in ((0.05, "larger"), (20.0, "smaller")):
        curves = fit_curves(study(shift=shift), width=None)
        assert {curve.edge for curve in curves} == {f"at the edge of the grid: {side} sizes"}
        minima = fit_minima(curves, bootstrap=10, seed=0)
        assert minima.inside == []
        assert minima.of_weights is None
    samples = study()
    weights = np.where(samples.operations > 2e13, samples.weights / 20, samples.weights)
    values = samples.values - 0.2 * np.log(samples.weights) * (samples.operations > 2e13)
    minima = fit_minima(fit_curves(replace(samples, weights=weights, values=values), width=None), bootstrap=10, seed=0)
    assert minima.inside == [0, 1, 2]
    assert minima.of_weights is not None
    assert minima.of_weights.exponent == pytest.approx(A, rel=0.02)
    opens_down = fit_curves(replace(samples, values=-samples.values), width=None)
    assert all("opens downwards" in curve.edge for curve in opens_down)


def test_only_sizes_near_the_lowest_enter_a_parabola() -> None:
    """By count: of 9 sizes, 3 times apart, those within 8 of the lowest are three; a grid to 3^4 biases the minimum."""
    curves = fit_curves(study(n_size=9, step=3.0), width=8)
    assert [int(curve.is_used.sum()) for curve in curves] == [3] * 4
    wide = fit_curves(study(n_size=9, step=3.0), width=None)
    assert [int(curve.is_used.sum()) for curve in wide] == [9] * 4
    true = np.log10(CENTRE[0] * (1e12 / CENTRE[1]) ** A)
    assert curves[0].minimum is not None
    assert wide[0].minimum is not None
    assert abs(curves[0].minimum - true) < 0.3 * abs(wide[0].minimum - true)


def test_intervals_cover_the_exponents() -> None:
    """Coverage over 40 noisy studies (surface: 8): nearly all 95 % intervals hold the true a, and are no points."""
    held = {"parabolas": 0, "surface": 0}
    widths = []
    for seed in range(40):
        samples = study(noise=0.003, seed=seed)
        law = fit_minima(fit_curves(samples, width=None), bootstrap=100, seed=seed).of_weights
        assert law is not None
        assert law.interval is not None
        widths.append(law.interval[1] - law.interval[0])
        held["parabolas"] += law.interval[0] <= A <= law.interval[1]
        if seed < 8:
            surface = fit_surface(samples, huber=None, bootstrap=25, seed=seed)
            assert surface is not None
            interval = surface.exponents["a"][1]
            assert interval is not None
            held["surface"] += interval[0] <= A <= interval[1]
    assert held["parabolas"] >= 35
    assert held["surface"] >= 6
    assert 0.01 < np.mean(widths) < 0.1


def test_three_sizes_leave_no_interval() -> None:
    """Invariant: three points are a parabola, without a residual: a minimum, and no interval."""
    minima = fit_minima(fit_curves(study(n_size=3), width=None), bootstrap=50, seed=0)
    assert minima.of_weights is not None
    assert minima.of_weights.interval is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keep": 2}, "a budget needs 3 sizes for its parabola, that of 1e\\+12 operations has 2"),
        ({"value": np.nan}, "values must be finite numbers, got nan"),
    ],
)
def test_what_cannot_be_fitted(changed: dict[str, float], message: str) -> None:
    samples = study()
    if "keep" in changed:
        kept = np.r_[0:2, 5:20]
        samples = Samples(*(of[kept] for of in (samples.weights, samples.tokens, samples.operations, samples.values)))
    else:
        samples.values[3] = changed["value"]
    with pytest.raises(ValueError, match=message):
        fit_curves(samples, width=None)
