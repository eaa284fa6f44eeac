"""The one description of a network: it is built by it, saved with it, compared, planned and dispatched by it."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

from pydantic import Field

from igpt.model.positions import POSITIONS

LARGEST = 1 << 24  # of a network's sizes: what is above was never meant
Size = Annotated[int, Field(ge=1, le=LARGEST)]


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and choices of a network. Choices have the paper's as their default, which a missing key means in a file.

    Raises:
        ValueError: a size that is no whole number from 1 on, a width that the heads do not divide, an unknown choice.
    """

    n_layer: Size  # L, blocks
    n_embd: Size  # C, width
    n_head: Size  # H
    n_ctx: Size  # T, positions
    n_vocab: Size  # V, tokens
    causal: bool  # position i sees 0 … i-1 (AR); else all that are visible (BERT)
    positions: str = "learned"  # how the network knows where a token is: a table (Chen et al. 2020), or `POSITIONS`

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_embd", "n_head", "n_ctx", "n_vocab"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= LARGEST:
                raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}")
        if not isinstance(self.causal, bool):
            raise ValueError(f"causal must be true or false, got {self.causal!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: choose a multiple of it")
        if self.positions not in ("learned", *POSITIONS):
            raise ValueError(f"model.positions must be one of learned, {', '.join(POSITIONS)}: got {self.positions!r}")

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> "GPTConfig":
        """The config that a file holds. Raises ValueError on a setting that this version does not know, or none."""
        known = {field.name for field in fields(GPTConfig)}
        if unknown := sorted(map(str, saved.keys() - known)):
            raise ValueError(f"its network has the setting {unknown[0]!r}, which this version does not know")
        try:
            return GPTConfig(**saved)
        except TypeError as error:
            raise ValueError(f"its network is not described whole ({error})") from error

    def to_dict(self) -> dict[str, Any]:
        """All settings, for a file."""
        return asdict(self)

    def choices_beyond(self, known: Iterable[str]) -> dict[str, Any]:
        """The settings that are not the paper's, but for those in `known`: what code for the paper's network lacks."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in known and getattr(self, field.name) != field.default
        }


SIZES = ("n_layer", "n_embd", "n_head", "n_ctx", "n_vocab", "causal")  # that code for the paper's network computes
