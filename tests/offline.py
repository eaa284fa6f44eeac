"""Reads what W&B keeps of a run offline, as `wandb sync` does: LevelDB's log format, a protocol buffer each record."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEAD, FILE_HEAD = 32_768, 7, 7
WHOLE, LAST = 1, 4


@dataclass
class OfflineRun:
    """One W&B run: its exit code is None when it was never closed."""

    folder: Path
    run_id: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None


def offline_runs(folder: Path) -> list[OfflineRun]:
    """Every offline run that lies somewhere below a folder, by its id."""
    return sorted((_read(path) for path in folder.rglob("offline-run-*/*.wandb")), key=lambda run: run.run_id)


def _read(path: Path) -> OfflineRun:
    run = OfflineRun(path.parent)
    for content in _records(path.read_bytes()):
        record = Record.FromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run_id, run.group, run.job_type = record.run.run_id, record.run.run_group, record.run.job_type
            run.tags = list(record.run.tags)
            run.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            run.config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            run.history.append({_name(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "summary":
            run.summary |= {_name(item): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _name(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def _records(content: bytes) -> Iterator[bytes]:
    at, parts = FILE_HEAD, b""
    while at + HEAD <= len(content):
        if BLOCK - at % BLOCK < HEAD:  # the rest of a block is too short for a head
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + HEAD])
        parts += content[at + HEAD : at + HEAD + size]
        at += HEAD + size
        if kind in (WHOLE, LAST):
            yield parts
            parts = b""
