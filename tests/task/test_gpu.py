"""What only a GPU can show. `python -m pytest -m gpu`"""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from igpt.checkpoint.find import find_weights
from igpt.model import decode, graphs
from igpt.model.attention import masked_attention
from igpt.model.config import GPTConfig
from igpt.model.generate import Sampling, generate
from igpt.model.gpt import GPT
from igpt.model.patterns import SPARSE, Pattern, TokenLayout
from igpt.model.sparse_mask import SparseMask
from igpt.utils import keyed
from tests.conftest import perturbed, small_net
from tests.task.conftest import Lab, machine
from tests.tokens.test_datamodule import module
from tests.tokens.test_vqvae import build_network, build_tokenizer, draw_pixels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, PyTorch sees none"),
]


def test_weights_are_drawn_the_same_on_every_device() -> None:
    """Invariant: initialising on the GPU gives the CPU's weights, to the bit."""
    on_cpu = GPT(GPTConfig(n_layer=2, n_embd=32, n_head=2, n_ctx=16, n_vocab=17, causal=True))
    on_cpu.init_weights(0)
    with torch.device("cuda"):
        on_gpu = GPT(on_cpu.config)
        on_gpu.init_weights(0)
    for one, other in zip(on_cpu.parameters(), on_gpu.parameters(), strict=True):
        assert torch.equal(one, other.cpu())


def test_logits_equal_the_cpus() -> None:
    """Invariant: float32 to 1e-4, compiled or not, bfloat16 to what it allows."""
    net = small_net(n_ctx=64)
    tokens = torch.randint(11, (4, 64))
    expected = net(tokens).detach()
    net = net.cuda()
    for compiled in (False, True):
        if compiled:
            for block in net.blocks:
                block.compile()
        with torch.no_grad():
            assert (net(tokens.cuda()).cpu() - expected).abs().max() < 1e-4
            with torch.autocast("cuda", dtype=torch.bfloat16):
                rounded = net(tokens.cuda()).float().cpu()
        assert (rounded - expected).norm() / expected.norm() < 2e-2


def test_keyed_numbers_equal_the_cpus() -> None:
    """Invariant: to the bit."""
    rng_keys = keyed.per_example_keys(keyed.key(0, "test"), torch.arange(100))
    assert torch.equal(keyed.uniform(rng_keys.cuda(), 64).cpu(), keyed.uniform(rng_keys, 64))


def test_cached_draws_equal_uncached() -> None:
    """Invariant: on the GPU too."""
    net = perturbed(GPT(GPTConfig(n_layer=2, n_embd=32, n_head=2, n_ctx=64, n_vocab=17, causal=True))).cuda()
    uniforms = keyed.uniform(keyed.per_example_keys(keyed.key(0, "test"), torch.arange(8)), 64).cuda()
    sampling = Sampling(1.0, None, None)
    assert torch.equal(generate(net, uniforms, sampling), generate(net, uniforms, sampling, cached=False))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", SPARSE)
def test_flex_attention_equals_the_cpus(name: str, compiled: bool) -> None:
    """Invariant: outputs and gradients of a dense mask on the CPU, float32 to 1e-3 and bfloat16 to 3 %."""
    layout = TokenLayout(12, 15, 1, tuple(torch.randperm(180, generator=torch.Generator().manual_seed(0)).tolist()))
    for half, causal in ((0, True), (1, True), (1, False)):
        mask = SparseMask(Pattern(name, half, causal, layout, radius=3, stride=15))
        along = torch.randn(2, 180, 64)

        def attend(qkv: torch.Tensor, backend: str, mask: SparseMask = mask, causal: bool = causal) -> torch.Tensor:
            return masked_attention(qkv, 2, causal=causal, mask=mask, backend=backend)

        for dtype, rounding in ((torch.float32, 1e-3), (torch.bfloat16, 3e-2)):
            qkv = torch.randn(2, 180, 192).to(dtype).requires_grad_()
            on_gpu = qkv.detach().cuda().requires_grad_()
            expected = attend(qkv, "sdpa")
            mask.prepare(on_gpu.device, "flex")
            out = (torch.compile(attend) if compiled else attend)(on_gpu, "auto")
            (gradient,) = torch.autograd.grad(out, on_gpu, along.to(dtype).cuda())
            (same,) = torch.autograd.grad(expected, qkv, along.to(dtype))
            assert (out.cpu() - expected).abs().max() < rounding * expected.abs().max()
            assert (gradient.cpu() - same).abs().max() < rounding * same.abs().max()


@pytest.mark.parametrize("mixed", [False, True])
def test_a_recorded_step_is_taken_from_span_to_span(
    mixed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: CUDA graphs are used, and give the logits of whole forward passes."""
    monkeypatch.setattr(graphs, "SPAN", 16)
    net = perturbed(GPT(GPTConfig(n_layer=2, n_embd=32, n_head=2, n_ctx=64, n_vocab=17, causal=True))).cuda()
    tokens = torch.randint(17, (8, 64), device="cuda")
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=mixed):
        full, cache = net(tokens).float(), net.new_cache(8)
        net.step(tokens[:, :5], cache)
        step = decode.make_decode_step(net, cache)
        for i in range(5, 63):
            off = (step(tokens[:, i : i + 1]).float() - full[:, i + 1]).abs().max()
            assert off < (0.05 * full.abs().max() if mixed else 1e-4)
    assert "a recorded step is not used" not in caplog.text


@pytest.mark.parametrize("changed", [{}, {"precision": "bf16-mixed", "compile": True, "num_workers": 2}])
def test_training_follows_the_cpu(tmp_path: Path, lab: Lab, changed: dict[str, object]) -> None:
    """Invariant: the same images and weights, so the same losses, to 1e-4 in float32 and 2 % in bfloat16."""
    on_cpu = lab.pretrain(tmp_path / "cpu")
    on_gpu = lab.pretrain(tmp_path / "gpu", on=machine(accelerator="gpu", **changed))
    rel = 2e-2 if changed else 1e-4
    assert on_gpu.curves["train/loss_gen"].y == pytest.approx(on_cpu.curves["train/loss_gen"].y, rel=rel)


def test_tokens_for_baselines_are_made_on_it() -> None:
    """Invariant: those of the CPU, where they end."""
    data = module()
    encoder, devices = data._encoder, []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        devices.append(pixels.device.type)
        return encoder(pixels)

    data._encoder, rows = encode, np.arange(20)
    expected = data.encode_rows("val", rows)
    attached: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")))
    data.trainer = attached
    assert torch.equal(data.encode_rows("val", rows), expected)
    assert devices == ["cpu", "cuda"]


@pytest.mark.parametrize("changed", [{}, {"factor": 4}, {"quantizer": "fsq", "codes": 4096}], ids=str)
def test_tokens_of_a_vqvae_are_the_cpus(changed: dict[str, Any]) -> None:
    """Invariant: the same code of every vector, in any batch, under autocast too."""
    tokenizer, pixels = build_tokenizer(build_network(**changed)), draw_pixels(24)
    expected = tokenizer.encode(pixels)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.encode(pixels.cuda()).cpu(), expected)
    assert torch.equal(torch.cat([tokenizer.encode(some) for some in pixels.cuda().split(5)]).cpu(), expected)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("strategy", ["deepspeed_2_offload", "deepspeed_3_offload"])
def test_deepspeed_on_one_gpu_follows_the_cpu(tmp_path: Path, lab: Lab, strategy: str, mixed: bool) -> None:
    """Invariant: with the optimiser in host memory, losses, norms and fine-tuning to 1e-4, in bfloat16 to 2 %; a run
    that it saved is resumed by one process without it."""
    pytest.importorskip("deepspeed")
    rel = 2e-2 if mixed else 1e-4
    on = machine(accelerator="gpu", strategy=strategy, precision="bf16-mixed" if mixed else "32-true", micro_batch=50)
    on_cpu, on_gpu = lab.pretrain(tmp_path / "cpu"), lab.pretrain(tmp_path / "gpu", on=on)
    for name in ("train/loss_gen", "val/loss_gen", "train/grad_norm"):
        assert on_gpu.curves[name].y == pytest.approx(on_cpu.curves[name].y, rel=5 * rel if "norm" in name else rel)
    weights = find_weights(str(tmp_path / "cpu"))
    tuned = [
        lab.finetune(tmp_path / f"finetune {each.device.type}", weights, on=each).curves for each in (machine(), on)
    ]
    for name in ("train/loss_gen", "train/loss_clf"):
        assert tuned[1][name].y == pytest.approx(tuned[0][name].y, rel=rel)
    checkpoints = tmp_path / "gpu" / "checkpoints"
    shutil.rmtree(checkpoints / "step_0000008.ckpt")
    (checkpoints / "latest").write_text("step_0000004.ckpt\n")
    resumed = lab.pretrain(tmp_path / "gpu", on=machine(accelerator="gpu"))
    assert resumed.curves["train/loss_gen"].y == pytest.approx(on_cpu.curves["train/loss_gen"].y, rel=rel)
