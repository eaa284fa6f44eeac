"""Logistic regression on the features of all layers, at all regularisation strengths, fitted together."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt.probe.duality import bound_minima
from igpt.probe.preconditioner import CovariancePreconditioner, Preconditioner, WeightedPreconditioner

TOLERANCE = 1e-6  # nats per image: the objective of converged heads is no farther above its minimum
HISTORY = 8  # step pairs of the L-BFGS direction
ARMIJO = 1e-4  # sufficient decrease, as a share of the decrease predicted by the slope


@dataclass(frozen=True)
class Heads:
    """Linear classifiers of P layers at S regularisation strengths: weight (P, S, K, D), bias (P, S, K)."""

    weight: Tensor
    bias: Tensor
    objective: Tensor  # (P, S) float64, mean nats per image plus the penalty, at the end
    suboptimality: Tensor  # (P, S) float64, upper bound of the objective's distance to its minimum: the duality gap
    iterations: int

    def scores(self, features: Tensor) -> Tensor:
        """Class scores of every image from every head: (P, N, D) → (P, S, N, K)."""
        return torch.einsum("pnd,pskd->psnk", features, self.weight) + self.bias[:, :, None]


@torch.no_grad()
def logistic_regression(
    features: Tensor,
    labels: Tensor,
    *,
    n_class: int,
    C_grid: list[float],
    tolerance: float = TOLERANCE,
    max_iterations: int = 500,
    names: Sequence[str] | None = None,
) -> Heads:
    """Minimises Σ_i -log p(y_i | x_i) · C + ½ ‖W‖², the intercept free, for each layer and each C in `C_grid`.

    The objective is that of scikit-learn's LogisticRegression(C); for two classes, where scikit-learn fits one vector
    instead of two, that of its C doubled. Features (P, N, D), labels (N,) int64. Ends when no objective can be more
    than `tolerance` nats per image above its minimum, or after `max_iterations`: `Heads.suboptimality` tells which.

    Method: features are centred, which changes only the intercept. L-BFGS is preconditioned by the inverse of their
    covariance, the part of the Hessian that does not depend on the heads: tens of steps instead of hundreds. All layers
    are fitted together, each with its own step lengths; a step takes two passes over the features, however many step
    lengths its line search tries. Strengths are fitted in ascending order, each starting from the previous heads. This
    stops at a tenth of `tolerance` by an estimate, which rounding and outliers can make too small. The duality gap of
    the heads is therefore computed in float64, and heads above `tolerance` are fitted further in float64 (`_refine`).

    Raises:
        ValueError: features that are not finite, or too large to square; labels outside 0 … K - 1. `names`: of layers.
    """
    check_features(features, labels, n_class, names=names)
    mean = features.mean(dim=1, keepdim=True)  # (P, 1, D)
    x = features - mean
    covariance = x.mT @ x / x.shape[1]  # (P, D, D)
    check_finite(covariance.diagonal(dim1=1, dim2=2).sum(dim=1).isfinite(), names)
    hot = F.one_hot(labels, n_class).to(x.dtype)  # (N, K)
    theta = x.new_zeros(len(x), x.shape[2] + 1, n_class)
    solutions: dict[float, tuple[Tensor, int]] = {}
    for strength in sorted(C_grid):
        problem = _Problem(x, hot, penalty=1 / (strength * x.shape[1]))
        guess = CovariancePreconditioner(covariance, problem.penalty)
        solutions[strength] = problem.minimise(theta, guess, tolerance / 10, max_iterations)
        theta = solutions[strength][0]
    thetas, iterations = zip(*(solutions[strength] for strength in C_grid), strict=True)
    weight = torch.stack([theta[:, :-1] for theta in thetas], dim=1).mT.contiguous()  # (P, S, K, D)
    bias = torch.stack([theta[:, -1] for theta in thetas], dim=1) - torch.einsum("pskd,pd->psk", weight, mean[:, 0])
    del x, covariance, problem, guess  # memory of the features' size
    penalties = [1 / (strength * len(labels)) for strength in C_grid]
    hot, steps = hot.double(), sum(iterations)
    objective = weight.new_empty(weight.shape[:2], dtype=torch.float64)
    gap = torch.empty_like(objective)
    for layer, values in enumerate(features):
        heads = weight[layer], bias[layer]  # changed in place
        objective[layer], gap[layer], further = _refine(values, hot, *heads, penalties, tolerance, max_iterations)
        steps += further
    return Heads(weight, bias, objective, gap, steps)


def check_features(features: Tensor, labels: Tensor, n_class: int, *, names: Sequence[str] | None = None) -> None:
    """Raises ValueError unless features (P, N, D) are finite and labels (N,) lie in 0 … K - 1."""
    check_finite(features.sum(dim=(1, 2)).isfinite(), names)
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < n_class):
        raise ValueError(f"labels must lie in 0 … {n_class - 1}, found {int(labels.min())} … {int(labels.max())}")


def check_finite(finite: Tensor, names: Sequence[str] | None = None) -> None:
    """Raises ValueError, naming layers, unless all of (P,) bool are True: whether each layer's features are finite."""
    if not finite.all():
        layers = [names[i] if names else str(i) for i in (~finite).nonzero().flatten().tolist()]
        raise ValueError(
            f"the features of layer(s) {', '.join(layers)} hold NaN or infinity, or values too large to square: "
            "the weights have broken down, or the precision is too low (try task.dtype=float32 and "
            "trainer.precision=32-true)"
        )


@dataclass
class _Problem:
    """Objectives of P layers at one strength, as functions of θ (P, D + 1, K); its last row is the intercept."""

    x: Tensor  # (P, N, D), centred
    hot: Tensor  # (N, K), one-hot labels
    penalty: float  # factor of ½ ‖W‖²; the loss is the mean over images

    def logits(self, theta: Tensor) -> Tensor:
        """→ (P, N, K)"""
        return torch.baddbmm(theta[:, -1:], self.x, theta[:, :-1])

    def nats(self, logits: Tensor) -> Tensor:
        """The mean loss without the penalty: → (P,) float64"""
        return (logits.logsumexp(dim=-1) - (logits * self.hot).sum(dim=-1)).double().mean(dim=1)

    def objective(self, theta: Tensor, logits: Tensor) -> Tensor:
        """The mean loss with the penalty: → (P,) float64"""
        return self.nats(logits) + self.penalty / 2 * _dot(theta[:, :-1], theta[:, :-1])

    def gradient(self, theta: Tensor, probabilities: Tensor) -> Tensor:
        """→ (P, D + 1, K)"""
        error = (probabilities - self.hot) / len(self.hot)  # (P, N, K)
        of_weight = (error.mT @ self.x).mT + self.penalty * theta[:, :-1]  # in this order x is not transposed
        return torch.cat([of_weight, error.sum(dim=1, keepdim=True)], dim=1)

    def minimise(
        self, theta: Tensor, guess: Preconditioner, tolerance: float, max_iterations: int
    ) -> tuple[Tensor, int]:
        """L-BFGS from θ until `guess.suboptimality` is at most `tolerance`, or `max_iterations`. Returns (θ, steps)."""
        x = self.x
        logits = self.logits(theta)
        probabilities = logits.softmax(dim=-1)
        objective = self.objective(theta, logits)
        gradient = self.gradient(theta, probabilities)
        steps: list[tuple[Tensor, Tensor, Tensor]] = []  # of θ, of the gradient, 1 / their product
        iteration = 0
        while True:
            guess.update(probabilities)
            direction = -_two_loop(gradient, steps, guess)
            slope = _dot(gradient, direction)
            if iteration == max_iterations or bool((guess.suboptimality(gradient, slope) <= tolerance).all()):
                return theta, iteration
            iteration += 1
            along = self.logits(direction)  # logits are linear in θ: the line search needs no further pass
            w, d = theta[:, :-1], direction[:, :-1]
            squares = _dot(w, w), _dot(w, d), _dot(d, d)
            length = torch.ones_like(objective)  # (P,)
            for _ in range(40):
                at = self.nats(logits + length[:, None, None].to(x.dtype) * along)
                at = at + self.penalty / 2 * (squares[0] + 2 * length * squares[1] + length**2 * squares[2])
                noise = torch.finfo(x.dtype).eps * objective
                enough = at <= objective + ARMIJO * length * slope + noise
                if bool(enough.all()):
                    break
                length = torch.where(enough, length, length / 2)
            length = torch.where(enough, length, 0.0)[:, None, None].to(x.dtype)
            move = length * direction
            theta, logits = theta + move, logits + length * along
            objective = torch.where(enough, at, objective)
            probabilities = logits.softmax(dim=-1)
            new_gradient = self.gradient(theta, probabilities)
            change, gradient = new_gradient - gradient, new_gradient
            product = _dot(move, change)
            useful = product > torch.finfo(x.dtype).eps * (_dot(move, move) * _dot(change, change)).sqrt()
            inverse = torch.where(useful, 1 / torch.where(useful, product, 1.0), 0.0)
            steps = [*steps[-(HISTORY - 1) :], (move, change, inverse[:, None, None].to(x.dtype))]


def _refine(
    features: Tensor,
    hot: Tensor,
    weight: Tensor,
    bias: Tensor,
    penalties: list[float],
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor, int]:
    """Fits one layer's heads further in float64, in place, where their duality gaps are above `tolerance`.

    Features (N, D), one-hot labels (N, K), weight (S, K, D), bias (S, K). Returns (objectives (S,), gaps (S,), steps).
    """
    objective, minimum = bound_minima(features, hot, weight, bias, penalties)
    unconverged = [i for i, gap in enumerate((objective - minimum).tolist()) if not gap <= tolerance]
    if not unconverged:
        return objective, objective - minimum, 0
    x = features.to(torch.float64, copy=True)
    mean = x.mean(dim=0)
    x -= mean
    steps, last = 0, x.new_zeros(1, x.shape[1] + 1, hot.shape[1])
    for i in sorted(unconverged, key=lambda i: -penalties[i]):
        problem = _Problem(x[None], hot, penalties[i])
        for target in (tolerance / 2, tolerance / 20):  # the bound is an estimate in what the intercept adds to it
            own = torch.cat([weight[i].mT.double(), (bias[i].double() + weight[i].double() @ mean)[None]])[None]
            start = own if bool(objective[i] <= problem.objective(last, problem.logits(last))) else last
            guess = WeightedPreconditioner(x, hot.shape[1], penalties[i])
            last, further = problem.minimise(start, guess, target, max_iterations)
            steps += further
            w, b = last[0, :-1].mT, last[0, -1] - mean @ last[0, :-1]  # (K, D), (K,)
            rounded_w, rounded_b = w.to(weight.dtype), b.to(bias.dtype)
            weights, biases = torch.stack([w, rounded_w.double()]), torch.stack([b, rounded_b.double()])
            values, minima = bound_minima(features, hot, weights, biases, [penalties[i]] * 2)
            minimum[i] = torch.fmax(minimum[i], minima.max())
            if not objective[i] <= values[1]:
                weight[i], bias[i], objective[i] = rounded_w, rounded_b, values[1]
            if objective[i] - minimum[i] <= tolerance:
                break
    return objective, (objective - minimum).clamp(min=0), steps


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product per layer: (P, …), (P, …) → (P,) float64"""
    return (a * b).sum(dim=-1).double().sum(dim=-1)


def _two_loop(gradient: Tensor, steps: list[tuple[Tensor, Tensor, Tensor]], guess: Preconditioner) -> Tensor:
    """L-BFGS two-loop recursion: approximate inverse Hessian times the gradient (Nocedal & Wright, alg. 7.4)."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=(1, 2), keepdim=True)

    q = gradient
    alphas = []
    for move, change, inverse in reversed(steps):
        alphas.append(alpha := inverse * dot(move, q))
        q = q - alpha * change
    scale: Tensor | float = 1.0
    if steps:
        move, change, inverse = steps[-1]
        scale = torch.where(inverse > 0, 1 / (inverse * dot(change, guess.apply(change))).clamp(min=1e-30), 1.0)
    q = scale * guess.apply(q)
    for (move, change, inverse), alpha in zip(steps, reversed(alphas), strict=True):
        q = q + (alpha - inverse * dot(change, q)) * move
    return q
