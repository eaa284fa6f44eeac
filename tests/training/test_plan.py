"""The plan of a run: its peak against one that is measured, bytes that are sent, utilisation, and its table."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from igpt.metric.result import Number
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.objective.ar import AR
from igpt.run.arguments import prepare_arguments
from igpt.settings.devices import HardwareSettings
from igpt.training.communication import Communication, count_sent_bytes
from igpt.training.cost_estimate import estimate_cost
from igpt.training.ema import WeightAverage
from igpt.training.optimizers import make_adam, make_optimizer
from igpt.training.plan import compare_memory, estimate_memory, estimate_run, plan_run
from tests.configs import CONF, built
from tests.task.conftest import machine

SMALL = GPTConfig(n_layer=3, n_embd=96, n_head=4, n_ctx=144, n_vocab=50, causal=True)
L, XL = (
    GPTConfig(n_layer=48, n_embd=1536, n_head=16, n_ctx=1024, n_vocab=512, causal=True),
    GPTConfig(n_layer=60, n_embd=3072, n_head=24, n_ctx=4096, n_vocab=512, causal=True),
)
IN_BLOCKS, REST = 48 * (12 * 1536**2 + 2 * 1536), (2 * 512 + 1024 + 2) * 1536  # of L, by hand
ALONE: dict[str, Any] = {"batch_size": 4, "micro_batch": 4, "steps": 1, "devices": 1, "strategy": "ddp"}


def measure_peak(network: GPTConfig, images: int, precision: str, *, recompute: bool) -> int:
    """The largest number of bytes of all tensors in a step of training, its gradients and moments existing before."""
    net = GPT(network)
    net.init_weights(0)
    net.checkpointing = recompute
    for block in net.blocks:
        block.attn.backend = "sdpa"
    if precision == "bf16-true":
        net.to(torch.bfloat16)
    optimizer = make_adam(net.parameters(), learning_rate=0.1, beta1=0.9, beta2=0.95, weight_decay=0.0)
    tokens = torch.randint(network.n_vocab, (images, network.n_ctx))
    tracker = MemTracker()  # type: ignore[no-untyped-call]  # PyTorch gives it no types
    tracker.track_external(net, optimizer, tokens)
    with tracker:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = AR().loss(net(tokens), tokens, None)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            tracker.reset_mod_stats()  # type: ignore[no-untyped-call]
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_peak_of_a_step(precision: str, recompute: bool) -> None:
    """Independent source: PyTorch's tracker of tensors over real steps, within 8 %, where it is mostly weights 3 %.

    Many codes: the gradients of scores are more than half of the peak. Wide: autocast's copies of matrices, which stay
    until the forward pass ends, are more than a block's activations.
    """
    for changed, images, within in (
        ({"n_ctx": 64, "n_vocab": 1500, "n_embd": 32, "n_layer": 2}, 4, 0.08),
        ({"n_ctx": 16, "n_embd": 192, "n_layer": 4}, 2, 0.03),
    ):
        network = replace(SMALL, **changed)
        planned = estimate_cost(
            network, **{**ALONE, "batch_size": images, "micro_batch": images}, precision=precision,
            recompute=recompute, backends=["sdpa"] * network.n_layer, on_gpu=False,
        )  # fmt: skip
        measured = measure_peak(network, images, precision, recompute=recompute)
        assert planned.memory == pytest.approx(measured, rel=within), changed


def test_muon_and_an_average_take_what_they_hold() -> None:
    """Independent source: the bytes of the optimiser's state after a step, and of `task.ema`'s average."""
    net = GPT(SMALL)
    net.init_weights(0)
    optimizer = make_optimizer("muon", net, learning_rate=0.1, beta1=0.9, beta2=0.95, weight_decay=0.0)
    tokens = torch.randint(50, (1, 144))
    AR().loss(net(tokens), tokens, None).backward()
    optimizer.step()
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())
    average = sum(weight.nbytes for weight in WeightAverage(net, 0.999).weights.values())
    planned = estimate_run(machine(), SMALL, batch_size=4, steps=1, optimizer="muon", has_average=True)
    plain = estimate_run(machine(), SMALL, batch_size=4, steps=1, optimizer="adam", has_average=False)
    assert (planned.optimiser, planned.average) == (held, average)
    assert plain.memory - planned.memory == plain.optimiser - held - average


def test_fsdp_gathers_blocks_in_bfloat16() -> None:
    """By hand: of two gathered blocks and the gradients of one 2 B a weight, of the copy that is reduced 4; the rest
    and its gradients in float32; gradients of all weights, whole, until the last of several passes; the average
    of the weights is sharded.
    """
    block, rest = 12 * 1536**2 + 2 * 1536, REST
    settings: dict[str, Any] = {"batch_size": 32, "steps": 1, "devices": 8, "recompute": False, "on_gpu": True}
    settings |= {"backends": ["sdpa"] * 48, "precision": "bf16-mixed"}
    fsdp = estimate_cost(L, micro_batch=4, strategy="fsdp", **settings)
    ddp = estimate_cost(L, micro_batch=4, strategy="ddp", **settings)
    assert fsdp.working - ddp.working == 10 * block + 8 * rest
    assert ddp.activations - fsdp.activations == 48 * 4 * 1536**2 * 2  # autocast's copies, but for the MLP's
    averaged = estimate_cost(L, micro_batch=4, strategy="fsdp", has_average=True, **settings)
    assert averaged.average == averaged.memory - fsdp.memory == 4 * fsdp.n_weight / 8
    passes = estimate_cost(L, micro_batch=1, strategy="fsdp", **settings)
    assert passes.gradients - fsdp.gradients == 4 * fsdp.n_weight
    wide = estimate_cost(L, micro_batch=4, strategy="fsdp", **{**settings, "precision": "32-true"})
    same = estimate_cost(L, micro_batch=4, strategy="ddp", **{**settings, "precision": "32-true"})
    assert wide.working - same.working == 16 * block + 8 * rest


def test_zero_gathers_blocks_and_reduces_buckets() -> None:
    """By hand: 2 B of a weight in two buckets; under ZeRO 3 those of the rest twice, of a block three times."""
    block, rest = 12 * 1536**2 + 2 * 1536, REST
    settings: dict[str, Any] = {"batch_size": 32, "micro_batch": 4, "steps": 1, "recompute": False, "on_gpu": True}
    settings |= {"backends": ["sdpa"] * 48, "devices": 8}
    plain = estimate_cost(L, strategy="ddp", precision="bf16-true", **settings)
    two, three = (
        estimate_cost(L, strategy=f"deepspeed_{stage}", precision="bf16-mixed", **settings) for stage in (2, 3)
    )
    assert two.working - plain.working == 2 * 2 * 200_000_000
    assert three.working - two.working == 2 * (2 * rest + 3 * block)
    assert (three.weights, three.optimiser) == (2 * three.n_weight / 8, 12 * three.n_weight / 8)


def test_what_fits() -> None:
    """By hand: with a tenth to spare; else hardly, or not."""
    memory = estimate_memory(machine(), SMALL, batch_size=4) / 1e9
    for share, verdict in ((0.89, "yes"), (0.95, "hardly"), (1.01, "no")):
        rows = dict(plan_run(machine(memory_gb=memory / share), SMALL, batch_size=4, steps=1))
        assert rows["fits"].startswith(f"{verdict}: ")


@pytest.mark.parametrize(
    ("strategy", "precision", "passes", "a_weight"),
    [
        ("ddp", "bf16-mixed", 4, 8),  # reduced once: 4 B there, 4 back
        ("ddp", "bf16-true", 1, 4),
        ("fsdp", "bf16-mixed", 1, 2 + 2 + 4),
        ("fsdp", "bf16-mixed", 4, 4 * (2 + 2) + 4),
        ("fsdp", "32-true", 1, 4 + 4 + 4),
        ("fsdp", "bf16-true", 1, 2 + 2 + 2),
        ("deepspeed_2", "bf16-mixed", 1, 2 + 2),
        ("deepspeed_2", "bf16-mixed", 4, 4 * 2 + 2),
        ("deepspeed_3", "bf16-mixed", 1, 2 + 2 + 2),
        ("deepspeed_3_offload", "bf16-mixed", 4, 4 * 6),
    ],
)
def test_bytes_that_are_sent(strategy: str, precision: str, passes: int, a_weight: int) -> None:
    """By hand: bytes of a weight in iGPT-L's blocks, of which one of 32 devices sends 31/32.

    What is outside of its blocks, fsdp gathers once a pass, in the precision of the weights.
    """
    sent, to_host = count_sent_bytes(
        in_blocks=IN_BLOCKS, rest=REST, strategy=strategy, precision=precision, devices=32, passes=passes
    )
    width = 2 if precision == "bf16-true" else 4
    of_rest = a_weight if strategy != "fsdp" else width * (passes + 1)
    assert sent == pytest.approx(31 / 32 * (a_weight * IN_BLOCKS + of_rest * REST), rel=1e-12)
    assert to_host == pytest.approx(4 * 6 * (IN_BLOCKS + REST) / 32 if strategy.endswith("offload") else 0)
    alone = count_sent_bytes(in_blocks=1, rest=1, strategy=strategy, precision=precision, devices=1, passes=passes)
    assert alone == (0, 4 * 6 * 2 if strategy.endswith("offload") else 0)


@pytest.mark.parametrize(
    ("network", "devices", "gigabytes", "milliseconds"), [(L, 32, 10.557, 30.2), (XL, 64, 53.636, 153.2)]
)
def test_communication_of_the_papers_networks(
    network: GPTConfig, devices: int, gigabytes: float, milliseconds: float
) -> None:
    """By hand: 8 B a weight under fsdp in bf16-mixed, at 350 GB/s; the table has the time with and without overlap."""
    on = machine(
        plan=True, accelerator="gpu", strategy="fsdp", precision="bf16-mixed", devices=8, nodes=devices // 8,
        bandwidth_gbs=350.0, peak_tflops=989.0, memory_gb=80.0,
    )  # fmt: skip
    plan = estimate_run(on, network, batch_size=128, steps=1000, optimizer="adam", has_average=False)
    assert plan.communication.sent / 1e9 == pytest.approx(gigabytes, abs=1e-3)
    assert plan.communication.sent == pytest.approx(8 * plan.n_weight, rel=0.04)
    seconds = plan.communication.seconds
    assert seconds is not None
    assert seconds * 1000 == pytest.approx(milliseconds, abs=0.1)
    assert plan.step_seconds is not None
    assert plan.shortest_step_seconds == max(seconds, plan.step_seconds)
    assert plan.longest_step_seconds == seconds + plan.step_seconds
    rows = dict(plan_run(on, network, batch_size=128, steps=1000))
    assert rows["planned for"] == f"{devices} GPUs of 80 GB, fsdp, bf16-mixed"
    assert rows["communication"] == f"each device sends {gigabytes:.2f} GB a step, {seconds:.3f} s at 350 GB/s"
    assert rows["  with communication"].endswith("if computation waits for it")
    unstated = dict(plan_run(on.model_copy(update={"bandwidth_gbs": None}), network, batch_size=128, steps=1000))
    assert "state trainer.bandwidth_gbs" in unstated["communication"]
    assert "  with communication" not in unstated


def test_what_goes_to_host_memory_is_said() -> None:
    """By hand: 2 + 2 B of each of L's weights under ZeRO 2; of one device, too, and row one names it."""
    assert Communication(2e9, 3e9, 1e9).text == (
        "each device sends 2.00 GB a step, 2.000 s at 1 GB/s; 3.00 GB a step to and from the machine's memory, "
        "not timed"
    )
    alone = machine(plan=True, accelerator="gpu", strategy="deepspeed_2_offload", precision="bf16-mixed")
    rows = dict(plan_run(alone, L, batch_size=4, steps=1))
    assert rows["planned for"] == "1 GPU, deepspeed_2_offload, bf16-mixed"
    assert rows["communication"] == "5.45 GB a step to and from the machine's memory, not timed"
    assert "communication" not in dict(plan_run(machine(), SMALL, batch_size=4, steps=1))


def test_utilisation_is_of_the_models_operations() -> None:
    """Invariant: the time of a stated utilisation is that of the model's operations, whether activations are kept.

    As a run measures it; what is assumed where none is stated is 3/4 with recomputation: four passes in place of three.
    """
    seconds = {}
    for recompute in (False, True):
        for stated in (None, 0.4, 0.3):
            on = machine(peak_tflops=1.0, utilisation=stated, activation_checkpointing=recompute)
            plan = estimate_run(on, SMALL, batch_size=4, steps=1, optimizer="adam", has_average=False)
            seconds[recompute, stated] = plan.step_seconds
            assert plan.recomputed_flops == (plan.flops_per_image / 3 if recompute else 0)
            row = dict(plan_run(on, SMALL, batch_size=4, steps=1))["a step"]
            assert ("(assumed)" in row) == (stated is None)
    assert seconds[False, None] == seconds[False, 0.4] == seconds[True, 0.4]
    assert seconds[True, None] == seconds[True, 0.3] == pytest.approx(4 / 3 * (seconds[False, None] or 0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("trainer=deepspeed_3", "trainer.precision=bf16-true"), "does not go with trainer.precision=bf16-true"),
        (("trainer=deepspeed_2", "trainer.compile=true"), "does not go with trainer.compile=true"),
        (("trainer.sharded_checkpoint=true",), "leave it at auto, or take trainer=fsdp"),
        (("trainer=deepspeed_2", "trainer.sharded_checkpoint=false"), "a shard of each process"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_on_any_hardware(settings: tuple[str, ...], message: str) -> None:
    """By hand: also in a plan, and before PyTorch is imported (`HardwareSettings`)."""
    with pytest.raises(ValueError, match=message):
        _ = built("trainer.plan=true", *settings).hardware
    trainer = {key: value for key, value in built(*settings).run.config["trainer"].items() if key != "_target_"}
    with pytest.raises(ValueError, match=message):
        HardwareSettings.model_validate(trainer)


def test_a_run_on_a_gpu_holds_its_peak_against_the_plan(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By hand: the ratio that is logged, of 3 GB measured; on a CPU, where the whole process is measured, nothing."""
    options: dict[str, Any] = {"batch_size": 64, "optimizer": "adam", "has_average": False}
    assert compare_memory(machine(), SMALL, Number(3.0, "GB", 1), **options) == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    on = machine(accelerator="gpu")
    planned = estimate_memory(on, SMALL, **options)
    with caplog.at_level("INFO"):
        numbers = compare_memory(on, SMALL, Number(planned * 0.9 / 1e9, "GB", 1), **options)
    assert numbers == {"train/planned_memory": Number(planned / 1e9, "GB", 1)}
    assert "90 % of the planned" in caplog.text


@pytest.mark.parametrize(
    ("typed", "named"), [(("trainer=ddp", "trainer=fsdp"), "ddp"), (("trainer=[gpu,fsdp]",), "gpu")]
)
def test_two_trainers_are_refused(typed: tuple[str, ...], named: str) -> None:
    """By hand: Hydra would take the last one."""
    with pytest.raises(ValueError, match=rf"^trainer={named} and trainer=fsdp: choose one of them$"):
        prepare_arguments([*typed], CONF)
    assert prepare_arguments(["trainer=fsdp", "trainer=fsdp"], CONF)
