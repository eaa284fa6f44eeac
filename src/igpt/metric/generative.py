"""How close drawn images come to real ones, from an encoder's features: KID, Fréchet distance, precision and recall,
nearest training images. All in float64; features of a set are (N, D).
"""

from collections.abc import Callable
from math import sqrt

import torch
from scipy.stats import t as student
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from igpt.metric.result import Number
from igpt.metric.share import share_number, wilson_interval

N_BLOCK = 20  # of the jackknife: 19 degrees of freedom
T_QUANTILE = float(student.ppf(0.975, N_BLOCK - 1))  # of a 95 % interval
FEWEST = 2 * N_BLOCK  # images of a set: without one block, two of another are still a pair
NEIGHBOURS = 3  # k of precision and recall (Kynkäänniemi et al. 2019)
FEW_FOR_FRECHET = 10_000  # images, below which a Fréchet distance is mostly bias: it grows as images become fewer
AT_ONCE = 1024  # rows of a block of distances
Blocks = tuple[Tensor, ...]  # rows of each
ROUNDING = 1e-12  # of the squares of two images in float64, with room to spare


def kernel_distance(real: Tensor, drawn: Tensor) -> Number:
    """KID: the unbiased estimate of MMD² with the kernel (x·y / D + 1)³; 0 on average for sets of one distribution.

    Standard error: `jackknife` over blocks of each set, of equal size but for one image; images are taken to be in
    random order. Interval: Student's t. Source: Bińkowski et al. 2018, who average over subsets; all pairs of images at
    once are as unbiased, and vary less.

    Raises:
        ValueError: fewer than `FEWEST` images in a set.
    """
    check_enough(len(real), "real images")
    check_enough(len(drawn), "drawn images")
    of_real, of_drawn = _split_blocks(real), _split_blocks(drawn)
    real_pairs, drawn_pairs = _sum_kernel(real, real, of_real, of_real), _sum_kernel(drawn, drawn, of_drawn, of_drawn)
    cross_pairs = _sum_kernel(real, drawn, of_real, of_drawn)  # (N_BLOCK, N_BLOCK)
    real_alone, drawn_alone = _sum_self_kernel(real, of_real), _sum_self_kernel(drawn, of_drawn)  # (N_BLOCK,)
    sizes = torch.tensor([[len(rows) for rows in parts] for parts in (of_real, of_drawn)]).double()  # (2, N_BLOCK)

    def estimate(kept: Tensor) -> float:
        """The estimate from the blocks where `kept` (N_BLOCK,) is 1."""
        n, m = (sizes @ kept).tolist()
        in_real = (kept @ real_pairs @ kept - real_alone @ kept) / (n * (n - 1))
        in_drawn = (kept @ drawn_pairs @ kept - drawn_alone @ kept) / (m * (m - 1))
        return float(in_real + in_drawn - 2 * kept @ cross_pairs @ kept / (n * m))

    value, stderr = jackknife(estimate)
    around = T_QUANTILE * stderr
    return Number(value, "MMD²", len(drawn), stderr, (value - around, value + around))


def jackknife(estimate: Callable[[Tensor], float]) -> tuple[float, float]:
    """An estimate from all of N_BLOCK blocks of each set, and its standard error by leaving out one after the other.

    `estimate`: takes a mask of the blocks to use, (N_BLOCK,) of 0 and 1. The error is not too small on average (Efron &
    Stein 1981).
    """
    every = torch.ones(N_BLOCK).double()
    without = torch.tensor([estimate(every - one) for one in torch.eye(N_BLOCK).double()]).double()
    return estimate(every), float(without.std(correction=0)) * sqrt(N_BLOCK - 1)


def check_enough(n: int, what: str) -> None:
    """Raises ValueError where `what` gives fewer than `FEWEST` images."""
    if n < FEWEST:
        raise ValueError(f"{what}: sample quality needs at least {FEWEST} images of each kind, got {n}")


def _split_blocks(images: Tensor) -> Blocks:
    return torch.tensor_split(torch.arange(len(images)), N_BLOCK)


def _sum_kernel(x: Tensor, y: Tensor, of_x: Blocks, of_y: Blocks) -> Tensor:
    """Sums of the kernel between each block of x and each of y: (N_BLOCK, N_BLOCK)."""
    rows = [_kernel(x[block] @ y.T, x.shape[1]).sum(0) for block in of_x]
    return torch.stack([torch.stack([row[block].sum() for block in of_y]) for row in rows])


def _sum_self_kernel(x: Tensor, of_x: Blocks) -> Tensor:
    """Sums of each image's kernel with itself: (N_BLOCK,)."""
    alone = _kernel(x.square().sum(1), x.shape[1])
    return torch.stack([alone[block].sum() for block in of_x])


def _kernel(products: Tensor, width: int) -> Tensor:
    base = products / width + 1
    return base * base * base  # ten times as fast as a power


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
    radii = torch.cat(
        [_distances(some, others).kthvalue(NEIGHBOURS + 1).values for some in torch.split(others, AT_ONCE)]
    )
    return torch.cat([(_distances(some, others) <= radii).any(1) for some in torch.split(images, AT_ONCE)])


def _distances(some: Tensor, others: Tensor) -> Tensor:
    """Euclidean distances (N, M), by |x|² + |y|² - 2 x·y; those that rounding could have made are 0."""
    norms = some.square().sum(1)[:, None] + others.square().sum(1)  # (N, M)
    squares = norms - 2 * some @ others.T
    return squares.where(squares > ROUNDING * norms, 0.0).sqrt()


def find_nearest_images(images: Tensor, others: Tensor, *, k: int = 1) -> tuple[Tensor, Tensor]:
    """Euclidean distances of each image to its `k` nearest of the others, and their rows: (N, k), (N, k)."""
    found = [_distances(some, others).topk(k, largest=False) for some in torch.split(images, AT_ONCE)]
    return torch.cat([values for values, _ in found]), torch.cat([rows for _, rows in found])


def memorisation_numbers(drawn: Tensor, *, training: Tensor, held_out: Tensor) -> dict[str, Number]:
    """`nearest_in_train`, `nearest_excess` and `nearest_distance_ratio` of drawn images.

    - share of drawn images whose nearest real image is a training image, not a held-out one. Of a model that repeats no
      training image it is the training images' share of all real images, as these are exchangeable;
    - its excess, (share - expected) / (1 - expected): 0 is expected without memorisation, 1 if all drawn images are
      copies of training images, and their share if some are. After the data-copying test of Meehan, Chaudhuri &
      Dasgupta 2020, with the nearest neighbours of Schilling 1986. Interval: the wider of Wilson's, for these real
      images, and the `jackknife`'s, over blocks of real images, too, as one of them may be the nearest of many;
    - median distance from a drawn image to the nearest training image, over that from a held-out image: 0 for copies.

    Raises:
        ValueError: fewer than `FEWEST` images of a kind.
    """
    for images, what in ((drawn, "drawn"), (training, "training"), (held_out, "held-out")):
        check_enough(len(images), f"{what} images")
    n, of_drawn = len(drawn), torch.empty(len(drawn), dtype=torch.int64)
    for i, rows in enumerate(_split_blocks(drawn)):
        of_drawn[rows] = i
    to_training, to_held_out = _block_distances(drawn, training), _block_distances(drawn, held_out)  # (N, N_BLOCK)

    def estimate(kept: Tensor) -> float:
        """The share from the blocks where `kept` (N_BLOCK,) is 1."""
        blocks = kept.bool()
        nearer = to_training[:, blocks].amin(1) < to_held_out[:, blocks].amin(1)
        return float(nearer[blocks[of_drawn]].double().mean())

    share, stderr = jackknife(estimate)
    expected = len(training) / (len(training) + len(held_out))
    low, high = wilson_interval(share, n)
    around = T_QUANTILE * stderr
    low, high = max(0.0, min(low, share - around)), min(1.0, max(high, share + around))
    interval = ((low - expected) / (1 - expected), (high - expected) / (1 - expected))
    ratio = float(to_training.amin(1).median() / find_nearest_images(held_out, training)[0].median())
    return {
        "nearest_in_train": share_number(share, n),
        "nearest_excess": Number((share - expected) / (1 - expected), "share", n, stderr / (1 - expected), interval),
        "nearest_distance_ratio": Number(ratio, "of held-out images' distance", n),
    }


def _block_distances(drawn: Tensor, real: Tensor) -> Tensor:
    """Distance of each drawn image to the nearest of each block of real images: (N, N_BLOCK)."""
    return torch.stack([find_nearest_images(drawn, real[rows])[0][:, 0] for rows in _split_blocks(real)], dim=1)
