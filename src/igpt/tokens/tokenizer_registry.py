"""The registry of tokenizers by `kind`, the name in checkpoints, and the file of a trained one."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from igpt.tokens.palette_tokenizer import PaletteTokenizer
from igpt.tokens.patches import PatchTokenizer
from igpt.tokens.rgb import RGBTokenizer
from igpt.tokens.tokenizer import Tokenizer
from igpt.tokens.vqvae_tokenizer import VQVAETokenizer
from igpt.utils import files

TOKENIZER = "tokenizer.json"  # in the folder model/ of a run of task=tokenizer
FORMAT = 1  # of that file


TOKENIZERS: dict[str, Callable[[Mapping[str, Any]], Tokenizer]] = {
    "palette": PaletteTokenizer.from_dict,
    "patches": PatchTokenizer.from_dict,
    "vqvae": VQVAETokenizer.from_dict,
    "rgb": RGBTokenizer.from_dict,
}


def tokenizer_from_dict(saved: Any) -> Tokenizer:
    """The inverse of `tokenizer_to_dict`. Raises ValueError on invalid input."""
    if not isinstance(saved, Mapping) or not isinstance(saved.get("kind"), str):
        raise ValueError(f"its tokenizer is {saved!r:.60}, expected its kind and settings")
    if saved["kind"] not in TOKENIZERS:
        raise ValueError(f"its tokenizer is of the kind {saved['kind']!r:.60}, known are {', '.join(TOKENIZERS)}")
    try:
        return TOKENIZERS[saved["kind"]]({key: value for key, value in saved.items() if key != "kind"})
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"its tokenizer is not described whole ({error!r})") from error


def tokenizer_to_dict(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer as JSON values, with its kind."""
    return {"kind": tokenizer.kind, **tokenizer.to_dict()}


def save_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """Writes a tokenizer as one JSON file, atomically."""
    files.write_json(path, {"format": FORMAT, **tokenizer_to_dict(tokenizer)})


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file of `save_tokenizer`. Raises ValueError if it is damaged or of another format."""
    saved = files.read_json(path)
    stated = saved.get("format") if isinstance(saved, Mapping) else None
    if stated != FORMAT:
        raise ValueError(f"{path} is no tokenizer of format {FORMAT} (it states {stated!r:.60})")
    try:
        return tokenizer_from_dict({key: value for key, value in saved.items() if key != "format"})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
