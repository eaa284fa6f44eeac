"""Logging: plain messages on the terminal, with timestamps in a file."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from tqdm.auto import tqdm


class Console(logging.Handler):
    """Logging handler that writes above a tqdm progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def set_up_logging(*, quiet: bool = False) -> None:
    """Sends log records to the terminal: INFO of this package, WARNING of libraries; with `quiet`, only errors."""
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
    # caused by Lightning's own code
    warnings.filterwarnings("ignore", message=r".*treespec, LeafSpec.*", module="lightning.*")


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Appends all log records of the block, with timestamps, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")  # independent of the locale
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
