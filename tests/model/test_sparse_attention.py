"""Attention through sparse masks, by every backend."""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from igpt.distributed.process_state import num_threads
from igpt.model import c_attention, c_library, dispatch, sparse_mask
from igpt.model.attention import masked_attention, self_attention
from igpt.model.patterns import ALTERNATING, SPARSE, Pattern, TokenLayout
from igpt.model.sparse_mask import SparseMask
from igpt.model.verify import verify_attention
from tests.conftest import needs_compiler, small_net
from tests.model.test_options import make
from tests.task.conftest import machine

N_HEAD, DEPTH = 2, 24
BACKENDS = [pytest.param("native", marks=needs_compiler), "blocks", "sdpa", "bmm"]
GRIDS = ((5, 7, 1), (4, 8, 1), (4, 3, 3), (9, 11, 1))  # none, one and several blocks of queries, whole and not

# of a grid of 3 × 3: the keys that each query sees, in causal attention
BY_HAND = {
    ("local", 0): ["0", "01", "02", "0123", "01234", "0235", "0456", "04567", "0568"],
    ("strided", 0): ["0", "01", "012", "0123", "0234", "0345", "0456", "0567", "0678"],
    ("strided", 1): ["0", "01", "02", "013", "024", "035", "0146", "0257", "0368"],
    ("fixed", 0): ["0", "01", "012", "03", "034", "0345", "06", "067", "0678"],
    ("fixed", 1): ["0", "01", "02", "023", "024", "025", "0256", "0257", "0258"],
    ("axial", 0): ["0", "01", "012", "03", "04", "045", "06", "07", "078"],
    ("axial", 1): ["0", "01", "02", "013", "024", "035", "0146", "0257", "0368"],
}
BY_HAND_BOTH_WAYS = {
    ("local", 0): ["0134", "012345", "1245", "013467", "012345678", "124578", "3467", "345678", "4578"],
    ("axial", 0): ["012", "012", "012", "345", "345", "345", "678", "678", "678"],
    ("axial", 1): ["036", "147", "258", "036", "147", "258", "036", "147", "258"],
    ("fixed", 1): ["0258", "1258", "258", "2358", "2458", "258", "2568", "2578", "258"],
}


def make_pattern(name: str, half: int, causal: bool, grid: tuple[int, int, int], shuffled: bool = False) -> Pattern:
    cells = grid[0] * grid[1]
    drawn = torch.randperm(cells, generator=torch.Generator().manual_seed(0)).tolist()
    layout = TokenLayout(*grid, tuple(drawn) if shuffled else None)
    return Pattern(name, half, causal, layout, radius=2, stride=layout.row_length)


def list_patterns() -> Iterator[Pattern]:
    for grid, causal, shuffled, name in itertools.product(GRIDS, (True, False), (False, True), SPARSE):
        for half in (0, 1) if name in ALTERNATING else (0,):
            yield make_pattern(name, half, causal, grid, shuffled)


def draw(t: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (1.5 * torch.randn(2, t, 3 * N_HEAD * DEPTH, generator=torch.Generator().manual_seed(0))).to(dtype)


def differentiate(out: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    """The output and its gradients, of a loss that no position is alike in."""
    along = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, of, along)


def attend_sparsely(qkv: Tensor, mask: SparseMask, backend: str) -> tuple[Tensor, ...]:
    qkv = qkv.detach().requires_grad_()
    return differentiate(masked_attention(qkv, N_HEAD, causal=mask.pattern.causal, mask=mask, backend=backend), qkv)


def attend_densely(qkv: Tensor, visible: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """The definition: softmax over the visible keys."""
    q, k, v = qkv.unflatten(2, (3, N_HEAD, DEPTH)).permute(2, 0, 3, 1, 4)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / DEPTH**0.5 + bias
    weights = torch.where(visible, scores.exp(), 0)
    return torch.einsum("bhij,bhjd->bihd", weights / weights.sum(-1, keepdim=True), v).flatten(2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_attention_is_what_it_is_in_float64(backend: str) -> None:
    """Independent source: the definition in float64; outputs and gradients of every pattern."""
    check_against_definition(backend)


def check_against_definition(backend: str) -> None:
    for pattern in list_patterns():
        t = pattern.layout.n_ctx
        mask, visible = SparseMask(pattern), pattern.mask_rows(0, t)
        for dtype, rounding in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
            qkv = draw(t, dtype)
            exact = qkv.double().requires_grad_()
            expected = differentiate(attend_densely(exact, visible), exact)
            for one, same in zip(attend_sparsely(qkv, mask, backend), expected, strict=True):
                assert one.dtype == dtype
                assert (one - same).abs().max() < rounding * same.abs().max(), (pattern, dtype)


@pytest.mark.parametrize(("causal", "by_hand"), [(True, BY_HAND), (False, BY_HAND_BOTH_WAYS)])
def test_masks_of_a_small_grid(causal: bool, by_hand: dict[tuple[str, int], list[str]]) -> None:
    """Independent source: by hand."""
    for (name, half), rows in by_hand.items():
        pattern = Pattern(name, half, causal, TokenLayout(3, 3), radius=1, stride=3)
        mask = SparseMask(pattern)
        mask.prepare(torch.device("cpu"), "sdpa")
        assert mask.dense is not None
        assert ["".join(str(int(j)) for j in row.nonzero()) for row in mask.dense] == rows, pattern


@pytest.mark.parametrize("name", ["strided", "fixed"])
@pytest.mark.parametrize(("rows", "columns", "stride"), [(6, 6, 6), (5, 7, 4), (3, 5, 15)])
def test_two_layers_reach_every_earlier_position(name: str, rows: int, columns: int, stride: int) -> None:
    """Invariant (Child et al. 2019, §4.2): the product of both masks is the causal triangle."""
    t = rows * columns
    first, second = (
        Pattern(name, half, True, TokenLayout(rows, columns), stride=stride).mask_rows(0, t).long() for half in (0, 1)
    )
    assert torch.equal(second @ first > 0, torch.ones(t, t, dtype=torch.bool).tril())
    assert not torch.equal(first > 0, torch.ones(t, t, dtype=torch.bool).tril()) or stride == t


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_of_the_whole_grid_is_full_attention(backend: str, causal: bool) -> None:
    """Invariant: local with a radius of at least the side."""
    qkv = (draw(63) / 1.5).requires_grad_()
    mask = SparseMask(Pattern("local", 0, causal, TokenLayout(7, 9), radius=9))
    expected = differentiate(self_attention(qkv, N_HEAD, causal=causal), qkv)
    (out, gradient), (same, d_same) = attend_sparsely(qkv, mask, backend), expected
    assert (out - same).abs().max() < 1e-6 * same.abs().max()
    assert (gradient - d_same).abs().max() < 3e-6 * d_same.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hidden_key_changes_nothing(backend: str) -> None:
    """Invariant: to the bit, in every pattern; and the queries that see it all change."""
    for pattern in list_patterns():
        t, mask, j = pattern.layout.n_ctx, SparseMask(pattern), pattern.layout.n_ctx // 3
        seen = pattern.mask_rows(0, t)[:, j]
        for dtype in (torch.float32, torch.bfloat16):
            qkv = draw(t, dtype)
            changed = qkv.clone()
            changed[:, j, N_HEAD * DEPTH :] += 1
            outputs = [
                masked_attention(x, N_HEAD, causal=pattern.causal, mask=mask, backend=backend) for x in (qkv, changed)
            ]
            same = (outputs[0] == outputs[1]).all(-1).all(0)
            assert torch.equal(same, ~seen), pattern


@needs_compiler
def test_what_is_not_a_number_is_not_hidden_in_c() -> None:
    """Invariant: a bad key spoils all that see it, and the gradient, so that training stops."""
    pattern = make_pattern("local", 0, True, (9, 11, 1))
    qkv = draw(99)
    qkv[0, 40, N_HEAD * DEPTH : 2 * N_HEAD * DEPTH] = torch.nan
    out, gradient = attend_sparsely(qkv, SparseMask(pattern), "native")
    assert not out[0, pattern.mask_rows(0, 99)[:, 40]].isfinite().any()
    assert not gradient.isfinite().all()
    assert out[1].isfinite().all()


@needs_compiler
def test_the_number_of_threads_changes_no_bit() -> None:
    """Invariant: more threads than heads, and fewer."""
    mask, outputs = SparseMask(make_pattern("strided", 1, True, (9, 11, 1))), []
    for threads in (1, 3, 40):
        with num_threads(threads):
            outputs.append(attend_sparsely(draw(99), mask, "native"))
    for others in outputs[1:]:
        assert all(map(torch.equal, others, outputs[0]))


@needs_compiler
def test_sparse_attention_in_c_as_an_operator() -> None:
    """Independent source: PyTorch's own checks of an operator's schema and shapes; strides may be as they come."""
    mask = SparseMask(make_pattern("local", 0, True, (5, 7, 1)))
    mask.prepare(torch.device("cpu"), "native")
    assert mask.lanes is not None
    qkv = draw(35).requires_grad_()
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(c_attention.attend_sparse, (qkv, N_HEAD, *mask.lanes), test_utils=checks)
    apart = qkv.detach().transpose(0, 1).contiguous().transpose(0, 1)
    assert not apart.is_contiguous()
    expected = attend_sparsely(qkv, mask, "native")
    assert all(map(torch.equal, attend_sparsely(apart, mask, "native"), expected))
    empty = attend_sparsely(qkv[:0], mask, "native")
    assert [part.shape for part in empty] == [(0, 35, N_HEAD * DEPTH), (0, 35, 3 * N_HEAD * DEPTH)]


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_sparse_attention_compiles(backend: str) -> None:
    """Invariant: compiled as one graph, where its tables are there, it gives the same; these may be built anywhere."""
    mask = SparseMask(make_pattern("axial", 1, True, (5, 7, 1)))
    with torch.inference_mode(), torch.device("meta"):
        mask.prepare(torch.device("cpu"), backend)

    def attend(qkv: Tensor) -> Tensor:
        return masked_attention(qkv, N_HEAD, causal=True, mask=mask, backend=backend)

    qkv = draw(35).requires_grad_()
    expected = attend_sparsely(qkv, mask, backend)
    for fullgraph in (True, False):  # without its tables, as two graphs
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=fullgraph)
        for one, same in zip(differentiate(compiled(qkv), qkv), expected, strict=True):
            assert torch.allclose(one, same, atol=1e-6)
        mask = copy.deepcopy(mask)


@pytest.mark.parametrize("backend", ["sdpa", "bmm", "auto"])
@pytest.mark.parametrize("name", [None, "local"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_bias_is_added_to_the_scores(backend: str, name: str | None, causal: bool) -> None:
    """Independent source: the definition in float64, of outputs, their gradients and the bias's."""
    t, mask = 35, None if name is None else SparseMask(make_pattern(name, 0, causal, (5, 7, 1)))
    bias = torch.randn(N_HEAD, t, t, generator=torch.Generator().manual_seed(2))
    visible = torch.ones(t, t, dtype=torch.bool)
    visible = mask.pattern.mask_rows(0, t) if mask is not None else visible.tril() if causal else visible
    for dtype, rounding in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        inputs = draw(t, dtype).requires_grad_(), bias.clone().requires_grad_()
        exact = [x.detach().double().requires_grad_() for x in inputs]
        out = masked_attention(inputs[0], N_HEAD, causal=causal, mask=mask, bias=inputs[1], backend=backend)
        expected = differentiate(attend_densely(exact[0], visible, exact[1]), *exact)
        for one, same in zip(differentiate(out, *inputs), expected, strict=True):
            assert (one - same).abs().max() < rounding * same.abs().max()


@pytest.mark.parametrize("backend", ["auto", "native", "blocks"])
def test_a_prompt_is_the_start_of_a_sequence(backend: str) -> None:
    """Invariant: causal attention over the first positions alone."""
    mask, qkv = SparseMask(make_pattern("strided", 0, True, (5, 7, 1))), draw(35)
    full = masked_attention(qkv, N_HEAD, causal=True, mask=mask, backend="sdpa")
    for t in (1, 12):
        assert torch.allclose(
            masked_attention(qkv[:, :t], N_HEAD, causal=True, mask=mask, backend=backend), full[:, :t], atol=1e-6
        )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_the_same_where_it_runs() -> None:
    """Independent source: the definition in float64. On a CPU FlexAttention has no backward pass, which is said."""
    for i, name in enumerate(SPARSE):
        causal = i % 2 == 0
        pattern = make_pattern(name, i // 2, causal, (4, 3, 3), shuffled=i < 2)
        qkv, mask = draw(36), SparseMask(pattern)
        out = masked_attention(qkv, N_HEAD, causal=causal, mask=mask, backend="flex")
        assert torch.allclose(out, attend_densely(qkv.double(), pattern.mask_rows(0, 36)).float(), atol=1e-5)
    with pytest.raises(ValueError, match="flex has no backward pass on a cpu, only on CUDA: choose auto"):
        masked_attention(qkv.requires_grad_(), N_HEAD, causal=causal, mask=mask, backend="flex")
    narrow = draw(36)[..., : 3 * N_HEAD * 8].contiguous().requires_grad_()  # heads that FlexAttention does not compile
    outputs = [masked_attention(narrow, N_HEAD, causal=causal, mask=mask, backend=way) for way in ("flex", "sdpa")]
    assert torch.equal(*outputs)


def test_backends_that_cannot_are_refused() -> None:
    """By hand: FlexAttention on a CPU or without a pattern; C or FlexAttention with a bias on the scores."""
    with pytest.raises(ValueError, match="attention_backend=flex is for a CUDA GPU, this would run on cpu"):
        machine(attention_backend="flex")
    flex = machine(attention_backend="flex", plan=True)
    with pytest.raises(ValueError, match=r"flex is for model.attention=local, strided, fixed, axial, this network has"):
        flex.prepare(small_net())
    with pytest.raises(ValueError, match="attention_backend=flex does not compute relative_bias"):
        flex.prepare(make("local_bias_rope"))
    flex.prepare(make("local"))
    if c_library.is_available():
        with pytest.raises(ValueError, match=r"native computes attention scores, model.attention=linear has none"):
            machine(attention_backend="native").prepare(make("mixed"))


def test_which_backend_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert dispatch.sparse_backend("auto", gpu) == "flex"
    for requested, chosen in (("auto", "sdpa"), ("flex", "sdpa"), ("bmm", "bmm")):
        assert dispatch.sparse_backend(requested, gpu, head_size=8) == chosen
    assert dispatch.sparse_backend("auto", cpu, torch.float64) == "blocks"
    assert (
        dispatch.sparse_backend("auto", cpu, dense=True) == dispatch.sparse_backend("native", cpu, dense=True) == "sdpa"
    )
    assert dispatch.sparse_backend("bmm", cpu, dense=True) == "bmm"
    for here in (True, False):
        monkeypatch.setattr(c_library, "is_available", lambda here=here: here)
        assert dispatch.sparse_backend("auto", cpu) == ("native" if here else "blocks")


def test_copies_share_what_their_originals_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: layers of one pattern keep one mask in a copied network; its tables are built once."""
    built = []
    build = SparseMask._build_dense
    monkeypatch.setattr(SparseMask, "_build_dense", lambda self: built.append(self) or build(self))
    mask = SparseMask(make_pattern("local", 0, True, (5, 7, 1)))
    for _ in range(2):
        mask.prepare(torch.device("cpu"), "sdpa")
    assert built == [mask]
    one, other = copy.deepcopy([mask, mask])
    assert one is other is not mask
    assert one.pattern == mask.pattern
    assert one.dense is None


@pytest.mark.parametrize("backend", ["blocks", "bmm"])
def test_saved_scores_are_counted(backend: str) -> None:
    """Independent source: what autograd saves beyond queries, keys, values, and less than all pairs by `blocks`."""
    pattern = make_pattern("local", 0, True, (9, 11, 1))
    mask, saved = SparseMask(pattern), []
    masked_attention(draw(99), N_HEAD, causal=True, mask=mask, backend=backend)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        masked_attention(draw(99).requires_grad_(), N_HEAD, causal=True, mask=mask, backend=backend)
    scores = {x.data_ptr(): x.numel() for x in saved if x.is_floating_point() and DEPTH not in x.shape[-2:]}
    expected = mask.count_saved_scores(backend)
    assert sum(scores.values()) == 2 * N_HEAD * expected
    assert (expected < 99**2) == (backend == "blocks")


@needs_compiler
def test_attention_in_c_is_checked_for_every_pattern(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: another result of the C in the second of two patterns gives it up; an equal one does not."""
    net = make("strided")
    verify_attention(net)
    assert {block.attn.backend for block in net.blocks} == {"auto"}
    attend, second = c_attention.attend_sparse, net.blocks[1].attn.mask
    assert second is not None
    assert second.lanes is not None

    def wrong(qkv: Tensor, n_head: int, *lanes: Tensor) -> Any:
        out, lse = attend(qkv, n_head, *lanes)
        return out * (1.01 if lanes[3] is second.lanes[3] else 1), lse

    monkeypatch.setattr(c_attention, "attend_sparse", wrong)
    verify_attention(net)
    assert {block.attn.backend for block in net.blocks} == {"blocks"}
    assert "attention in C is not used" in caplog.text


def test_blocks_read_few_hidden_keys() -> None:
    """Invariant: at 4,096 positions, keys read by attention in C, as a share of all causal pairs.

    By hand, what a window of 7 needs at least: 4 × 8 queries see at most 11 × 22 keys, 242 of 2,048 on average.
    """
    layout, pairs = TokenLayout(64, 64), 4096 * 4097 / 2
    for name, half, most in (("local", 0, 242 / 2048), ("strided", 1, 0.05), ("fixed", 0, 0.05), ("axial", 1, 0.05)):
        _, _, keys, _ = SparseMask(Pattern(name, half, True, layout, 7, 64))._build_lanes()
        assert len(keys) * sparse_mask.BLOCK / pairs < most, name
