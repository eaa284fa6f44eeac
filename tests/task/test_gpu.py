"""What only a GPU can show of the tasks, and of the parts that they are made of. `python -m pytest -m gpu`"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.igpt_format import Weights
from igpt.model import decode, graphs
from igpt.model.attention import masked_attention
from igpt.model.config import GPTConfig
from igpt.model.generate import Sampling, generate
from igpt.model.gpt import GPT
from igpt.model.patterns import SPARSE, Pattern, TokenLayout
from igpt.model.sparse_mask import SparseMask
from igpt.objective.bert import BERT
from igpt.tokens.palette import Palette
from igpt.utils import keyed
from tests.conftest import perturbed, small_net
from tests.on_gpu import ACCELERATOR, DEVICE, MARKS, only_cuda
from tests.task.conftest import Arrays, Lab, machine
from tests.task.test_pretrain import StopAfter
from tests.tokens.test_datamodule import module
from tests.tokens.test_vqvae import build_network, build_tokenizer, draw_pixels

pytestmark = MARKS


def test_weights_are_drawn_the_same_on_every_device() -> None:
    """Invariant: initialising on the GPU gives the CPU's weights, to the bit."""
    on_cpu = GPT(GPTConfig(n_layer=2, n_embd=32, n_head=2, n_ctx=16, n_vocab=17, causal=True))
    on_cpu.init_weights(0)
    with torch.device(DEVICE):
        on_gpu = GPT(on_cpu.config)
        on_gpu.init_weights(0)
    for one, other in zip(on_cpu.parameters(), on_gpu.parameters(), strict=True):
        assert torch.equal(one, other.cpu())


def test_logits_equal_the_cpus() -> None:
    """Invariant: float32 to 1e-4, compiled or not, bfloat16 to what it allows."""
    net = small_net(n_ctx=64)
    tokens = torch.randint(11, (4, 64))
    expected = net(tokens).detach()
    net = net.to(DEVICE)
    for compiled in (False, True):
        if compiled:
            for block in net.blocks:
                block.compile()
        with torch.no_grad():
            assert (net(tokens.to(DEVICE)).cpu() - expected).abs().max() < 1e-4
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                rounded = net(tokens.to(DEVICE)).float().cpu()
        assert (rounded - expected).norm() / expected.norm() < 2e-2


def test_keyed_numbers_equal_the_cpus() -> None:
    """Invariant: to the bit."""
    rng_keys = keyed.per_example_keys(keyed.key(0, "test"), torch.arange(100))
    assert torch.equal(keyed.uniform(rng_keys.to(DEVICE), 64).cpu(), keyed.uniform(rng_keys, 64))


def test_cached_draws_equal_uncached() -> None:
    """Invariant: on the GPU too."""
    net = perturbed(GPT(GPTConfig(n_layer=2, n_embd=32, n_head=2, n_ctx=64, n_vocab=17, causal=True))).to(DEVICE)
    uniforms = keyed.uniform(keyed.per_example_keys(keyed.key(0, "test"), torch.arange(8)), 64).to(DEVICE)
    sampling = Sampling(1.0, None, None)
    assert torch.equal(generate(net, uniforms, sampling), generate(net, uniforms, sampling, cached=False))


@only_cuda
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", SPARSE)
def test_flex_attention_equals_the_cpus(name: str, compiled: bool) -> None:
    """Invariant: outputs and gradients of a dense mask on the CPU, float32 to 1e-3 and bfloat16 to 3 %."""
    layout = TokenLayout(12, 15, 1, tuple(torch.randperm(180, generator=torch.Generator().manual_seed(0)).tolist()))
    for half, causal in ((0, True), (1, True), (1, False)):
        torch.compiler.reset()  # each mask is compiled for itself, and the compiler takes only so many of one function
        mask = SparseMask(Pattern(name, half, causal, layout, radius=3, stride=15))
        along = torch.randn(2, 180, 64)

        def attend(qkv: torch.Tensor, backend: str, mask: SparseMask = mask, causal: bool = causal) -> torch.Tensor:
            return masked_attention(qkv, 2, causal=causal, mask=mask, backend=backend)

        for dtype, rounding in ((torch.float32, 1e-3), (torch.bfloat16, 3e-2)):
            qkv = torch.randn(2, 180, 192).to(dtype).requires_grad_()
            on_gpu = qkv.detach().to(DEVICE).requires_grad_()
            expected = attend(qkv, "sdpa")
            mask.prepare(on_gpu.device, "flex")
            out = (torch.compile(attend) if compiled else attend)(on_gpu, "auto")
            (gradient,) = torch.autograd.grad(out, on_gpu, along.to(dtype).to(DEVICE))
            (same,) = torch.autograd.grad(expected, qkv, along.to(dtype))
            assert (out.cpu() - expected).abs().max() < rounding * expected.abs().max()
            assert (gradient.cpu() - same).abs().max() < rounding * same.abs().max()


@only_cuda
@pytest.mark.parametrize("mixed", [False, True])
def test_a_recorded_step_is_taken_from_span_to_span(
    mixed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: CUDA graphs are used, and give the logits of whole forward passes."""
    monkeypatch.setattr(graphs, "SPAN", 16)
    net = perturbed(GPT(GPTConfig(n_layer=2, n_embd=32, n_head=2, n_ctx=64, n_vocab=17, causal=True))).to(DEVICE)
    tokens = torch.randint(17, (8, 64), device=DEVICE)
    with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16, enabled=mixed):
        full, cache = net(tokens).float(), net.new_cache(8)
        net.step(tokens[:, :5], cache)
        step = decode.make_decode_step(net, cache)
        for i in range(5, 63):
            off = (step(tokens[:, i : i + 1]).float() - full[:, i + 1]).abs().max()
            assert off < (0.05 * full.abs().max() if mixed else 1e-4)
    assert "drawn more slowly" not in caplog.text


@pytest.mark.parametrize("changed", [{}, {"precision": "bf16-mixed", "compile": True, "num_workers": 2}])
def test_training_follows_the_cpu(tmp_path: Path, lab: Lab, changed: dict[str, object]) -> None:
    """Invariant: the same images and weights, so the same losses, to 1e-4 in float32 and 2 % in bfloat16."""
    on_cpu = lab.pretrain(tmp_path / "cpu")
    on_gpu = lab.pretrain(tmp_path / "gpu", on=machine(accelerator=ACCELERATOR, **changed))
    rel = 2e-2 if changed else 1e-4
    assert on_gpu.curves["train/loss_gen"].y == pytest.approx(on_cpu.curves["train/loss_gen"].y, rel=rel)


@pytest.mark.parametrize(
    "changed", [{}, {"precision": "bf16-mixed", "activation_checkpointing": True, "compile": True}]
)
def test_bert_follows_the_cpu(tmp_path: Path, lab: Lab, changed: dict[str, object]) -> None:
    """Invariant: the same masks, so the same losses, to 1e-4 in float32 and 2 % in bfloat16."""
    bert = BERT(mask_probability=0.15)
    on_cpu = lab.pretrain(tmp_path / "cpu", objective=bert)
    on_gpu = lab.pretrain(tmp_path / "gpu", objective=bert, on=machine(accelerator=ACCELERATOR, **changed))
    rel = 2e-2 if changed else 1e-4
    for name in ("train/loss_gen", "val/loss_gen"):
        assert on_gpu.curves[name].y == pytest.approx(on_cpu.curves[name].y, rel=rel)


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_probes_equal_the_cpus(tmp_path: Path, few: Arrays, palette: Palette, ar: Weights, solver: str) -> None:
    """Invariant: accuracies of every layer to one of 60 images, the chosen C and layer where they are no tie."""
    lab = Lab(few, palette)
    on_cpu, on_gpu = (
        lab.probe(tmp_path / name, ar, on=machine(accelerator=name), solver=solver) for name in ("cpu", ACCELERATOR)
    )
    assert on_gpu.curves.keys() == on_cpu.curves.keys()
    for name, curve in on_cpu.curves.items():
        within = 1 / 60 + 1e-6 if "loss" not in name else 2e-2
        assert on_gpu.curves[name].y == pytest.approx(curve.y, abs=within), name


def test_resuming_is_exact_with_deterministic_algorithms(tmp_path: Path, lab: Lab) -> None:
    """Invariant: a run that crashed after 6 steps and was resumed from step 4 is the uninterrupted one, to the bit."""
    on = machine(accelerator=ACCELERATOR, precision="bf16-mixed")
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        full = lab.pretrain(tmp_path / "whole", on=on)
        with pytest.raises(KeyError):
            lab.pretrain(tmp_path / "resumed", on=on, callbacks=(StopAfter(6),))
        resumed = lab.pretrain(tmp_path / "resumed", on=on)
    finally:
        torch.use_deterministic_algorithms(was)
    assert resumed.curves == full.curves
    states = [find_weights(str(tmp_path / name)).net().state_dict() for name in ("whole", "resumed")]
    assert all(torch.equal(weight, states[1][name]) for name, weight in states[0].items())


def test_the_precision_of_auto() -> None:
    """Invariant: bfloat16 with float32 weights on a GPU that has it, float32 on a CPU."""
    expected = "bf16-mixed" if DEVICE == "cuda" and torch.cuda.is_bf16_supported() else "32-true"
    assert machine(accelerator="auto" if DEVICE == "cuda" else DEVICE, precision="auto").precision == expected


def test_tokens_for_baselines_are_made_on_it() -> None:
    """Invariant: those of the CPU, where they end."""
    data = module()
    encoder, devices = data._encoder, []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        devices.append(pixels.device.type)
        return encoder(pixels)

    data._encoder, rows = encode, np.arange(20)
    expected = data.encode_rows("val", rows)
    attached: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(DEVICE)))
    data.trainer = attached
    assert torch.equal(data.encode_rows("val", rows), expected)
    assert devices == ["cpu", DEVICE]


@pytest.mark.parametrize("changed", [{}, {"factor": 4}, {"quantizer": "fsq", "codes": 4096}], ids=str)
def test_tokens_of_a_vqvae_are_the_cpus(changed: dict[str, Any]) -> None:
    """Invariant: the same code of every vector, in any batch, under autocast too."""
    tokenizer, pixels = build_tokenizer(build_network(**changed)), draw_pixels(24)
    expected = tokenizer.encode(pixels)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(tokenizer.encode(pixels.to(DEVICE)).cpu(), expected)
    assert torch.equal(torch.cat([tokenizer.encode(some) for some in pixels.to(DEVICE).split(5)]).cpu(), expected)
