"""Files of `torch.save`: archive and pickle are checked before PyTorch reads them, so that nothing in them is executed
or unpacks to more than the file holds.
"""

import io
import pickle
import pickletools
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from igpt.checkpoint.tensors import first_line

# Exceptions raised when reading a damaged file.
DAMAGE = (
    pickle.UnpicklingError, OSError, EOFError, RuntimeError, ValueError, TypeError, AttributeError, LookupError,
    ImportError, ArithmeticError, MemoryError, RecursionError, zlib.error, zipfile.BadZipFile,
)  # fmt: skip
MOST_OPERATIONS = 4_000_000  # of a pickle: each makes an object of up to 216 bytes
_LEGACY_PICKLES = 5  # in a file of PyTorch before 1.6: magic number, version, system, the object, keys of the storages
_GLOBALS = {  # what a pickle of tensors and plain values names, but for storages and dtypes
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor", "torch._utils _rebuild_parameter",
    "torch Size", "torch device", "collections OrderedDict", "collections Counter", "builtins set", "builtins complex",
}  # fmt: skip


def read_torch(path: Path) -> Any:
    """Content of a `torch.save` file: tensors, memory-mapped, and plain values.

    Files of PyTorch before 1.6, which are no zip archives, are read into memory.

    Raises:
        ValueError: a damaged file, or one with other objects, none of which are executed.
    """
    try:
        check_torch_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive(path))
        _check_repetition(content)
        return content
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no file of PyTorch's, or holds more than tensors and plain values: it is not read, and nothing "
            f"in it was run ({first_line(error)})"
        ) from error
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged or no file of PyTorch's ({first_line(error)})") from error


def check_torch_file(path: Path) -> None:
    """Checks a `torch.save` file before PyTorch reads it: nothing in it may unpack to more than the file holds.

    Raises:
        pickle.UnpicklingError: its pickle names other than tensors and plain values.
        ValueError: members of an archive that are larger than it, or a pickle of too many objects.
    """
    with path.open("rb") as file:
        if is_archive(path):
            check_archive(file, path.stat().st_size)
        else:
            for _ in range(_LEGACY_PICKLES):
                _check_pickle(file)


def is_archive(path: Path) -> bool:
    """Whether PyTorch would read a file as a zip archive: by its first bytes."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def check_archive(file: IO[bytes], size: int) -> None:
    """As `check_torch_file`, for an open zip archive of `size` bytes. PyTorch's own reader tells sizes and pickle."""
    reader = torch._C.PyTorchFileReader(file)
    unpacked = sum(_list_record_sizes(reader, file))
    if unpacked > size:
        raise ValueError(
            f"it has {size:,} bytes and would unpack to {unpacked:,}: its members are compressed or overlap"
        )
    _check_pickle(io.BytesIO(reader.get_record("data.pkl")))


def _list_record_sizes(reader: Any, file: IO[bytes]) -> list[int]:
    """Bytes of each member of an archive when unpacked."""
    names = reader.get_all_records()
    if hasattr(reader, "get_record_size"):
        return [reader.get_record_size(name) for name in names]
    file.seek(0)  # PyTorch 2.11, as images of GPUs have it, does not tell
    members = zipfile.ZipFile(file).infolist()
    if [member.filename.partition("/")[2] for member in members] != names:
        raise ValueError("PyTorch and Python disagree on what is in it")
    return [member.file_size for member in members]


def _check_pickle(file: IO[bytes]) -> None:
    """Checks the pickle at the file position, without executing it; ends behind it."""
    for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if count > MOST_OPERATIONS:
            raise ValueError(f"its pickle has more than {MOST_OPERATIONS:,} operations")
        if operation.name == "GLOBAL" and argument not in _GLOBALS:
            module, _, name = str(argument).partition(" ")
            is_storage = name.endswith("Storage") and name not in ("UntypedStorage", "TypedStorage")
            if module != "torch" or not (is_storage or isinstance(getattr(torch, name, None), torch.dtype)):
                raise pickle.UnpicklingError(f"it wants {module}.{name}")


def _check_repetition(content: Any) -> None:
    """Raises ValueError if values, each counted as often as it is named, are too many: as a text they fill memory."""
    waiting, count = [content], 0
    while waiting:
        value = waiting.pop()
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        if isinstance(parts, list | tuple | set):
            waiting.extend(parts)
            count += len(parts)
        if count > MOST_OPERATIONS:
            raise ValueError(f"its values name others more than {MOST_OPERATIONS:,} times")


def check_total_size(state: Mapping[str, Tensor], path: Path) -> None:
    """Raises ValueError if tensors together are larger than the file they were read from: views that repeat numbers."""
    total, size = sum(tensor.numel() * tensor.itemsize for tensor in state.values()), path.stat().st_size
    if total > size:
        raise ValueError(f"{path} has {size:,} bytes and its tensors {total:,}: they repeat numbers, save them in full")
