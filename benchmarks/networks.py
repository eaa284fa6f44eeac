"""The networks that benchmarks compare, with the same weights: ours, a plain rewrite, Hugging Face's."""

from typing import Any

import torch
import torch.nn.functional as F
from plain import PlainGPT
from torch import Tensor, nn

from igpt.checkpoint import tensors
from igpt.checkpoint.huggingface import export_state
from igpt.metric.throughput import train_flops_per_image
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT

SIZES = {  # n_layer, n_embd, n_head, n_ctx, n_vocab, batch of a training step
    "a": (12, 256, 8, 1024, 512, 4),
    "b": (24, 512, 8, 1024, 512, 2),  # iGPT-S
    "c": (8, 64, 4, 64, 16, 128),
    "s": (24, 512, 8, 1024, 512, 64),  # for a GPU: iGPT-S, -M and -L
    "m": (36, 1024, 8, 1024, 512, 16),
    "l": (48, 1536, 16, 1024, 512, 4),
    "xl": (4, 3072, 24, 4096, 512, 2),  # four of XL's 60 blocks, at its 64×64
    "micro": (8, 128, 4, 256, 128, 16),  # igpt_micro at 16×16
    "tiny": (2, 32, 4, 16, 8, 2),  # to see that a benchmark runs
}


def our_net(size: str, *, compiled: bool = False, attention: str = "auto") -> GPT:
    """This project's network, its head drawn too, so that what it predicts depends on every weight."""
    n_layer, n_embd, n_head, n_ctx, n_vocab, _ = SIZES[size]
    net = GPT(GPTConfig(n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_ctx=n_ctx, n_vocab=n_vocab, causal=True))
    net.init_weights(0)
    with torch.no_grad():
        net.wtet.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    for block in net.blocks:
        block.attn.backend = attention
        if compiled:
            block.compile()
    return net


def plain_net(size: str, *, compiled: bool = False) -> PlainGPT:
    n_ctx = SIZES[size][3]
    net = PlainGPT(*SIZES[size][:5], bmm=n_ctx <= 128 and not torch.cuda.is_available())
    igpt_state = our_net(size).state_dict()
    names = {"ln_1.g": "norm_1.weight", "ln_2.g": "norm_2.weight", "attn.c_attn": "qkv", "attn.c_proj": "proj",
             "mlp.c_fc": "fc", "mlp.c_proj": "out", "ln_f.g": "ln_f.weight", "wtet": "head.weight"}  # fmt: skip
    state = {}
    for name, weight in igpt_state.items():
        for our, their in names.items():
            name = name.replace(our, their)
        state["wte.weight" if name == "wte" else name] = weight
    net.load_state_dict(state)
    if compiled:
        for block in net.h:
            block.compile()
    return net


def hugging_face(size: str, *, use_cache: bool = False) -> Any:
    """Their `ImageGPTForCausalImageModeling`, dropout off, with our weights."""
    from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

    n_layer, n_embd, n_head, n_ctx, n_vocab, _ = SIZES[size]
    config = ImageGPTConfig(
        vocab_size=n_vocab + 1, n_positions=n_ctx, n_embd=n_embd, n_layer=n_layer, n_head=n_head,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=use_cache,
    )  # fmt: skip
    net = ImageGPTForCausalImageModeling(config)
    igpt_net = our_net(size)
    state = {
        name: lazy.read()
        for name, lazy in export_state(tensors.unwrapped_state(igpt_net.state_dict()), igpt_net.config).items()
    }
    net.load_state_dict(state)
    return net


class HuggingFace(nn.Module):
    """Theirs as shipped (eager attention is all it has), fed [sos, x_0 … x_{n-2}]: tokens (B, T) → logits (B, T, V)."""

    def __init__(self, size: str) -> None:
        super().__init__()
        self.net, self.sos = hugging_face(size), SIZES[size][4]

    def forward(self, tokens: Tensor) -> Tensor:
        shifted = F.pad(tokens[:, :-1], (1, 0), value=self.sos)
        return self.net(input_ids=shifted).logits


def token_ids(size: str, device: str, batch: int | None = None) -> Tensor:
    """The ids that every row sees."""
    n_ctx, n_vocab, usual = SIZES[size][3:]
    return torch.randint(n_vocab, (batch or usual, n_ctx), generator=torch.Generator().manual_seed(0)).to(device)


def step_flops(size: str, batch: int | None = None) -> float:
    """Operations of forward and backward, as a run counts them."""
    n_layer, n_embd, _, n_ctx, n_vocab, usual = SIZES[size]
    sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_head": 1, "n_ctx": n_ctx, "n_vocab": n_vocab, "causal": True}
    return (batch or usual) * train_flops_per_image(GPTConfig(**sizes))
