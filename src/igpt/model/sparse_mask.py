"""Tables of an attention pattern for the backends that compute it, built from its one rule and kept on a device."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from igpt.model.patterns import Cells, Pattern

BLOCK = 32  # queries of a block: bits of an int32, and Q in attend_sparse.c; products gain nothing from larger ones


class SparseMask:
    """The mask of a pattern as every backend reads it; one object serves all layers of the same pattern.

    `prepare` builds what a backend reads. A copy builds its own again.
    """

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        self._forget(torch.device("cpu"))

    def __reduce__(self) -> tuple[Any, ...]:
        return SparseMask, (self.pattern,)

    def _forget(self, device: torch.device) -> None:
        self.device = device
        self.dense: Tensor | None = None  # (T, T) bool: query i sees key j
        self.blocks: tuple[Tensor, ...] | None = None  # per block: queries (n,), keys (m,) int64, hidden (n, m) bool
        self.lanes: tuple[Tensor, ...] | None = None  # tables of attend_sparse.c, int32, see `_build_lanes`
        self.flex: BlockMask | None = None  # of FlexAttention

    def prepare(self, device: torch.device, backend: str) -> None:
        """Builds the tables that a backend (`dispatch.sparse_backend`) reads on this device, unless they are there.

        Compiled code that does not find them calls this itself, at the price of a break in its graph.
        """
        tables = {"native": self.lanes, "blocks": self.blocks, "flex": self.flex}.get(backend, self.dense)
        if device != self.device or tables is None:
            self._build(device, backend)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # PyTorch has no type for it
    def _build(self, device: torch.device, backend: str) -> None:
        if device != self.device:
            self._forget(device)
        with torch.inference_mode(False), torch.no_grad():  # the tables serve training, too
            if backend == "native":
                self.lanes = self._build_lanes()
            elif backend == "blocks":
                self.blocks = tuple(table.to(device) for block in self._list_blocks() for table in block)
            elif backend == "flex":
                self.flex = self._build_flex()
            else:
                self.dense = self._build_dense().to(device)

    def count_saved_scores(self, backend: str) -> int:
        """Number of scores saved for the backward pass, per image and head."""
        if backend == "blocks":
            return sum(hidden.numel() for _, _, hidden in self._list_blocks())
        return self.pattern.layout.n_ctx**2 if backend == "bmm" else 0

    def _build_flex(self) -> BlockMask:
        pattern, t = self.pattern, self.pattern.layout.n_ctx
        queries, keys = pattern.layout.queries(self.device), pattern.layout.keys(pattern.causal, self.device)

        def is_visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return pattern.is_visible(Cells(*(each[query] for each in queries)), Cells(*(each[key] for each in keys)))

        return create_block_mask(is_visible, None, None, t, t, device=self.device)

    def _build_dense(self) -> Tensor:
        t = self.pattern.layout.n_ctx
        return torch.cat([self.pattern.mask_rows(start, min(start + 512, t)) for start in range(0, t, 512)])

    def _build_lanes(self) -> tuple[Tensor, ...]:
        """Queries in order (T,); of every block its first key (⌈T / BLOCK⌉ + 1,); keys (N,) and their bits (N,).

        Bit i of a key is set if query i of its block sees it. A last block's missing queries see what its first does.
        """
        blocks = list(self._list_blocks())
        bits = []
        for chosen, _, hidden in blocks:
            visible = torch.cat([~hidden, ~hidden[:1].expand(BLOCK - len(chosen), -1)])
            bits.append((visible.long() << torch.arange(BLOCK, device="cpu")[:, None]).sum(0))
        starts = torch.tensor([0, *(len(keys) for _, keys, _ in blocks)], device="cpu").cumsum(0)
        order, keys = (torch.cat([block[i] for block in blocks]) for i in (0, 1))
        return order.int(), starts.int(), keys.int(), torch.cat(bits).int()

    def _list_blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All queries in blocks of `BLOCK`, each with the keys that any of them sees, and which of these are hidden."""
        layout = self.pattern.layout
        queries, keys = layout.queries(), Cells(*(each[None] for each in layout.keys(self.pattern.causal)))
        for chosen in torch.split(order_queries(self.pattern), BLOCK):
            visible = self.pattern.is_visible(Cells(*(each[chosen, None] for each in queries)), keys)  # (n, T)
            seen = visible.any(0).nonzero()[:, 0]
            yield chosen, seen, ~visible[:, seen]


def order_queries(pattern: Pattern) -> Tensor:
    """Positions in an order in which neighbours see much the same keys: (T,) int64.

    Local: pieces of four rows of the grid and about `BLOCK` tokens. Axial: rows; columns. The second half of strided:
    all that are a number of strides apart. Else the sequence.
    """
    layout = pattern.layout
    index, row, column = layout.queries()
    first, second = index * 0, index
    if pattern.name == "local":
        wide = max(1, BLOCK // 4 // layout.channels) * layout.channels
        first, second = row // 4 * layout.row_length + column // wide, row * layout.row_length + column
    elif pattern.name == "axial":
        first, second = (row, column) if pattern.half == 0 else (column, row)
    elif pattern.name == "strided" and pattern.half == 1:
        first = index % pattern.stride
    return (first * layout.n_ctx + second).argsort(stable=True)
