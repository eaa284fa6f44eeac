"""Position encodings other than the paper's learned table, by the name in `GPTConfig.positions`."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from igpt.model.config import GPTConfig


class Positions(nn.Module):
    """Base class: no position information. Subclasses add to the embeddings, or rotate queries and keys.

    Parameters are initialised with standard deviation 0.02, as the other embeddings are. Buffers (e.g. tables of
    sines) are computed in `__init__` only: they are not saved, loading a network runs it again.
    """

    def __init__(self, config: "GPTConfig") -> None:
        super().__init__()
        self.config = config

    def add(self, content: Tensor, start: int) -> Tensor:
        """Token embeddings with the encodings of positions start, start + 1, … added: (B, T, C) → (B, T, C)."""
        return content

    def rotate(self, x: Tensor, start: int) -> Tensor:
        """Queries or keys of positions start, start + 1, …, rotated: (B, H, T, D) → (B, H, T, D)."""
        return x


POSITIONS: dict[str, type[Positions]] = {}  # name → class; `learned` is OpenAI's and in `gpt.py`
