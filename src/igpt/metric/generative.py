"""How close drawn images come to real ones, from an encoder's features: KID, Fréchet distance, precision and recall,
nearest training images. All in float64; features of a set are (N, D).
"""

from math import sqrt

import torch
from scipy.stats import t as student
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from igpt.metric.result import Number
from igpt.metric.share import share_number, wilson_interval

N_BLOCK = 20  # of the jackknife: 19 degrees of freedom
FEWEST = 2 * N_BLOCK  # images of a set: without one block, two of another are still a pair
NEIGHBOURS = 3  # k of precision and recall (Kynkäänniemi et al. 2019)
FEW_FOR_FRECHET = 10_000  # images, below which a Fréchet distance is mostly bias: it grows as images become fewer
AT_ONCE = 1024  # rows of a block of distances
ROUNDING = 1e-12  # of the squares of two images in float64, with room to spare


def kernel_distance(real: Tensor, drawn: Tensor) -> Number:
    """KID: the unbiased estimate of MMD² with the kernel (x·y / D + 1)³; 0 on average for sets of one distribution.

    Standard error: jackknife over `N_BLOCK` blocks of each set, of equal size but for one image, which is not too small
    on average (Efron & Stein 1981); images are taken to be in random order. Interval: Student's t. Source: Bińkowski et
    al. 2018, who average over subsets; all pairs of images at once are as unbiased, and vary less.

    Raises:
        ValueError: fewer than `FEWEST` images in a set.
    """
    check_enough(len(real), len(drawn))
    parts = [torch.tensor_split(torch.arange(len(images)), N_BLOCK) for images in (real, drawn)]
    pairs = {}
    for name, x, y, of_x, of_y in (
        ("real", real, real, *parts[:1] * 2), ("drawn", drawn, drawn, *parts[1:] * 2), ("cross", real, drawn, *parts)
    ):  # fmt: skip
        pairs[name] = torch.stack([_sum_kernel(x[rows], y, of_y) for rows in of_x])  # (N_BLOCK, N_BLOCK)
    alone = torch.stack([_self_kernel(real, parts[0]), _self_kernel(drawn, parts[1])])  # (2, N_BLOCK)
    sizes = torch.tensor([[len(rows) for rows in part] for part in parts]).double()  # (2, N_BLOCK)

    def estimate(kept: Tensor) -> float:
        n, m = (sizes * kept).sum(1).tolist()
        within = [float(kept @ pairs[name] @ kept - alone[i] @ kept) for i, name in enumerate(("real", "drawn"))]
        return within[0] / (n * (n - 1)) + within[1] / (m * (m - 1)) - 2 * float(kept @ pairs["cross"] @ kept) / (n * m)

    every = torch.ones(N_BLOCK).double()
    without = torch.tensor([estimate(every - one) for one in torch.eye(N_BLOCK).double()]).double()
    value, stderr = estimate(every), float(without.std(correction=0)) * sqrt(N_BLOCK - 1)
    around = float(student.ppf(0.975, N_BLOCK - 1)) * stderr
    return Number(value, "MMD²", len(drawn), stderr, (value - around, value + around))


def check_enough(*counts: int) -> None:
    """Raises ValueError for a set of fewer than `FEWEST` images."""
    if min(counts) < FEWEST:
        several = " and ".join(map(str, counts))
        raise ValueError(f"sample quality needs at least {FEWEST} images in each set, got {several}")


def _kernel(products: Tensor, width: int) -> Tensor:
    base = products / width + 1
    return base * base * base  # ten times as fast as a power


def _sum_kernel(some: Tensor, others: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
    """Sums of the kernel between some images and each part of the others: (parts,)."""
    of_others = _kernel(some @ others.T, some.shape[1]).sum(0)  # (N,)
    return torch.stack([of_others[rows].sum() for rows in parts])


def _self_kernel(images: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
    """Sums of each image's kernel with itself: (parts,)."""
    alone = _kernel(images.square().sum(1), images.shape[1])
    return torch.stack([alone[rows].sum() for rows in parts])


class _Features(nn.Identity):
    """Takes the place of torchmetrics' encoder: its images are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width


def frechet_distance(real: Tensor, drawn: Tensor) -> float:
    """|μ - μ'|² + tr(S + S' - 2 (S S')^½) of the means and covariances of two sets. Source: Dowson & Landau 1982."""
    distance = FrechetInceptionDistance(feature=_Features(real.shape[1]))
    distance.update(real, real=True)
    distance.update(drawn, real=False)
    return float(distance.compute())


def precision_and_recall(real: Tensor, drawn: Tensor) -> tuple[Number, Number]:
    """Share of drawn images among the real ones, and of real images among the drawn ones.

    An image lies among others if it is as close to one of them as that one's third nearest neighbour. Both sets should
    be of one size: radii shrink with more images. Source: Kynkäänniemi et al. 2019, k = 3.
    """
    shares = [float(_is_among(x, others).double().mean()) for x, others in ((drawn, real), (real, drawn))]
    return share_number(shares[0], len(drawn)), share_number(shares[1], len(real))


def _is_among(images: Tensor, others: Tensor) -> Tensor:
    """Whether each image lies in the ball of one of the others to its NEIGHBOURS-th nearest of them: (N,) bool."""
    radii = torch.cat([_distances(some, others).kthvalue(NEIGHBOURS + 1).values for some in others.split(AT_ONCE)])
    return torch.cat([(_distances(some, others) <= radii).any(1) for some in images.split(AT_ONCE)])


def _distances(some: Tensor, others: Tensor) -> Tensor:
    """Euclidean distances (N, M), by |x|² + |y|² - 2 x·y; those that rounding could have made are 0."""
    norms = some.square().sum(1)[:, None] + others.square().sum(1)  # (N, M)
    squares = norms - 2 * some @ others.T
    return squares.where(squares > ROUNDING * norms, 0.0).sqrt()


def find_nearest_images(images: Tensor, others: Tensor, *, k: int = 1) -> tuple[Tensor, Tensor]:
    """Euclidean distances of each image to its `k` nearest of the others, and their rows: (N, k), (N, k)."""
    found = [_distances(some, others).topk(k, largest=False) for some in images.split(AT_ONCE)]
    return torch.cat([values for values, _ in found]), torch.cat([rows for _, rows in found])


def memorisation_numbers(drawn: Tensor, *, training: Tensor, held_out: Tensor) -> dict[str, Number]:
    """`nearest_in_train`, `nearest_excess` and `nearest_distance_ratio` of drawn images.

    - share of drawn images whose nearest real image is a training image, not a held-out one. Of a model that has learnt
      no single image it is the training images' share of all real images, as these are exchangeable;
    - its excess, (share - expected) / (1 - expected): 0 is expected without memorisation, 1 if all drawn images are
      copies of training images, and their share if some are. After the data-copying test of Meehan, Chaudhuri &
      Dasgupta 2020, with the nearest neighbours of Schilling 1986;
    - median distance from a drawn image to the nearest training image, over that from a held-out image: 0 for copies.
    """
    n = len(drawn)
    to_training, to_held_out = (find_nearest_images(drawn, real)[0][:, 0] for real in (training, held_out))
    share = float((to_training < to_held_out).double().mean())
    expected = len(training) / (len(training) + len(held_out))
    low, high = ((end - expected) / (1 - expected) for end in wilson_interval(share, n))
    stderr = sqrt(share * (1 - share) / n) / (1 - expected)
    usual = find_nearest_images(held_out, training)[0].median()
    return {
        "nearest_in_train": share_number(share, n),
        "nearest_excess": Number((share - expected) / (1 - expected), "share", n, stderr, (low, high)),
        "nearest_distance_ratio": Number(float(to_training.median() / usual), "of held-out images' distance", n),
    }
