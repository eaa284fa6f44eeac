"""DataLoader workers: an identity collate function, and the number of workers that can be started."""

import logging
import multiprocessing
from typing import Any

log = logging.getLogger(__name__)


def identity_collate(batch: Any) -> Any:
    """Returns the batch unchanged: its dataset already yields batches."""
    return batch


def startable_workers(n: int) -> int:
    """`n`, or 0 with a warning if the semaphores of `n` DataLoader workers cannot be created.

    Linux keeps semaphores in /dev/shm, which may be read-only or very small in a container. Images go through pipes and
    need no shared memory.
    """
    if n < 1:
        return 0
    try:  # as many as a DataLoader creates: for results, for shutdown, and per worker
        _semaphores = [multiprocessing.Semaphore() for _ in range(8 + 3 * n)]
    except OSError as error:
        log.warning(
            "data: images are read in this process, which is slower: no other can be started (%s). /dev/shm has to be "
            "writable and to have some 100 kB free (docker run --shm-size=64m); trainer.num_workers=0 is the same "
            "without this warning",
            error.strerror or error,
        )
        return 0
    return n
