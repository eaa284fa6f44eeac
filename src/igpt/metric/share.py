"""Shares, such as accuracies, with Wilson's confidence interval."""

from math import sqrt
from statistics import NormalDist

from igpt.metric.result import Number

Z = NormalDist().inv_cdf(0.975)  # of a 95 % interval


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n images; unlike the bootstrap's, it has a width where none or all are right.

    Made for n images that are right or wrong; for the mean over n images of shares in [0, 1] it is conservative, as
    their variance is at most share · (1 - share). Source: Wilson 1927.
    """
    middle, spread = share + Z**2 / (2 * n), Z * sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2)
    low, high = ((middle + side * spread) / (1 + Z**2 / n) for side in (-1, 1))
    return (low if share > 0 else 0.0), (high if share < 1 else 1.0)  # rounding leaves 1e-17 at the ends


def share_number(share: float, n: int, *, features: str = "") -> Number:
    """A share of n images, with standard error and 95 % interval; `features`: those that classes were read from."""
    share = float(share)
    return Number(share, "share", n, sqrt(share * (1 - share) / n), wilson_interval(share, n), features=features)
