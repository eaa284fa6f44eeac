"""What only a GPU can show of the network. `python -m pytest -m gpu`"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from igpt.model.block import Cache
from igpt.model.config import GPTConfig
from igpt.model.generate import Sampling, generate
from igpt.model.gpt import GPT
from igpt.model.graphs import RecordedStep
from igpt.utils import keyed
from tests.conftest import perturbed
from tests.model.test_options import OPTIONS
from tests.on_gpu import DEVICE, MARKS, only_cuda

pytestmark = MARKS

PAPER: dict[str, Any] = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_ctx": 64, "n_vocab": 17, "grid": (8, 8, 1)}


def make_net(*, causal: bool = True, scale: float = 0.1, **changed: Any) -> GPT:
    return perturbed(GPT(GPTConfig(causal=causal, **PAPER | changed)), scale=scale)


def draw_tokens(net: GPT, batch: int) -> Tensor:
    return torch.randint(net.n_vocab, (batch, net.n_ctx), generator=torch.Generator().manual_seed(0))


def measure_loss(net: GPT, tokens: Tensor, visible: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of a sum over them, on the CPU."""
    net.zero_grad()
    logits = net(tokens, visible)
    along = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits.float() * along.to(logits.device)).mean().backward()
    gradients = {name: weight.grad.cpu() for name, weight in net.named_parameters() if weight.grad is not None}
    return logits.detach().float().cpu(), gradients


def assert_near(one: Tensor, other: Tensor, within: float) -> None:
    """To a share of the larger tensor's norm, which single rounded numbers may exceed."""
    assert (one - other).norm() <= within * other.norm() + 1e-9


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("option", ["paper", *OPTIONS])
def test_every_option_equals_the_cpus(option: str, causal: bool) -> None:
    """Invariant: logits and gradients of every position and attention option, float32 to 1e-3, bfloat16 to 4 %."""
    torch.compiler.reset()  # flex attention is compiled for each pattern, and the compiler takes only so many
    changed = OPTIONS.get(option, {})
    net = make_net(causal=causal, n_layer=3, **changed)
    tokens = draw_tokens(net, 4)
    visible = None if causal else torch.rand(4, 64, generator=torch.Generator().manual_seed(2)) > 0.15
    logits, gradients = measure_loss(net, tokens, visible)
    net = net.to(DEVICE)
    on_device = (tokens.to(DEVICE), None if visible is None else visible.to(DEVICE))
    for mixed, within in ((False, 1e-3), (True, 4e-2)):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=mixed):
            same, of_weights = measure_loss(net, *on_device)
        assert_near(same, logits, within)
        assert of_weights.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert_near(of_weights[name], gradient, 3 * within)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("backend", ["layers", "graphs"])
def test_decoding_at_the_size_of_s(backend: str, mixed: bool) -> None:
    """Invariant: heads of 64 numbers and 256 images: every step's logits are those of the whole forward pass."""
    wide = {"n_embd": 512, "n_head": 8} if DEVICE == "cuda" else {"n_embd": 128}
    net = make_net(n_layer=2, scale=0.02, **wide).to(DEVICE)
    assert net.n_embd // net.n_head == 64
    tokens = draw_tokens(net, 256).to(DEVICE)
    with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16, enabled=mixed):
        expected, cache = net(tokens).float(), net.new_cache(256)
        net.step(tokens[:, :3], cache)
        step: Any = RecordedStep(net, cache) if backend == "graphs" else LayersStep(net, cache)
        for i in range(3, 63):
            logits = step(tokens[:, i : i + 1]).float()
            assert_near(logits, expected[:, i + 1], 4e-2 if mixed else 1e-4)


class LayersStep:
    def __init__(self, net: GPT, cache: Cache) -> None:
        self.net, self.cache = net, cache

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.net.step(tokens, self.cache)


@only_cuda
def test_recorded_images_are_those_of_the_layers() -> None:
    """Invariant: 256 images of 1,024 tokens of a network of S's heads, over all spans: fewer than 1 in 100 images
    differ, where two tokens tie within rounding."""
    net = make_net(n_layer=4, n_embd=512, n_head=8, n_ctx=1024, n_vocab=512, grid=None, scale=0.02).to(DEVICE)
    uniforms = keyed.uniform(keyed.per_example_keys(keyed.key(0, "test"), torch.arange(256)), 1024).to(DEVICE)
    drawn = [generate(net, uniforms, Sampling(1.0, None, None), backend=backend) for backend in ("graphs", "layers")]
    assert (drawn[0] != drawn[1]).any(1).double().mean() < 0.01


@only_cuda
@pytest.mark.parametrize("recompute", [False, True])
def test_memory_is_the_plans(recompute: bool) -> None:
    """Invariant: what PyTorch allocated at most in a training step is within 15 % of the plan's."""
    from igpt.training.cost_estimate import estimate_cost
    from igpt.training.optimizers import make_adam

    network = replace(make_net().config, n_layer=8, n_embd=512, n_head=8, n_ctx=1024, n_vocab=512, grid=None)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with torch.device(DEVICE):
        net = GPT(network)
    net.init_weights(0)
    net.checkpointing = recompute
    optimizer = make_adam(net.parameters(), learning_rate=1e-4, beta1=0.9, beta2=0.95, weight_decay=0.0)
    tokens = draw_tokens(net, 32).to(DEVICE)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = net(tokens)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    planned = estimate_cost(
        network, batch_size=32, micro_batch=32, steps=1, devices=1, strategy="ddp", precision="bf16-mixed",
        recompute=recompute, backends=["sdpa"] * 8, on_gpu=True,
    ).memory  # fmt: skip
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(planned, rel=0.15)
