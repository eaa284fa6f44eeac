"""Uploads an exported folder to the Hugging Face Hub."""

import logging
from pathlib import Path

log = logging.getLogger(__name__)


def check_upload(name: str) -> None:
    """Checks, before an export, that a token is there and that the Hub knows it.

    Raises:
        ValueError: no token, one that is refused, or no connection to the Hub; one line.
    """
    from huggingface_hub import HfApi, constants, get_token  # lazy: most exports upload nothing

    if get_token() is None:
        raise ValueError(
            f"task.push={name} needs a token of the Hub that may write: HF_TOKEN=…, or `hf auth login`; or leave it out"
        )
    if constants.is_offline_mode():
        raise ValueError(f"task.push={name}: HF_HUB_OFFLINE is set, which forbids it to reach the Hub: unset it")
    try:
        HfApi().whoami()
    except Exception as error:  # of the client's HTTP library, which is its own choice
        raise ValueError(
            f"task.push={name}: the Hub refuses the token or is out of reach: {_first_line(error)}"
        ) from error


def upload_folder(folder: Path, name: str, *, private: bool | None) -> str:
    """Uploads a folder to the model repository `owner/name`, made if it is not there; returns its address.

    `private`: of a new repository; None: as the owner's settings on the Hub have it.

    Raises:
        ValueError: the Hub refuses, or is out of reach; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = str(api.create_repo(name, private=private, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Weights exported by igpt")
    except Exception as error:  # of the client's HTTP library, which is its own choice
        raise ValueError(
            f"task.push={name}: the upload failed ({_first_line(error)}); {folder} is complete, and the same command "
            "tries again"
        ) from error
    return address


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}".rstrip(" :.")
