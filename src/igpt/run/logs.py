"""Logging: plain messages on the terminal, with timestamps in a file."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from tqdm.auto import tqdm

from igpt.report.bystanders import Bystander


class Console(logging.Handler):
    """Logging handler that writes above a tqdm progress bar instead of through it; its errors end no run."""

    def __init__(self) -> None:
        super().__init__()
        self.bystander = Bystander("the console")

    def emit(self, record: logging.LogRecord) -> None:
        with self.bystander:
            tqdm.write(self.format(record), file=sys.stderr)


class LogFile(logging.FileHandler):
    """Logging handler that appends to a file, which is opened at the first record; its errors end no run."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace", delay=True)  # independent of the locale
        self.bystander = Bystander(path)

    def emit(self, record: logging.LogRecord) -> None:
        with self.bystander:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the name is that of logging
        error = sys.exception()
        assert isinstance(error, Exception)
        self.bystander.report(error)

    def close(self) -> None:
        with self.bystander:
            super().close()


class StandardStream:
    """sys.stdout or sys.stderr whose errors (a reader that is gone, a full disk) end no run: log.txt has the rest."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._bystander = stream, Bystander(name)

    def write(self, text: str) -> int:
        with self._bystander:
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._bystander:
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_streams() -> None:
    """Makes errors of this process's stdout and stderr end nothing; a stream that is closed gets a sink."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, StandardStream):
            setattr(sys, name, StandardStream(stream or open(os.devnull, "w"), name))  # noqa: SIM115  # until exit


def set_up_logging(*, quiet: bool = False) -> None:
    """Sends log records to the terminal: INFO of this package, WARNING of libraries; with `quiet`, only errors."""
    guard_streams()
    console = Console()
    console.setLevel(logging.ERROR if quiet else logging.INFO)
    console.setFormatter(logging.Formatter("%(message)s"))
    # on a terminal the progress bar shows the same
    console.addFilter(lambda record: not (getattr(record, "progress", False) and sys.stderr.isatty()))
    root = logging.getLogger()
    root.handlers = [console]
    root.setLevel(logging.WARNING)
    logging.getLogger("igpt").setLevel(logging.DEBUG)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.callbacks").setLevel(logging.INFO)  # those that were asked for
    # caused by Lightning's own code
    warnings.filterwarnings("ignore", message=r".*treespec, LeafSpec.*", module="lightning.*")
    warnings.filterwarnings("ignore", message="GPU available but not used")  # trainer=cpu has chosen so


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Appends all log records of the block, with timestamps, to a file of an existing folder."""
    handler = LogFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    except BaseException as error:
        logging.getLogger(__name__).debug("stopped by %s", type(error).__name__, exc_info=True)
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def refuse(message: str) -> NoReturn:
    """Exits with code 2 after a one-line error."""
    logging.getLogger(__name__).error("error: %s", message)
    sys.exit(2)
