"""The surface L = E + A / N^α + B / D^β through a study's runs, by variable projection (Golub and Pereyra 1973)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize, nnls

from igpt.scaling_law.parabola import MOST_LOST, Interval, Samples, percentile_interval
from igpt.utils import keyed

EXPONENTS = (0.02, 3.0)  # range of α and β
GRID = 12  # values of each where the search begins
LEAST_RUNS = 6  # one more than parameters
IRLS_STEPS = 15  # reweighted least squares, of Huber's loss


@dataclass(frozen=True)
class Surface:
    """L(N, D) = floor + of_weights (N / weights)^-α + of_tokens (D / tokens)^-β, with E = floor."""

    floor: float
    of_weights: float
    of_tokens: float
    alpha: float
    beta: float
    weights: float  # geometric means of the runs
    tokens: float

    def predict(self, weights: float | np.ndarray, tokens: float | np.ndarray) -> np.ndarray:
        """L at N weights and D tokens."""
        n, d = np.asarray(weights) / self.weights, np.asarray(tokens) / self.tokens
        return np.asarray(self.floor + self.of_weights * n**-self.alpha + self.of_tokens * d**-self.beta)

    @property
    def is_identified(self) -> bool:
        """Whether both terms are there, and neither exponent is at an end of EXPONENTS."""
        low, high = EXPONENTS[0] * 1.01, EXPONENTS[1] * 0.99
        inside = all(low < exponent < high for exponent in (self.alpha, self.beta))
        smallest = 1e-9 * abs(float(self.predict(self.weights, self.tokens)))
        return inside and min(self.of_weights, self.of_tokens) > smallest

    def exponents(self, gamma: float) -> tuple[float, float]:
        """(a, b) of N* ∝ C^a, D* ∝ C^b, where one token costs ∝ N^gamma operations: β / (α + γβ), α / (α + γβ).

        gamma = 1, as of C = 6ND, gives β / (α + β) and α / (α + β) (Hoffmann et al. 2022, equation 4).
        """
        total = self.alpha + gamma * self.beta
        return self.beta / total, self.alpha / total

    def find_optimum(self, operations: float, gamma: float, log_factor: float) -> float:
        """N* at a budget, where one token costs 10^log_factor N^gamma operations.

        The zero of dL/dN along D = C / (10^log_factor N^gamma); NaN where a term of the surface is missing.
        """
        if not self.is_identified:
            return float("nan")
        log_d = np.log(operations / 10**log_factor / self.tokens) - gamma * np.log(self.weights)  # of D N^gamma
        ratio = np.log(self.alpha * self.of_weights) - np.log(gamma * self.beta * self.of_tokens)
        return float(self.weights * np.exp((ratio + self.beta * log_d) / (self.alpha + gamma * self.beta)))


@dataclass(frozen=True)
class SurfaceFit:
    """The surface of a study, those of the bootstrap, and the cost of a token: 10^log_factor N^gamma operations."""

    surface: Surface
    draws: list[Surface]
    gamma: float
    log_factor: float
    deviation: float  # root mean square of the residuals, with n - 5 in the denominator

    @property
    def is_determined(self) -> bool:
        """Whether both terms are there, with exponents inside EXPONENTS, in the fit and in nearly all of its draws."""
        is_lost = [not of.is_identified for of in self.draws]
        return self.surface.is_identified and sum(is_lost) <= MOST_LOST * len(is_lost)

    @property
    def exponents(self) -> dict[str, tuple[float, Interval | None]]:
        """α, β, E, a and b, each with its 95 % interval."""
        numbers = [_list_numbers(surface, self.gamma) for surface in (self.surface, *self.draws)]
        return {
            name: (value, percentile_interval(np.array([of[name] for of in numbers[1:]])))
            for name, value in numbers[0].items()
        }

    def find_optimum(self, operations: float) -> tuple[float, Interval | None]:
        """N* at a budget, with its 95 % interval."""
        value, *draws = (of.find_optimum(operations, self.gamma, self.log_factor) for of in (self.surface, *self.draws))
        return value, percentile_interval(np.array(draws))

    def predict(self, weights: float, tokens: float) -> tuple[float, Interval | None]:
        """L at N weights and D tokens, with the 95 % interval of a run there: the surface's and the run's own noise."""
        value, *draws = (float(of.predict(weights, tokens)) for of in (self.surface, *self.draws))
        noise = keyed.generator(0, "noise of a run").standard_normal(len(draws)) * self.deviation
        return value, percentile_interval(np.array(draws) + noise)


def _list_numbers(surface: Surface, gamma: float) -> dict[str, float]:
    a, b = surface.exponents(gamma)
    return {"alpha": surface.alpha, "beta": surface.beta, "E": surface.floor, "a": a, "b": b}


def fit_surface(samples: Samples, *, huber: float | None, bootstrap: int, seed: int) -> SurfaceFit | None:
    """The surface with the smallest sum of squares, or of Huber's loss; None for fewer than LEAST_RUNS runs.

    α and β are searched on a grid, then by Nelder and Mead; E, A and B are, for each, the non-negative least squares.
    `huber`: where Huber's loss becomes linear, as a share of the median value (Hoffmann et al. 2022: 0.001 of log L);
    None: squares. Intervals: residual bootstrap, as of the parabolas (`fit_minima`), with five parameters.
    """
    n, values = len(samples.values), samples.values
    if n < LEAST_RUNS:
        return None
    scales = [float(np.exp(np.log(of).mean())) for of in (samples.weights, samples.tokens)]
    logs = np.log(samples.weights / scales[0]), np.log(samples.tokens / scales[1])
    delta = None if huber is None else huber * abs(float(np.median(values)))
    starts = [(a, b) for a in np.geomspace(*EXPONENTS, GRID) for b in np.geomspace(*EXPONENTS, GRID)]
    start = min(starts, key=lambda exponents: _project(logs, values, exponents, delta)[1])
    surface = _refine(logs, values, start, delta, scales, precision=1e-7)
    fitted = surface.predict(samples.weights, samples.tokens)
    residuals = (values - fitted) * np.sqrt(n / (n - 5))
    rng = keyed.generator(seed, "bootstrap of the surface")
    draws = []
    for scale in np.sqrt((n - 5) / rng.chisquare(n - 5, bootstrap)):
        noisy = fitted + scale * rng.choice(residuals - residuals.mean(), n)
        draws.append(_refine(logs, noisy, (surface.alpha, surface.beta), delta, scales, precision=1e-3))
    tokens_cost = np.log10(samples.operations / samples.tokens)
    gamma, log_factor = np.polyfit(np.log10(samples.weights), tokens_cost, 1)
    deviation = float(np.sqrt(np.sum((values - fitted) ** 2) / (n - 5)))
    return SurfaceFit(surface, draws, float(gamma), float(log_factor), deviation)


def _refine(
    logs: tuple[np.ndarray, np.ndarray], values: np.ndarray, start: tuple[float, float], delta: float | None,
    scales: list[float], *, precision: float,
) -> Surface:  # fmt: skip
    """The best surface near a start, of runs with these log N and log D; `precision`: of log α and log β."""
    found = minimize(
        lambda point: _project(logs, values, np.exp(point), delta)[1], np.log(start), method="Nelder-Mead",
        bounds=[tuple(np.log(EXPONENTS))] * 2, options={"xatol": precision, "fatol": np.inf, "maxfev": 400},
    )  # fmt: skip
    alpha, beta = map(float, np.exp(found.x))
    floor, of_weights, of_tokens = map(float, _project(logs, values, (alpha, beta), delta)[0])
    return Surface(floor, of_weights, of_tokens, alpha, beta, *scales)


def _project(
    logs: tuple[np.ndarray, np.ndarray], values: np.ndarray, exponents: Sequence[float], delta: float | None
) -> tuple[np.ndarray, float]:
    """(E, A, B) ≥ 0 of the smallest loss at these α and β, and that loss."""
    alpha, beta = exponents
    design = np.stack([np.ones_like(values), np.exp(-alpha * logs[0]), np.exp(-beta * logs[1])], axis=1)
    solution, norm = nnls(design, values)
    if delta is None:
        return solution, float(norm**2)
    for _ in range(IRLS_STEPS):
        distance = np.abs(values - design @ solution)
        root = np.sqrt(np.minimum(1, delta / np.maximum(distance, 1e-300)))
        solution, _ = nnls(design * root[:, None], values * root)
    distance = np.abs(values - design @ solution)
    loss = np.where(distance <= delta, distance**2, 2 * delta * distance - delta**2)
    return solution, float(loss.sum())
