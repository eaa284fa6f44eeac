"""Milliseconds of every way of attention, forward and backward, over sequence length: what `dispatch.py` rests on.

    python benchmarks/attention.py --out attention.json
    python benchmarks/attention.py --patterns --out patterns.json

Causal, 4 heads of D, 8,192 positions at every length. Ways take turns; outputs must agree. `--patterns`: one image of a
square grid, 8 heads of 32, float32, by pattern of attention: milliseconds of a layer, and MiB of float32 that it saves
for the backward pass beside queries, keys and values.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import machine
import torch

from igpt.distributed.process_state import float32_matmul_precision
from igpt.model import c_library, dispatch
from igpt.model.attention import masked_attention, self_attention, split_heads
from igpt.model.linear_attention import CHUNK, linear_attention
from igpt.model.patterns import ALTERNATING, SPARSE, Pattern, TokenLayout
from igpt.model.sparse_mask import SparseMask
from igpt.training.hardware import disable_malloc_trim

WAYS = ("native", "sdpa", "blocks", "bmm")
N_HEAD = 4
# of the outputs
WITHIN = {"fp32": 1e-4, "fp32+medium": 1e-4, "tf32-products": 5e-3, "bf16-products": 5e-2, "bf16": 5e-2}


def ways(device: str) -> tuple[str, ...]:
    return WAYS if device == "cpu" and c_library.is_available() else WAYS[1:]


def rows(t: int, d: int, precision: str, device: str) -> dict[str, machine.Run]:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    shape = (max(1, 8192 // t), t, N_HEAD * d)
    qkv = torch.randn(*shape[:2], 3 * shape[2], dtype=dtype, device=device, generator=generator, requires_grad=True)
    along = torch.randn(shape, dtype=dtype, device=device, generator=generator)

    def both(way: str) -> torch.Tensor:
        qkv.grad = None
        out = self_attention(qkv, N_HEAD, causal=True, backend=way)
        out.backward(along)
        return out.detach().float()

    return {way: machine.with_timer(lambda way=way: both(way)) for way in ways(device)}


Attend = Callable[[torch.Tensor], torch.Tensor]
RADIUS, HEADS = 7, 8  # of local patterns, and of every row


def pattern_ways(side: int, device: str) -> dict[str, tuple[list[Attend], list[Attend]]]:
    """By pattern and backend the layers to time, two where a pattern alternates; and their reference."""
    layout, found = TokenLayout(side, side), {}
    auto = "native" if device == "cpu" and c_library.is_available() else None
    t = layout.n_ctx
    unfused = dispatch.unfused_attention_backend(torch.device(device), torch.float32, t=t, causal=True)
    other = "blocks" if device == "cpu" else "flex"

    def attend(backend: str, mask: SparseMask | None) -> Attend:
        if mask is None:
            return lambda qkv: self_attention(qkv, HEADS, causal=True, backend=backend)
        return lambda qkv: masked_attention(qkv, HEADS, causal=True, mask=mask, backend=backend)

    def attend_linearly(chunk: int) -> Attend:
        def run(qkv: torch.Tensor) -> torch.Tensor:
            q, k, v = split_heads(qkv, HEADS)
            return linear_attention(q, k, v, causal=True, chunk=chunk).transpose(1, 2).flatten(2)

        return run

    for backend, plain in (("native", auto), ("without C", unfused)):
        if plain is not None:
            found[f"full {backend}"] = [attend(plain, None)], [attend("bmm", None)]
    for name in SPARSE:
        halves = (0, 1) if name in ALTERNATING else (0,)
        masks = [SparseMask(Pattern(name, half, True, layout, RADIUS, side)) for half in halves]
        for backend, sparse in (("native", auto), ("without C", other)):
            if sparse is not None:
                found[f"{name} {backend}"] = (
                    [attend(sparse, mask) for mask in masks],
                    [attend("bmm", mask) for mask in masks],
                )
    found["linear without C"] = [attend_linearly(CHUNK)], [attend_linearly(t)]
    return found


def run_patterns(sides: Sequence[int], rounds: int, device: str) -> list[dict[str, Any]]:
    """Times and saved bytes of every pattern; prints ms (min – max), times as fast as the first row, MiB."""
    shapes, cells = [], dict[str, list[str]]()
    for side in sides:
        t, generator = side**2, torch.Generator(device).manual_seed(0)
        qkv = torch.randn(1, t, 3 * 32 * HEADS, device=device, generator=generator, requires_grad=True)
        along = torch.randn(1, t, 32 * HEADS, device=device, generator=generator)

        def both(layers: list[Attend], qkv: torch.Tensor = qkv, along: torch.Tensor = along) -> torch.Tensor:
            outputs = []
            for layer in layers:
                qkv.grad = None
                out = layer(qkv)
                out.backward(along)
                outputs.append(torch.cat([out.detach(), qkv.grad], 2))
            return torch.stack(outputs)

        ways = pattern_ways(side, device)
        times = machine.time_in_turns(
            {name: machine.with_timer(lambda layers=layers: both(layers)) for name, (layers, _) in ways.items()}, rounds
        )
        saved = {
            name: statistics.mean(count_saved_bytes(layer, qkv) for layer in layers) / 2**20
            for name, (layers, _) in ways.items()
        }
        shapes.append({"side": side, "rows": times, "saved": saved})
        for name, (_, dense) in ways.items():
            expected = machine.Timed(result=both(dense))
            machine.agree("output and gradient", {f"{name}, dense": expected, name: times[name]}, lambda _: 1e-4)
        full = times[next(iter(ways))].median
        for name, (layers, _) in ways.items():
            times[name].seconds = [seconds / len(layers) for seconds in times[name].seconds]  # of one layer
            row = times[name]
            cell = f"{1e3 * row.median:.1f} ({row.spread}), {full / row.median:.1f}×, {saved[name]:.1f}"
            cells.setdefault(name, []).append(cell)
    print("| | " + " | ".join(f"{side**2:,}" for side in sides) + " |\n" + "|---" * (1 + len(sides)) + "|")
    for name, row_cells in cells.items():
        print(f"| {name} | " + " | ".join(row_cells) + " |")
    return shapes


def count_saved_bytes(layer: Attend, qkv: torch.Tensor) -> int:
    saved: dict[int, int] = {qkv.untyped_storage().data_ptr(): 0}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            saved.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        kept.append(tensor)  # so that no address is used twice
        return tensor

    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(qkv)
    return sum(saved.values())


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--heads", type=int, nargs="+", default=[16, 32, 64], help="sizes of a head")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patterns", action="store_true", help="by pattern of attention, instead")
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 48, 64], help="of the grids of --patterns")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    disable_malloc_trim()
    if args.patterns:
        print(machine.about())
        report: dict[str, Any] = {"shapes": run_patterns(args.sides, args.rounds, device)}
        machine.write(args.out, report)
        return report
    print(f"{machine.about()}\n{' / '.join(ways(device))} in ms")
    precisions = ("fp32", machine.medium(device), "bf16")
    print("| T | " + " | ".join(f"{p} D={d}" for p in precisions for d in args.heads) + " |")
    print("|---" * (1 + len(precisions) * len(args.heads)) + "|")
    report = {"shapes": []}
    for t in args.lengths:
        cells = []
        for precision in precisions:
            products = "medium" if precision == machine.medium(device) else "highest"
            for d in args.heads:
                with float32_matmul_precision(products):
                    times = machine.time_in_turns(rows(t, d, precision, device), args.rounds, warm_up=2)
                machine.agree("the output", times, lambda _, p=precision: WITHIN[p])
                cells.append(" / ".join(f"{1e3 * row.median:.1f}" for row in times.values()))
                report["shapes"].append({"t": t, "d": d, "precision": precision, "rows": times})
        print(f"| {t} | " + " | ".join(cells) + " |", flush=True)
    machine.write(args.out, report)
    return report


if __name__ == "__main__":
    main()
