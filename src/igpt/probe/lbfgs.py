"""Logistic regression on the features of all layers, at all regularisation strengths, fitted together."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

HISTORY = 8  # step pairs of the L-BFGS direction
ARMIJO = 1e-4  # sufficient decrease, as a share of the decrease predicted by the slope


@dataclass(frozen=True)
class Heads:
    """Linear classifiers of P layers at S regularisation strengths: weight (P, S, K, D), bias (P, S, K)."""

    weight: Tensor
    bias: Tensor
    objective: Tensor  # (P, S) mean nats per image plus the penalty, at the end
    suboptimality: Tensor  # (P, S) estimated distance of the objective to its minimum, in nats per image
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
    tolerance: float = 1e-7,
    max_iterations: int = 500,
    names: Sequence[str] | None = None,
) -> Heads:
    """Minimises Σ_i -log p(y_i | x_i) · C + ½ ‖W‖², the intercept free, for each layer and each C in `C_grid`.

    The objective is that of scikit-learn's LogisticRegression(C); for two classes, where scikit-learn fits one vector
    instead of two, that of its C doubled. Features (P, N, D), labels (N,) int64. Stops when the estimated distance of
    every objective to its minimum is below `tolerance`, in nats per image.

    Method: features are centred, which changes only the intercept. L-BFGS is preconditioned by the inverse of their
    covariance, the part of the Hessian that does not depend on the heads: tens of steps instead of hundreds. All layers
    are fitted together, each with its own step lengths; a step takes two passes over the features, however many step
    lengths its line search tries. Strengths are fitted in ascending order, each starting from the previous heads.

    Raises:
        ValueError: non-finite features or labels outside 0 … K - 1; layers are called by `names`.
    """
    check_features(features, labels, n_class, names=names)
    mean = features.mean(dim=1, keepdim=True)  # (P, 1, D)
    x = features - mean
    covariance = x.mT @ x / x.shape[1]  # (P, D, D)
    hot = F.one_hot(labels, n_class).to(x.dtype)  # (N, K)
    theta = x.new_zeros(len(x), x.shape[2] + 1, n_class)
    solutions: dict[float, tuple[Tensor, Tensor, Tensor, int]] = {}
    for strength in sorted(C_grid):
        problem = _Problem(x, hot, penalty=1 / (strength * x.shape[1]), covariance=covariance)
        solutions[strength] = problem.minimise(theta, tolerance, max_iterations)
        theta = solutions[strength][0]
    thetas, objectives, suboptimality, iterations = zip(*(solutions[strength] for strength in C_grid), strict=True)
    weight = torch.stack([theta[:, :-1] for theta in thetas], dim=1).mT  # (P, S, K, D)
    bias = torch.stack([theta[:, -1] for theta in thetas], dim=1) - torch.einsum("pskd,pd->psk", weight, mean[:, 0])
    return Heads(weight.contiguous(), bias, torch.stack(objectives, 1), torch.stack(suboptimality, 1), sum(iterations))


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
            f"the features of layer(s) {', '.join(layers)} hold NaN or infinity: the weights have broken down, or the "
            "precision is too low (try task.dtype=float32 and trainer.precision=32-true)"
        )


@dataclass
class _Problem:
    """Objectives of P layers at one strength, as functions of θ (P, D + 1, K); its last row is the intercept."""

    x: Tensor  # (P, N, D), centred
    hot: Tensor  # (N, K), one-hot labels
    penalty: float  # factor of ½ ‖W‖²; the loss is the mean over images
    covariance: Tensor  # (P, D, D)

    def logits(self, theta: Tensor) -> Tensor:
        """→ (P, N, K)"""
        return torch.baddbmm(theta[:, -1:], self.x, theta[:, :-1])

    def nats(self, logits: Tensor) -> Tensor:
        """The mean loss without the penalty: → (P,) float64"""
        return (logits.logsumexp(dim=-1) - (logits * self.hot).sum(dim=-1)).double().mean(dim=1)

    def gradient(self, theta: Tensor, probabilities: Tensor) -> Tensor:
        """→ (P, D + 1, K)"""
        error = (probabilities - self.hot) / len(self.hot)  # (P, N, K)
        of_weight = (error.mT @ self.x).mT + self.penalty * theta[:, :-1]  # in this order x is not transposed
        return torch.cat([of_weight, error.sum(dim=1, keepdim=True)], dim=1)

    def minimise(self, theta: Tensor, tolerance: float, max_iterations: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """L-BFGS starting at θ. Returns (θ, objectives (P,), estimated distance of each to its minimum (P,), steps)."""
        x = self.x
        logits = self.logits(theta)
        probabilities = logits.softmax(dim=-1)
        objective = self.nats(logits) + self.penalty / 2 * _dot(theta[:, :-1], theta[:, :-1])
        gradient = self.gradient(theta, probabilities)
        steps: list[tuple[Tensor, Tensor, Tensor]] = []  # of θ, of the gradient, 1 / their product
        guess = _Preconditioner(self.covariance, self.penalty)
        iteration = 0
        while True:
            guess.update(probabilities)
            direction = -_two_loop(gradient, steps, guess)
            slope = _dot(gradient, direction)
            suboptimality = -slope / 2  # the exact distance to the minimum of a quadratic
            done = bool((suboptimality <= tolerance).all())
            if iteration == max_iterations and not done:
                log.warning("logistic regression: %d iterations leave up to %.1e nats", iteration, suboptimality.max())
            if done or iteration == max_iterations:
                return theta, objective, suboptimality, iteration
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


class _Preconditioner:
    """Preconditioner (h·Σ + penalty)⁻¹ of each layer, the same for every class, with Σ the features' covariance.

    It is the inverse Hessian with p (1 - p) replaced by its mean h over images and classes.
    """

    def __init__(self, covariance: Tensor, penalty: float) -> None:
        self.covariance, self.penalty = covariance, penalty
        self.h = torch.zeros_like(covariance[:, 0, 0])  # (P,) of the current inverse
        self.inverse = torch.empty_like(covariance)

    def update(self, probabilities: Tensor) -> None:
        """Recomputes the inverse of layers where h has halved or doubled."""
        h = (probabilities * (1 - probabilities)).mean(dim=(1, 2)).clamp(min=1e-7)
        (old,) = torch.where((h < self.h / 2) | (h > self.h * 2))
        if len(old):
            matrix = h[old, None, None] * self.covariance[old]
            diagonal = matrix.diagonal(dim1=1, dim2=2)  # a view
            # keeps the matrix positive definite in spite of rounding
            rounding = 10 * torch.finfo(matrix.dtype).eps * diagonal.sum(dim=1, keepdim=True)
            diagonal.add_(self.penalty + rounding)
            self.inverse[old] = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
            self.h[old] = h[old]

    def apply(self, gradient: Tensor) -> Tensor:
        return torch.cat([self.inverse @ gradient[:, :-1], gradient[:, -1:] / self.h[:, None, None]], dim=1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product per layer: (P, …), (P, …) → (P,) float64"""
    return (a * b).sum(dim=-1).double().sum(dim=-1)


def _two_loop(gradient: Tensor, steps: list[tuple[Tensor, Tensor, Tensor]], guess: "_Preconditioner") -> Tensor:
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
