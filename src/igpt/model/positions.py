"""Position encodings other than the paper's learned table, by their names in `GPTConfig.positions`."""

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from igpt.model.config import GPTConfig

ROTARY_BASE = 10_000.0  # Su et al. 2021, "RoFormer", §3.4.1


class Positions(nn.Module):
    """Base class: no position information. Subclasses add to the embeddings, or rotate queries and keys.

    Parameters are initialised with standard deviation `init_std`. Buffers (e.g. tables of sines) are computed in
    `__init__` only: they are not saved, loading a network runs it again.
    """

    kind: ClassVar[Literal["table", "rotation", "other"]] = "other"
    reads_grid: ClassVar[bool] = False  # the config then states rows, columns and order of the tokens
    init_std: ClassVar[float] = 0.02  # as the other embeddings

    def __init__(self, config: "GPTConfig") -> None:
        super().__init__()
        self.config = config

    @classmethod
    def check(cls, config: "GPTConfig") -> None:
        """Raises ValueError if a network of these sizes cannot have this encoding."""

    def add(self, content: Tensor, start: int) -> Tensor:
        """Token embeddings with the encodings of positions start, start + 1, … added: (B, T, C) → (B, T, C)."""
        return content

    def rotate(self, x: Tensor, start: int) -> Tensor:
        """Queries or keys of positions start, start + 1, …, rotated: (B, H, T, D) → (B, H, T, D)."""
        return x


class Factorised(Positions):
    """A learned vector per row plus one per column, plus one per channel where cells have several tokens.

    Position i has the row and column of token i, which it predicts. Source: sums of vectors by row, column and channel
    as Child et al. 2019, "Sparse Transformers", §5.3; Parmar et al. 2018, "Image Transformer", §3.1, joins two halves.
    """

    kind = "table"
    reads_grid = True
    init_std = 0.01  # as wpe

    def __init__(self, config: "GPTConfig") -> None:
        super().__init__(config)
        assert config.layout is not None
        layout, n_embd = config.layout, config.n_embd
        self.row = nn.Parameter(torch.full((layout.rows, n_embd), torch.nan))
        self.column = nn.Parameter(torch.full((layout.columns, n_embd), torch.nan))
        if layout.channels > 1:
            self.channel = nn.Parameter(torch.full((layout.channels, n_embd), torch.nan))
        rows, columns, channels = _locate_cells(config)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("channels", channels, persistent=False)

    def table(self, start: int, end: int) -> Tensor:
        """The encodings of positions start … end - 1, (end - start, C): as the rows of a learned table."""
        chosen = slice(start, end)
        summed = self.row[self.get_buffer("rows")[chosen]] + self.column[self.get_buffer("columns")[chosen]]
        if hasattr(self, "channel"):
            summed = summed + self.channel[self.get_buffer("channels")[chosen]]
        return summed

    def add(self, content: Tensor, start: int) -> Tensor:
        return content + self.table(start, start + content.shape[1])


class Rope2d(Positions):
    """Half of every head turned by the token's row, half by its token column, in every layer; pairs are neighbours.

    Position i has the place of token i, which it predicts. Source: Su et al. 2021 in two dimensions, as LlamaGen (Sun
    et al. 2024) and EVA-02 (Fang et al. 2023) have it.
    """

    kind = "rotation"
    reads_grid = True

    def __init__(self, config: "GPTConfig") -> None:
        super().__init__(config)
        rows, columns, channels = _locate_cells(config)
        assert config.layout is not None
        n_pair = config.n_embd // config.n_head // 4  # of each half
        rates = ROTARY_BASE ** -(torch.arange(n_pair, device="cpu") / n_pair)
        places = torch.stack([rows, columns * config.layout.channels + channels])  # (2, T)
        angles = places.T[..., None] * rates  # (T, 2, pairs)
        self.register_buffer("cos", angles.flatten(1).cos(), persistent=False)  # (T, D / 2)
        self.register_buffer("sin", angles.flatten(1).sin(), persistent=False)

    @classmethod
    def check(cls, config: "GPTConfig") -> None:
        size = config.n_embd // config.n_head
        if size % 4:
            raise ValueError(
                f"model.positions=rope_2d turns pairs in both halves of a head: heads of {size} "
                f"(n_embd {config.n_embd} / n_head {config.n_head}) must be a multiple of 4"
            )

    def rotate(self, x: Tensor, start: int) -> Tensor:
        chosen = slice(start, start + x.shape[-2])
        cos, sin = self.get_buffer("cos")[chosen], self.get_buffer("sin")[chosen]  # (T, D / 2)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


def _locate_cells(config: "GPTConfig") -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and channel of the token that each position predicts: 3 × (T,) int64, on the CPU."""
    assert config.layout is not None, "GPTConfig has seen to it"
    channels = config.layout.channels
    tokens = config.layout.queries("cpu")
    return tokens.row, tokens.column // channels, tokens.column % channels


# name → class; `learned` is OpenAI's and in `gpt.py`
POSITIONS: dict[str, type[Positions]] = {"factorised": Factorised, "rope_2d": Rope2d}
