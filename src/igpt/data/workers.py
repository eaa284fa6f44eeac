"""Processes that read images beside this one: how many can be started here."""

import logging
import multiprocessing
from typing import Any

log = logging.getLogger(__name__)


def identity_collate(batch: Any) -> Any:
    """The batch as its dataset made it: there is nothing left to collate."""
    return batch


def startable_workers(n: int) -> int:
    """`n`, or 0 where this machine cannot let processes wait for one another: images are then read in this one.

    Processes meet at semaphores, which Linux keeps in /dev/shm; a container may have that read-only or very small.
    Images themselves go through pipes, so that nothing else is needed of it.
    """
    if n < 1:
        return 0
    made = []
    try:
        for _ in range(8 + 3 * n):  # as many as a DataLoader makes: for its results, for its end, for each worker
            made.append(multiprocessing.Semaphore())
    except OSError as error:
        log.warning(
            "data: images are read in this process, which is slower: no other can be started (%s). /dev/shm has to be "
            "writable and to have some 100 kB free (docker run --shm-size=64m); trainer.num_workers=0 is the same "
            "without this warning",
            error.strerror or error,
        )
        return 0
    return n
