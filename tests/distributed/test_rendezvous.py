"""Where the ranks of a run meet, and what they tell each other there. Threads stand in for ranks."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from igpt.distributed import ranks, rendezvous
from igpt.distributed.gpus import check_gpus, describe_gpu, gpu_index
from igpt.distributed.launcher import RENDEZVOUS_FILE
from igpt.distributed.rank import Rank
from igpt.distributed.rendezvous import check_addresses, meet
from tests.distributed.test_ranks import start_as
from tests.task.conftest import machine


def gather(count: int, *come: int, **about: Any) -> list[Any]:
    """What `meet` answers to each of the ranks that come, or the message of its error."""

    def one(index: int) -> Any:
        time.sleep(0 if index else 0.02)  # the others look first
        try:
            return meet(Rank(index, index, count, count), {"number": index, **about})[1]
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, come))


@pytest.fixture
def meeting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_as(monkeypatch, {RENDEZVOUS_FILE: str(tmp_path / "meeting")})
    monkeypatch.setattr(rendezvous, "POLL_SECONDS", 0.001)


def test_ranks_that_were_started_again_do_not_hear_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: each start hears its own ranks, of a store that torchrun keeps; also after one that never was."""
    monkeypatch.setattr(rendezvous, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(rendezvous, "MEET_SECONDS", 20)
    kept = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    start_as(monkeypatch, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(kept.port)})
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for start in (1, 2):
        heard = gather(3, 0, 1, 2, start=start)
        assert [[(record["number"], record["start"]) for record in each] for each in heard] == [
            [(0, start), (1, start), (2, start)]
        ] * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rendezvous, "MEET_SECONDS", 0.05)
        assert all(isinstance(answer, str) for answer in gather(3, 0, 2, start=3))
    assert [record["start"] for record in gather(3, 2, 1, 0, start=4)[0]] == [4, 4, 4]


def test_ranks_that_do_not_come_are_named(meeting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "MEET_SECONDS", 0.1)
    here = f"those that did are on {socket.gethostname()}"
    for answer in gather(4, 0, 2):
        assert answer.startswith("2 of 4 ranks (1, 3) did not come in 0.1 s")
        assert here in answer


def test_rank_0_does_not_come(meeting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "MEET_SECONDS", 0.05)
    assert gather(2, 1)[0].startswith("rank 0 did not come in 0.05 s")


def test_an_address_where_nobody_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: at a free port nobody listens, and a second rank 0 cannot take one that is in use; each in a line."""
    monkeypatch.setattr(rendezvous, "MEET_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        start_as(monkeypatch, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        (taken,) = gather(2, 0)
    (alone,) = gather(2, 1)
    assert f"rank 0 on {socket.gethostname()} cannot use 127.0.0.1:{port}" in taken
    assert "torchrun --master-port" in taken
    assert f"found nobody in 0.05 s at 127.0.0.1:{port}" in alone
    assert "refused" in alone
    assert len((taken + alone).splitlines()) == 1


def test_where_the_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: a step of a part of the nodes meets on its own first one, each step and each job at its own port."""
    job = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_NODELIST": "node[1-4]"}
    step = {**job, "SLURM_STEP_ID": "1", "SLURM_STEP_NODELIST": "node[3-4]"}
    places = []
    for environment in (job, step, {**job, "SLURM_JOB_ID": "4712"}):
        start_as(monkeypatch, environment)
        places.append(rendezvous._find_address())
    assert [name for name, _ in places] == ["node1", "node3", "node1"]
    assert len({port for _, port in places}) == 3
    assert all(15000 <= port < 25000 for _, port in places)
    for environment in ({}, {"MASTER_ADDR": "node1"}, {"MASTER_ADDR": "node1", "MASTER_PORT": "http"}):
        start_as(monkeypatch, environment)
        with pytest.raises(ValueError, match=r"MASTER_ADDR.*MASTER_PORT"):
            rendezvous._find_address()


def record(host: str, uuid: str | None, name: str = "H100") -> dict[str, Any]:
    return {"host": host, "gpu": None if uuid is None else {"uuid": uuid, "name": name, "memory": "80 GB"}}


def test_the_gpus_of_the_ranks() -> None:
    """By hand: each its own; all or none; another kind is said, as it works, at the pace of the slowest."""
    assert check_gpus([record("a", None), record("b", None)]) is None
    assert check_gpus([record("a", "1"), record("a", "2"), record("b", "3")]) is None
    with pytest.raises(ValueError, match="rank 0 on a and rank 2 on a have the same GPU, H100 1"):
        check_gpus([record("a", "1"), record("a", "2"), record("a", "1")])
    with pytest.raises(ValueError, match="rank 0 on a computes on a GPU, rank 1 on b sees none"):
        check_gpus([record("a", "1"), record("b", None)])
    warning = check_gpus([record("a", "1"), record("a", "2"), record("b", "3", "A100")])
    assert warning is not None
    assert "H100, 80 GB (rank 0 on a); A100, 80 GB (rank 2 on b)" in warning


def test_addresses_that_lead_nowhere() -> None:
    """By hand: of one machine any will do, of several none may be of the loopback interface."""
    there, bad = {"host": "a", "address": "10.0.0.1"}, {"host": "b", "address": "127.0.1.1"}
    check_addresses([bad, bad])
    check_addresses([there, {"host": "b", "address": ""}])  # its interface was named
    with pytest.raises(ValueError, match=r"the name of b stands for 127\.0\.1\.1.*GLOO_SOCKET_IFNAME"):
        check_addresses([there, bad])


@pytest.mark.parametrize(("n_gpu", "index"), [(1, 0), (4, 3)])
def test_the_gpu_of_a_rank(monkeypatch: pytest.MonkeyPatch, n_gpu: int, index: int) -> None:
    """By hand: the only one that srun shows it, else that of its place on the machine; Lightning is told the same."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: n_gpu)
    start_as(monkeypatch, {"RANK": "7", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"})
    on = machine(accelerator="gpu", devices=4, nodes=2)
    assert on.device == torch.device("cuda", index)
    assert gpu_index(Rank(7, 3, 8, 4)) == index
    environment = ranks.Ranks()
    assert (environment.node_rank(), environment.local_rank(), environment.world_size()) == (7, 0, 8)


@pytest.mark.parametrize(
    ("environment", "n_gpu", "settings", "message"),
    [
        ({"LOCAL_WORLD_SIZE": "2", RENDEZVOUS_FILE: "x"}, 1, {"devices": 2}, "2 processes on this .* there are 1"),
        ({"LOCAL_WORLD_SIZE": "4"}, 2, {"devices": 4}, "4 processes on this machine need as many GPUs, there are 2"),
        ({"LOCAL_WORLD_SIZE": "3"}, 4, {"devices": "auto"}, "asks for 3 process.*started: 4"),
        ({}, 4, {"devices": "auto", "nodes": 3}, r"asks for 3 process.*started: 4.*--ntasks-per-node"),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0, {"devices": 4}, "sees no GPU here, as CUDA_VISIBLE_DEVICES='' says"),
    ],
)  # fmt: skip
def test_gpus_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], n_gpu: int, settings: dict[str, Any], message: str
) -> None:
    count = "2" if settings["devices"] == 2 else "4"
    local = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": count} | ({"LOCAL_RANK": "2"} if n_gpu == 2 else {})
    start_as(monkeypatch, {**local, **environment})
    monkeypatch.setattr("torch.cuda.is_available", lambda: n_gpu > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: n_gpu)
    with pytest.raises(ValueError, match=message):
        machine(accelerator="gpu", **settings)


def test_a_starter_that_says_no_local_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the settings say how many machines there are, which is all that is asked of it."""
    start_as(monkeypatch, {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"})
    assert machine(devices="auto", nodes=2).rank == Rank(5, 1, 8, None)


def test_nccl_that_cannot_start(meeting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent source: the text of PyTorch's error, with NCCL's own last line. A stub stands in for the GPU."""
    text = (
        "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled system error (run with "
        "NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclSystemError: System call failed.\n"
        "Last error:\nBootstrap : no socket interface found\nException raised from checkForNCCLErrors at file.cpp"
    )
    start_as(monkeypatch, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    monkeypatch.setattr(ranks, "describe_gpu", lambda device: {"uuid": "0"})
    monkeypatch.setattr(
        ranks, "meet", lambda rank, about: (None, [{**record("a", str(i)), "address": ""} for i in (0, 1)])
    )
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)

    def fail(*_: Any, **__: Any) -> None:
        raise dist.DistBackendError(text)

    monkeypatch.setattr(dist, "init_process_group", fail)
    message = r"rank 0 on .* cannot connect.*\(NCCL error.*no socket interface found\): .*NCCL_DEBUG=WARN"
    with pytest.raises(ValueError, match=message) as caught, ranks.process_group(torch.device("cuda", 0)):
        pass
    assert len(str(caught.value).splitlines()) == 1


def test_what_a_rank_says_of_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand; it goes to the other ranks as JSON. A CPU has nothing to compare."""
    properties = SimpleNamespace(uuid="f00", name="NVIDIA H100", total_memory=85_000_000_000)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    of_gpu = describe_gpu(torch.device("cuda", 0))
    assert json.loads(json.dumps(of_gpu)) == {"uuid": "f00", "name": "NVIDIA H100", "memory": "85 GB"}
    assert describe_gpu(torch.device("cpu")) is None

    def busy(device: torch.device) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nFor debugging …")

    monkeypatch.setattr("torch.cuda.get_device_properties", busy)
    with pytest.raises(ValueError, match=r"^cuda:0 cannot be used \(.* busy or unavailable\): look at nvidia-smi$"):
        describe_gpu(torch.device("cuda", 0))
