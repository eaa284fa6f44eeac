"""What a network computes for given tokens, to hold another program's outputs against it.

    python benchmarks/trace_network.py runs/... tokens.npy --out trace.npz

The model is whatever `init=` takes. `tokens.npy`: whole numbers (B, T). `--visible mask.npy`: True where a network of
masked pixels is shown one, (B, T). Written, all float32: `logits` (B, T, V), `block_outputs` (L, B, T, C), `image_nats`
(B,), the mean loss of each image's tokens, and `class_scores` (B, K), where K is 0 without a class head.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.head_files import has_head, read_head
from igpt.objective import registry
from igpt.utils import files


def load_array(path: Path, *, kinds: str, shape: tuple[int | None, ...]) -> torch.Tensor:
    """The array in a `.npy` file; nothing in it is run. `kinds`: numpy's (`iu`, `b`); `shape`: None first is any.

    Raises:
        SystemExit: no such array.
    """
    try:
        array = np.load(path, allow_pickle=False)
        wanted = (shape[0] or len(array), *shape[1:]) if array.ndim else shape
        if array.dtype.kind not in kinds or array.shape != wanted or not array.size:
            raise ValueError(f"{array.dtype} {array.shape}")
    except (OSError, ValueError, EOFError) as error:
        expected = "True and False" if kinds == "b" else "whole numbers"
        shown = ", ".join("images" if size is None else str(size) for size in shape)
        raise SystemExit(f"{path}: expected a .npy array of {expected}, ({shown}): {error}") from error
    return torch.from_numpy(array if kinds == "b" else array.astype(np.int64))


@torch.inference_mode()
def trace(model: str, tokens: Path, visible: Path | None, batch: int) -> dict[str, np.ndarray]:
    """The arrays, by name.

    Raises:
        SystemExit: arrays that do not go with the network.
    """
    weights = find_weights(model)
    network = weights.metadata.network
    given = load_array(tokens, kinds="iu", shape=(None, network.n_ctx))
    if given.min() < 0 or given.max() >= network.n_vocab:
        raise SystemExit(f"{tokens}: tokens lie in 0 … {network.n_vocab - 1}, got {given.min()} to {given.max()}")
    if (visible is None) != network.causal:
        raise SystemExit("--visible is for networks of masked pixels, which need it, and for no others")
    shown = None if visible is None else load_array(visible, kinds="b", shape=tuple(given.shape))
    objective = registry.build_objective(**weights.metadata.objective)
    head = read_head(weights)[1].float() if has_head(weights) else torch.empty(0, network.n_embd)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = weights.net().to(device).eval()
    parts = []
    for rows in torch.arange(len(given)).split(batch):
        some, mask = given[rows].to(device), None if shown is None else shown[rows].to(device)
        _, *outputs = net.hidden_states(some, mask)
        hidden = net.ln_f(outputs[-1])
        logits = net.logits(hidden)
        nats = objective.per_example_loss(logits, some, mask)
        parts.append((logits, torch.stack(outputs, 1), nats, hidden.mean(1) @ head.T.to(device)))
    full = [torch.cat([part.float().cpu() for part in of_all]).numpy() for of_all in zip(*parts, strict=True)]
    traced = dict(zip(("logits", "block_outputs", "image_nats", "class_scores"), full, strict=True))
    return traced | {"block_outputs": traced["block_outputs"].swapaxes(0, 1)}


def main(arguments: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a run folder, a checkpoint, a folder of Hugging Face's: as init=")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--visible", type=Path)
    parser.add_argument("--batch", type=int, default=16, help="images per forward pass")
    parser.add_argument("--out", type=Path, default=Path("trace.npz"))
    chosen = parser.parse_args(arguments)
    traced = trace(chosen.model, chosen.tokens, chosen.visible, chosen.batch)
    with files.atomic_write(chosen.out) as file:
        np.savez(file, **traced)
    print(f"{chosen.out}: {len(traced['logits'])} images, {traced['image_nats'].mean(dtype=np.float64):.4f} nats/token")
    return traced


if __name__ == "__main__":
    main()
