"""The plan of a run, held against the bytes that PyTorch keeps, and against published sizes."""

from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import pytest
import torch

from igpt.model import c_library, token_loss
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.objective.ar import AR
from igpt.objective.base import generative_loss
from igpt.objective.bert import BERT
from igpt.tokens.vqvae_tokenizer import VQVAESettings
from igpt.training.activation_memory import estimate_activation_bytes
from igpt.training.cost_estimate import ADAM, count_parameters, estimate_cost
from igpt.training.optimizers import make_adam
from igpt.training.plan import count_vqvae_cost, format_plan, plan_run, plan_tokenizer
from tests.conftest import attention_in_graph, needs_compiler, small_net
from tests.task.conftest import VQVAE, machine

SMALL = GPTConfig(n_layer=3, n_embd=96, n_head=4, n_ctx=144, n_vocab=50, causal=True)
USUAL: dict[str, Any] = {"strategy": "ddp", "recompute": False, "backends": ["sdpa"] * 3, "on_gpu": True}


def kept_for_backward(
    network: GPTConfig, images: int, *, path: str, precision: str, recompute: bool, residual: str = "float32"
) -> int:
    """The bytes of every storage that autograd saves in one forward pass, weights aside, each counted once."""
    net = GPT(network)
    net.init_weights(0)
    net.checkpointing = recompute
    net.set_residual(torch.bfloat16 if residual == "bfloat16" else None)
    for block in net.blocks:
        block.attn.backend = path
    if precision == "bf16-true":
        net.to(torch.bfloat16)
    own = {weight.untyped_storage().data_ptr() for weight in net.parameters()}
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    objective = AR() if network.causal else BERT(mask_probability=0.15)
    tokens = torch.randint(network.n_vocab, (images, network.n_ctx))
    visible = objective.visible_mask(tokens, torch.arange(images))
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), mixed:
        net(tokens, visible, partial(generative_loss, objective, net, tokens=tokens, visible=visible))
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def count_activations(network: GPTConfig, images: int, path: str, precision: str, **changed: Any) -> float:
    backends = [path] * network.n_layer
    usual = {"recompute": False, "backends": backends, "on_gpu": False}
    return estimate_activation_bytes(network, images, precision=precision, **usual | changed)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("path", [pytest.param("native", marks=needs_compiler), "sdpa", "bmm", "blocks"])
def test_activations(path: str, precision: str, causal: bool) -> None:
    """Independent source: what autograd keeps, within 15 %, at two widths and batches."""
    for changed, images in (({}, 3), ({"n_embd": 64, "n_ctx": 400, "n_layer": 2}, 2)):
        network = replace(SMALL, causal=causal, **changed)
        measured = kept_for_backward(network, images, path=path, precision=precision, recompute=False)
        assert count_activations(network, images, path, precision) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_of_a_residual_stream_in_bfloat16(recompute: bool) -> None:
    """Independent source: what autograd keeps, within 15 %; on a GPU, by hand, each block's two norms keep 2 bytes of
    a number and not 4.
    """
    kept: dict[str, Any] = {"precision": "bf16-mixed", "recompute": recompute, "residual": "bfloat16"}
    deeper = replace(SMALL, n_layer=9)
    measured = kept_for_backward(deeper, 3, path="sdpa", **kept)
    if recompute:  # and of the block whose activations are there
        more, fewer = (
            kept_for_backward(replace(SMALL, n_layer=n), 3, path="sdpa", **kept | {"recompute": False}) for n in (4, 3)
        )
        measured += more - fewer
    assert count_activations(deeper, 3, "sdpa", **kept) == pytest.approx(measured, rel=0.15)
    wide, narrow = (
        count_activations(SMALL, 1, "sdpa", "bf16-mixed", on_gpu=True, residual=residual)
        for residual in ("float32", "bfloat16")
    )
    assert wide - narrow == (2 * 3 + 1) * 144 * 96 * 2  # and the last norm


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_logits_of_a_large_vocabulary_are_not_kept(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent source: what autograd keeps of 2,000 tokens of which few have logits in memory, within 15 %."""
    network = replace(SMALL, n_vocab=2000)
    in_full = count_activations(network, 3, "sdpa", precision)
    monkeypatch.setattr(token_loss, "CHUNK", 20_000)
    kept = count_activations(network, 3, "sdpa", precision)
    assert in_full - kept == 3 * 144 * 2000 * 4
    measured = kept_for_backward(network, 3, path="sdpa", precision=precision, recompute=False)
    assert kept == pytest.approx(measured, rel=0.15)


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("sdpa", {"positions": "factorised+rope_2d"}),
    ("sdpa", {"qk_norm": True}),
    ("sdpa", {"value_residual": True}),
    ("sdpa", {"qk_norm": True, "value_residual": True, "positions": "rope_2d"}),
    ("sdpa", {"activation": "relu2"}),
    ("sdpa", {"activation": "swiglu"}),
    ("sdpa", {"attention": "linear"}),
    ("sdpa", {"relative_bias": True}),
    ("bmm", {"relative_bias": True}),
    ("sdpa", {"relative_bias": True, "attention": "axial"}),
    ("native", {"attention": "local", "radius": 2}),
    ("sdpa", {"attention": "local", "radius": 2}),
    ("blocks", {"attention": "local", "radius": 2}),
    ("blocks", {"attention": "strided"}),
    ("bmm", {"attention": "fixed"}),
    ("sdpa", {"attention": ["linear", "local", "full"], "radius": 2, "activation": "swiglu", "qk_norm": True}),
]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize(
    ("path", "changed"), [pytest.param(*option, marks=needs_compiler if option[0] == "native" else (), id=str(option))
                          for option in OPTIONS]
)  # fmt: skip
def test_activations_of_options(path: str, changed: dict[str, Any], precision: str) -> None:
    """Independent source: what autograd keeps, within 15 %. In bf16-mixed not causal, two tokens a cell."""
    causal = precision != "bf16-mixed"
    grid = (12, 12, 1) if causal else (10, 10, 2)
    network = replace(SMALL, causal=causal, grid=grid, n_ctx=prod(grid), **changed)
    measured = kept_for_backward(network, 3, path=path, precision=precision, recompute=False)
    assert count_activations(network, 3, path, precision) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("path", ["sdpa", "bmm"])
def test_tables_of_masks(path: str) -> None:
    """Independent source: the bytes of dense masks (two of axial attention, one of local) and of pairs' offsets."""
    network = replace(SMALL, attention=("axial", "axial", "local"), radius=2, relative_bias=True, grid=(12, 12, 1))
    net = GPT(network)
    for block in net.blocks:
        block.attn.backend = path
    net.prepare_tables()
    tables = {block.attn.mask.dense for block in net.blocks if block.attn.mask} | {net.blocks[0].attn.offsets.index}
    found = estimate_cost(
        network,
        batch_size=1,
        micro_batch=1,
        steps=1,
        devices=1,
        precision="32-true",
        **USUAL | {"backends": [path] * 3},
    )
    without = estimate_cost(
        replace(network, attention="full", relative_bias=False, radius=None), batch_size=1, micro_batch=1, steps=1,
        devices=1, precision="32-true", **USUAL | {"backends": [path] * 3},
    )  # fmt: skip
    assert found.working - without.working == sum(table.nbytes for table in tables)


@pytest.mark.parametrize(
    "changed", [{}, {"value_residual": True, "attention": ["local", "linear"], "radius": 2}], ids=str
)
def test_recomputed_activations(changed: dict[str, Any]) -> None:
    """Independent source: what autograd keeps of all blocks, and of the largest when it computes it again."""
    network = replace(SMALL, **changed, grid=(12, 12, 1))
    at_the_end = kept_for_backward(network, 3, path="sdpa", precision="32-true", recompute=True)
    more, fewer = (
        kept_for_backward(replace(network, n_layer=n), 3, path="sdpa", precision="32-true", recompute=False)
        for n in (4, 3)
    )
    counted = count_activations(network, 3, "sdpa", "32-true", recompute=True)
    assert counted == pytest.approx(at_the_end + more - fewer, rel=0.15)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_weights_gradients_and_optimiser(precision: str) -> None:
    """Independent source: the bytes of all three after one step of training."""
    net = GPT(SMALL)
    net.init_weights(0)
    if precision == "bf16-true":
        net.to(torch.bfloat16)
    optimizer = make_adam(net.parameters(), learning_rate=0.1, beta1=0.9, beta2=0.95, weight_decay=0.0)
    tokens = torch.randint(50, (2, 144))
    AR().loss(net(tokens), tokens, None).backward()
    optimizer.step()
    found = estimate_cost(SMALL, batch_size=2, micro_batch=2, steps=1, devices=1, precision=precision, **USUAL)
    weights = list(net.parameters())
    assert found.weights == sum(w.nbytes for w in weights)
    assert found.gradients == sum(w.grad.nbytes for w in weights if w.grad is not None)
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())
    assert found.optimiser == moments == ADAM * found.weights


@pytest.mark.parametrize(
    ("sizes", "millions"), [((24, 512, 8), 76), ((36, 1024, 8), 455), ((48, 1536, 16), 1362), ((60, 3072, 24), 6801)]
)
def test_the_papers_sizes(sizes: tuple[int, int, int], millions: int) -> None:
    """Independent source: Chen et al. 2020, Table 1 (XL at 64×64: 6,801 M), in millions of weights."""
    n_layer, n_embd, n_head = sizes
    n_ctx = 64 * 64 if n_layer == 60 else 1024
    network = GPTConfig(n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_ctx=n_ctx, n_vocab=512, causal=True)
    count = count_parameters(network)
    assert round((count["blocks"] + count["rest"]) / 1e6) == pytest.approx(millions, abs=20)
    c = n_embd  # by hand, as of any network without options
    assert count["block"] == 12 * c**2 + 2 * c
    assert count == {"blocks": n_layer * count["block"], "block": count["block"], "rest": (2 * 512 + n_ctx + 2) * c}


def test_weights_of_options() -> None:
    """By hand: tables, biases per head and offset, gains of queries and keys, two mixing weights, three matrices."""
    c, grid = SMALL.n_embd, (12, 4, 3)

    def count(**changed: Any) -> list[int]:
        return list(count_parameters(replace(SMALL, grid=grid, **changed)).values())

    blocks, block, rest = count()
    assert count(positions="factorised") == [blocks, block, rest + (12 + 4 + 3 - 144) * c]
    assert count(positions="rope_2d") == [blocks, block, rest - 144 * c]
    for changed, more in ({"relative_bias": True}, 4 * 23 * 23), ({"qk_norm": True}, 2 * 24), (
        {"activation": "swiglu"}, c * (3 * 256 - 8 * c)
    ):  # fmt: skip
        assert count(**changed) == [blocks + 3 * more, block + more, rest]
    assert count(value_residual=True) == [blocks + 2 * 2, block + 2, rest]  # the first block mixes nothing
    for unchanged in ({"attention": "axial"}, {"attention": "linear"}, {"activation": "relu2"}):
        assert count(**unchanged) == [blocks, block, rest]


def test_time_by_hand() -> None:
    """By hand: 100 images a step of 1e12 operations at half of 1e14 a second on each of two devices."""
    network = SMALL
    found = estimate_cost(
        network, batch_size=100, micro_batch=50, steps=86_400, devices=2, precision="32-true", peak_flops=1e14,
        utilisation=0.5, **USUAL,
    )  # fmt: skip
    seconds = found.flops_per_image * 100 / 1e14
    assert found.step_seconds == pytest.approx(seconds)
    rows, too_small = (dict(format_plan(found, machine(memory_gb=size, utilisation=0.5))) for size in (1e3, 1e-3))
    assert rows["all steps"].startswith(f"{seconds:.2f} days")  # 86,400 steps: as many days as a step has seconds
    assert rows["fits"].startswith("yes")
    assert too_small["fits"].startswith("no")
    no_peak = estimate_cost(network, batch_size=1, micro_batch=1, steps=1, devices=1, precision="32-true", **USUAL)
    assert "peak_tflops" in dict(format_plan(no_peak, machine()))["time"]


def test_sharding_divides_all_but_what_is_in_use() -> None:
    """Invariant: over 8 devices an eighth each of weights, gradients and optimiser; activations are their own."""
    network = SMALL
    shared: dict[str, Any] = {"batch_size": 8, "micro_batch": 1, "steps": 1, "precision": "32-true"}
    alone = estimate_cost(network, devices=1, **shared, **USUAL)
    parts = estimate_cost(network, devices=8, **shared, **{**USUAL, "strategy": "fsdp"})
    for name in ("weights", "gradients", "optimiser"):
        assert getattr(parts, name) == getattr(alone, name) / 8
    assert parts.activations == alone.activations
    assert parts.working > alone.working


@pytest.mark.parametrize(
    ("strategy", "weights", "gradients", "optimiser", "host"),
    [
        ("fsdp", 4 / 8, 4 / 8, 8 / 8, 0),
        ("deepspeed_2", 2, 2 / 8, 12 / 8, 0),
        ("deepspeed_2_offload", 2, 0, 0, 14 / 8),
        ("deepspeed_3", 2 / 8, 2 / 8, 12 / 8, 0),
        ("deepspeed_3_offload", 0, 0, 0, 16 / 8),
    ],
)
def test_bytes_of_a_weight(strategy: str, weights: float, gradients: float, optimiser: float, host: float) -> None:
    """Independent source: Rajbhandari et al. 2020, figure 1: 2 + 2 + 12 bytes of a weight in mixed precision."""
    found = estimate_cost(
        SMALL, batch_size=8, micro_batch=1, steps=1, devices=8, precision="bf16-mixed",
        **{**USUAL, "strategy": strategy},
    )  # fmt: skip
    planned = [found.weights, found.gradients, found.optimiser, found.host]
    assert [part / found.n_weight for part in planned] == [weights, gradients, optimiser, host]


@pytest.mark.parametrize("in_c", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize(
    ("t", "causal", "precision", "unfused"),
    [
        (1024, True, "32-true", "sdpa"),
        (1024, True, "bf16-true", "blocks"),
        (512, True, "32-true", "blocks"),
        (512, False, "32-true", "bmm"),
        (64, True, "32-true", "bmm"),
    ],
)
def test_attention_is_planned_as_it_is_computed(
    t: int, causal: bool, precision: str, unfused: str, in_c: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Independent source: what autograd notes of a network with attention_backend=auto; the plan is the one of that
    way.

    By hand: that is C, or, without a compiler, what keeps no scores at 1,024 positions and products at few.
    """
    if not in_c:
        monkeypatch.setattr(c_library, "is_available", lambda: False)
        monkeypatch.setattr(c_library, "find_compiler", lambda: None)
    network = GPTConfig(n_layer=1, n_embd=8, n_head=1, n_ctx=t, n_vocab=5, causal=causal)
    net = GPT(network)
    net.init_weights(0)
    if precision == "bf16-true":
        net.to(torch.bfloat16)
    (way,) = attention_in_graph(net(torch.zeros(1, t, dtype=torch.int64)))
    assert way == ("native" if in_c else unfused)
    rows = {
        attention: dict(
            plan_run(machine(attention_backend=attention, precision=precision), network, batch_size=5000, steps=1)
        )
        for attention in ("auto", "sdpa", "blocks", "bmm")
    }
    assert rows["auto"] == rows["sdpa" if way == "native" else way]  # neither keeps scores
    assert rows["bmm"]["  activations of 5,000 image(s)"] != rows["sdpa"]["  activations of 5,000 image(s)"]


@pytest.mark.parametrize("in_c", [pytest.param(True, marks=needs_compiler), False])
def test_sparse_attention_is_planned_as_it_is_computed(in_c: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent source: the backend that a network with attention_backend=auto builds its mask for."""
    if not in_c:
        monkeypatch.setattr(c_library, "is_available", lambda: False)
        monkeypatch.setattr(c_library, "find_compiler", lambda: None)
    local = replace(SMALL, n_layer=2, attention=("local", "full"), radius=2, grid=(12, 12, 1))
    for network, planned in (
        (local, "native" if in_c else "blocks"),
        (replace(local, attention="local", relative_bias=True), "sdpa"),
    ):
        net = GPT(network)
        net.prepare_tables()
        mask = net.blocks[0].attn.mask
        built = {"native": mask.lanes, "blocks": mask.blocks, "sdpa": mask.dense}
        assert [backend for backend, tables in built.items() if tables is not None] == [planned]
        rows = {
            attention: plan_run(
                machine(attention_backend=attention, precision="bf16-mixed"), network, batch_size=5000, steps=1
            )
            for attention in ("auto", planned, "bmm")
        }
        assert rows["auto"] == rows[planned] != rows["bmm"]


def test_attention_of_float64_is_not_computed_in_c() -> None:
    """Independent source: what autograd notes of a network in float64, which the C cannot read."""
    net = small_net().double()
    assert attention_in_graph(net(torch.zeros(1, 16, dtype=torch.int64))) == {"bmm"}


@pytest.mark.parametrize(
    ("changed", "by_hand"),
    [
        ({}, {}),
        ({"activation_checkpointing": True}, {"recompute": True, "utilisation": 0.3}),
        ({"precision": "bf16-mixed"}, {"precision": "bf16-mixed"}),
        ({"micro_batch": 100}, {"micro_batch": 100}),
        ({"devices": 4, "nodes": 2}, {"devices": 8, "micro_batch": 500}),
        ({"devices": 8, "strategy": "fsdp"}, {"devices": 8, "micro_batch": 500, "strategy": "fsdp"}),
        ({"peak_tflops": 100.0, "utilisation": 0.5}, {"peak_flops": 1e14, "utilisation": 0.5}),
    ],
)
def test_the_plan_is_that_of_the_settings(changed: dict[str, Any], by_hand: dict[str, Any]) -> None:
    """By hand: what each setting of the trainer is to the count; attention is fused, memory as it was stated."""
    network = replace(SMALL, n_layer=12, n_embd=960)
    on = machine(plan=True, attention_backend="sdpa", memory_gb=24.0, **changed)
    counted: dict[str, Any] = {
        "micro_batch": 4000, "devices": 1, "precision": "32-true", "peak_flops": 1e12, "utilisation": 0.4
    }  # fmt: skip
    counted |= {**USUAL, "on_gpu": False, "backends": ["sdpa"] * 12}
    lines = plan_run(on, network, batch_size=4000, steps=1000)
    assert lines == format_plan(estimate_cost(network, batch_size=4000, steps=1000, **{**counted, **by_hand}), on)
    if changed:
        assert lines != plan_run(
            machine(plan=True, attention_backend="sdpa", memory_gb=24.0), network, batch_size=4000, steps=1000
        )


def test_the_plan_of_a_tokenizer() -> None:
    """By hand: weights and operations of each convolution; the first one needs no gradient of its input."""
    config = VQVAESettings(**VQVAE)
    rows = dict(plan_tokenizer(machine(plan=True), config, side=8, batch_size=8, steps=10))
    convolutions = [  # inputs, outputs, kernel, places of the kernel
        (3, 8, 16, 16), (8, 8, 9, 16), (8, 2, 9, 16), (2, 8, 1, 16), (8, 4, 1, 16),  # encoder
        (4, 8, 9, 16), (8, 2, 9, 16), (2, 8, 1, 16), (8, 3, 16, 16),  # decoder; its last one is transposed
    ]  # fmt: skip
    weights = sum(a * b * k + b for a, b, k, _ in convolutions)
    products = [a * b * k * n for a, b, k, n in convolutions]
    assert rows["weights"] == f"{weights:,}"
    assert count_vqvae_cost(config, 8).flops == 6 * sum(products) - 2 * products[0] + 2 * 16 * 32 * 4
    assert rows["vectors a step"] == "128, enough for 32 codes"
