"""A process that reads hostile files, each in a fork of its own, and reports what came of it.

A line of JSON per request and per answer. The imports are done once; a fork starts with them in memory, so that its
peak is what reading one file took.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import igpt
from igpt.checkpoint.find import find_weights
from igpt.checkpoint.head_files import read_head
from igpt.checkpoint.probe_files import read_probe
from igpt.checkpoint.resume import AtomicCheckpointIO
from igpt.data.images import Images
from igpt.run.launch import run
from igpt.run.targets import checked_partial
from igpt.tokens.openai_npy import OpenAITokens
from igpt.tokens.palette import Palette
from igpt.training.fsdp import _load_into
from igpt.utils import program
from tests.data.conftest import SETTINGS

CONF = Path(__file__).parents[2] / "conf"
IN_OPEN, IN_NONBLOCK = 0x20, 0o4000  # inotify.h
STARTS_PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")


def read_images(path: Path, **changed: Any) -> None:
    """Decodes every training image."""
    source: Images = checked_partial(
        {"_target_": "igpt.data.images.Images", **SETTINGS, "val_fraction": 0.0, **changed, "path": str(path)}, "data"
    )(cache=path.parent / "cache")
    if changed.get("streaming"):
        stream: Any = source.training()
        for record, state in stream.make_reader(0, 1, 0).iterate_epoch(stream.initial_state()):
            stream.read([record], [0])
            del state
        return
    split = source.split("train")
    for i in range(len(split)):
        split.read([i], [0])
    if changed.get("on_corrupt") == "skip":
        raise SkippedError(f"{len(split)} images read")


def read_tokens(path: Path) -> None:
    source = OpenAITokens(name="made", resolution=2, path=str(path), clusters=str(path / "kmeans_centers.npy"))
    split = source.split("val")
    split.read(range(len(split)), [0] * len(split))


def read_run(path: Path, *overrides: str) -> None:
    run(*(o.format(path) for o in overrides), f"paths.cache={path.parent}/cache", conf=CONF)


class SkippedError(ValueError):
    """What was read of a dataset whose bad images are left out."""


LOADERS: dict[str, Callable[..., object]] = {
    "load": lambda path: igpt.load(path),
    "head": lambda path: read_head(find_weights(str(path))),
    "probe": lambda path: read_probe(path),
    "resume checkpoint": lambda path: AtomicCheckpointIO().load_checkpoint(path),
    "resume sharded checkpoint": lambda path: _load_into({"state_dict": {"net.wte": torch.empty(11, 24)}}, path),
    "palette": Palette.load,
    "tokens": read_tokens,
    "images": read_images,
    "images, skip": lambda path: read_images(path, on_corrupt="skip"),
    "images, stream": lambda path: read_images(path, streaming=True),
    "resume": lambda path: read_run(path, "resume={}"),
    "report": lambda path: read_run(path, "task=report", "task.runs=[{}]"),
    "compare": lambda path: read_run(path, "task=compare", "task.runs=[{}]", f"paths.runs={path.parent}/runs"),
}


def memory(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS, VmHWM (the peak since the fork), VmData."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) << 10


def watch(folder: str) -> int:
    """An inotify descriptor with an event for each file of a folder that is opened, by Python or by any library."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(IN_NONBLOCK)
    assert libc.inotify_add_watch(descriptor, folder.encode(), IN_OPEN) >= 0, os.strerror(ctypes.get_errno())
    return int(descriptor)


def read(loader: str, path: Path) -> dict[str, Any]:
    """How reading ended: {} or the error's type, whether it is a ValueError, and its message."""
    try:
        LOADERS[loader](path)
    except BaseException as error:
        return {
            "error": type(error).__name__,
            "is_value_error": isinstance(error, ValueError),
            "message": str(error),
            "traceback": traceback.format_exc()[-3000:],
        }
    return {}


def change_bytes(content: bytes, rng: np.random.Generator, first: int) -> bytes:
    """Flips, cuts out, repeats or inserts a few bytes among the first `first`."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at, n = int(rng.integers(0, max(1, min(first, len(changed))))), int(rng.integers(1, 9))
        kind = rng.integers(0, 4)
        if kind == 0 and at < len(changed):
            changed[at] ^= int(rng.integers(1, 256))
        elif kind == 1:
            del changed[at : at + n]
        elif kind == 2:
            changed[at:at] = rng.bytes(n)
        else:
            changed[at:at] = changed[at : at + n]
    return bytes(changed)


def read_mutations(
    loader: str, path: Path, *, file: str, first: int, last: int, count: int, seed: int
) -> dict[str, Any]:
    """Reads `count` versions of one file with random changes near its start or end; the first unexpected error."""
    rng = np.random.default_rng(seed)
    target = path / file if file else path
    good = target.read_bytes()
    errors = 0
    for i in range(count):
        if last and rng.integers(0, 2):
            bad = good[:-last] + change_bytes(good[-last:], rng, last)
        else:
            bad = change_bytes(good, rng, first)
        target.write_bytes(bad)
        if file == "" and loader == "load":  # the checksum is the file's: whoever changes one can change the other
            import hashlib

            target.with_suffix(".sha256").write_text(hashlib.sha256(bad).hexdigest())
        outcome = read(loader, path)
        errors += bool(outcome)
        if outcome and not outcome["is_value_error"]:
            return outcome | {"number": i, "content": repr(bad[: first + 64])}
    return {"errors": errors}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Reads in this process, a fork; the largest memory beyond that of its start, and what it must not have done."""
    programs: list[str] = []
    # reads the commit of this package, for the record of a run
    commit = ["git", "--no-optional-locks", "-C", str(program.PACKAGE.parents[1])]

    def note(event: str, arguments: Any) -> None:
        is_known = event == "subprocess.Popen" and [*arguments[1]][:4] == commit
        if event in STARTS_PROGRAMS and not is_known:
            programs.append(event)

    sys.addaudithook(note)
    guard = (
        memory("VmData") + request["most_bytes"] + (1 << 30)
    )  # so that a failing test does not take the machine down
    resource.setrlimit(resource.RLIMIT_DATA, (guard, guard))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(request["seconds"])
    outside, before = watch(request["outside"]), memory("VmRSS")
    path = Path(request["path"])
    outcome = (
        read_mutations(request["loader"], path, **request["mutate"])
        if "mutate" in request
        else read(request["loader"], path)
    )
    peak = memory("VmHWM") - before
    try:
        opened = len(os.read(outside, 1 << 16))
    except BlockingIOError:
        opened = 0
    return {**outcome, "peak": peak, "opened_outside": opened, "programs": programs}


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # prints of libraries
    for line in sys.stdin:
        request = json.loads(line)
        out, into = os.pipe()
        if (child := os.fork()) == 0:
            try:
                with os.fdopen(into, "w") as file:
                    json.dump(answer(request), file)
            finally:
                os._exit(0)
        os.close(into)
        with os.fdopen(out) as file:
            content = file.read()
        _, status = os.waitpid(child, 0)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = json.loads(content) if content else {"died": os.waitstatus_to_exitcode(status)}
        answers.write(json.dumps(found | {"cpu": used.ru_utime + used.ru_stime}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
