"""Worker processes where /dev/shm cannot be used."""

import errno
import logging
import multiprocessing
import os
from typing import Any

import pytest

from igpt.data.workers import startable_workers


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.ENOENT])
def test_without_shared_memory_images_are_read_here(
    code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By hand: a /dev/shm that is read-only, full, forbidden or missing is a warning with the reason, not a failure."""

    def refuse(*given: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(multiprocessing, "Semaphore", refuse)
    with caplog.at_level(logging.WARNING):
        assert startable_workers(2) == 0
    assert f"no other can be started ({os.strerror(code)}). /dev/shm has to be writable" in caplog.text
    assert startable_workers(0) == 0
