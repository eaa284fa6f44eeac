"""Drawn images and an encoder's features, cached in parts, so that a run that was stopped continues."""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from igpt.data.cache import hash_cache_key, map_array, unwritable
from igpt.distributed import ranks
from igpt.encoder.encoder import Encoder
from igpt.model.generate import Sampling
from igpt.model.gpt import GPT
from igpt.task.sample import draw_images
from igpt.utils import files

log = logging.getLogger(__name__)

PART = 250  # images of a file


def draw_cached(
    net: GPT,
    sampling: Sampling,
    *,
    rng_keys: Tensor,
    batch_size: int,
    cache: Path,
    cache_key: Mapping[str, Any],
    prompts: Tensor | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """As `draw_images`, in parts that are kept below `cache`: keys (N,) → tokens (N, T) int64.

    `cache_key`: identifies the network and the precision it runs at.
    """
    drawn = []
    for rows in torch.split(torch.arange(len(rng_keys)), PART):
        given = None if prompts is None or known is None else [_hash(prompts[rows].numpy()), _hash(known.numpy())]
        of_part = {"keys": _hash(rng_keys[rows].numpy()), "sampling": vars(sampling), "given": given}
        path = cache / "samples" / f"{hash_cache_key({**cache_key, **of_part})}.npy"
        tokens = ranks.broadcast_from_rank0(partial(_read, path, (len(rows), net.n_ctx)))
        if tokens is None:
            some = None if prompts is None else prompts[rows]
            new = draw_images(net, sampling, rng_keys=rng_keys[rows], batch_size=batch_size, prompts=some, known=known)
            tokens = new.to(torch.int32).numpy()
            if ranks.this_rank().is_first:
                _write(path, tokens)
        drawn.append(torch.from_numpy(tokens).long())
    return torch.cat(drawn)


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The tokens in a file; None if it is missing, damaged or of another shape."""
    if files.find_damage(path) is not None:
        return None
    tokens: np.ndarray = np.load(path, allow_pickle=False)
    return tokens if tokens.shape == shape else None


def _write(path: Path, tokens: np.ndarray) -> None:
    try:
        with files.checksummed_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, tokens, allow_pickle=False)
    except OSError as error:
        raise unwritable(path, error, "drawn images") from error


def encode_cached(
    encoder: Encoder, parts: Iterable[np.ndarray], *, n: int, batch_size: int, cache: Path, what: str
) -> Tensor:
    """An encoder's features of `n` images in float64 on the CPU: parts (P, R, R, 3) uint8 → (N, D).

    Those of each part are kept below `cache`, named by the encoder's hash and the pixels. `what`: for the progress bar.

    Raises:
        ValueError: NaN or infinity in the features, or the cache cannot be written.
    """
    encoded = []
    with tqdm(total=n, desc=f"{encoder.name}: {what}", unit="image", disable=None, leave=False) as bar:
        for pixels in parts:
            path = cache / "encoded" / f"{hash_cache_key({'encoder': encoder.hash, 'pixels': _hash(pixels)})}.npy"

            def write(file: IO[bytes], pixels: np.ndarray = pixels) -> None:
                for some in torch.split(torch.from_numpy(pixels), batch_size):
                    file.write(encoder.encode(some).float().cpu().numpy().tobytes())

            features = torch.from_numpy(np.array(map_array(path, (len(pixels), encoder.width), np.float32, write)))
            if bad := int((~features.isfinite().all(1)).sum()):
                raise ValueError(
                    f"task.encoder: {encoder.name} gives NaN or infinity for {bad} of {len(pixels)} images ({what}): "
                    "take another, or repair its weights"
                )
            encoded.append(features.double())
            bar.update(len(pixels))
    return torch.cat(encoded)


def split_pixels(pixels: np.ndarray) -> list[np.ndarray]:
    """Images (N, …) in parts of at most PART."""
    return [pixels[start : start + PART] for start in range(0, len(pixels), PART)]


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(f"{array.shape} {array.dtype} ".encode() + np.ascontiguousarray(array).tobytes()).hexdigest()
