"""The registry of tokenizers by `kind`, the name in checkpoints."""

from collections.abc import Callable, Mapping
from typing import Any

from igpt.tokens.palette_tokenizer import PaletteTokenizer
from igpt.tokens.patches import PatchTokenizer
from igpt.tokens.rgb import RGBTokenizer
from igpt.tokens.tokenizer import Tokenizer

TOKENIZERS: dict[str, Callable[[Mapping[str, Any]], Tokenizer]] = {
    "palette": PaletteTokenizer.from_dict,
    "patches": PatchTokenizer.from_dict,
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
