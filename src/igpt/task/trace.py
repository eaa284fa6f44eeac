"""What a network computes for given tokens, to hold against another program's: logits, every block's output, losses."""

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from tqdm.auto import tqdm

from igpt import files, ranks
from igpt.checkpoint.head import has_head, read_head
from igpt.checkpoint.native import Weights
from igpt.metric.result import Number, Result
from igpt.objective.base import Objective
from igpt.task.fit import Runner


def check(*, tokens: str | None, batch_size: int, **_: object) -> None:
    """Raises ValueError when a setting of the task cannot be right, before anything is built."""
    if tokens is None:
        raise ValueError("task=trace needs the tokens to read: task.tokens=FILE.npy, whole numbers (images, positions)")
    if batch_size < 1:
        raise ValueError(f"task.batch_size must be at least 1, got {batch_size}")


def run(
    *, runner: Runner, weights: Weights, objective: Objective, tokens: str | None, keep: str | None, batch_size: int
) -> Result:
    """Writes `trace.npz`: `logits` (B, T, V), `block_outputs` (L, B, T, C), `image_nats` (B,), all float32.

    With a class head, `class_scores` (B, K), too; without, K is 0.

    Raises:
        ValueError: arrays of other shapes or kinds, tokens outside the palette, or masks that the objective needs or
            does not know.
    """
    assert tokens is not None, "as `check` has seen to"
    network = weights.metadata.network
    n_ctx, causal = network.n_ctx, network.causal
    given = whole_numbers(Path(tokens), n_ctx=n_ctx, k=network.n_vocab)
    if (keep is None) != causal:
        raise ValueError(
            "task.keep=FILE.npy says which pixels a network that was trained on masked pixels is shown, (images, "
            "positions) of True and False" if keep is None else "task.keep is for networks of masked pixels only"
        )  # fmt: skip
    shown = None
    if keep is not None:
        shown = torch.from_numpy(np.array(array(Path(keep), kind="b", shape=tuple(given.shape))))
    head = read_head(weights)[1].float() if has_head(weights) else None
    scores = np.empty((len(given), 0 if head is None else len(head)), dtype=np.float32)
    n = len(given)
    logits = np.empty((n, n_ctx, network.n_vocab), dtype=np.float32)
    outputs = np.empty((network.n_layer, n, n_ctx, network.n_embd), dtype=np.float32)
    nats = np.empty(n, dtype=np.float32)
    with (
        torch.inference_mode(),
        runner.machine.inference(weights.net()) as net,
        tqdm(total=n, unit="image", desc="tracing", disable=None, leave=False) as bar,
    ):
        for rows in torch.split(torch.arange(n), batch_size):
            some = given[rows].to(net.wte.device)
            mask = None if shown is None else shown[rows].to(net.wte.device)
            h = torch.empty(0)
            for layer, h in enumerate(net.hidden_states(some, mask)):
                if layer:
                    outputs[layer - 1, rows] = h.float().cpu()
            hidden = net.ln_f(h)
            said = net.logits(hidden).float()
            if head is not None:
                scores[rows] = (hidden.float().mean(1).cpu() @ head.T).numpy()
            logits[rows] = said.cpu()
            nats[rows] = objective.per_example_loss(said, some, mask).cpu()
            bar.update(len(rows))
    if ranks.this_rank().first:
        with files.atomic_write(runner.folder / "trace.npz") as file:
            np.savez(file, logits=logits, block_outputs=outputs, image_nats=nats, class_scores=scores)
    mean, error = float(nats.mean(dtype=np.float64)), float(nats.std(ddof=1) / n**0.5) if n > 1 else None
    return Result(
        numbers={"loss_gen": Number(mean, "nats/token", n, error)},
        files={"trace": Path("trace.npz")},
        provenance={"weights": weights.sha256, "tokens": files.sha256(Path(tokens))},
    )


def whole_numbers(path: Path, *, n_ctx: int, k: int) -> torch.Tensor:
    """The tokens in a `.npy` file: (B, T) int64, each below `k`."""
    found = array(path, kind="iu", shape=(None, n_ctx))
    if found.size == 0 or found.min() < 0 or found.max() >= k:
        said = f"{found.min()} to {found.max()}" if found.size else "none"
        raise ValueError(f"{path}: tokens lie in 0 … {k - 1}, got {said}")
    return torch.from_numpy(found.astype(np.int64))


def array(path: Path, *, kind: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """The array in a `.npy` file; nothing in it is run. Raises ValueError on another shape (None: any) or kind."""
    if not path.is_file():
        raise ValueError(f"there is no {path}")
    try:
        found: np.ndarray = np.load(
            path, mmap_mode="r", allow_pickle=False
        )  # a size that is not there is not made room for
    except (ValueError, EOFError, OSError, OverflowError, BadZipFile) as error:
        raise ValueError(f"{path} is no .npy array of numbers ({error})") from error
    fits = isinstance(found, np.ndarray) and found.ndim == len(shape) and found.dtype.kind in kind
    if not fits or any(want not in (None, size) for want, size in zip(shape, found.shape, strict=True)):
        said = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else "several arrays"
        expected = "True and False" if kind == "b" else "whole numbers"
        raise ValueError(f"{path}: {said}, expected {expected} of shape {shape}".replace("None", "any"))
    return found
