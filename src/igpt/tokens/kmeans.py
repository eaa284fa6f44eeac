"""Fits a palette to pixels: k-means on distinct colours, weighted by their counts."""

import hashlib
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch

from igpt.data.cache import map_chunks, read_or_make
from igpt.data.source import Source, Split, plain_pixels
from igpt.settings.fields import Count, Seed
from igpt.tokens.palette import Palette, PaletteSize, colour_codes, decode_colour_codes
from igpt.utils import files, keyed

log = logging.getLogger(__name__)


def fit_palette(pixels: np.ndarray, *, k: int, iterations: int, restarts: int, seed: int) -> Palette:
    """The k-means palette of (N, 3) uint8 pixels, colours sorted from dark to light.

    k-means++ and Lloyd's algorithm on the distinct colours, weighted by count: the objective on all pixels at a
    fraction of the cost; the best of `restarts` fits. At most k distinct colours are the palette themselves, which is
    then exact and possibly smaller than k; a single colour gets the furthest colour beside it, since a palette has at
    least two. Grey pixels give a grey palette.
    """
    colours, counts = count_colours(pixels)  # (U, 3), (U,)
    if len(colours) == 1:
        colours = np.concatenate([colours, np.where(colours < 128, 255, 0).astype(np.uint8)])
    centres = weighted_kmeans(colours, counts, k=k, iterations=iterations, restarts=restarts, seed=seed)
    if (colours == colours[:, :1]).all():  # grey: remove tints from rounding in k-means
        centres = np.repeat(centres[:, :1], 3, axis=1)
    return Palette(dark_to_light(centres))


def count_colours(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct colours of (N, 3) uint8 pixels, (U, 3), in ascending order, and their counts (U,).

    As `np.unique(pixels, axis=0, return_counts=True)`; a colour is sorted as one number, not as a record of three.
    """
    codes = colour_codes(torch.from_numpy(np.ascontiguousarray(pixels.reshape(-1, 3)))).numpy()  # (N,) int32
    distinct, counts = np.unique(codes, return_counts=True)
    return decode_colour_codes(torch.from_numpy(distinct)).numpy().astype(np.uint8), counts


def weighted_kmeans(
    levels: np.ndarray, counts: np.ndarray, *, k: int, iterations: int, restarts: int, seed: int
) -> np.ndarray:
    """k-means centres in [-1, 1] of distinct points with counts: (U, D) uint8, (U,) → (min(k, U), D) float32."""
    points = levels / 127.5 - 1  # (U, D) float64
    if k < len(points):
        from sklearn.cluster import KMeans  # takes half a second to import, and most runs find their palette fitted

        random_state = keyed.key(seed, "kmeans") % 2**32
        solver = KMeans(k, init="k-means++", n_init=restarts, max_iter=iterations, random_state=random_state)
        points = solver.fit(points, sample_weight=counts).cluster_centers_
    return np.clip(points, -1, 1).astype(np.float32)


def dark_to_light(centres: np.ndarray) -> np.ndarray:
    """The rows sorted by their sum, ties by their entries from the last to the first."""
    return centres[np.lexsort((*centres.T, centres.sum(axis=1)))]


def sample_pixels(split: Split, *, n_pixels: int, seed: int) -> np.ndarray:
    """At most `n_pixels` pixels of a split, as whole images in a seeded order: (N, 3) uint8."""
    if not len(split):
        raise ValueError("there is no training image to fit a palette to")
    side = split.read([0], [0]).pixels.shape[1]
    chunks = sample_images(split, n_pixels // side**2, seed=seed, stream="palette")
    return np.concatenate([chunk.reshape(-1, 3) for chunk in chunks])


def sample_images(split: Split, n_image: int, *, seed: int, stream: str) -> Iterator[np.ndarray]:
    """At most `n_image` (at least one) images of a split, sampled by key: yields chunks (B, R, R, 3) uint8."""
    order = keyed.generator(seed, stream).permutation(len(split))
    rows = np.sort(order[: max(1, min(len(split), n_image))])
    return map_chunks(partial(plain_pixels, split), rows, f"reading images for the {stream}")


def fit_cached(
    source: Source, cache: Path, *, k: PaletteSize, n_pixels: Count, iterations: Count, restarts: Count, seed: Seed
) -> Palette:
    """The palette of a source's training split, for `tokens=fitted`; fitted once, then read from `cache`.

    The file name holds a hash of all arguments and of the pixels.
    """
    pixels = sample_pixels(source.split("train"), n_pixels=n_pixels, seed=seed)
    how = {"k": k, "iterations": iterations, "restarts": restarts, "seed": seed}
    digest = files.hash_json({**how, "pixels": hashlib.sha256(pixels.tobytes()).hexdigest()}, sort_keys=True)[:12]
    path = cache / "palettes" / f"{source.name}{source.resolution}-k{k}-{digest}.npy"

    def fit(file: IO[bytes]) -> None:
        np.save(file, fit_palette(pixels, **how).centres, allow_pickle=False)
        log.info("palette: fitted to %d pixels, saved as %s", len(pixels), path)

    palette = read_or_make(path, partial(Palette.load, path), fit)
    log.info("palette: %d colours of %s", palette.k, path)
    if (pixels == pixels[0]).all():
        log.warning(
            "palette: all %d training pixels looked at have one colour, %s: the palette has that and %s, since it "
            "needs two; is data.path what you meant?",
            len(pixels), pixels[0].tolist(), next(c for c in palette.colours.tolist() if c != pixels[0].tolist()),
        )  # fmt: skip
    elif palette.k < k:
        log.warning(
            "palette: tokens.palette.k asks for %d colours, and the %d training pixels looked at hold %d: these are "
            "taken, without error, and the network has as many",
            k, len(pixels), palette.k,
        )  # fmt: skip
    return palette


def colour_distances(palette: Palette, pixels: np.ndarray) -> np.ndarray:
    """The distance between each pixel and its palette colour, in grey levels: (…, 3) uint8 → (…) float64."""
    decoded = palette.decode(palette.encode(torch.from_numpy(np.ascontiguousarray(pixels))))
    distances: np.ndarray = np.sqrt(((decoded.astype(np.float64) - pixels) ** 2).sum(-1))
    return distances
