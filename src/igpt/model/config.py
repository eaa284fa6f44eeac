"""GPTConfig: the sizes and choices of a network, saved with every checkpoint."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from igpt.model.patterns import ATTENTION, SPARSE, Pattern, TokenLayout, layer_patterns
from igpt.model.positions import POSITIONS

LARGEST = 1 << 24  # upper bound of every size: larger values are typing errors
MOST_BLOCKS = 1 << 12  # the paper's largest network has 60
MOST_POSITIONS = 1 << 20  # 1,024 × 1,024 pixels
MOST_SPARSE = 1 << 14  # positions with a mask: building it takes T² steps, some seconds, and a dense one T² bytes
Size = Annotated[int, Field(ge=1, le=LARGEST)]
Activation = Literal["quick_gelu", "relu2", "swiglu"]


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
    # position encodings joined by +: a learned table (Chen et al. 2020), names in `POSITIONS`
    positions: str = "learned"
    relative_bias: bool = False  # a learned score for every offset of rows and columns
    attention: str | list[str] | tuple[str, ...] = "full"  # a name in `ATTENTION`, or several in turn over the layers
    radius: Annotated[int, Field(ge=1, le=LARGEST)] | None = None  # of attention=local, in cells
    stride: Annotated[int, Field(ge=2, le=LARGEST)] | None = None  # of strided and fixed, tokens; None: those of a row
    qk_norm: bool = False  # RMS norm of every head's queries and keys
    value_residual: bool = False  # values mixed with those of the first layer
    activation: Activation = "quick_gelu"
    grid: tuple[int, int, int] | None = None  # rows, columns, channels of the tokens; None where no setting reads it
    permutation: tuple[int, ...] | None = None  # of the cells, as in `TokenLayout`; None: row by row

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_embd", "n_head", "n_ctx", "n_vocab"):
            size, most = getattr(self, name), {"n_layer": MOST_BLOCKS, "n_ctx": MOST_POSITIONS}.get(name, LARGEST)
            if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
                raise ValueError(f"{name} must be a whole number of 1 to {most:,}, got {size!r:.60}")
        for name in ("causal", "relative_bias", "qk_norm", "value_residual"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r:.60}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: choose a multiple of it")
        if self.activation not in get_args(Activation):
            options = ", ".join(get_args(Activation))
            raise ValueError(f"model.activation must be one of {options}: got {self.activation!r:.60}")
        self._check_positions()
        self._check_attention()
        self._check_grid()

    def _check_positions(self) -> None:
        options = ("learned", *POSITIONS)
        names = self.positions.split("+") if isinstance(self.positions, str) else [self.positions]
        for name in names:
            if name not in options:
                raise ValueError(f"model.positions must be one of {', '.join(options)}: got {name!r:.60}")
        for kind in ("table", "rotation"):
            same = [name for name in names if ("table" if name == "learned" else POSITIONS[name].kind) == kind]
            if len(same) > 1:
                raise ValueError(
                    f"model.positions={self.positions}: {' and '.join(same)} are both a {kind}: choose one"
                )
        for name in names:
            if name != "learned":
                POSITIONS[name].check(self)
        names.sort(key=lambda name: (name != "learned", list(options).index(name)))  # equal networks are equal
        object.__setattr__(self, "positions", "+".join(names))

    def _check_attention(self) -> None:
        given = self.attention
        names = [given] if isinstance(given, str) else list(given) if isinstance(given, list | tuple) else [given]
        for name in names:
            if name not in ATTENTION:
                raise ValueError(f"model.attention must be one of {', '.join(ATTENTION)}, or a list: got {name!r:.60}")
        if not 1 <= len(names) <= self.n_layer:
            raise ValueError(
                f"model.attention lists {len(names)} patterns, in turn over the {self.n_layer} layers: list 1 to "
                f"{self.n_layer}"
            )
        object.__setattr__(self, "attention", names[0] if len(names) == 1 else tuple(names))
        for name, readers in {"radius": ("local",), "stride": ("strided", "fixed")}.items():
            value, is_read = getattr(self, name), any(reader in names for reader in readers)
            if value is not None and not is_read:
                raise ValueError(f"model.{name}={value} is for model.attention={' or '.join(readers)}: leave it out")
            least = {"radius": 1, "stride": 2}[name]
            if value is not None and (type(value) is not int or not least <= value <= LARGEST):
                raise ValueError(f"model.{name} must be a whole number of {least} to {LARGEST:,}, got {value!r:.60}")
        if "local" in names and self.radius is None:
            raise ValueError("model.attention=local needs the radius of its window: model.radius=3, in cells")
        if "linear" in names:
            of_scores = [f"positions={self.positions}"] * self.rotates + ["relative_bias=true"] * self.relative_bias
            if of_scores:
                raise ValueError(
                    f"model.{of_scores[0]} changes attention scores, model.attention=linear has none: leave one out"
                )

    def _check_grid(self) -> None:
        """Drops the token grid where no setting reads it, so that equal networks have equal configs."""
        is_sparse = any(name in SPARSE for name in self.attention_names)
        reads_grid = is_sparse or self.relative_bias or any(POSITIONS[name].reads_grid for name in self.encodings)
        if not reads_grid:
            object.__setattr__(self, "grid", None)
            object.__setattr__(self, "permutation", None)
            return
        grid = self.grid
        if grid is None:
            raise ValueError("this network reads the token grid, which its config does not state (grid)")
        if not isinstance(grid, list | tuple) or len(grid) != 3 or not all(type(n) is int and n > 0 for n in grid):
            raise ValueError(f"grid must hold rows, columns and channels of the tokens, got {grid!r:.60}")
        rows, columns, channels = grid
        if rows * columns * channels != self.n_ctx:
            raise ValueError(f"a grid of {rows} × {columns} × {channels} tokens is not the {self.n_ctx} positions")
        object.__setattr__(self, "grid", tuple(grid))
        if self.permutation is not None:
            cells, order = rows * columns, self.permutation
            if not isinstance(order, list | tuple) or not all(type(cell) is int for cell in order):
                raise ValueError("permutation must hold whole numbers")
            if sorted(order) != list(range(cells)):
                raise ValueError(f"permutation must hold 0 … {cells - 1} once")
            object.__setattr__(self, "permutation", None if tuple(order) == tuple(range(cells)) else tuple(order))
        if (is_sparse or self.relative_bias) and self.n_ctx > MOST_SPARSE:
            raise ValueError(
                f"{self.n_ctx:,} positions: sparse patterns and model.relative_bias keep a table of all pairs, up to "
                f"{MOST_SPARSE:,} positions: choose a lower resolution, or full or linear attention"
            )
        stride = self.stride
        if stride is not None and (stride >= self.n_ctx or self.n_ctx % stride):
            raise ValueError(
                f"model.stride={stride} does not divide the {self.n_ctx} tokens of an image: leave it out, which is a "
                f"row of {columns * channels}"
            )

    @property
    def encodings(self) -> tuple[str, ...]:
        """The position encodings beside the paper's table, names in `POSITIONS`."""
        return tuple(name for name in self.positions.split("+") if name != "learned")

    @property
    def rotates(self) -> bool:
        """Whether a position encoding rotates queries and keys."""
        return any(POSITIONS[name].kind == "rotation" for name in self.encodings)

    @property
    def attention_names(self) -> tuple[str, ...]:
        """The names in `attention`, without repetition over the layers."""
        return (self.attention,) if isinstance(self.attention, str) else tuple(self.attention)

    @cached_property
    def layout(self) -> TokenLayout | None:
        """The token grid; None where no setting reads it."""
        return None if self.grid is None else TokenLayout(*self.grid, self.permutation)

    @cached_property
    def patterns(self) -> list[str | Pattern]:
        """The attention pattern of every layer, `full` and `linear` as their names."""
        return layer_patterns(
            self.attention_names, self.n_layer, self.layout, causal=self.causal, radius=self.radius or 0,
            stride=self.stride or (self.layout.row_length if self.layout else 0),
        )  # fmt: skip

    @property
    def hidden_size(self) -> int:
        """Width of the MLP: 4 C; of swiglu, which has three matrices, 8/3 C in multiples of 8 (Shazeer 2020)."""
        return max(8, round(self.n_embd / 3) * 8) if self.activation == "swiglu" else 4 * self.n_embd

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
        """The settings as plain values, to save; choices beyond `positions` only where they are not the paper's."""
        optional = {field.name: field.default for field in fields(self) if field.name not in (*SIZES, "positions")}
        saved = asdict(self)
        return {name: value for name, value in saved.items() if name not in optional or value != optional[name]}

    def unsupported(self, known: Iterable[str]) -> str:
        """Settings that code with the paper's values but for `known` does not support, as `positions=rope`; else ""."""
        known = (*known, "grid", "permutation")  # they are there where another setting reads them
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in known}
        return ", ".join(f"{name}={x}" for name, x in values.items() if x != self.__dataclass_fields__[name].default)


SIZES = ("n_layer", "n_embd", "n_head", "n_ctx", "n_vocab", "causal")  # supported by code for the paper's network
