"""Ways of telling the network where a token is, beside the paper's learned table: `GPTConfig.positions` names one."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from igpt.model.config import GPTConfig


class Positions(nn.Module):
    """Where a token is, without a table: this one does not tell. Subclasses add to embeddings, turn queries and keys.

    Weights of it are drawn with standard deviation 0.02, as the other embeddings are. Buffers, tables of sines say, are
    computed in `__init__`, and nowhere else: a network that is loaded computes them so.
    """

    def __init__(self, config: "GPTConfig") -> None:
        super().__init__()
        self.config = config

    def add(self, content: Tensor, start: int) -> Tensor:
        """The embeddings of positions start, start + 1, …, with what tells where they are: (B, T, C) → (B, T, C)."""
        return content

    def rotate(self, x: Tensor, start: int) -> Tensor:
        """Queries or keys of positions start, start + 1, …: (B, H, T, D) → (B, H, T, D)."""
        return x


POSITIONS: dict[str, type[Positions]] = {}  # name → class; `learned` is in `gpt.py`, as OpenAI has it
