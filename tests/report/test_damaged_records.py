"""A run.json or result.json of any content is read, or refused in one line: no input ends in a traceback."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from igpt.metric.result import Curve, Number, Result
from igpt.report.closing_table import closing_table
from igpt.report.folder import RunFolder
from igpt.report.found_runs import find_runs
from igpt.report.identity import changes, identity
from igpt.report.runs import read_finished
from igpt.run.jobs import Job
from igpt.run.saved_overrides import resume_overrides
from igpt.settings.older_configs import VERSION, read_record
from tests.conftest import ROOT

CONFIG: dict[str, Any] = {
    "seed": 0,
    "init": "elsewhere",
    "task": {"name": "pipeline", "stages": {"pretrain": {"steps": 2}}, "runs": ["a"]},
    "trainer": {"precision": "32-true"},
    "data": {"name": "digits", "streams": {"a": {"path": "b"}}},
    "objective": {"name": "ar"},
}


def nest(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


VALUES: list[Any] = [
    None, 5, "text", [], {}, [5], True, float("nan"), {"a": [1]}, nest(300), nest(900)
]  # fmt: skip
TEXTS = [b"", b"null", b"5", b'"x"', b"[]", b"{}", b"[" * 200_000, b'{"a":' * 100_000, b"\xff", b"1" * 5000]
TEXTS += [b'{"version": 1e999}', b'{"version": 123456789012345678901234567890}', b'{"version": true}']


def change_everywhere(record: dict[str, Any], depth: int = 0) -> Iterator[dict[str, Any]]:
    """The record with each key, at any depth, missing or of each of VALUES; deep ones at the top alone."""
    for key, value in record.items():
        yield {name: part for name, part in record.items() if name != key}
        for other in VALUES[: -2 if depth else None]:
            yield {**record, key: other}
        if isinstance(value, dict):
            for inner in change_everywhere(value, depth + 1):
                yield {**record, key: inner}


def read_all(folder: Path) -> None:
    """Everything that is read of a run by others."""
    for run in (found := find_runs([str(folder)])).runs:
        _ = run.stages, run.overrides, run.init_history, run.settings
    assert found.input_hashes


def resume(folder: Path) -> None:
    """What is compared when a run goes on."""
    saved = RunFolder(folder).read_run()
    changes(saved["config"], CONFIG)
    identity(saved["config"], saved["files_sha256"])


def take_overrides(folder: Path) -> None:
    resume_overrides(folder, [], [], [ROOT / "conf"])


def read_metric(folder: Path) -> None:
    """What a sweep reads of a job."""
    assert Job(0, [], folder=str(folder)).read_result("loss_gen")


def print_table(folder: Path) -> None:
    """What is printed when a finished run's command is given again."""
    run = read_finished(folder)
    closing_table(run.result, folder, run.record["seconds"])


def tell(read: Callable[[Path], Any], folder: Path) -> str | None:
    """None, or the error that is no line, of reading the folder."""
    try:
        read(folder)
    except (ValueError, OSError) as error:
        return None if "\n" not in str(error) and str(error) else f"{error!r} is no line"
    except Exception as error:  # each is a failure of this test
        return repr(error)
    return None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = RunFolder(tmp_path / "run")
    folder.start(CONFIG, ["seed=1"], {"init": None, "task.runs a": "1"})
    result = Result({"val/loss_gen": Number(1.0, "nats/token", 9)}, {"val/loss_gen": Curve([1], [1.0], "step", "nats")})
    result.provenance["init"] = {"objective": {"name": "ar"}}
    folder.finish("pipeline", result, seconds=1.0)
    return folder.path


READERS: dict[str, tuple[Callable[[Path], Any], ...]] = {
    "run.json": (lambda folder: read_record(folder / "run.json"), take_overrides, resume, read_all),
    "result.json": (read_all, read_metric, print_table),
}


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_record_is_refused_in_a_line(folder: Path, name: str) -> None:
    """By enumeration: other texts; each key of the record at any depth missing, or of another type, size or depth."""
    good = json.loads((folder / name).read_text())
    for read in READERS[name]:
        assert tell(read, folder) is None
    records = [*change_everywhere(good)]
    records += [{**record, "version": 1} for record in records[::5]]  # of an older release, which are updated
    for text in [*TEXTS, *(json.dumps(record).encode() for record in records)]:
        (folder / name).write_bytes(text)
        problems = {problem for read in READERS[name] if (problem := tell(read, folder))}
        assert not problems, text[:300]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {}}, "a config without task is no run's: restore run.json"),
        ({"config": 5}, "is damaged .config is of another type"),
        ({"config": nest(900)}, "is damaged .maximum recursion depth"),
        ({"version": VERSION + 1}, "of another version"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, change: dict[str, Any], message: str) -> None:
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, **change}))
    with pytest.raises(ValueError, match=message):
        resume(folder)
