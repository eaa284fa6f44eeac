"""Checkpoints in the layout that OpenAI released, with TensorFlow's own writer."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from igpt.distributed.process_state import environment


def variables(state: Mapping[str, Tensor], n_head: int, wclf: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Our weights as the variables of OpenAI's `model.py`, with its scope; `wclf` (classes, C) zeros by default."""
    plain = {name: weight.numpy() for name, weight in state.items()}
    c = plain["wpe"].shape[1]
    d = c // n_head
    variables = {name: plain[name] for name in ("wpe", "wte", "wtet", "sos") if name in plain} | {
        "ln_f/g": plain["ln_f.g"]
    }
    for i in range(sum(name.endswith("ln_1.g") for name in plain)):
        block, scope = f"h.{i}.", f"h{i}/"
        variables |= {f"{scope}ln_1/g": plain[f"{block}ln_1.g"], f"{scope}ln_2/g": plain[f"{block}ln_2.g"]}
        q, k, v = np.split(plain[f"{block}attn.c_attn.weight"], 3)
        parts = {"q": q, "k": k, "v": v, "c": plain[f"{block}attn.c_proj.weight"].T}
        variables |= {f"{scope}attn/{name}_proj": part.reshape(n_head, d, c) for name, part in parts.items()}
        variables[f"{scope}mlp/c_fc/w"] = plain[f"{block}mlp.c_fc.weight"].T
        variables[f"{scope}mlp/c_proj/w"] = plain[f"{block}mlp.c_proj.weight"].T
    variables["clf/wclf"] = np.zeros((10, c), np.float32) if wclf is None else wclf
    return {f"model/{name}": np.ascontiguousarray(value) for name, value in variables.items()}


def save(prefix: Path, values: Mapping[str, np.ndarray], n_shard: int = 1) -> Path:
    """Writes a checkpoint of TensorFlow's in so many shards, variables dealt out in turn. Returns its prefix."""
    with environment(TF_CPP_MIN_LOG_LEVEL="3"):
        import tensorflow as tf

        prefix.parent.mkdir(parents=True, exist_ok=True)
        names = sorted(values)
        parts = []
        for i in range(n_shard):
            mine = names[i::n_shard]
            parts.append(str(prefix.parent / "parts" / f"part-{i}"))
            tf.raw_ops.SaveV2(
                prefix=parts[-1],
                tensor_names=mine,
                shape_and_slices=[""] * len(mine),
                tensors=[tf.constant(values[name]) for name in mine],
            )
        tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, destination_prefix=str(prefix), delete_old_dirs=True)
        return prefix
