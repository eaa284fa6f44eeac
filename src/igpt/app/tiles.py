"""Images and words as HTML: the pieces that the page of the demo is made of."""

import base64
import html
import io
from collections.abc import Iterable, Mapping

import numpy as np
from PIL import Image


def picture(pixels: np.ndarray) -> str:
    """An image as an address that holds it whole: (R, R, 3) uint8 → a data URI of a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def tile(pixels: np.ndarray, title: str, note: str = "") -> str:
    """An image, enlarged by the page without smoothing, and what it is."""
    small = f"<small>{html.escape(note)}</small>" if note else ""
    title = html.escape(title)
    return f'<figure><img src="{picture(pixels)}" alt="{title}"><figcaption>{title}{small}</figcaption></figure>'


def tiles(made: Iterable[str], what: str) -> str:
    """Tiles beside one another, in as many lines as they need; `what` they are together."""
    return f'<div class="tiles" role="group" aria-label="{html.escape(what)}">{"".join(made)}</div>'


def note(text: str, *, problem: bool = False) -> str:
    """A line that says how things stand; a reader that speaks says it, too, when it changes."""
    return f'<p class="note{" problem" if problem else ""}" role="status">{html.escape(text)}</p>'


def facts(title: str, said: Mapping[str, str], intro: str) -> str:
    """The head of the page: a title, what the page is for, and names with what is said of them."""
    rows = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in said.items())
    return f'<header class="facts"><h1>{html.escape(title)}</h1><p>{html.escape(intro)}</p><dl>{rows}</dl></header>'
