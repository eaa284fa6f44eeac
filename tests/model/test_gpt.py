"""The network, held against OpenAI's and Hugging Face's own code and a rewrite in numpy."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from igpt.distributed.process_state import num_threads
from igpt.model import c_attention, dispatch
from igpt.model.attention import attend, self_attention
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.model.head import ClassHead
from igpt.objective.ar import AR
from tests.conftest import needs_compiler, perturbed, small_net
from tests.oracle import gpt as plain
from tests.oracle.names import from_openai, to_huggingface


def openai_case(shared: Path, kind: str) -> tuple[GPT, dict[str, np.ndarray], dict[str, np.ndarray]]:
    folder = shared / "oracles" / f"openai-{kind}"
    reference = dict(np.load(folder / "reference.npz"))
    variables = dict(np.load(folder / "weights.npz"))
    state = from_openai(variables)
    n_vocab, n_embd = state["wte"].shape
    net = GPT(
        GPTConfig(
            n_layer=len(reference["block_outputs"]),
            n_embd=n_embd,
            n_head=int(reference["n_head"]),
            n_ctx=len(state["wpe"]),
            n_vocab=n_vocab,
            causal=kind == "ar",
        )
    )
    net.load_state_dict(state)
    return net, variables, reference


@pytest.mark.parametrize("path", [pytest.param("native", marks=needs_compiler), "sdpa", "bmm"])
@pytest.mark.parametrize("kind", ["ar", "bert"])
def test_equals_openais_code(shared: Path, kind: str, path: str) -> None:
    """Independent source: logits, every block's output and the class loss of OpenAI's model.py, to 1e-5."""
    net, variables, reference = openai_case(shared, kind)
    for block in net.h:
        block.attn.backend = path
    tokens = torch.from_numpy(reference["tokens"]).long()
    visible = torch.from_numpy(reference["visible"]) if kind == "bert" else None
    with torch.no_grad():
        streams = torch.stack(list(net.hidden_states(tokens, visible)))[1:]
        logits = net(tokens, visible)
        head = ClassHead(n_embd=net.n_embd, n_class=len(variables["model/clf/wclf"]))
        head.wclf.copy_(torch.from_numpy(variables["model/clf/wclf"]))
        scores = head(net.trunk(tokens, visible))
    labels = torch.from_numpy(reference["labels"])
    assert (streams - torch.from_numpy(reference["block_outputs"])).abs().max() < 1e-5
    assert (logits - torch.from_numpy(reference["gen_logits"])).abs().max() < 1e-5
    assert abs(F.cross_entropy(scores, labels).item() - reference["clf_loss"]) < 1e-5
    assert (scores.argmax(-1) == labels).double().mean().item() * 100 == pytest.approx(float(reference["accuracy"]))


def test_generative_loss_equals_openais(shared: Path) -> None:
    """Independent source: gen_loss of OpenAI's model.py, to 1e-5."""
    net, _, reference = openai_case(shared, "ar")
    tokens = torch.from_numpy(reference["tokens"]).long()
    with torch.no_grad():
        loss = AR().loss(net(tokens), tokens, None)
    assert abs(loss.item() - reference["gen_loss"]) < 1e-5


@pytest.mark.parametrize("sizes", [(3, 24, 3, 64, 17), (4, 128, 4, 1024, 512)])
def test_equals_hugging_face(sizes: tuple[int, ...]) -> None:
    """Independent source: ImageGPTForCausalImageModeling with our random weights, float32 to 1e-5."""
    from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

    n_layer, n_embd, n_head, n_ctx, k = sizes
    net = perturbed(
        GPT(GPTConfig(n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_ctx=n_ctx, n_vocab=k, causal=True)), scale=0.03
    )
    config = ImageGPTConfig(
        vocab_size=k + 1,
        n_positions=n_ctx,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    reference = ImageGPTForCausalImageModeling(config).eval()
    to_huggingface(net.state_dict(), reference)
    tokens = torch.randint(k, (2, n_ctx), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(input_ids=F.pad(tokens[:, :-1], (1, 0), value=k)).logits
        own = net(tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = net(tokens).float()
    assert (own - expected).abs().max() < 1e-5
    assert expected.abs().max() > 0.3  # else the next line would say nothing
    # bfloat16 keeps 8 bits: 2^-8 relative in each product, a few of them in a row
    assert (rounded - expected).norm() / expected.norm() < 2e-2


@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_plain_rewrite(causal: bool) -> None:
    """Independent source: the numpy rewrite, both in float64, to 1e-12."""
    net = small_net(causal=causal).double()
    tokens = torch.randint(11, (2, 16), generator=torch.Generator().manual_seed(0))
    visible = None if causal else torch.rand(2, 16, generator=torch.Generator().manual_seed(1)) > 0.3
    weights = {name: w.numpy() for name, w in net.state_dict().items()}
    with torch.no_grad():
        own = net(tokens, visible).numpy()
    for i in range(2):
        shown = None if visible is None else visible[i].numpy()
        expected = plain.logits(weights, tokens[i].numpy(), shown, net.n_head, causal)
        assert np.abs(own[i] - expected).max() < 1e-12


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ((24, 512, 8), 76_571_648),
        ((36, 1024, 8), 455_157_760),
        ((48, 1536, 16), 1_362_250_752),
        ((60, 3072, 24), 6_801_438_720),
    ],
)
def test_the_papers_parameter_counts(sizes: tuple[int, int, int], count: int) -> None:
    """Independent source: Chen et al. 2020, Table 1 (76M, 455M, 1362M, 6801M), at 1024 positions and 512 colours."""
    n_layer, n_embd, n_head = sizes
    with torch.device("meta"):
        net = GPT(GPTConfig(n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_ctx=1024, n_vocab=512, causal=True))
    assert sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize("causal", [True, False])
def test_the_first_loss_is_ln_k(causal: bool) -> None:
    """Independent source: a zero head makes every logit exactly 0, so the loss is ln 512 = 6.2383…, in float32."""
    net = GPT(GPTConfig(n_layer=2, n_embd=32, n_head=2, n_ctx=16, n_vocab=512, causal=causal))
    net.init_weights(0)
    tokens = torch.randint(512, (3, 16))
    logits = net(tokens)
    assert (logits == 0).all()
    assert AR().loss(logits, tokens, None).item() == pytest.approx(math.log(512), rel=2**-22)


def test_initial_spreads_are_the_released_codes() -> None:
    """Independent source: the initialisers of OpenAI's model.py; a spread over n weights is known to 4/√(2n)."""
    net = GPT(GPTConfig(n_layer=9, n_embd=96, n_head=4, n_ctx=64, n_vocab=200, causal=True))
    net.init_weights(3)
    block = net.h[4]
    expected = {
        net.wpe: 0.01,
        net.wte: 0.02,
        block.attn.c_attn.weight: 96**-0.5,
        block.attn.c_proj.weight: (96 * 9) ** -0.5,
        block.mlp.c_fc.weight: 0.02,
        block.mlp.c_proj.weight: 0.02,
    }
    for weight, std in expected.items():
        assert weight.std().item() == pytest.approx(std, rel=4 / (2 * weight.numel()) ** 0.5)
    assert net.wtet.abs().max() == 0
    assert (block.ln_1.g == 1).all()
    assert 0.012 < net.sos.std() < 0.028
    assert not torch.equal(net.h[0].mlp.c_fc.weight, net.h[1].mlp.c_fc.weight)


def test_weights_are_no_numbers_until_they_are_set() -> None:
    """Invariant: a forgotten initialisation or load cannot pass for a network."""
    net = GPT(GPTConfig(n_layer=1, n_embd=8, n_head=2, n_ctx=4, n_vocab=3, causal=True))
    assert net(torch.zeros(1, 4, dtype=torch.int64)).isnan().all()


def test_logits_do_not_see_their_own_token(net: GPT, tokens: Tensor) -> None:
    """Invariant: p(x_t | x_<t). Changing token t moves no logit at 0 … t and some logit later."""
    t, changed = 5, tokens.clone()
    changed[:, t] = (tokens[:, t] + 1) % net.n_vocab
    before, after = net(tokens), net(changed)
    assert torch.equal(before[:, : t + 1], after[:, : t + 1])
    assert not torch.equal(before[:, t + 1 :], after[:, t + 1 :])


def test_a_hidden_pixel_is_not_seen_but_its_place_is() -> None:
    """Invariant of BERT: the content of a masked position moves nothing; that it is masked moves its own logits."""
    net = small_net(causal=False)
    tokens = torch.randint(11, (2, 16), generator=torch.Generator().manual_seed(0))
    visible = torch.ones(2, 16, dtype=torch.bool)
    visible[:, 3] = False
    changed = tokens.clone()
    changed[:, 3] = (tokens[:, 3] + 1) % 11
    assert torch.equal(net(tokens, visible), net(changed, visible))
    assert not torch.equal(net(tokens, visible)[:, 3], net(tokens)[:, 3])
    assert not torch.equal(net(tokens, visible)[:, 3], net(tokens, visible)[:, 4])


PATHS = [pytest.param("native", marks=needs_compiler), "sdpa", "bmm", "blocks", "auto"]


def attended(qkv: Tensor, n_head: int, causal: bool, path: str) -> tuple[Tensor, Tensor]:
    """Attention and its gradient, of a loss that no position is alike in."""
    qkv = qkv.detach().requires_grad_()
    out = self_attention(qkv, n_head, causal=causal, backend=path)
    along = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    (gradient,) = torch.autograd.grad(out, qkv, along)
    return out.detach(), gradient


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("n_ctx", "depth"), [(1, 8), (16, 8), (37, 24), (64, 16), (200, 64), (600, 5), (130, 80)])
@pytest.mark.parametrize("path", PATHS)
def test_attention_is_what_it_is_in_float64(path: str, n_ctx: int, depth: int, causal: bool) -> None:
    """Independent source: PyTorch's own in float64; outputs and gradients, to the rounding of each way."""
    qkv = 1.5 * torch.randn(2, n_ctx, 3 * 3 * depth, generator=torch.Generator().manual_seed(0))
    expected = attended(qkv.double(), 3, causal, "sdpa")
    scores_in_float32 = path in ("native", "sdpa")
    for dtype, rounding in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2 if scores_in_float32 else 3e-2)):
        exact = expected if dtype == torch.float32 else attended(qkv.to(dtype).double(), 3, causal, "sdpa")
        for one, same in zip(attended(qkv.to(dtype), 3, causal, path), exact, strict=True):
            assert (one - same).abs().max() < rounding * same.abs().max(), dtype


@pytest.mark.parametrize("path", PATHS)
def test_one_query_over_many_keys(path: str) -> None:
    """Independent source: the last position of PyTorch's causal attention."""
    q, k, v = (torch.randn(2, 3, 70, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    last = F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, -1:]
    assert torch.allclose(attend(q[:, :, -1:], k, v, causal=False, backend=path), last, atol=1e-6)


def test_one_query_on_a_gpu_is_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent source: PyTorch's fused attention, also with a bias, within 1e-6; none is fused, by what is called.

    cuDNN would build a plan for every number of keys.
    """
    q, k, v = (torch.randn(2, 3, 70, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    bias = torch.randn(3, 1, 70)
    cases = [(path, None) for path in ("auto", "sdpa", "bmm")] + [("auto", bias)]
    fused = [attend(q[:, :, -1:], k, v, causal=False, backend=path, bias=bias) for path, bias in cases]
    monkeypatch.setattr(dispatch, "is_unfused_query", lambda device: True)
    with RecordedOps() as called:
        plain = [attend(q[:, :, -1:], k, v, causal=False, backend=path, bias=bias) for path, bias in cases]
    torch.testing.assert_close(plain, fused, rtol=0, atol=1e-6)
    assert called.names
    assert not any("scaled_dot_product" in name for name in called.names)


class RecordedOps(TorchDispatchMode):
    """The names of the operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


def test_gradients_of_queries_keys_and_values_are_joined_in_one_copy() -> None:
    """By hand: of PyTorch's fused attention, whose gradients have positions before heads, one stack and no other."""
    x, weight = torch.randn(2, 50, 24, requires_grad=True), torch.randn(72, 24, requires_grad=True)
    out = self_attention(F.linear(x, weight), 3, causal=True, backend="sdpa")
    with RecordedOps() as called:
        torch.autograd.grad(out, (x, weight), torch.ones_like(out))
    assert [name for name in called.names if name in ("stack", "cat", "clone", "copy_")] == ["stack"]


@pytest.mark.parametrize("path", PATHS)
def test_no_image_is_a_batch_too(path: str) -> None:
    """By hand: a process whose share of a last batch is empty gets nothing back."""
    assert [part.shape for part in attended(torch.empty(0, 200, 72), 3, True, path)] == [(0, 200, 24), (0, 200, 72)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_is_not_hidden(bad: float, path: str) -> None:
    """Invariant: a bad key spoils all that see it, and the gradient, so that training stops."""
    qkv = torch.randn(1, 64, 72, generator=torch.Generator().manual_seed(0))
    qkv[0, 40, 24:48] = bad
    out, gradient = attended(qkv, 3, True, path)
    assert not out[0, 40:].isfinite().all(-1).any()
    assert not gradient.isfinite().all()


@needs_compiler
def test_large_scores_do_not_overflow_in_c() -> None:
    """Independent source: PyTorch's own in float64, where the softmax picks single positions."""
    qkv = torch.randn(2, 64, 72, generator=torch.Generator().manual_seed(0))
    qkv[..., :24] *= 300
    (out, gradient), (same, d_same) = attended(qkv, 3, True, "native"), attended(qkv.double(), 3, True, "sdpa")
    assert (out - same).abs().max() < 1e-3
    assert (gradient - d_same).abs().max() < 1e-3 * d_same.abs().max()


@needs_compiler
def test_c_has_room_under_any_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: what C works in is float32 here, also where Lightning makes bfloat16 the default, or a block meta."""
    taken: list[Tensor] = []
    empty = torch.empty

    def noted(*size: int, **how: Any) -> Tensor:
        taken.append(empty(*size, **how))
        return taken[-1]

    qkv = torch.randn(2, 50, 72)
    expected = self_attention(qkv, 3, causal=True, backend="native")
    monkeypatch.setattr(torch, "empty", noted)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            out = self_attention(qkv, 3, causal=True, backend="native")
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(out, expected)
    assert [(room.dtype, room.device.type) for room in taken] == [(torch.float32, "cpu")]


@needs_compiler
def test_c_as_an_operator() -> None:
    """Independent source: PyTorch's own checks of an operator's schema and shapes; strides may be as they come."""
    qkv = torch.randn(3, 20, 72, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.library.opcheck(c_attention.attend, (qkv, 3, True), test_utils=("test_schema", "test_faketensor"))
    apart = qkv.detach().transpose(0, 1).contiguous().transpose(0, 1)
    assert not apart.is_contiguous()
    assert all(map(torch.equal, attended(apart, 3, True, "native"), attended(qkv, 3, True, "native")))
    with pytest.raises(ValueError, match="3 heads cannot be 70 numbers"):
        c_attention.attend(torch.randn(1, 2, 70), 3, True)


@pytest.mark.slow
@needs_compiler
def test_compiled_in_bfloat16(net: GPT, tokens: Tensor) -> None:
    """Invariant: what training in bfloat16 chooses gives, compiled or not, the float32 gradients but for rounding."""
    exact = gradients(net, tokens)
    for compiled in (False, True):
        if compiled:
            for block in net.blocks:
                block.compile()
        with torch.autocast("cpu", torch.bfloat16):
            rounded = gradients(net, tokens)
        for one, same in zip(rounded, exact, strict=True):
            assert (one - same).abs().max() < 0.05 * same.abs().max() + 1e-4


@needs_compiler
def test_c_gives_the_same_bits_by_any_number_of_threads() -> None:
    """Invariant: a run repeats itself whatever else the machine does."""
    qkv = torch.randn(5, 50, 72, generator=torch.Generator().manual_seed(0))
    outputs = []
    for threads in (1, 4, 40):  # 40: more than there are heads of images
        with num_threads(threads):
            outputs.append(attended(qkv, 3, True, "native"))
    for others in outputs[1:]:
        assert all(map(torch.equal, others, outputs[0]))


def gradients(net: GPT, tokens: Tensor) -> list[Tensor]:
    loss = AR().loss(net(tokens), tokens, None)
    return [loss, *torch.autograd.grad(loss, list(net.parameters()))]


@pytest.mark.ci
def test_every_way_to_run_gives_the_same_gradients(net: GPT, tokens: Tensor) -> None:
    """Invariant: checkpointed, compiled, and both with any way of attention equal the plain pass to 1e-5."""
    expected = gradients(net, tokens)
    ways = {
        "checkpointed": ("auto", True, False),
        "compiled": ("auto", False, True),
        **{f"compiled {path}": (path, True, True) for path in ("auto", "sdpa", "bmm", "blocks")},
    }
    for way, (path, checkpointing, compiled) in ways.items():
        other = small_net()
        other.checkpointing = checkpointing
        for block in other.h:
            block.attn.backend = path
            if compiled:
                block.compile()
        assert set(other.state_dict()) == set(net.state_dict()), "compiling renames nothing"
        for one, same in zip(gradients(other, tokens), expected, strict=True):
            assert torch.allclose(one, same, rtol=1e-4, atol=1e-5), way


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"n_embd": 10, "n_head": 4}, "not divisible"), ({"n_layer": 0}, "n_layer"), ({"n_ctx": 2.5}, "whole number")],
)
def test_bad_sizes(sizes: dict[str, int], message: str) -> None:
    good = {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_ctx": 4, "n_vocab": 3}
    with pytest.raises(ValueError, match=message):
        GPT(GPTConfig(**{**good, **sizes}, causal=True))


def test_another_number_of_tokens(net: GPT) -> None:
    with pytest.raises(ValueError, match="15 tokens an image, this network has 16"):
        net(torch.zeros(1, 15, dtype=torch.int64))
