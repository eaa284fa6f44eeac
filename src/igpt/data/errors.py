"""The error of bad input data. It survives the way from a DataLoader worker to the main process."""


class DataError(ValueError):
    """Images or labels that cannot be read; a one-line message that names the file or row."""

    def __init__(self, message: str) -> None:
        # PyTorch re-raises a worker's exception with the worker's traceback as its message: keep the original message
        super().__init__(message.rpartition(f"{type(self).__qualname__}: ")[2].rstrip())
