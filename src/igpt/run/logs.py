"""Messages: in plain words on the terminal, with their time in a file."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm


class Console(logging.Handler):
    """Writes messages above a progress bar, if there is one, instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def set_up_logging(*, quiet: bool = False) -> None:
    """Messages to the terminal; libraries, and this package where it is to be quiet, speak only when something is
    wrong.
    """
    console = Console()
    console.setLevel(logging.ERROR if quiet else logging.INFO)
    console.setFormatter(logging.Formatter("%(message)s"))
    # a bar shows the same on a terminal
    console.addFilter(lambda record: not (getattr(record, "progress", False) and sys.stderr.isatty()))
    root = logging.getLogger()
    root.handlers = [console]
    root.setLevel(logging.WARNING)
    logging.getLogger("igpt").setLevel(logging.DEBUG)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Lightning's own use of PyTorch, nothing a user can mend
    warnings.filterwarnings("ignore", message=r".*treespec, LeafSpec.*", module="lightning.*")


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Everything logged while the block lasts, appended to a file with its time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")  # whatever the locale is
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
