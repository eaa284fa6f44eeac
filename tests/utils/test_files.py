"""Atomic writing: the old file survives whatever happens to the new one."""

import subprocess
import sys
from pathlib import Path

import pytest

from igpt.utils import files

KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from igpt.utils import files
with files.atomic_write(Path(sys.argv[1])) as file:
    file.write(b"half of the n")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""

DISK_FULL = """
import resource, signal, sys
from pathlib import Path
from igpt.utils import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # as a full disk does, the write fails half way
try:
    with files.atomic_write(Path(sys.argv[1])) as file:
        file.write(b"x" * 100_000)
except OSError:
    sys.exit(3)
"""


@pytest.mark.parametrize(("program", "exit_code"), [(KILLED_WHILE_WRITING, -9), (DISK_FULL, 3)])
def test_the_old_file_survives(tmp_path: Path, program: str, exit_code: int) -> None:
    """Invariant: a kill or a full disk leaves what was there."""
    path = tmp_path / "value.json"
    files.write_json(path, {"good": 1})
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == exit_code
    assert files.read_json(path) == {"good": 1}


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    """Invariant: no temporary file stays."""
    with pytest.raises(KeyError), files.atomic_write(tmp_path / "a") as file:
        file.write(b"1")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_json_round_trip_and_damage(tmp_path: Path) -> None:
    """Round trip; damage names the file; NaN is refused, for JSON has none."""
    path = tmp_path / "a.json"
    files.write_json(path, {"x": [1.5, "é"]})
    assert files.read_json(path) == {"x": [1.5, "é"]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, float("nan"))
    path.write_text('{"x": ')
    with pytest.raises(ValueError, match=r"a\.json is not a JSON file"):
        files.read_json(path)
