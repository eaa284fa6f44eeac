"""Where OpenAI's and Hugging Face's tensors go in ours."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def from_openai(variables: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The variables of a TensorFlow checkpoint (scope `model/`) under our names and layouts."""
    v = {name.removeprefix("model/"): torch.from_numpy(value) for name, value in variables.items()}
    c = v["wpe"].shape[1]
    state = {name: v[name] for name in ("wte", "wpe", "wtet")} | {"ln_f.g": v["ln_f/g"]}
    if "sos" in v:
        state["sos"] = v["sos"].reshape(c)
    for i in range(sum(name.endswith("ln_1/g") for name in v)):
        theirs, ours = f"h{i}/", f"h.{i}."
        state[ours + "ln_1.g"], state[ours + "ln_2.g"] = v[theirs + "ln_1/g"], v[theirs + "ln_2/g"]
        qkv = [v[f"{theirs}attn/{part}_proj"].reshape(c, c) for part in "qkv"]
        state[ours + "attn.c_attn.weight"] = torch.cat(qkv)
        state[ours + "attn.c_proj.weight"] = v[theirs + "attn/c_proj"].reshape(c, c).T
        state[ours + "mlp.c_fc.weight"] = v[theirs + "mlp/c_fc/w"].T
        state[ours + "mlp.c_proj.weight"] = v[theirs + "mlp/c_proj/w"].T
    return state


def to_huggingface(state: dict[str, Tensor], model: Any) -> None:
    """Copies our weights into a Hugging Face ImageGPT; its biases become zero."""
    theirs = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    theirs["transformer.wte.weight"] = torch.cat([state["wte"], state["sos"][None]])
    theirs["transformer.wpe.weight"] = state["wpe"]
    theirs["transformer.ln_f.weight"] = state["ln_f.g"]
    theirs["lm_head.weight"] = state["wtet"]
    for name, value in state.items():
        if name.startswith("h."):
            place = f"transformer.{name}".replace(".g", ".weight")
            theirs[place] = value if name.endswith(".g") else value.T  # Conv1D keeps (in, out)
    model.load_state_dict(theirs)
