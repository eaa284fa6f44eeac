"""The ranks of a run meet: each tells all others what it is, before they connect."""

import json
import os
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore  # torch.distributed's, with their types

from igpt.distributed.launcher import RENDEZVOUS_FILE
from igpt.distributed.rank import STARTERS, Rank

MEET_SECONDS = 600  # for all ranks to come, once the first has; their imports may take minutes from a shared disk
START = "igpt/start"  # key of the token of this start
POLL_SECONDS = 0.05


def meet(rank: Rank, about: Mapping[str, Any]) -> tuple[Store, list[dict[str, Any]]]:
    """A store of this start of the run, and what each rank tells `about` itself (values of JSON), in rank order.

    torchrun keeps one store over all restarts of its processes. Rank 0 draws a token, below which are the keys of this
    start; a rank that reads an earlier token does not find its own answer among those of that start, and looks again.

    Raises:
        ValueError: no address, an address that cannot be reached, or ranks that do not come in time.
    """
    store = _open_store(rank)
    mine = {**about, "host": socket.gethostname(), "answer": uuid.uuid4().hex}
    deadline = time.monotonic() + MEET_SECONDS
    if rank.is_first:
        store.set(START, uuid.uuid4().hex)
    while True:
        token = store.get(START).decode() if store.check([START]) else None
        if token is not None:
            keys = [f"{token}/{index}" for index in range(rank.count)]
            if not store.check([keys[rank.index]]) or json.loads(store.get(keys[rank.index])) != mine:
                store.set(keys[rank.index], json.dumps(mine))
            if rank.is_first and store.check(keys):
                store.set(f"{token}/all", json.dumps([json.loads(store.get(key)) for key in keys]))
            if store.check([f"{token}/all"]):
                records: list[dict[str, Any]] = json.loads(store.get(f"{token}/all"))
                if records[rank.index] == mine:
                    return PrefixStore(token, store), records
        if time.monotonic() > deadline:
            raise ValueError(_describe_missing(store, token, rank))
        time.sleep(POLL_SECONDS)


def check_addresses(records: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError if ranks on several machines would give each other an address of their own machine only."""
    several = len({record["host"] for record in records}) > 1
    if several and (bad := next((record for record in records if record["address"].startswith("127.")), None)):
        raise ValueError(
            f"the name of {bad['host']} stands for {bad['address']}, at which no other machine can reach it: export "
            "GLOO_SOCKET_IFNAME=INTERFACE, as eth0 (`ip -brief address` lists them), on every machine"
        )


def find_own_address() -> str:
    """The address of this machine's name, which gloo gives to other ranks; empty if it is told an interface."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return ""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:  # an unknown name: gloo takes the loopback interface
        return "127.0.0.1"


def _open_store(rank: Rank) -> Store:
    if (file := os.environ.get(RENDEZVOUS_FILE)) is not None:  # one parent started all ranks: no port can be in use
        return FileStore(file, rank.count)
    address, port = _find_address()
    serves = rank.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
    if not serves:
        _wait_for_port(address, port, rank)
    timeout = timedelta(seconds=MEET_SECONDS)
    try:
        return TCPStore(address, port, rank.count, serves, timeout, wait_for_workers=False)
    except dist.DistError as error:
        raise ValueError(
            f"rank {rank.index} on {socket.gethostname()} cannot use {address}:{port}, where the ranks meet "
            f"({str(error).splitlines()[0]}): set MASTER_PORT (torchrun --master-port) to one that is free"
        ) from error


def _find_address() -> tuple[str, int]:
    """Where rank 0 waits: as torchrun says, else on the first machine of this SLURM step, at a port of its own."""
    env = os.environ
    if "MASTER_ADDR" in env or "MASTER_PORT" in env:
        address, number = env.get("MASTER_ADDR", ""), env.get("MASTER_PORT", "")
        if not address or not number.isdecimal() or not 0 < int(number) < 2**16:
            raise ValueError(f"MASTER_ADDR={address} MASTER_PORT={number} name no machine and port: {STARTERS}")
        return address, int(number)
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST")
    if nodes is None or "SLURM_JOB_ID" not in env:
        raise ValueError(f"MASTER_ADDR and MASTER_PORT, where the ranks meet, are not set: {STARTERS}")
    # equal on all machines; jobs and their steps that run at a time get different ones
    port = 15000 + (16 * int(env["SLURM_JOB_ID"]) + int(env.get("SLURM_STEP_ID", 0))) % 10000
    return SLURMEnvironment.resolve_root_node_address(nodes), port


def _wait_for_port(address: str, port: int, rank: Rank) -> None:
    """Waits until somebody listens there. PyTorch's store would, too, with a stack trace for each vain try."""
    deadline = time.monotonic() + MEET_SECONDS
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"rank {rank.index} on {socket.gethostname()} found nobody in {MEET_SECONDS} s at "
                    f"{address}:{port}, where rank 0 waits ({error.strerror or error}): did it start, and is this an "
                    "address that the machines reach each other at?"
                ) from error
        time.sleep(POLL_SECONDS)


def _describe_missing(store: Store, token: str | None, rank: Rank) -> str:
    """Which ranks did not come, and on which machines those are that did."""
    came = [index for index in range(rank.count) if token is not None and store.check([f"{token}/{index}"])]
    if not rank.is_first and len(came) in (0, rank.count):
        came = [rank.index]  # of this start, nothing is known
        missing = "rank 0"
    else:
        away = [str(index) for index in range(rank.count) if index not in came]
        missing = f"{len(away)} of {rank.count} ranks ({', '.join(away[:16])}{', …' if len(away) > 16 else ''})"
    hosts = {json.loads(store.get(f"{token}/{i}"))["host"] for i in came} if token else {socket.gethostname()}
    return (
        f"{missing} did not come in {MEET_SECONDS} s; those that did are on {', '.join(sorted(hosts)[:8])}: look at "
        "the output of the others, and whether all were given the same MASTER_ADDR and MASTER_PORT"
    )
