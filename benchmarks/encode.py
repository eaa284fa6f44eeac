"""Palette encoding of images, and k-means: this project against Hugging Face's processor and scikit-learn.

    python benchmarks/encode.py --images FOLDER_OR_PARQUET --rounds 3 --out encode.json

1,000 real images of 32×32 uint8 pixels, 512 colours. Ids are compared with the exact ones (float64, lowest index on a
tie); where the peer's differ, that and by how little is printed. k-means: 1 M pixels, the same inertia for all rows.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import machine
import numpy as np
import torch
from sklearn.cluster import KMeans

from igpt.data.images import Images
from igpt.tokens.kmeans import fit
from igpt.tokens.lookup import Encoder
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
    "image_column": ["image", "img"],
    "label_column": [],
    "augment": {"pad": 0, "flip": False},
    "on_corrupt": "raise",
    "streaming": False,
    "crop": {
        "short_side": None, "eval_short_side": None, "size": None, "filter": "bilinear", "resize": "once", "draft": None
    },
    "stream": {"buffer": 1, "held": 1, "lanes": None},
}  # fmt: skip


def pixels_of(path: str, n: int, cache: Path) -> np.ndarray:
    """The first n images, (n, 32, 32, 3) uint8."""
    split = Images(cache=cache, name="bench", path=path, resolution=32, **SETTINGS).split("train")
    return split.read(range(min(n, len(split))), [0] * min(n, len(split))).pixels


def peer(palette: Palette, pixels: np.ndarray, *, resize: bool) -> tuple[Callable[[], float], list[np.ndarray]]:
    """Hugging Face's image processor; `resize`: as shipped, which resizes 32×32 to 32×32."""
    from transformers import ImageGPTImageProcessor

    made = ImageGPTImageProcessor(
        clusters=palette.centres.tolist(), size={"height": 32, "width": 32}, do_resize=resize, do_color_quantize=True
    )
    images, last = list(pixels), [np.empty(0)]

    def run() -> float:
        start = time.perf_counter()
        last[0] = np.asarray(made(images, return_tensors="np")["input_ids"])
        return time.perf_counter() - start

    return run, last


def encoding(pixels: np.ndarray, palette: Palette, cache: Path, rounds: int) -> dict[str, list[float]]:
    batch = torch.from_numpy(pixels)
    exact = palette.encode(batch)
    without, with_table = Encoder(palette, None), Encoder(palette, cache)
    with_table._make(with_table.path)  # on disk, as after two million distinct colours
    hf, hf_ids = peer(palette, pixels, resize=True)
    fast, fast_ids = peer(palette, pixels, resize=False)

    def once_a_colour() -> None:
        without.computed = 0  # it would change over to the table
        assert torch.equal(without(batch), exact)

    def by_table() -> None:
        assert torch.equal(with_table(batch), exact)

    rows = {
        "hf as shipped": hf, "hf without its resize": fast,
        "igpt, each colour once": machine.timed(once_a_colour), "igpt, table on disk": machine.timed(by_table),
    }  # fmt: skip
    times = machine.interleaved(rows, rounds)
    for name, ids in (("as shipped", hf_ids[0]), ("without its resize", fast_ids[0])):
        theirs = torch.from_numpy(ids.reshape(exact.shape).astype(np.int64))
        differ = theirs != exact
        points = batch.double() / 127.5 - 1
        centres = torch.from_numpy(palette.centres).double()
        further = (points[differ] - centres[theirs[differ]]).square().sum(-1)
        nearest = (points[differ] - centres[exact[differ]]).square().sum(-1)
        worst = float((further - nearest).max()) if differ.any() else 0.0
        print(
            f"hf {name}: {int(differ.sum())} of {differ.numel():,} ids are not the exact ones, by {worst:.1e} at most"
        )
    print("\n".join(machine.table(times, unit=lambda s: f"{len(pixels) / s:,.0f} images/s", against="hf as shipped")))
    return times


def clustering(pixels: np.ndarray, rounds: int) -> dict[str, list[float]]:
    """Whole fits to the same inertia: scikit-learn's on raw pixels, and ours, given no fewer iterations."""
    flat = pixels.reshape(-1, 3)[:1_000_000]
    points = (flat / 127.5 - 1).astype(np.float32)
    reached: dict[str, float] = {}

    def inertia(centres: np.ndarray) -> float:
        distances = Palette(centres.astype(np.float32))
        nearest = distances.encode(torch.from_numpy(flat)).numpy()
        return float(((points - centres[nearest]) ** 2).sum())

    def sklearn_raw() -> None:
        found = KMeans(512, n_init=1, max_iter=60, random_state=0).fit(points)
        reached["scikit-learn, raw pixels"] = inertia(np.clip(found.cluster_centers_, -1, 1))

    def our_fit() -> None:
        reached["igpt, distinct colours"] = inertia(fit(flat, k=512, iterations=60, restarts=1, seed=0).centres)

    rows = {"scikit-learn, raw pixels": sklearn_raw, "igpt, distinct colours": our_fit}
    times = machine.interleaved({name: machine.timed(run) for name, run in rows.items()}, rounds, warm_up=0)
    lines = machine.table(times, unit=lambda s: f"{s:.2f} s", against="scikit-learn, raw pixels")
    print(f"\nk-means, {len(flat):,} pixels, {len(np.unique(flat, axis=0)):,} colours; inertia {json.dumps(reached)}")
    print("\n".join(lines))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="a folder of images, or of parquet files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    print(machine.about())
    pixels = pixels_of(args.images, 1000, args.cache)
    palette = fit(pixels, k=512, iterations=20, restarts=1, seed=0)
    times = encoding(pixels, palette, args.cache, args.rounds)
    fits = clustering(pixels, args.rounds)
    machine.write(args.out, {"encoding": times, "kmeans": fits})


if __name__ == "__main__":
    main()
