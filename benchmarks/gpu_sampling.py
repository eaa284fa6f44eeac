"""Part `sampling` of `gpu.py`: whole images drawn with iGPT-S in each way, and by Hugging Face's `generate`, one at a
time.
"""

import argparse
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from gpu_units import Unit
from networks import SIZES
from sampling import GREEDY, build_side

# hand-recorded graphs span by span and for all positions at once, torch.compile(mode="reduce-overhead") of the latter
WAYS = ("graphs", "single-graph", "reduce-overhead")


def check_greedy(seconds: float, size: str, way: str) -> dict[str, Any]:
    """Share of the first greedy tokens of two images, in float32, that are Hugging Face's."""
    rows = build_side("igpt", size, [], [way], "fp32") | build_side("hf", size, [], [], "fp32")
    (_, own), (_, peer) = (run() for run in rows.values())
    return {"same_tokens": float((own == peer).double().mean()), "tokens": GREEDY * 2}


def measure_sampling(
    seconds: float, size: str, who: str, way: str, precision: str, batch: int, rounds: int
) -> dict[str, Any]:
    """Seconds of drawing `batch` whole images, round by round; the first round is a warm-up of ours (compilation).

    A peer that runs out of memory draws half as many.
    """
    while True:
        try:
            rows = build_side(who, size, [batch], [way], precision)
            run = next(run for name, run in rows.items() if not name.startswith("greedy"))
            times = [run()[0] for _ in range(rounds + (who == "igpt"))]
            break
        except torch.OutOfMemoryError:
            if who == "igpt" or batch == 1:
                raise
        batch //= 2
        torch.cuda.empty_cache()
    times = times[-rounds:]
    return {"images": batch, "seconds": times, "images_per_s": batch / statistics.median(times)}


def list_units(args: argparse.Namespace) -> list[Unit]:
    size, batches, rounds = ("tiny", [2], 1) if args.tiny else ("b", [64, 256], 3)
    ways = ("graphs", "single-graph") if args.tiny else WAYS
    slow = {"reduce-overhead": 120.0}  # compiles, for one image and for all
    quick = 1.0 if args.tiny else 25.0
    units = [Unit("sampling", f"greedy {way}", slow.get(way, quick), check_greedy, (size, way)) for way in ways]
    for batch in batches:
        for precision in ("bf16", "fp32"):
            for way in ways:
                few = (size, "igpt", way, precision, batch, rounds)
                seconds = slow.get(way, quick) + (0 if args.tiny else batch / 8)
                units.append(Unit("sampling", f"{batch} {precision} igpt {way}", seconds, measure_sampling, few))
            few = (size, "hf", "auto", precision, batch, 1)
            seconds = quick + (0 if args.tiny else 60 + batch / 4)
            units.append(Unit("sampling", f"{batch} {precision} hf", seconds, measure_sampling, few))
    return units


def make_table(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A row for each batch, precision and way, against Hugging Face's of the same."""
    results = {name: entry["result"] for name, entry in figures.items() if "result" in entry}
    rows = {name: r for name, r in results.items() if "images_per_s" in r}
    if not rows:
        return []
    n_ctx = SIZES["b"][3]
    lines = ["| images asked for, precision, way | images | s | images/s | ms a step | against Hugging Face |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, r in rows.items():
        batch, precision, *way = name.split()
        peer = rows.get(f"{batch} {precision} hf")
        ratio = f"{r['images_per_s'] / peer['images_per_s']:.2f}×" if peer else "–"
        s = statistics.median(r["seconds"])
        spread = f"{s:.2f} ({min(r['seconds']):.2f} – {max(r['seconds']):.2f})"
        lines.append(
            f"| {batch}, {precision}, {' '.join(way)} | {r['images']} | {spread} | {r['images_per_s']:.1f} | "
            f"{1e3 * s / n_ctx:.2f} | {ratio} |"
        )
    same = {name: r for name, r in results.items() if "same_tokens" in r}
    if same:
        each = ", ".join(f"{name.split()[1]} {r['same_tokens']:.1%}" for name, r in same.items())
        lines += ["", f"Greedy tokens equal to Hugging Face's in float32, of {GREEDY} of two images each: {each}."]
    return lines
