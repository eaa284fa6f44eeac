"""What only watches a run (console, log.txt, CSV, pictures, page, W&B): its errors are logged once and end nothing."""

import logging
from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import Any

from igpt.distributed.signals import RunEndedError

log = logging.getLogger(__name__)


class Bystander:
    """Context manager around the work of one bystander: an Exception in the block is logged, once, and passed over.

    Errors that end a run by design (StoppedError, NonFiniteLossError) and KeyboardInterrupt are raised.
    """

    def __init__(self, name: object) -> None:
        self.name = name  # what failed, for the message: a path, or a thing
        self.error: Exception | None = None  # the last error

    def __enter__(self) -> "Bystander":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception) or isinstance(error, RunEndedError):
            return False
        self.report(error)
        return True

    def guard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, called in a block of this bystander; None instead of its value after an error."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return call

    def report(self, error: Exception) -> None:
        """Logs the first error. Log handlers that fail meanwhile are bystanders, too, so this ends."""
        is_first, self.error = self.error is None, error
        if is_first:
            cause = f", from {describe_error(error.__cause__)}" if error.__cause__ else ""  # a library's may hide it
            log.warning("%s: %s%s; the run goes on", self.name, describe_error(error), cause)
            log.debug("traceback", exc_info=error)


def describe_error(error: BaseException) -> str:
    """The type of an error and the first line of its message that is not empty, if there is one."""
    lines = (line.strip() for line in str(error).splitlines())
    return ": ".join([type(error).__name__, *[line for line in lines if line][:1]])
