"""Palette encoding of images, and k-means: this project against Hugging Face's processor and scikit-learn.

    python benchmarks/encode.py --images FOLDER_OR_PARQUET --rounds 3 --out encode.json

1,000 real images of 32×32 uint8 pixels, 512 colours. Ids are compared with the exact ones (float64, lowest index on a
tie); where the peer's differ, that and by how little is printed. k-means: 1 M pixels; the inertia of each is printed.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from igpt.data.images import Images
from igpt.run.targets import checked_partial
from igpt.tokens.kmeans import fit_palette
from igpt.tokens.lookup import LookupEncoder
from igpt.tokens.palette import Palette

SETTINGS = {
    "classes": None,
    "n_class": None,
    "val_fraction": 0.0,
    "test_fraction": 0.0,
    "split_seed": 0,
    "labels_per_class": None,
    "subset_seed": 0,
    "splits": {"train": ["train"], "val": [], "test": []},
    "layout": "auto",
    "image_column": ["image", "img"],
    "label_column": [],
    "augment": {"pad": 0, "flip": False},
    "on_corrupt": "raise",
    "streaming": False,
    "crop": {
        "short_side": None, "eval_short_side": None, "size": None, "filter": "bilinear", "resize": "once", "draft": None
    },
    "stream": {"buffer": 1, "held_in_memory": 1, "num_readers": None},
}  # fmt: skip


def read_pixels(path: str, n: int, cache: Path) -> np.ndarray:
    """The first n images, (n, 32, 32, 3) uint8."""
    settings = {"_target_": "igpt.data.images.Images", "name": "bench", "path": path, "resolution": 32, **SETTINGS}
    source: Images = checked_partial(settings, "data")(cache=cache)
    split = source.split("train")
    return split.read(range(min(n, len(split))), [0] * min(n, len(split))).pixels


def peer(palette: Palette, pixels: np.ndarray, *, resize: bool) -> Callable[[], np.ndarray]:
    """Hugging Face's image processor; `resize`: as shipped, which resizes 32×32 to 32×32."""
    from transformers import ImageGPTImageProcessor

    size = {"height": pixels.shape[1], "width": pixels.shape[2]}
    processor = ImageGPTImageProcessor(
        clusters=palette.centres.tolist(), size=size, do_resize=resize, do_color_quantize=True
    )
    images = list(pixels)
    return lambda: np.asarray(processor(images, return_tensors="np")["input_ids"])


def encoding(pixels: np.ndarray, palette: Palette, cache: Path, rounds: int) -> dict[str, machine.Timed]:
    """Rows in turn. Ours must be the exact ids; how many of theirs are not, and by how little, is printed."""
    batch = torch.from_numpy(pixels)
    exact = palette.encode(batch)
    without, with_table = LookupEncoder(palette, None), LookupEncoder(palette, cache)
    with_table._load_table()  # on disk, as after two million distinct colours

    def once_a_colour() -> Tensor:
        without.computed = 0  # it would change over to the table
        return without(batch)

    rows: dict[str, Callable[[], Any]] = {
        "hf as shipped": peer(palette, pixels, resize=True),
        "hf without its resize": peer(palette, pixels, resize=False),
        "igpt, each colour once": once_a_colour,
        "igpt, table on disk": lambda: with_table(batch),
    }
    times = machine.time_in_turns({name: machine.with_timer(run) for name, run in rows.items()}, rounds)
    points, centres = batch.double() / 127.5 - 1, torch.from_numpy(palette.centres).double()
    for name, row in times.items():
        ids = torch.as_tensor(row.result).reshape(exact.shape).to(exact.dtype)
        differ = ids != exact
        if name.startswith("igpt") and differ.any():
            raise SystemExit(f"{name}: {int(differ.sum())} ids are not the exact ones: no figures")
        further = (points[differ] - centres[ids[differ]]).square().sum(-1)
        nearest = (points[differ] - centres[exact[differ]]).square().sum(-1)
        worst = float((further - nearest).max()) if differ.any() else 0.0
        print(f"{name}: {int(differ.sum())} of {differ.numel():,} ids are not the exact ones, by {worst:.1e} at most")
        row.result = None
    print("\n".join(machine.table(times, unit=lambda s: f"{len(pixels) / s:,.0f} images/s", against="hf as shipped")))
    return times


def clustering(pixels: np.ndarray, k: int, n: int, rounds: int) -> dict[str, machine.Timed]:
    """Whole fits, at most 60 iterations each: scikit-learn's on raw pixels, ours on distinct colours with weights.

    The result of a row is its inertia: the sum of squared distances of all pixels to their nearest colour.
    """
    flat = pixels.reshape(-1, 3)[:n]
    points = (flat / 127.5 - 1).astype(np.float32)

    def inertia(centres: np.ndarray) -> float:
        palette = Palette(np.clip(centres, -1, 1).astype(np.float32))
        nearest = palette.encode(torch.from_numpy(flat)).numpy()
        return float(((points - palette.centres[nearest]) ** 2).sum())

    rows: dict[str, Callable[[], np.ndarray]] = {
        "scikit-learn, raw pixels": lambda: (
            KMeans(k, n_init=1, max_iter=60, random_state=0).fit(points).cluster_centers_
        ),
        "igpt, distinct colours": lambda: fit_palette(flat, k=k, iterations=60, restarts=1, seed=0).centres,
    }
    times = machine.time_in_turns({name: machine.with_timer(run) for name, run in rows.items()}, rounds, warm_up=0)
    for row in times.values():
        row.result = inertia(row.result)
    print(f"\nk-means, {len(flat):,} pixels, {len(np.unique(flat, axis=0)):,} colours, k {k}")
    print("\n".join(machine.table(times, unit=lambda s: f"{s:.2f} s", against="scikit-learn, raw pixels")))
    print("inertia: " + ", ".join(f"{name} {row.result:,.1f}" for name, row in times.items()), flush=True)
    return times


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="a folder of images, or of parquet files")
    parser.add_argument("--count", type=int, default=1000, help="images")
    parser.add_argument("--colours", type=int, default=512)
    parser.add_argument("--pixels", type=int, default=1_000_000, help="of the k-means fit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    print(machine.about())
    pixels = read_pixels(args.images, args.count, args.cache)
    palette = fit_palette(pixels, k=args.colours, iterations=20, restarts=1, seed=0)
    times = encoding(pixels, palette, args.cache, args.rounds)
    fits = clustering(pixels, args.colours, args.pixels, args.rounds)
    inertia = {name: row.result for name, row in fits.items()}
    report = {"encoding": times, "kmeans": fits, "inertia": inertia}
    machine.write(args.out, report)
    return report


if __name__ == "__main__":
    main()
