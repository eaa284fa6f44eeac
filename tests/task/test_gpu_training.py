"""What only a GPU can show of training steps, ranks and strategies. `python -m pytest -m gpu`"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.igpt_format import Weights
from igpt.distributed.launcher import run_ranks
from igpt.model.attention import attend
from igpt.model.token_loss import chunked_nats
from igpt.objective.ar import AR
from igpt.report.folder import RunFolder
from tests.conftest import ROOT, small_net
from tests.model.test_gpt import RecordedOps
from tests.on_gpu import ACCELERATOR, DEVICE, MARKS, only_cuda
from tests.task.conftest import Lab, machine
from tests.task.test_no_wait import BETWEEN, TASKS, train

pytestmark = MARKS


def raise_at_waits(mode: str) -> None:
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode(mode)


class Forbid(L.Callback):
    """Has PyTorch raise at what waits for the GPU: from the fifth step on to the backward pass of the eighth."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step >= BETWEEN[0] - 1:
            raise_at_waits("error")
            self.steps.append(trainer.global_step)

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step >= BETWEEN[-1]:  # this step is logged
            raise_at_waits("default")


@pytest.mark.parametrize("changed", [{}, {"precision": "bf16-mixed", "compile": True}], ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_no_step_waits(task: str, changed: dict[str, Any], tmp_path: Path, lab: Lab, ar: Weights, masked: Path) -> None:
    """Invariant: the transfer and encoding of batches, the steps, and all that Lightning does between them."""
    forbid = Forbid()
    try:
        train(task, tmp_path, lab, ar, masked, forbid, accelerator=ACCELERATOR, **changed)
    finally:
        raise_at_waits("default")
    assert set(forbid.steps) == {4, 5, 6, 7}


@only_cuda
def test_one_query_is_not_fused() -> None:
    """Invariant: the last position of causal attention, in float32 to 1e-5; no fused kernel plans for its keys."""
    q, k, v = torch.randn(3, 4, 2, 70, 64, device=DEVICE)
    last = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, -1:]
    with RecordedOps() as called:
        out = attend(q[:, :, -1:], k, v, causal=False, backend="auto")
    assert (out - last).abs().max() < 1e-5
    assert not any("scaled_dot_product" in name for name in called.names)


@pytest.mark.parametrize("residual", ["float32", "bfloat16"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_follow_the_cpu(checkpointing: bool, compiled: bool, residual: str) -> None:
    """Invariant: recomputed, compiled or both, in float32 those of the CPU to 1e-3, under autocast to 5 %."""
    net, tokens = small_net(n_ctx=64), torch.randint(11, (4, 64))
    expected = torch.autograd.grad(AR().loss(net(tokens), tokens, None), list(net.parameters()))
    net, tokens = net.to(DEVICE), tokens.to(DEVICE)
    mixed = residual == "bfloat16"
    precision = "bf16-mixed" if mixed else "32-true"
    machine(
        accelerator=ACCELERATOR, compile=compiled, activation_checkpointing=checkpointing, residual=residual,
        precision=precision,
    ).prepare(net)  # fmt: skip
    with torch.autocast(DEVICE, torch.bfloat16, enabled=mixed):
        loss = AR().loss(net(tokens), tokens, None)
    for one, same in zip(torch.autograd.grad(loss, list(net.parameters())), expected, strict=True):
        assert (one.cpu() - same).norm() < (0.05 if mixed else 1e-3) * same.norm()


@only_cuda
def test_a_large_vocabulary_takes_little_memory() -> None:
    """Invariant: the loss and gradients of all logits at once, to 1e-4, in less than half of the memory."""
    hidden, head = torch.randn(8, 4096, 64, device=DEVICE), torch.randn(8192, 64, device=DEVICE) / 8
    tokens = torch.randint(8192, (8, 4096), device=DEVICE)
    results, peaks = [], []
    for in_chunks in (True, False):
        inputs = [each.clone().requires_grad_() for each in (hidden, head)]
        torch.cuda.reset_peak_memory_stats()
        if in_chunks:
            loss = chunked_nats(*inputs, tokens).mean()
        else:
            loss = torch.nn.functional.cross_entropy((inputs[0] @ inputs[1].T).flatten(0, 1), tokens.flatten())
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
        peaks.append(torch.cuda.max_memory_allocated())
    for one, same in zip(*results, strict=True):
        assert (one - same).norm() < 1e-4 * same.norm()
    assert peaks[0] < peaks[1] / 2


@only_cuda
def test_two_ranks_on_one_gpu(capfd: pytest.CaptureFixture[str]) -> None:
    """Invariant: it is told by its UUID before NCCL starts, which would hang or fail."""
    code = "import torch; from igpt.distributed.ranks import process_group as p\nwith p(torch.device('cuda', 0)): pass"
    assert run_ranks([sys.executable, "-c", code], 2) == 1
    assert "rank 0 on " in (message := capfd.readouterr().err)
    assert "have the same GPU, " in message


@only_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ranks_that_see_one_gpu_each(tmp_path: Path) -> None:
    """Invariant: as under `srun --gpus-per-task=1`, two ranks train with the losses of one."""
    script = tmp_path / "one_gpu.py"
    script.write_text(
        "import os; os.environ['CUDA_VISIBLE_DEVICES'] = os.environ['LOCAL_RANK']\nfrom igpt.cli import main; main()"
    )
    settings = ("task=pretrain", "model.n_layer=2", "model.n_embd=16", "task.warmup_steps=1", "task.steps=4")
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), "trainer=ddp")
    for name, command in (("two", (*two, "trainer.devices=2")), ("one", (str(ROOT / "train.py"), "trainer=gpu"))):
        (tmp_path / name).mkdir()
        precision = ("trainer.precision=32-true", "trainer.compile=false")
        subprocess.run([sys.executable, *command, *settings, *precision], cwd=tmp_path / name, check=True)
    curves = [
        RunFolder(next((tmp_path / name / "runs").iterdir())).read_result()["curves"]["train/loss_gen"]["y"]
        for name in ("two", "one")
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_a_network_to_read_stays_on_it(tmp_path: Path, lab: Lab, ar: Weights) -> None:
    """Invariant: filled there tensor by tensor, the CPU's weights to the bit; loss and probe of the CPU."""
    on = machine(accelerator=ACCELERATOR)
    net = on.build_frozen(ar.build_network, ar.load_into)
    for name, weight in ar.net().state_dict().items():
        assert torch.equal(net.state_dict()[name].cpu(), weight)
    one, other = (lab.evaluate(tmp_path / name, ar, on=on) for name, on in (("cpu", machine()), ("gpu", on)))
    assert other.numbers["val/loss_gen"].value == pytest.approx(one.numbers["val/loss_gen"].value, rel=1e-5)
    probes = [lab.probe(tmp_path / name, ar, on=on, solver="sgd") for name, on in (("a", machine()), ("b", on))]
    shares = [probe.numbers["val/accuracy"].value for probe in probes]
    assert shares[1] == pytest.approx(shares[0], abs=0.05)


@only_cuda
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("strategy", ["deepspeed_2_offload", "deepspeed_3_offload"])
def test_deepspeed_on_one_gpu_follows_the_cpu(tmp_path: Path, lab: Lab, strategy: str, mixed: bool) -> None:
    """Invariant: with the optimiser in host memory, losses, norms and fine-tuning to 1e-4, in bfloat16 to 2 %; a run
    that it saved is resumed by one process without it."""
    pytest.importorskip("deepspeed")
    rel = 2e-2 if mixed else 1e-4
    on = machine(
        accelerator=ACCELERATOR, strategy=strategy, precision="bf16-mixed" if mixed else "32-true", micro_batch=50
    )
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
    resumed = lab.pretrain(tmp_path / "gpu", on=machine(accelerator=ACCELERATOR))
    assert resumed.curves["train/loss_gen"].y == pytest.approx(on_cpu.curves["train/loss_gen"].y, rel=rel)
