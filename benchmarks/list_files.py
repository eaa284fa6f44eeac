"""Seconds to list and to open a folder in ImageNet's shape: empty files in train/<wnid>/ and val/<wnid>/.

    python benchmarks/list_files.py --files 1331167 --peer --out list.json

`list` is the one listing of a run (names, sizes, times of change); `hash` what a run is known by; `open` all of it,
splits and labels included, until images could be read. `--peer`: Hugging Face `datasets`, which opened folders before.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import machine
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from igpt.data.classes import imagenet_classes
from igpt.data.images import Images
from igpt.data.listing import list_files
from igpt.run.targets import checked_partial, without

CONF = Path(__file__).parents[1] / "conf"
OF_VAL = 50_000 / 1_331_167  # of all images of ILSVRC 2012


def make_files(root: Path, n: int) -> None:
    """Empty image files in the layout and of the names of ILSVRC 2012."""
    wnids = list(imagenet_classes())
    for split, count in (("train", n - round(n * OF_VAL)), ("val", round(n * OF_VAL))):
        for c, wnid in enumerate(wnids):
            (root / split / wnid).mkdir(parents=True, exist_ok=True)
            for i in range(c, count, len(wnids)):
                os.close(os.open(root / split / wnid / f"{wnid}_{i}.JPEG", os.O_CREAT | os.O_WRONLY, 0o644))


def open_ours(root: Path, cache: Path) -> int:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = OmegaConf.to_container(compose("config", overrides=["data=imagenet32"]).data, resolve=True)
    assert isinstance(settings, dict)
    settings = {**without(settings, "palette_size"), "path": str(root)}
    source: Images = checked_partial(settings, "data")(cache=cache)
    return sum(len(source.split(name)) for name in ("train", "val", "test"))


def open_peer(root: Path, cache: Path) -> int:
    found = datasets.load_dataset("imagefolder", data_dir=str(root), drop_labels=False, cache_dir=str(cache))
    return sum(len(split) for split in found.values())


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="store_true", help="Hugging Face `datasets`, too, once: it takes minutes")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    report: dict[str, Any] = {"files": args.files, "seconds": {"list": [], "hash": [], "open": []}}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "ilsvrc"
        make_files(root, args.files)
        for _ in range(args.rounds):
            start = time.perf_counter()
            listing = list_files(root)
            listed = time.perf_counter()
            assert listing.sha256
            hashed = time.perf_counter()
            found = open_ours(root, Path(place) / "cache")
            opened = time.perf_counter()
            if {len(listing), found} != {args.files}:
                raise SystemExit(f"{args.files} files, {len(listing)} were listed, {found} opened: no figures")
            for row, seconds in zip(report["seconds"], (listed - start, hashed - listed, opened - hashed), strict=True):
                report["seconds"][row].append(seconds)
        if args.peer:
            start = time.perf_counter()
            open_peer(root, Path(place) / "peer")
            report["seconds"]["datasets"] = [time.perf_counter() - start]
    print(f"{machine.about()}\n{args.files:,} files\n| row | seconds, min – max |\n|---|---|")
    for row, seconds in report["seconds"].items():
        print(f"| {row} | {min(seconds):.2f} – {max(seconds):.2f} |")
    machine.write(args.out, report)
    return report


if __name__ == "__main__":
    main()
