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
        reference, own = f"h{i}/", f"h.{i}."
        state[own + "ln_1.g"], state[own + "ln_2.g"] = v[reference + "ln_1/g"], v[reference + "ln_2/g"]
        qkv = [v[f"{reference}attn/{part}_proj"].reshape(c, c) for part in "qkv"]
        state[own + "attn.c_attn.weight"] = torch.cat(qkv)
        state[own + "attn.c_proj.weight"] = v[reference + "attn/c_proj"].reshape(c, c).T
        state[own + "mlp.c_fc.weight"] = v[reference + "mlp/c_fc/w"].T
        state[own + "mlp.c_proj.weight"] = v[reference + "mlp/c_proj/w"].T
    return state


def to_huggingface(state: dict[str, Tensor], model: Any) -> None:
    """Copies our weights into a Hugging Face ImageGPT; its biases become zero."""
    reference = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    reference["transformer.wte.weight"] = torch.cat([state["wte"], state["sos"][None]])
    reference["transformer.wpe.weight"] = state["wpe"]
    reference["transformer.ln_f.weight"] = state["ln_f.g"]
    reference["lm_head.weight"] = state["wtet"]
    for name, value in state.items():
        if name.startswith("h."):
            place = f"transformer.{name}".replace(".g", ".weight")
            reference[place] = value if name.endswith(".g") else value.T  # Conv1D keeps (in, out)
    model.load_state_dict(reference)
