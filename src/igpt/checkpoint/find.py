"""Weights by path, in any known format, or by name on the Hub; the trained tokenizer of `tokens.path`."""

import logging
import re
from dataclasses import replace
from pathlib import Path

from igpt.checkpoint import huggingface, igpt_format, openai, sharded, tensors
from igpt.checkpoint.head_files import ABOUT, HEAD
from igpt.checkpoint.igpt_format import CONFIG, Weights
from igpt.checkpoint.probe_files import find_probe, find_probed, read_probe
from igpt.checkpoint.resized import resize_weights
from igpt.checkpoint.resume import find_kept, read_latest
from igpt.tokens.tokenizer import Tokenizer
from igpt.tokens.tokenizer_registry import TOKENIZER, read_tokenizer
from igpt.tokens.vqvae_tokenizer import VQVAETokenizer
from igpt.utils.overrides import escape_text, shorten, suggest_name

log = logging.getLogger(__name__)

MOST_MESSAGE = 800  # characters of an error, which may quote names from a file
EXPORTS = ("huggingface", "igpt")  # folders that task=export writes into its run directory
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_FILES = [CONFIG, huggingface.PREPROCESSOR, tensors.WEIGHTS, tensors.INDEX, "model-*.safetensors", HEAD, ABOUT]


def find_weights(path: str, *, palette: str | None = None, n_head: int | None = None) -> Weights:
    """The weights named by `init=`, from any format.

    Ours: a run directory, its `model/`, a file in that; a training checkpoint, sharded or not, or a file of a sharded
    one; a run of `task=probe`, for the weights that it probed. Hugging Face's ImageGPT: its folder, a file in it, or a
    name on the Hub. OpenAI's: the prefix, any one of its files, or their folder. `palette` (default: searched beside
    the files) and `n_head` (if the shapes do not tell it) apply to OpenAI's only.

    Raises:
        ValueError: nothing at that path, or an unknown format; the message names the likely fix.
    """
    try:
        return _find_weights(path, palette=palette, n_head=n_head)
    except ValueError as error:
        raise ValueError(escape_text(shorten(str(error), MOST_MESSAGE))) from error


def find_vqvae(path: str, *, setting: str = "tokens.path") -> VQVAETokenizer:
    """The VQ-VAE at the path that a setting names.

    A run directory of `task=tokenizer`, its `model/` or the file in that; a pipeline with one such stage; or a network
    that was trained on a VQ-VAE, by any path that `init=` takes.

    Raises:
        ValueError: nothing at that path, several tokenizers, another kind, or a damaged file.
    """
    try:
        place = Path(path).expanduser().absolute()
        stages = sorted(place.glob(f"*/model/{TOKENIZER}"))
        if len(stages) > 1:
            raise ValueError(f"it holds several, choose one: {', '.join(str(file.parents[1]) for file in stages)}")
        known = (place, place / TOKENIZER, place / "model" / TOKENIZER, *stages)
        file = next((file for file in known if file.name == TOKENIZER and file.is_file()), None)
        tokenizer = _find_weights_tokenizer(place) if file is None else read_tokenizer(file)
        if not isinstance(tokenizer, VQVAETokenizer):
            raise ValueError(f"its tokens are {tokenizer.describe()}, expected those of a VQ-VAE of task=tokenizer")
    except (ValueError, RuntimeError) as error:  # RuntimeError: `~USER` without such a user
        message = f"{setting}={path}: {error}"
        raise ValueError(escape_text(shorten(message, MOST_MESSAGE))) from error
    return tokenizer


def _find_weights_tokenizer(place: Path) -> Tokenizer:
    """The tokenizer that a network was trained on."""
    expected = "expected a finished run of task=tokenizer, or of a network that was trained on one"
    if not place.exists():
        beside = place.parent.iterdir() if place.parent.is_dir() else ()
        near = suggest_name(place.name, (path.name for path in beside))
        raise ValueError(f"there is nothing{near or ','} {expected}")
    try:
        return find_weights(str(place)).tokenizer
    except ValueError as error:
        reason = str(error).removeprefix(f"init={place}: ")
        raise ValueError(f"it holds no tokenizer, {expected} ({reason})") from error


def _find_weights(path: str, *, palette: str | None, n_head: int | None) -> Weights:
    try:
        local = Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"init={path}: {error}") from error
    folder = local.parent if local.is_file() else local
    if (probe := find_probe(local)) is not None and not _has_tensors(folder):
        return _find_probed_weights(probe)
    of_folder = (CONFIG, tensors.WEIGHTS, huggingface.PREPROCESSOR, tensors.INDEX, huggingface.TORCH)
    if (folder / sharded.METADATA).is_file() or (folder.is_dir() and next(folder.glob(sharded.PIECES), None)):
        return sharded.read(_resolve_folder(local, folder))
    if local.is_file() and local.suffix == ".ckpt":
        return igpt_format.read_training_checkpoint(local)
    if local.is_file() and (prefix := openai.find_prefix(local)) is not None:
        return openai.read(prefix, palette=palette, n_head=n_head)
    if local.is_file() and (local.name not in of_folder and local not in tensors.list_part_files(folder)):
        raise ValueError(f"init={path}: {_explain_missing(local)}")
    if local.name == huggingface.TORCH and local.is_file() and _has_tensors(folder):
        raise ValueError(
            f"init={path}: {tensors.WEIGHTS} lies beside it and would be read: give the folder to take that"
        )
    for candidate in (folder, *(local / inside for inside in ("model", *EXPORTS))):
        if huggingface.is_huggingface_folder(candidate):
            return huggingface.read(_resolve_folder(local, candidate))
        if (candidate / CONFIG).is_file() and _has_tensors(candidate):
            return igpt_format.read_model(_resolve_folder(local, candidate))
    prefix = openai.find_prefix(local)
    if prefix is not None:
        return openai.read(prefix, palette=palette, n_head=n_head)
    if HUB_NAME.fullmatch(path) and not Path(Path(path).parts[0]).exists():
        return _find_weights(str(download_from_hub(path)), palette=None, n_head=None)
    raise ValueError(f"init={path}: {_explain_missing(local)}")


def _find_probed_weights(probe: Path) -> Weights:
    """The weights that a run of task=probe read, with its probe."""
    _, about = read_probe(probe)
    path = find_probed(probe)
    weights = _find_weights(path, palette=None, n_head=None)
    if weights.sha256 != about.weights:
        raise ValueError(f"init={probe.parent}: {path} holds other weights now than those that it probed")
    return replace(resize_weights(weights, about.resolution), probe=probe)


def _resolve_folder(path: Path, folder: Path) -> Path:
    """Returns `folder`; logs it if it is neither `path` nor its `model/`."""
    if folder not in (path, path / "model"):
        log.info("%s: %s is taken", path, folder)
    return folder


def _has_tensors(folder: Path) -> bool:
    return (folder / tensors.WEIGHTS).is_file() or (folder / tensors.INDEX).is_file()


def _explain_missing(local: Path) -> str:
    """Error message: the reason why a path holds no weights, and the path probably meant."""
    if local.name == TOKENIZER or any((folder / TOKENIZER).is_file() for folder in (local, local / "model")):
        return f"a tokenizer and no network: tokens=vqvae tokens.path={local} trains one on its tokens"
    if local.is_file():
        if local.suffix == ".safetensors" and (local.parent / CONFIG).is_file():
            return (
                f"of the weights there {tensors.WEIGHTS} is the one that {CONFIG} is of: give the folder, or that file"
            )
        if _has_tensors(local.parent) and not (local.parent / CONFIG).is_file():
            return f"weights without their {CONFIG}, which says what network they are of: copy both"
        return (
            "this file is no checkpoint; give a finished run folder, a model.safetensors beside its config.json, a "
            ".ckpt of a run, or any file of a checkpoint of OpenAI's"
        )
    stages = sorted(p.parent.parent.name for p in local.glob(f"*/model/{CONFIG}"))
    if stages:
        return (
            f"no {CONFIG} with {tensors.WEIGHTS} there or in its model/; give a finished run folder; did you mean "
            f"{local / stages[-1]}"
        )
    for folder in (local, local / "checkpoints"):
        if (newest := read_latest(folder)) is not None:
            if (folder.parent / "model" / CONFIG).is_file():
                return f"these are checkpoints of a finished run: init={folder.parent}, or one of them, init={newest}"
            kept = "".join(f", init={path}" for path in find_kept(folder.parent).values())
            so_far = f"init={newest}{kept}"
            return f"this run is not finished: resume={newest.parent.parent}, or take what it has so far, {so_far}"
    if not local.exists() and (kept_beside := find_kept(local.parent).values()):
        return f"there is nothing of that name; kept steps of that run: {', '.join(f'init={at}' for at in kept_beside)}"
    if steps := sorted({path.parent.name for path in local.glob("*/*.index")}, key=lambda s: (len(s), s)):
        return (
            f"it holds {len(steps)} checkpoint(s) of OpenAI's, choose one: {', '.join(str(local / s) for s in steps)}"
        )
    if snapshots := sorted(local.glob(f"snapshots/*/{CONFIG}")):
        return f"this is a cache of the Hub's: did you mean {snapshots[-1].parent}"
    if (local / CONFIG).is_file() or (local / "model" / CONFIG).is_file():
        return f"a {CONFIG} without its {tensors.WEIGHTS}: copy both"
    return f"no {CONFIG} with {tensors.WEIGHTS} there or in its model/; give a finished run folder"


def download_from_hub(name: str) -> Path:
    """Local folder of a model on the Hub, downloaded unless cached; an interrupted download is continued.

    Raises:
        ValueError: no model of that name, its licence not accepted, or no connection to the Hub.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES))
        if not _has_tensors(folder):  # early models have no safetensors file
            folder = Path(snapshot_download(name, allow_patterns=[*HUB_FILES, huggingface.TORCH]))
    except GatedRepoError as error:
        raise ValueError(f"{name} asks for its licence to be accepted on the Hub, and a token (HF_TOKEN)") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{name} is no path on this machine and no model on the Hub") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"{name} is no path on this machine (is it misspelt?), and the Hub, where it might be a model, cannot be "
            "reached: download its folder where there is a network, and give that"
        ) from error
    return folder
