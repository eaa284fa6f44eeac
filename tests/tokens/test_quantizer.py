"""The quantiser of the VQ-VAE against another library, against sums by hand, and against itself in parts."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from igpt.tokens import quantizer as quantizers
from igpt.tokens.code_search import find_repeated, nearest_codes, nearest_codes_within, nearest_in_float64, search
from igpt.tokens.quantizer import EMAQuantizer, sum_by_code

UPDATE: dict[str, Any] = {"seed": 3, "decay": 0.9, "unquantised_steps": 1, "restart_below": 0.0}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def start(quantizer: EMAQuantizer, codebook: Tensor, counts: float = 5.0) -> EMAQuantizer:
    """The quantiser with these codes, each as if it had been used so often."""
    n = torch.full((len(codebook),), counts, dtype=torch.float64)
    state = {"codebook": codebook, "counts": n, "totals": codebook.double() * counts, "is_started": torch.tensor(True)}
    quantizer.load_state_dict(state)
    return quantizer


def step(quantizer: EMAQuantizer, *micro_batches: tuple[Tensor, Tensor], **changed: Any) -> None:
    for vectors, keys in micro_batches:
        quantizer(vectors, keys)
    quantizer.update(**{**UPDATE, "step": 1, **changed})


def test_a_step_is_that_of_another_library() -> None:
    """Independent source: vector-quantize-pytorch, without its random start and restarts."""
    codebook, vectors = draw(20, 4), draw(3, 16, 4, seed=1)
    library = pytest.importorskip("vector_quantize_pytorch")  # a GPU's image may lack it, and imports this file
    reference = library.VectorQuantize(dim=4, codebook_size=20, decay=0.99, commitment_weight=1.0, rotation_trick=False)
    own = start(EMAQuantizer(20, 4), codebook)
    reference._codebook.embed.copy_(codebook[None])
    reference._codebook.embed_avg.copy_(5 * codebook[None])
    reference._codebook.cluster_size.fill_(5.0)
    codes, tokens, loss = reference.train()(vectors)
    quantized = own(vectors, torch.arange(3))
    own.update(**{**UPDATE, "step": 1, "decay": 0.99})
    assert torch.equal(quantized.tokens, tokens.flatten())
    assert torch.allclose(quantized.vectors, codes.flatten(0, 1), atol=1e-6)
    assert quantized.commitment.item() == pytest.approx(loss.item(), rel=1e-5)
    assert torch.allclose(own.codebook, reference._codebook.embed[0], atol=1e-5)
    assert torch.allclose(own.counts.float(), reference._codebook.cluster_size[0], atol=1e-5)
    assert not torch.allclose(own.codebook, codebook, atol=1e-3)


def test_sums_are_those_of_one_hot_rows() -> None:
    """Independent source: a product with one-hot rows in float64; a code without vectors has none."""
    vectors, tokens = draw(50, 3), torch.arange(50) % 6
    counts, totals = sum_by_code(vectors, tokens, 7)
    one_hot = F.one_hot(tokens, 7).double()
    assert torch.equal(counts, one_hot.sum(0))
    assert torch.allclose(totals, one_hot.T @ vectors.double(), atol=1e-12)


def test_gradients() -> None:
    """By hand: vectors get the gradient of their codes, and 2 (z - e) / (N · D) of the commitment; codes get none."""
    quantizer = start(EMAQuantizer(8, 4), draw(8, 4))
    vectors = draw(2, 5, 4, seed=1).requires_grad_()
    quantized = quantizer(vectors, torch.arange(2))
    weights = draw(10, 4, seed=2)
    (slope,) = torch.autograd.grad((quantized.vectors * weights).sum(), vectors, retain_graph=True)
    assert torch.equal(slope.flatten(0, 1), weights)
    (pull,) = torch.autograd.grad(quantized.commitment, vectors)
    difference = vectors.detach().flatten(0, 1) - quantizer.lookup(quantized.tokens)
    assert torch.allclose(pull.flatten(0, 1), 2 * difference / 40, atol=1e-7)
    assert not quantizer.codebook.requires_grad


@pytest.mark.parametrize(("n", "k", "d"), [(700, 130, 3), (2, 2, 1), (0, 5, 2), (600, 4096, 8)])
def test_nearest_codes(n: int, k: int, d: int) -> None:
    """Independent source: all distances in float64; the lowest index where codes are the same."""
    codebook, vectors = draw(k, d), draw(n, d, seed=1)
    codebook[k // 2] = codebook[0]
    distances = torch.cdist(vectors.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(nearest_codes(vectors, codebook), distances.argmin(1))
    assert torch.equal(nearest_in_float64(vectors.double(), codebook), distances.argmin(1))
    assert find_repeated(codebook).nonzero().flatten().tolist() == [k // 2]


def test_a_certain_code_stays_the_nearest() -> None:
    """Invariant: no move within the distance changes a certain code; those near a border are not certain."""
    codebook, vectors = draw(300, 4), draw(2000, 4, seed=1)
    codebook[7] = codebook[3]  # a repeated code is no reason for doubt
    distance = 0.02
    nearest = nearest_codes_within(vectors, codebook, torch.full((2000,), distance))
    assert 0.3 < float(nearest.is_certain.double().mean()) < 0.9
    others = torch.cdist(vectors.double(), codebook.double())  # (N, K)
    own = codebook[nearest.tokens].double()
    for code in range(300):  # the move towards each other code that is worst
        towards = codebook[code].double() - own
        moved = vectors + distance * F.normalize(towards, dim=1)
        nearer = (moved - codebook[code]).norm(dim=1) < (moved - own).norm(dim=1) - 1e-9
        assert not (nearer & nearest.is_certain).any()
    two = others.topk(3, largest=False)
    border = (codebook[two.indices[:, 0]] - codebook[two.indices[:, 1]]).norm(dim=1)
    close = (two.values[:, 1].square() - two.values[:, 0].square()) / (2 * border) < 0.9 * distance
    assert not (close & (two.indices[:, 0] != 3) & nearest.is_certain).any()
    apart = torch.cdist(own, codebook.double())
    borders = (others.square() - others.amin(1, keepdim=True).square()) / (2 * apart)
    borders = borders.masked_fill(find_repeated(codebook), torch.inf).scatter(1, nearest.tokens[:, None], torch.inf)
    few = nearest_codes_within(vectors, codebook, torch.full((2000,), 0.0005))
    assert 5 < int((~few.is_certain).sum()) < 100
    assert torch.equal(few.is_certain, borders.amin(1) > 0.0005)
    vectors[:100] = (codebook[100:200] + codebook[200:]) / 2  # between two codes, up to rounding
    nearest = nearest_codes_within(vectors, codebook, torch.zeros(2000))
    assert torch.equal(nearest.tokens, nearest_in_float64(vectors.double(), codebook))
    assert not torch.equal(nearest.tokens, nearest_codes(vectors, codebook))
    assert search(vectors, codebook[3:8], runner_up=True, repeated=find_repeated(codebook[3:8]))[2].isfinite().all()
    only = codebook[:1].expand(5, 4)
    assert search(vectors, only, runner_up=True, repeated=find_repeated(only))[2].isinf().all()
    same = nearest_codes_within(vectors, codebook[:1].expand(5, 4), torch.full((2000,), distance))
    assert same.is_certain.all()
    assert not same.tokens.any()
    assert not nearest_codes_within(vectors[:1] * math.nan, codebook, torch.ones(1)).is_certain


def test_k_means_starts_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: vectors pass unchanged until then; more iterations never raise the error; the order is no matter."""
    vectors, keys = draw(6, 40, 4), torch.tensor([5, 3, 9, 1, 7, 2])
    errors = []
    for iterations in (0, 1, 2, 3, 10):
        monkeypatch.setattr(quantizers, "LLOYD", iterations)
        quantizer = EMAQuantizer(16, 4)
        before = quantizer(vectors, keys)
        assert torch.equal(before.vectors, vectors.flatten(0, 1))
        assert float(before.commitment) == 0
        quantizer.update(**{**UPDATE, "step": 1, "unquantised_steps": 2})
        assert not quantizer.has_codes
        step(quantizer, (vectors, keys), step=2, unquantised_steps=2)
        errors.append(float(torch.cdist(vectors.flatten(0, 1), quantizer.codebook).amin(1).square().mean()))
        assert torch.equal(quantizer.counts, sum_by_code(vectors.flatten(0, 1), quantizer(vectors, keys).tokens, 16)[0])
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    again = EMAQuantizer(16, 4)
    step(again, (vectors[order[:2]], keys[order[:2]]), (vectors[order[2:]], keys[order[2:]]), step=2)
    assert torch.equal(again.codebook, quantizer.codebook)
    other = EMAQuantizer(16, 4)
    step(other, (vectors, keys), step=2, seed=4)
    assert not torch.equal(other.codebook, quantizer.codebook)


def test_a_start_that_is_none() -> None:
    with pytest.raises(
        ValueError, match=r"has 16 codes and a step 15 vectors to begin them from: raise task.batch_size"
    ):
        step(EMAQuantizer(16, 4), (draw(3, 5, 4), torch.arange(3)))
    with pytest.raises(ValueError, match="the encoder's vectors are not finite"):
        step(EMAQuantizer(4, 4), (draw(3, 5, 4) * math.nan, torch.arange(3)))


def test_an_unused_code_begins_anew() -> None:
    """By hand: a code far from all becomes a vector of the step, with the mean count, and is not overwritten."""
    codebook, vectors, keys = draw(6, 4), draw(3, 10, 4, seed=1), torch.tensor([8, 2, 5])
    codebook[4] = 100.0
    quantizer = start(EMAQuantizer(6, 4), codebook)
    settings = {"decay": 0.1, "restart_below": 0.15}  # the count of the code is a tenth of the mean and of nothing
    step(quantizer, (vectors, keys), **settings)
    rows = vectors.flatten(0, 1)
    is_row = torch.isclose(quantizer.codebook[4], rows, rtol=1e-3).all(1)
    assert int(is_row.sum()) == 1
    mean = (0.1 * 30 + 0.9 * 30) / 6  # before the restart
    assert float(quantizer.counts[4]) == pytest.approx(mean)
    assert torch.allclose(quantizer.totals[4], rows[is_row][0].double() * mean)
    others = [start(EMAQuantizer(6, 4), codebook) for _ in range(3)]
    step(others[0], (vectors[1:], keys[1:]), (vectors[:1], keys[:1]), **settings)  # in another order
    step(others[1], (vectors, keys), **{**settings, "step": 2})
    step(others[2], (vectors, keys), **{**settings, "restart_below": 0.0})
    assert torch.allclose(others[0].codebook[4], quantizer.codebook[4], atol=1e-6)
    assert not torch.isclose(others[1].codebook[4], quantizer.codebook[4]).all()
    assert torch.allclose(others[2].codebook[4], codebook[4], rtol=1e-4)
    followed = draw(3, 10, 4, seed=1)
    step(quantizer, (followed, keys), **{**settings, "decay": 0.9, "step": 2})
    assert int(quantizer(followed, keys).tokens.eq(4).sum()) >= 1


def train_quantizer(rank: int, count: int) -> dict[str, Tensor]:
    """The codes after five steps of four images, with restarts; of the images a rank has its share, one comes twice."""
    quantizer = EMAQuantizer(32, 4)
    for number in range(1, 6):
        images = draw(4, 60, 4, seed=number)
        images[3], keys = images[0], torch.tensor([7, 5, 9, 7]) + 10 * number
        step(quantizer, (images[rank::count], keys[rank::count]), step=number, restart_below=0.3)
    return quantizer.state_dict()


def test_stopped_and_resumed() -> None:
    """Invariant: 4 steps are 2 steps, saved and read, and 2 more, to the bit; other orders of images change no code."""

    def steps(quantizer: EMAQuantizer, numbers: range, order: Tensor) -> EMAQuantizer:
        for number in numbers:
            vectors, keys = draw(4, 60, 4, seed=number)[order], (torch.arange(4) + 4 * number)[order]
            step(quantizer, (vectors[:2], keys[:2]), (vectors[2:], keys[2:]), step=number, restart_below=0.3)
        return quantizer

    plain = torch.arange(4)
    full = steps(EMAQuantizer(32, 4), range(1, 5), plain)
    stopped, resumed = steps(EMAQuantizer(32, 4), range(1, 3), plain), EMAQuantizer(32, 4)
    resumed.load_state_dict(stopped.state_dict())
    steps(resumed, range(3, 5), plain)
    mixed = steps(EMAQuantizer(32, 4), range(1, 5), torch.tensor([2, 0, 3, 1]))
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in full.state_dict().items())
    assert torch.allclose(mixed.totals, full.totals, rtol=1e-12, atol=1e-12)
    assert torch.equal(mixed.counts, full.counts)


def test_images_of_one_colour() -> None:
    """By hand: all vectors are one; every code that is used is that vector, no number is lost."""
    vector = torch.tensor([0.5, -1.0])
    quantizer = EMAQuantizer(8, 2)
    for number in range(1, 40):
        step(quantizer, (vector.expand(2, 9, 2), torch.arange(2)), step=number, decay=0.5, restart_below=0.05)
    assert torch.allclose(quantizer.codebook, vector.expand(8, 2), rtol=1e-3)
    assert all(value.isfinite().all() for value in quantizer.state_dict().values())
    assert quantizer(vector.expand(1, 3, 2), torch.arange(1)).tokens.unique().numel() == 1


def test_evaluation_keeps_nothing() -> None:
    """Invariant: vectors seen in `eval` move no code."""
    quantizer = start(EMAQuantizer(8, 4), draw(8, 4))
    twin = start(EMAQuantizer(8, 4), draw(8, 4))
    quantizer.eval()(draw(2, 5, 4, seed=9), torch.arange(2))
    for each in (quantizer, twin):
        step(each.train(), (draw(2, 5, 4, seed=1), torch.arange(2)))
    assert torch.equal(quantizer.codebook, twin.codebook)
