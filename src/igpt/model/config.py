"""GPTConfig: the sizes and choices of a network, saved with every checkpoint."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

from pydantic import Field

from igpt.model.positions import POSITIONS

LARGEST = 1 << 24  # upper bound of every size: larger values are typing errors
MOST_BLOCKS = 1 << 12  # the paper's largest network has 60
MOST_POSITIONS = 1 << 20  # 1,024 × 1,024 pixels
Size = Annotated[int, Field(ge=1, le=LARGEST)]


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and choices of a network. Each choice defaults to the paper's, also for a key missing in a saved file.

    Raises:
        ValueError: a size that is not a positive integer, n_embd not divisible by n_head, an unknown choice.
    """

    n_layer: Annotated[int, Field(ge=1, le=MOST_BLOCKS)]  # L, blocks
    n_embd: Size  # C, width
    n_head: Size  # H
    n_ctx: Annotated[int, Field(ge=1, le=MOST_POSITIONS)]  # T, positions
    n_vocab: Size  # V, tokens
    causal: bool  # position i sees 0 … i-1 (AR); else all that are visible (BERT)
    positions: str = "learned"  # position encoding: a learned table (Chen et al. 2020) or a name in `POSITIONS`

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_embd", "n_head", "n_ctx", "n_vocab"):
            size, most = getattr(self, name), {"n_layer": MOST_BLOCKS, "n_ctx": MOST_POSITIONS}.get(name, LARGEST)
            if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
                raise ValueError(f"{name} must be a whole number of 1 to {most:,}, got {size!r:.60}")
        if not isinstance(self.causal, bool):
            raise ValueError(f"causal must be true or false, got {self.causal!r:.60}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: choose a multiple of it")
        if self.positions not in ("learned", *POSITIONS):
            options = ", ".join(("learned", *POSITIONS))
            raise ValueError(f"model.positions must be one of {options}: got {self.positions!r:.60}")

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> "GPTConfig":
        """The config saved in a file. Raises ValueError on an unknown, missing or invalid setting."""
        field_names = {field.name for field in fields(GPTConfig)}
        if unknown := sorted(map(str, saved.keys() - field_names)):
            raise ValueError(f"its network has the setting {unknown[0]!r:.60}, which this version does not know")
        try:
            return GPTConfig(**saved)
        except TypeError as error:
            raise ValueError(f"its network is not described whole ({error})") from error

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values, to save."""
        return asdict(self)

    def unsupported(self, known: Iterable[str]) -> str:
        """Settings that code with the paper's values but for `known` does not support, as `positions=rope`; else ""."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in known}
        return ", ".join(f"{name}={x}" for name, x in values.items() if x != self.__dataclass_fields__[name].default)


SIZES = ("n_layer", "n_embd", "n_head", "n_ctx", "n_vocab", "causal")  # supported by code for the paper's network
