"""What is compiled, how often, and what is said where that cannot be; the residual stream in bfloat16."""

import logging
import sysconfig
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from igpt.model import graphs
from igpt.model.block import Block
from igpt.model.features import layer_features
from igpt.model.generate import Sampling, generate
from igpt.model.gpt import GPT
from igpt.objective.ar import AR
from igpt.training import compiling
from tests.conftest import small_net
from tests.task.conftest import machine

CPU = torch.device("cpu")


def train(net: GPT, tokens: Tensor) -> list[Tensor]:
    loss = AR().loss(net(tokens), tokens, None)
    return [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))]


def test_graphs_are_counted(net: GPT, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the first block, to which nothing is added, and all others; of each one graph in training and one
    without gradients, and one more of each for other batch sizes. A second round compiles nothing, nor do features (of
    whose blocks each is given one tensor, as the first of training is) and sampling.
    """
    monkeypatch.setattr(Block, "compile", partialmethod(nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    machine(compile=True).prepare(net)
    counts: list[int] = []

    def count() -> None:
        counts.append(counters["stats"]["unique_graphs"])

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(2):
            counters.clear()
            for batch in (4, 3):  # 3: an odd last batch
                train(net, tokens[:batch])
                count()
                with torch.no_grad():
                    net(tokens[:batch])
                    count()
            with torch.no_grad():
                layer_features(net, tokens)
                generate(net, torch.rand(2, net.n_ctx), Sampling(1.0, None, None))
            count()
            assert not counters["graph_break"]
    assert counts == [2, 4, 6, 8, 8] + [0] * 5


def test_a_deferred_addition_changes_no_bit(net: GPT, tokens: Tensor) -> None:
    """Independent source: blocks one by one, each with its whole input as one tensor, as OpenAI's code has them."""
    h = net.embed(tokens)
    for block in net.blocks:
        x = h + block.attn(block.ln_1(h))[0]
        h = x + block.mlp(block.ln_2(x))
    expected = net.logits(net.ln_f(h))
    assert torch.equal(net(tokens), expected)
    assert torch.equal(list(net.hidden_states(tokens))[-1], h)
    net.checkpointing = True
    assert torch.equal(net(tokens), expected)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_what_compiling_needs(
    device: str, net: GPT, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: nothing is compiled and a line says what is missing: a compiler, Python's headers, Triton."""
    on, found = torch.device(device), lambda name: object()
    monkeypatch.setattr(compiling.importlib.util, "find_spec", found)
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "nowhere")
    assert compiling.find_missing(on) == f"{Path('nowhere/Python.h')} (Debian's package python3-dev)"
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "false")
    assert "compiler" in str(compiling.find_missing(on))
    if device == "cuda":
        monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
        assert "triton" in str(compiling.find_missing(on))
        return
    machine(compile=True).prepare(net)
    assert "nothing is compiled, which is slower: torch.compile needs a C++ compiler" in caplog.text
    assert caplog.records[-1].levelno == logging.WARNING
    assert all(block._compiled_call_impl is None for block in net.blocks)


def test_a_compilation_that_fails_is_one_line(net: GPT, tokens: Tensor) -> None:
    """Invariant: with the remedy; other errors are left alone."""

    def fail(*_: object) -> None:
        raise RuntimeError("no Triton here\nsecond line")

    torch._dynamo.reset()
    for block in net.blocks:
        block.compile(backend=fail)
    with pytest.raises(RuntimeError) as caught:
        net(tokens)
    message = compiling.explain_compile_failure(caught.value)
    assert message is not None
    assert "no Triton here" in message
    assert message.endswith("trainer.compile=false computes the same without it")
    assert "\n" not in message
    assert compiling.explain_compile_failure(RuntimeError("no Triton here")) is None


def test_a_residual_stream_in_bfloat16() -> None:
    """Independent source: the float32 network's loss and gradients; the stream is rounded, norms sum in float32.

    Beyond autocast's own rounding; by hand, where nothing but the embedding is added, the stream is its rounding.
    """
    net = small_net(n_layer=6, n_ctx=64)
    tokens = torch.randint(net.n_vocab, (8, 64), generator=torch.Generator().manual_seed(0))
    exact = train(net, tokens)
    errors = {}
    for residual in ("float32", "bfloat16"):
        machine(precision="bf16-mixed", residual=residual).prepare(net)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = train(net, tokens)
            streams = list(net.hidden_states(tokens))
        assert {h.dtype for h in streams} == {getattr(torch, residual)}
        assert {gradient.dtype for gradient in rounded[1:]} == {torch.float32}
        errors[residual] = [float((one - same).norm() / same.norm()) for one, same in zip(rounded, exact, strict=True)]
    assert errors["bfloat16"][0] < 5e-3
    assert max(errors["bfloat16"]) < 3 * max(errors["float32"])
    machine().prepare(net)
    assert all(map(torch.equal, train(net, tokens), exact))  # and back


def test_a_residual_stream_in_bfloat16_is_drawn_from() -> None:
    """Invariant: tokens one by one, by the recorded step too, are those of whole forward passes, but for rounding."""
    net = small_net(n_ctx=40)
    machine(precision="bf16-mixed", residual="bfloat16").prepare(net)
    tokens = torch.randint(net.n_vocab, (4, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        full, cache, other = net(tokens).float(), net.new_cache(4), net.new_cache(4)
        net.step(tokens[:, :4], cache)
        net.step(tokens[:, :4], other)
        recorded = graphs.RecordedStep(net, other)
        for i in range(4, 39):
            for logits in (net.step(tokens[:, i : i + 1], cache), recorded(tokens[:, i : i + 1])):
                assert (logits.float() - full[:, i + 1]).norm() < 0.03 * full[:, i + 1].norm()


def test_a_residual_stream_is_refused_in_float32() -> None:
    with pytest.raises(ValueError, match=r"is for trainer\.precision=bf16-mixed"):
        machine(residual="bfloat16").prepare(small_net())
