"""Images per second from photographs and pixels to tokens on the device, and what each faster way changes.

    python benchmarks/data_path.py --photos FOLDER --cifar FILE --out data.json

FOLDER holds JPEGs at any depth, FILE is CIFAR-10 as parquet.

At the end what arrives is held against what training consumes (`--size`, at this device's best setting): below 1 the
device would wait for images.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
import PIL
import pyarrow.parquet as pq
import torch
from networks import SIZES, our_net, token_ids
from PIL import Image
from torch.utils.data import DataLoader
from train_step import make_step

from igpt.data.crop import Crop, Resize
from igpt.distributed.cores import count_cores
from igpt.tokens import lookup
from igpt.tokens.kmeans import fit_palette
from igpt.tokens.lookup import LookupEncoder
from igpt.training.hardware import disable_malloc_trim

PAPER: dict[str, Any] = {"short_side": (256, 384), "size": 224}
K = 512
BATCH = 128  # images that a loader reads at once


def plain(crop: Crop) -> Callable[[bytes, int], np.ndarray]:
    """As a reader of the paper writes it: decode, resize the whole image, crop, resize."""
    method = Image.Resampling[crop.filter.upper()]

    def cut(data: bytes, key: int) -> np.ndarray:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        (left, top, right, _), (width, height) = crop.box(*image.size, key)
        scale = 224 / (right - left)
        x, y = round(left * scale), round(top * scale)
        image = image.resize((round(width * scale), round(height * scale)), method)
        return np.asarray(image.crop((x, y, x + 224, y + 224)).resize((crop.resolution,) * 2, method))

    return cut


def ways(resolution: int) -> dict[str, Callable[[bytes, int], np.ndarray]]:
    """What is compared; the first is what the others are held against."""

    def crop(resize: Resize, draft: float | None, filter: str = "bilinear") -> Crop:
        return Crop(resolution=resolution, resize=resize, draft=draft, filter=filter, **PAPER)

    return {
        "plain: whole image, crop, resize": plain(crop("twice", None)),
        "resize=twice draft=null": crop("twice", None),
        "resize=twice draft=3 (default)": crop("twice", 3),
        "resize=once draft=null": crop("once", None),
        "resize=once draft=4": crop("once", 4),
        "resize=once draft=3": crop("once", 3),
        "resize=once draft=2": crop("once", 2),
        "filter=bicubic": crop("twice", None, "bicubic"),
        "filter=box": crop("twice", None, "box"),
    }


def crops(photos: list[bytes], rounds: int) -> dict[str, float]:
    """Decode + crop + resize on one core, ways in turn; difference in grey levels against the plain way."""
    print("\n| R | way | images/s | min – max | root mean square difference | contrast of neighbours |")
    print("|---|---|---|---|---|---|")
    rates: dict[str, float] = {}
    for resolution in (32, 48, 64, 96, 192):
        pixels_by_way, speeds = {}, {name: [] for name in ways(resolution)}
        for _ in range(rounds):
            for name, cut in ways(resolution).items():
                start = time.perf_counter()
                pixels_by_way[name] = np.stack([cut(data, key) for key, data in enumerate(photos)]).astype(float)
                speeds[name].append(len(photos) / (time.perf_counter() - start))
        plain_pixels = next(iter(pixels_by_way.values()))
        contrast = np.abs(np.diff(plain_pixels, axis=2)).mean()
        for name, pixels in pixels_by_way.items():
            difference = np.sqrt(((pixels - plain_pixels) ** 2).mean())
            change = np.abs(np.diff(pixels, axis=2)).mean() / contrast - 1
            speed = speeds[name]
            rate = f"{statistics.median(speed):,.0f} | {min(speed):,.0f} – {max(speed):,.0f}"
            print(f"| {resolution} | {name} | {rate} | {difference:.2f} | {change:+.1%} |", flush=True)
            rates[f"{resolution}, {name}"] = statistics.median(speed)
    return rates


def encoding(pixels: np.ndarray, rounds: int) -> dict[str, float]:
    """Tokens of (N, R, R, 3) uint8 images with 512 fitted colours, on all cores."""
    palette = fit_palette(pixels.reshape(-1, 3)[:250_000], k=K, iterations=20, restarts=1, seed=0)
    images, n = torch.from_numpy(pixels), len(pixels)
    build, unique, table = [], [], []
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(rounds):
            start = time.perf_counter()
            lookup.build_table(palette)
            build.append(time.perf_counter() - start)
            start = time.perf_counter()
            tokens = palette.encode(images)
            unique.append(n / (time.perf_counter() - start))
        encoder = LookupEncoder(palette, Path(cache))
        encoder.computed = lookup.PAYS + 1
        encoder(images[:1])
        for _ in range(rounds):
            start = time.perf_counter()
            same = encoder(images)
            table.append(n / (time.perf_counter() - start))
    assert torch.equal(tokens, same)
    distinct = len(np.unique(pixels.reshape(-1, 3), axis=0))
    print(f"\n{n} images of {pixels.shape[1]}×{pixels.shape[1]}, {distinct:,} distinct colours, {K} in the palette")
    rates = (
        f"distinct colours {statistics.median(unique):,.0f} images/s, table {statistics.median(table):,.0f} images/s"
    )
    print(f"{rates}, the table built in {statistics.median(build):.2f} s")
    return {
        "distinct colours": statistics.median(unique),
        "table": statistics.median(table),
        "s to build it": statistics.median(build),
    }


class Photographs(torch.utils.data.Dataset[torch.Tensor]):
    """What a loader's worker does for one batch; without end."""

    def __init__(self, photos: list[bytes], crop: Crop) -> None:
        self.photos, self.crop = photos, crop

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, batch: int) -> torch.Tensor:
        keys = [(batch * BATCH + i) for i in range(BATCH)]
        return torch.from_numpy(np.stack([self.crop(self.photos[key % len(self.photos)], key) for key in keys]))


def loading(photos: list[bytes], workers: Sequence[int], size: str, device: str, least: float) -> dict[str, float]:
    """Batches of tokens on the device, as a training loop gets them, by number of workers; what training takes.

    The steady state: what workers had read before the first four batches of each were taken does not count, then
    at least `least` seconds and four batches of each worker.
    """
    takes = appetite(size, device)
    print(f"\ntraining of size {size} takes {takes:,.1f} images/s on this {device}")
    print("| workers | images/s at R = 32, as tokens on the device | of what training takes |\n|---|---|---|")
    crop = Crop(resolution=32, resize="twice", draft=3, filter="bilinear", **PAPER)
    palette = fit_palette(np.stack([crop(data, 0) for data in photos[:64]]), k=K, iterations=5, restarts=1, seed=0)
    encoder, rates = LookupEncoder(palette, None), {"takes": takes}
    for count in workers:
        loader = DataLoader(Photographs(photos, crop), batch_size=None, num_workers=count, pin_memory=device == "cuda")
        turns, n, start, elapsed = 4 * count or 1, 0, 0.0, 0.0
        for i, batch in enumerate(loader):
            n += len(encoder(batch.to(device, non_blocking=True)))
            if i + 1 == turns:
                machine.finish()
                start, n = time.perf_counter(), 0
            elif i + 1 >= 2 * turns:
                machine.finish()
                if (elapsed := time.perf_counter() - start) >= least:
                    break
        rates[f"{count} workers"] = rate = n / elapsed
        print(f"| {count} | {rate:,.0f} | {rate / takes:,.1f}× |", flush=True)
    return rates


def list_photos(folder: Path) -> list[Path]:
    """JPEGs in a folder, at any depth."""
    return [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")]


def appetite(size: str, device: str) -> float:
    """Images/s of a training step alone, at this device's best setting."""
    disable_malloc_trim()
    net = our_net(size, compiled=device == "cuda").to(device)
    run = make_step(net, token_ids(size, device), "bf16")
    run()
    seconds, _ = run()
    return SIZES[size][-1] / seconds


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=10.0, help="of loading with each number of workers, at least")
    parser.add_argument("--size", choices=sorted(SIZES), help="training of this takes what is loaded; a GPU: s")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    photos = [path.read_bytes() for path in list_photos(args.photos)]
    sizes = np.array([Image.open(io.BytesIO(data)).size for data in photos])
    print(f"{len(photos)} photographs, median {np.median(sizes, axis=0).astype(int).tolist()} pixels, "
          f"{np.mean([len(p) for p in photos]) / 1024:.0f} kB; Pillow {PIL.__version__}, torch {torch.__version__}, "
          f"{count_cores()} cores")  # fmt: skip
    report = {"crops": crops(photos, args.rounds)}
    size = args.size or ("s" if device == "cuda" else "a")
    report["loading"] = loading(photos, args.workers, size, device, args.seconds)
    crop = Crop(resolution=32, resize="once", draft=None, filter="bilinear", **PAPER)
    report["encoding photographs"] = encoding(
        np.stack([crop(data, key) for key in range(2) for data in photos])[:1000], args.rounds
    )
    if args.cifar:
        cells = pq.read_table(args.cifar, columns=["image"]).slice(0, 1000).column("image").to_pylist()
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(cell["bytes"]))) for cell in cells])
        report["encoding CIFAR-10"] = encoding(pixels, args.rounds)
    machine.write(args.out, report)
    return report


if __name__ == "__main__":
    main()
