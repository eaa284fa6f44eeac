"""Approximate inverse Hessians of logistic regression, with which L-BFGS starts."""

from typing import Protocol

import torch
from torch import Tensor

ROWS = 4096  # images at a time in a weighted covariance


class Preconditioner(Protocol):
    """An approximate inverse Hessian for gradients (P, D + 1, K) of P layers; the last row is the intercept's."""

    def update(self, probabilities: Tensor) -> None:
        """Adapts the inverse to the probabilities (P, N, K) of the current heads; called at every step."""

    def suboptimality(self, gradient: Tensor, slope: Tensor) -> Tensor:
        """Distance of the objective to its minimum (P,), by which steps end."""

    def apply(self, gradient: Tensor) -> Tensor:
        """The inverse times the gradient."""


class CovariancePreconditioner:
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

    def suboptimality(self, gradient: Tensor, slope: Tensor) -> Tensor:
        """Estimated distance to the minimum (P,), exact for the quadratic function with this inverse Hessian."""
        return -slope / 2

    def apply(self, gradient: Tensor) -> Tensor:
        return torch.cat([self.inverse @ gradient[:, :-1], gradient[:, -1:] / self.h[:, None, None]], dim=1)


class WeightedPreconditioner:
    """Preconditioner (Σ_i h_i x̃_i x̃_iᵀ / N + penalty)⁻¹ of one layer, the same for every class, in float64.

    It is the inverse Hessian with each image's p (1 - p) replaced by its mean h_i over classes; x̃ is (x, 1), whose last
    entry has no penalty. Unlike the features' covariance it does not count outliers of which the head is certain.
    """

    def __init__(self, x: Tensor, n_class: int, penalty: float) -> None:
        self.x, self.penalty = x, penalty
        self.every = max(20, x.shape[1] // (2 * n_class))  # steps: then an inverse costs no more than they do
        self.step = 0

    def update(self, probabilities: Tensor) -> None:
        """Recomputes the inverse every `every` steps."""
        if self.step % self.every == 0:
            h = (probabilities * (1 - probabilities)).mean(dim=(0, 2)).clamp(min=1e-14) / len(self.x)  # (N,)
            matrix = self.x.new_zeros(self.x.shape[1] + 1, self.x.shape[1] + 1)
            for some, weights in zip(torch.split(self.x, ROWS), torch.split(h, ROWS), strict=True):
                matrix[:-1, :-1].addmm_(some.mT * weights, some)
            matrix[-1, :-1] = matrix[:-1, -1] = h @ self.x
            diagonal = matrix.diagonal()  # a view
            diagonal[:-1] += self.penalty
            diagonal[-1] = h.sum()
            self.border = matrix[:-1, -1:] / h.sum()  # (D, 1) the weighted mean
            scale = diagonal.rsqrt()
            matrix = scale[:, None] * matrix * scale
            # keeps the matrix positive definite in spite of rounding
            matrix.diagonal().add_(10 * len(matrix) * torch.finfo(matrix.dtype).eps)
            self.inverse = scale[:, None] * torch.cholesky_inverse(torch.linalg.cholesky(matrix)) * scale
        self.step += 1

    def suboptimality(self, gradient: Tensor, slope: Tensor) -> Tensor:
        """Bound of the distance to the minimum (1,), from strong convexity; the intercept's part is an estimate."""
        weight, bias = gradient[:, :-1], gradient[:, -1:]
        weight = weight - self.border * bias  # with the intercept at its best
        return weight.square().sum(dim=(1, 2)) / (2 * self.penalty)

    def apply(self, gradient: Tensor) -> Tensor:
        return self.inverse @ gradient
