"""Errors of memory, workers, metrics and ranks are told in a line."""

import os
import signal
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping
from omegaconf import OmegaConf

from igpt.distributed import ranks
from igpt.run.explained_errors import (
    explain_lost_rank,
    explain_lost_worker,
    explain_missing_metric,
    explain_out_of_memory,
)
from igpt.run.launch import main as launch_main


def test_memory_that_ran_out() -> None:
    """What PyTorch raises when it is asked for 2^60 bytes names the plan; any other error is left as it is."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    message = explain_out_of_memory(raised.value)
    assert message is not None
    assert "the memory of this machine is full" in message
    assert "trainer.plan=true" in message
    assert explain_out_of_memory(RuntimeError("shape mismatch")) is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_of_a_gpu_that_ran_out(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent source: what PyTorch raises. Of several ranks it says which; what to lower, and how to go on."""
    monkeypatch.setattr(ranks, "this_rank", lambda: ranks.Rank(3, 1, 4, 2))
    message = explain_out_of_memory(error)
    assert message is not None
    assert len(message.splitlines()) == 1
    told = explain_out_of_memory(RuntimeError("rank 1: MemoryError: Unable to allocate 2.00 GiB"))
    assert str(told).startswith("the memory of the machine of rank 1 is full")
    for part in ("the GPU of rank 3 (on ", "trainer.micro_batch", "activation_checkpointing", "fsdp", "resume="):
        assert part in message


def test_a_worker_that_was_lost() -> None:
    """PyTorch's own words for a worker that is killed, as it reads and as it is waited for, become a line."""

    class Killed(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> int:
            os.kill(os.getpid(), signal.SIGBUS)
            return index

    with pytest.raises(RuntimeError) as caught:
        list(torch.utils.data.DataLoader(Killed(), num_workers=1))
    message = explain_lost_worker(caught.value)
    assert message is not None
    assert message.startswith("a process that reads images has died (killed by signal: Bus error)")
    assert "trainer.num_workers=0" in message
    waited = explain_lost_worker(RuntimeError("DataLoader worker (pid(s) 48, 49) exited unexpectedly"))
    assert waited is not None
    assert "(it ended unexpectedly)" in waited
    assert explain_lost_worker(RuntimeError("shapes differ")) is None


def test_a_metric_that_is_not_logged_is_said_in_a_line() -> None:
    """Independent source: the error of Lightning's own callback."""
    with pytest.raises(RuntimeError) as caught:
        EarlyStopping("val/x")._validate_condition_metric({})
    text = str(explain_missing_metric(caught.value))
    assert text.startswith("callbacks: Early stopping conditioned on metric `val/x`")
    assert explain_missing_metric(RuntimeError("shapes differ")) is None


def test_a_rank_that_is_left_alone_says_so_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exit code is not 2: the launcher would take the end of all ranks for bad input, and not name the first."""
    lost = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    assert explain_lost_rank(lost) is None
    monkeypatch.setattr(ranks, "this_rank", lambda: ranks.Rank(0, 0, 2, 2))
    assert str(explain_lost_rank(lost)).startswith("another process of this run has ended")
    assert explain_lost_rank(RuntimeError("shapes differ")) is None
    network = dist.DistBackendError("NCCL error in: a.cpp:9, unhandled system error\nLast error:\nno route to host")
    assert "no route to host; NCCL_DEBUG=WARN tells more" in str(explain_lost_rank(network))
    remote = dist.DistBackendError("NCCL error in: a.cpp:9, remote process exited\nncclRemoteError: a peer is gone")
    assert str(explain_lost_rank(remote)).startswith("another process of this run has ended")
    monkeypatch.setattr("igpt.run.launch.launch", lambda *_, **__: (_ for _ in ()).throw(lost))
    monkeypatch.setattr("igpt.run.launch.HydraConfig.get", lambda: MagicMock())
    with pytest.raises(SystemExit) as caught:
        launch_main(OmegaConf.create({}))
    assert caught.value.code == 1
