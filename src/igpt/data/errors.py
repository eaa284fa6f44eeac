"""What is wrong with the data itself: found where images are read, which may be another process."""


class DataError(ValueError):
    """Images or labels that cannot be read, in one line, which names them."""

    def __init__(self, message: str) -> None:
        # what a worker raised, PyTorch raises here anew, its message the worker's traceback, which ends in its own
        super().__init__(message.rpartition(f"{type(self).__qualname__}: ")[2].rstrip())
