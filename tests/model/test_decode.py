"""Drawing one more token: every way is the whole network's forward pass, but for rounding."""

import platform
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from igpt.model import c_attention, c_library, decode, dispatch, gpt, graphs
from igpt.model.attention import split_heads
from igpt.model.block import Attention, Cache
from igpt.model.config import GPTConfig
from igpt.model.generate import Sampling, generate
from igpt.model.gpt import GPT
from igpt.model.verify import verify_attention
from tests.conftest import needs_compiler, small_net
from tests.model.test_gpt import attended
from tests.model.test_sparse_attention import check_against_definition
from tests.task.conftest import machine

WAYS = [pytest.param("native", marks=needs_compiler), "columns", "graphs", "layers"]


@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize(
    ("batch", "n_embd", "n_head", "n_ctx", "n_vocab"),
    [(1, 32, 4, 24, 16), (4, 48, 2, 37, 10), (7, 64, 1, 40, 17), (18, 216, 3, 33, 5), (3, 160, 2, 61, 8)],
)
def test_logits_are_those_of_the_whole_network(
    backend: str, batch: int, n_embd: int, n_head: int, n_ctx: int, n_vocab: int
) -> None:
    """Invariant: at every position those of a forward pass in float64 within 2e-5; heads of 8 to 80, odd counts."""
    net = GPT(GPTConfig(n_layer=3, n_embd=n_embd, n_head=n_head, n_ctx=n_ctx, n_vocab=n_vocab, causal=True))
    net.init_weights(0)
    with torch.no_grad():
        net.wtet.normal_(0, 1 / n_embd**0.5)
        for block in net.blocks:
            block.attn.c_attn.weight.mul_(2)  # attention that is not flat
    tokens = torch.randint(n_vocab, (batch, n_ctx), generator=torch.Generator().manual_seed(1))
    start = 5
    with torch.inference_mode():
        full = deepcopy(net).double()(tokens).float()
        cache = net.new_cache(batch)
        net.step(tokens[:, :start], cache)
        step = decode.make_decode_step(net, cache, backend)
        for i in range(start, n_ctx - 1):
            torch.testing.assert_close(step(tokens[:, i : i + 1]), full[:, i + 1], rtol=0, atol=2e-5)


@needs_compiler
def test_far_from_zero() -> None:
    """Invariant: neither scores nor activations that are large overflow what C computes of them."""
    net = small_net(n_ctx=24)
    with torch.no_grad():
        for block in net.blocks:
            block.attn.c_attn.weight.mul_(30)
            block.mlp.c_fc.weight.mul_(1000)
    tokens = torch.randint(net.n_vocab, (4, net.n_ctx), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        full = deepcopy(net).double()(tokens)
        cache = net.new_cache(4)
        net.step(tokens[:, :2], cache)
        step = decode.make_decode_step(net, cache, "native")
        for i in range(2, net.n_ctx - 1):
            torch.testing.assert_close(step(tokens[:, i : i + 1]).double(), full[:, i + 1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("backend", WAYS)
def test_the_same_images(net: GPT, backend: str) -> None:
    """Invariant: token by token, drawn and greedy, with a prompt and without, those of whole forward passes."""
    uniforms = torch.rand(6, net.n_ctx, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = torch.randint(net.n_vocab, (6, net.n_ctx), generator=torch.Generator().manual_seed(1))
    known = torch.arange(net.n_ctx) < 7
    for sampling in (Sampling(1.0, None, None), Sampling(1.0, 1, None)):
        prompts: list[dict[str, torch.Tensor]] = [{}, {"prompts": given, "known": known}]
        for prompt in prompts:
            slow = generate(net, uniforms, sampling, cached=False, **prompt)
            assert torch.equal(generate(net, uniforms, sampling, backend=backend, **prompt), slow)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("n_ctx", [24, 300])
def test_a_recorded_step_goes_on_from_span_to_span(n_ctx: int, mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: the step that a GPU records, here not recorded, is the network in float64 within 1e-5; in bfloat16, on
    average, no more than half as far again from it as the network itself is.

    By hand: it is recorded again every ten positions, and reads no key beyond them.
    """
    monkeypatch.setattr(graphs, "SPAN", 10)
    ends: list[int] = []
    record = graphs.RecordedStep._record

    def noted(self: graphs.RecordedStep) -> None:
        ends.append(self._end)
        for kept in (*self.keys, *self.values):
            kept[:, :, self.now : self._end] = 0
            kept[:, :, self._end :] = torch.nan
        record(self)

    monkeypatch.setattr(graphs.RecordedStep, "_record", noted)
    net = small_net(n_ctx=n_ctx)
    tokens = torch.randint(net.n_vocab, (3, n_ctx), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        exact, own, cache = deepcopy(net).double()(tokens), net(tokens), net.new_cache(3)
        net.step(tokens[:, :4], cache)
        step = graphs.RecordedStep(net, cache)
        logits = torch.stack([step(tokens[:, i : i + 1]).clone() for i in range(4, n_ctx - 1)], 1)  # (B, T - 5, V)
    assert ends == [*range(10, n_ctx, 10), n_ctx]
    assert logits.dtype == (torch.bfloat16 if mixed else torch.float32)
    off, its_own = ((values - exact[:, 5:]).abs() for values in (logits, own[:, 5:]))
    if mixed:
        assert off.max() < 2 * its_own.max()
        assert off.mean() < 1.5 * its_own.mean()
    else:
        assert off.max() < 1e-5


def test_a_recording_that_fails_costs_speed_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: where a later graph cannot be recorded, the same step goes on unrecorded."""
    monkeypatch.setattr(graphs, "SPAN", 10)
    net = small_net(n_ctx=24)
    tokens = torch.randint(net.n_vocab, (3, 24), generator=torch.Generator().manual_seed(1))
    record = graphs.RecordedStep._record

    def fails_later(self: graphs.RecordedStep) -> None:
        if self.now >= 10:
            raise RuntimeError("operation failed due to a previous error during capture")
        record(self)

    monkeypatch.setattr(graphs.RecordedStep, "_record", fails_later)
    with torch.inference_mode():
        full, cache = net(tokens), net.new_cache(3)
        net.step(tokens[:, :4], cache)
        step = graphs.RecordedStep(net, cache)
        for i in range(4, 23):
            torch.testing.assert_close(step(tokens[:, i : i + 1]), full[:, i + 1], rtol=0, atol=1e-5)
    assert "a step is not recorded" in caplog.text


class ScaledAttention(Attention):
    """As after an edit of the block: a weight more, which scales what attention gives."""

    def __init__(self, config: GPTConfig, *parts: Any) -> None:
        super().__init__(config, *parts)
        self.scale = nn.Parameter(torch.full((config.n_embd,), 1.05))

    def forward(self, *inputs: Any) -> tuple[torch.Tensor, None]:
        return super().forward(*inputs)[0] * self.scale, None


class FarAttention(Attention):
    """As after an edit that shows from the fourth key on: what lies further back than two positions counts less."""

    def forward(
        self, x: torch.Tensor, first_value: None = None, cache: Cache | None = None, layer: int = 0
    ) -> tuple[torch.Tensor, None]:
        start = 0 if cache is None else cache.length
        qkv = self.c_attn(x)
        q, k, v = split_heads(qkv, self.n_head) if cache is None else self._update_kv_cache(qkv, cache, layer)
        if cache is not None:
            k, v = (kept[layer][:, :, : start + x.shape[1]] for kept in (cache.keys, cache.values))
        back = torch.arange(start, start + x.shape[1])[:, None] - torch.arange(k.shape[2])
        bias = torch.where(back < 0, -torch.inf, torch.where(back > 2, -1.0, 0.0))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.c_proj(out.transpose(1, 2).flatten(2)), None


@pytest.mark.parametrize("edited", [ScaledAttention, FarAttention])
@pytest.mark.parametrize("backend", ["auto", "native", "columns", "graphs"])
def test_a_way_that_computes_another_network_is_not_used(
    edited: type[Attention], backend: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: after an edit of the block alone, tokens are drawn from the network that was trained, and that is
    said; the network as it was is drawn from the fast way."""
    if backend == "native" and not c_library.is_available():
        pytest.skip("no C compiler")
    monkeypatch.setattr(gpt, "Attention", edited)
    net = small_net()
    tokens = torch.randint(net.n_vocab, (2, net.n_ctx), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        full, cache = net(tokens), net.new_cache(2)
        net.step(tokens[:, :0], cache)
        step = decode.make_decode_step(net, cache, backend)
        for i in range(net.n_ctx - 1):
            torch.testing.assert_close(step(tokens[:, i : i + 1]), full[:, i + 1], rtol=0, atol=1e-5)
    assert "is not used, tokens are drawn more slowly: its logits differ from the network's" in caplog.text


@pytest.mark.parametrize("backend", ["auto", "layers", "columns"])
def test_a_step_that_is_not_the_forward_pass_draws_nothing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an edit of the pass over whole images that forgot the step of one token, there is no way left to draw."""

    class Windowed(Attention):
        def forward(
            self, x: torch.Tensor, first_value: None = None, cache: Cache | None = None, layer: int = 0
        ) -> tuple[torch.Tensor, None]:
            is_step = cache is not None and x.shape[1] == 1
            return super().forward(x, None, cache, layer)[0] * (1.0 if is_step else 1.05), None

    monkeypatch.setattr(gpt, "Attention", Windowed)
    net = small_net()
    for _ in range(2):
        cache = net.new_cache(2)
        net.step(torch.zeros(2, 0, dtype=torch.int64), cache)
        with pytest.raises(ValueError, match=r"the network's step of one token \(GPT.step\) is not its forward pass"):
            decode.make_decode_step(net, cache, backend)


def test_a_way_that_gives_nan_is_not_used(
    net: GPT, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(net: GPT, cache: Cache) -> decode.Step:
        return lambda tokens: net.step(tokens, cache) * torch.nan

    monkeypatch.setitem(
        decode.BACKENDS, "columns", decode.DecodeBackend(broken, decode.BACKENDS["columns"].supported_settings)
    )
    assert not decode.is_verified(net, "columns")
    assert "decoding=columns is not used" in caplog.text
    cache = net.new_cache(1)
    net.step(torch.zeros(1, 0, dtype=torch.int64), cache)
    step = decode.make_decode_step(net, cache, "columns")
    assert step(torch.zeros(1, 1, dtype=torch.int64)).isfinite().all()


def test_a_way_is_looked_at_once(net: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: one whole pass for each network and way; a head of zeros says nothing, so it is looked at again."""
    passes = []
    trunk = GPT.trunk
    monkeypatch.setattr(GPT, "trunk", lambda self, *given: (passes.append(1), trunk(self, *given))[1])
    zeros = small_net()
    with torch.no_grad():
        zeros.wtet.zero_()
    for which, expected in ((net, 1), (zeros, 3)):
        passes.clear()
        for _ in range(3):
            assert decode.is_verified(which, "columns")
        assert len(passes) == expected


def test_attention_in_c_that_differs_is_not_used(
    net: GPT, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: another result of the C than PyTorch's gives it up, for all blocks; an equal one does not."""
    if not c_library.is_available():
        pytest.skip("no C compiler")
    verify_attention(net)
    assert {block.attn.backend for block in net.blocks} == {"auto"}
    attend = c_attention.attend

    def wrong(qkv: torch.Tensor, n_head: int, causal: bool) -> Any:
        out, lse = attend(qkv, n_head, causal)
        return torch.cat([out[:, :-1], out[:, -1:] * 1.01], 1), lse

    monkeypatch.setattr(c_attention, "attend", wrong)
    verify_attention(net)
    assert {block.attn.backend for block in net.blocks} == {"sdpa"}
    assert "attention in C is not used" in caplog.text


def test_a_network_says_how_it_is_drawn_from(net: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: `trainer.decoding` overrides what would be chosen."""
    machine(decoding="layers").prepare(net)
    monkeypatch.setattr(dispatch, "decode_backend", None)  # must not be asked
    with torch.inference_mode():
        cache = net.new_cache(2)
        net.step(torch.zeros(2, 0, dtype=torch.int64), cache)
        decode.make_decode_step(net, cache)(torch.zeros(2, 1, dtype=torch.int64))
    assert cache.length == 2  # the network's own step keeps count in the cache
    with pytest.raises(ValueError, match="decoding must be one of auto, native"):
        machine(decoding="fast")
    with pytest.raises(ValueError, match="native reads float32 weights on a CPU"):
        machine(decoding="native", precision="bf16-true")


@needs_compiler
def test_when_it_is_chosen(net: GPT) -> None:
    sizes = {"n_embd": net.n_embd, "n_head": net.n_head}
    assert dispatch.decode_backend(net.wte, **sizes) == "native"
    assert dispatch.decode_backend(net.wte, n_embd=60, n_head=5) == "columns"  # heads of 12, not of eights
    assert dispatch.decode_backend(net.wte.to(torch.bfloat16), **sizes) == "layers"
    assert dispatch.decode_backend(net.wte.to("meta"), **sizes) == "layers"
    with pytest.raises(ValueError, match="needs whole float32 weights on a CPU"):
        decode.make_decode_step(net.to(torch.bfloat16), net.new_cache(1), "native")


@needs_compiler
def test_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Round trip: what is compiled is kept, in a folder of the user's own, and taken the next time.

    Here for narrow vectors, as CPUs without AVX-512 have them; independent source: PyTorch's attention in float64.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if platform.machine() in dispatch.X86:
        monkeypatch.setenv("CC", "cc -mno-avx512f")
    c_library.load_library.cache_clear()
    try:
        assert c_library.load_library() is not None
        (kept,) = (tmp_path / "igpt" / "kernels").iterdir()
        assert kept.parent.stat().st_mode & 0o077 == 0
        monkeypatch.setattr(c_library, "compile_library", None)  # must not be called again
        c_library.load_library.cache_clear()
        assert c_library.load_library() is not None
        for n_ctx, depth, causal in ((64, 16, True), (37, 24, False), (200, 12, True)):
            qkv = torch.randn(2, n_ctx, 9 * depth, generator=torch.Generator().manual_seed(0))
            exact = attended(qkv.double(), 3, causal, "sdpa")
            for one, same in zip(attended(qkv, 3, causal, "native"), exact, strict=True):
                assert (one - same).abs().max() < 1e-5 * same.abs().max()
        check_against_definition("native")
    finally:
        c_library.load_library.cache_clear()


@pytest.mark.parametrize("compiler", ["nowhere-to-be-found", "false", "true"])
def test_without_a_compiler(
    net: GPT, compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: no compiler, or one that fails, costs speed only, and is said."""
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caplog.set_level("INFO")
    c_library.load_library.cache_clear()
    try:
        assert dispatch.decode_backend(net.wte, n_embd=net.n_embd, n_head=net.n_head) == "columns"
        assert dispatch.attention_backend(torch.device("cpu"), torch.float32, t=64, causal=True) == "bmm"
        assert "slower" in caplog.text
        with pytest.raises(ValueError, match="attention_backend=native needs a C compiler"):
            machine(attention_backend="native")
        with pytest.raises(ValueError, match="needs a C compiler"):
            decode.make_decode_step(net, net.new_cache(1), "native")
    finally:
        c_library.load_library.cache_clear()


def test_compiling_pays_where_training_is_long() -> None:
    """Invariant: on a CPU where networks are narrow or in bfloat16, on a GPU always."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for width, half, gains in ((64, False, True), (512, True, True), (512, False, False)):
        assert dispatch.is_worth_compiling(cpu, n_embd=width, flops=1e14, half=half) is gains
        assert not dispatch.is_worth_compiling(cpu, n_embd=width, flops=1e11, half=half)
        assert dispatch.is_worth_compiling(gpu, n_embd=width, flops=1e17, half=half)
        assert not dispatch.is_worth_compiling(gpu, n_embd=width, flops=1e14, half=half)
