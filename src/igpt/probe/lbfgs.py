"""Logistic regression on the features of all layers, at all regularisation strengths, fitted together."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

HISTORY = 8  # pairs of steps that the quasi-Newton direction is made of
ARMIJO = 1e-4  # of the decrease that the slope promises


@dataclass(frozen=True)
class Heads:
    """Linear classifiers of P layers at S strengths: weight (P, S, K, D), bias (P, S, K)."""

    weight: Tensor
    bias: Tensor
    objective: Tensor  # (P, S) mean nats per image plus the penalty, at the end
    remaining: Tensor  # (P, S) how much lower it could still get, estimated
    iterations: int

    def scores(self, features: Tensor) -> Tensor:
        """Class scores of every image by every head: (P, N, D) → (P, S, N, K)."""
        return torch.einsum("pnd,pskd->psnk", features, self.weight) + self.bias[:, :, None]


@torch.no_grad()
def logistic_regression(
    features: Tensor,
    labels: Tensor,
    *,
    n_class: int,
    strengths: list[float],
    tolerance: float = 1e-7,
    max_iterations: int = 500,
    names: Sequence[str] | None = None,
) -> Heads:
    """Minimises Σ_i -log p(y_i | x_i) · C + ½ ‖W‖², the intercept free, for each layer and each C of `strengths`.

    The objective is that of scikit-learn's LogisticRegression(C) (for two classes, where that fits one vector and not
    two, that of its 2 C). Features (P, N, D), labels (N,) int64. It ends when every objective, in nats per image, is
    within `tolerance` of its minimum by estimate.

    How: features are centred, which changes only the intercept. L-BFGS starts from the inverse of their covariance, as
    much of the Hessian as does not depend on the heads: tens of steps do where plain L-BFGS takes hundreds. All layers
    are fitted together, each with its own step lengths; a step is two passes over the features, however often its
    length is tried. The strengths follow one another, each from the heads of the one before.

    Raises:
        ValueError: features that are not finite, or labels that are no classes. `names` are what to call the layers.
    """
    check_features(features, labels, n_class, names=names)
    mean = features.mean(dim=1, keepdim=True)  # (P, 1, D)
    x = features - mean
    covariance = x.mT @ x / x.shape[1]  # (P, D, D)
    hot = F.one_hot(labels, n_class).to(x.dtype)  # (N, K)
    theta = x.new_zeros(len(x), x.shape[2] + 1, n_class)
    found: dict[float, tuple[Tensor, Tensor, Tensor, int]] = {}
    for strength in sorted(strengths):
        problem = _Problem(x, hot, penalty=1 / (strength * x.shape[1]), covariance=covariance)
        found[strength] = problem.minimise(theta, tolerance, max_iterations)
        theta = found[strength][0]
    thetas, objectives, remaining, iterations = zip(*(found[strength] for strength in strengths), strict=True)
    weight = torch.stack([theta[:, :-1] for theta in thetas], dim=1).mT  # (P, S, K, D)
    bias = torch.stack([theta[:, -1] for theta in thetas], dim=1) - torch.einsum("pskd,pd->psk", weight, mean[:, 0])
    return Heads(weight.contiguous(), bias, torch.stack(objectives, 1), torch.stack(remaining, 1), sum(iterations))


def check_features(features: Tensor, labels: Tensor, n_class: int, *, names: Sequence[str] | None = None) -> None:
    """Raises ValueError unless features (P, N, D) are finite and labels (N,) are classes."""
    finite = features.sum(dim=(1, 2)).isfinite()  # (P,)
    if not finite.all():
        layers = [names[i] if names else str(i) for i in (~finite).nonzero().flatten().tolist()]
        raise ValueError(
            f"the features of layer(s) {', '.join(layers)} hold NaN or infinity: the weights have broken down, or the "
            "precision is too low (try task.dtype=float32 and trainer.precision=32-true)"
        )
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < n_class):
        raise ValueError(f"labels must lie in 0 … {n_class - 1}, found {int(labels.min())} … {int(labels.max())}")


@dataclass
class _Problem:
    """The objectives of P layers at one strength, of θ (P, D + 1, K), whose last row is the intercept."""

    x: Tensor  # (P, N, D), centred
    hot: Tensor  # (N, K), the labels
    penalty: float  # of ½ ‖W‖², beside the mean over images
    covariance: Tensor  # (P, D, D)

    def logits(self, theta: Tensor) -> Tensor:
        """→ (P, N, K)"""
        return torch.baddbmm(theta[:, -1:], self.x, theta[:, :-1])

    def nats(self, logits: Tensor) -> Tensor:
        """The mean loss alone: → (P,) float64"""
        return (logits.logsumexp(dim=-1) - (logits * self.hot).sum(dim=-1)).double().mean(dim=1)

    def gradient(self, theta: Tensor, probabilities: Tensor) -> Tensor:
        """→ (P, D + 1, K)"""
        error = (probabilities - self.hot) / len(self.hot)  # (P, N, K)
        of_weight = (error.mT @ self.x).mT + self.penalty * theta[:, :-1]  # so turned, x is read as it lies
        return torch.cat([of_weight, error.sum(dim=1, keepdim=True)], dim=1)

    def minimise(self, theta: Tensor, tolerance: float, max_iterations: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """L-BFGS from θ: the minimum, the objectives (P,), how much lower each could still get (P,), iterations."""
        x = self.x
        logits = self.logits(theta)
        probabilities = logits.softmax(dim=-1)
        objective = self.nats(logits) + self.penalty / 2 * _dot(theta[:, :-1], theta[:, :-1])
        gradient = self.gradient(theta, probabilities)
        steps: list[tuple[Tensor, Tensor, Tensor]] = []  # of θ, of the gradient, 1 / their product
        guess = _Guess(self.covariance, self.penalty)
        iteration = 0
        while True:
            guess.look(probabilities)
            direction = -_two_loops(gradient, steps, guess)
            slope = _dot(gradient, direction)
            remaining = -slope / 2  # of a quadratic, this is the distance to its minimum
            done = bool((remaining <= tolerance).all())
            if iteration == max_iterations and not done:
                log.warning("logistic regression: %d iterations leave up to %.1e nats", iteration, remaining.max())
            if done or iteration == max_iterations:
                return theta, objective, remaining, iteration
            iteration += 1
            along = self.logits(direction)  # logits are linear in θ: no length that is tried costs another pass
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


class _Guess:
    """The inverse Hessian, if how sure a head is of an image had nothing to do with the image's features.

    Then it is (h Σ + penalty)⁻¹ for every class, with Σ the covariance and h the mean of p (1 - p) over images and
    classes.
    """

    def __init__(self, covariance: Tensor, penalty: float) -> None:
        self.covariance, self.penalty = covariance, penalty
        self.h = torch.zeros_like(covariance[:, 0, 0])  # (P,) that the inverse is of
        self.inverse = torch.empty_like(covariance)

    def look(self, probabilities: Tensor) -> None:
        """Inverts anew where heads have become half as sure, or twice."""
        h = (probabilities * (1 - probabilities)).mean(dim=(1, 2)).clamp(min=1e-7)
        (old,) = torch.where((h < self.h / 2) | (h > self.h * 2))
        if len(old):
            matrix = h[old, None, None] * self.covariance[old]
            diagonal = matrix.diagonal(dim1=1, dim2=2)  # a view: rounding must not make the matrix indefinite
            rounding = 10 * torch.finfo(matrix.dtype).eps * diagonal.sum(dim=1, keepdim=True)
            diagonal.add_(self.penalty + rounding)
            self.inverse[old] = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
            self.h[old] = h[old]

    def times(self, gradient: Tensor) -> Tensor:
        return torch.cat([self.inverse @ gradient[:, :-1], gradient[:, -1:] / self.h[:, None, None]], dim=1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each layer's: (P, …), (P, …) → (P,) float64"""
    return (a * b).sum(dim=-1).double().sum(dim=-1)


def _two_loops(gradient: Tensor, steps: list[tuple[Tensor, Tensor, Tensor]], guess: "_Guess") -> Tensor:
    """The inverse Hessian, as the steps so far let one guess it, times the gradient (Nocedal & Wright, alg. 7.4)."""

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
        scale = torch.where(inverse > 0, 1 / (inverse * dot(change, guess.times(change))).clamp(min=1e-30), 1.0)
    q = scale * guess.times(q)
    for (move, change, inverse), alpha in zip(steps, reversed(alphas), strict=True):
        q = q + (alpha - inverse * dot(change, q)) * move
    return q
