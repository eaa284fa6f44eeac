"""Check of attention in C against PyTorch's, on a network's own queries, keys and values, before its first use."""

import logging

import torch
from torch import Tensor

from igpt.model import dispatch
from igpt.model.block import Block
from igpt.model.gpt import GPT

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # largest difference, relative to the largest output


@torch.no_grad()
def verify_attention(net: GPT) -> None:
    """Switches the network to PyTorch's products, with a warning, if attention in C differs from them.

    Compares all positions of one image of random tokens, in the first layer of each pattern. Layers with attention that
    C does not support are skipped.
    """
    device = net.wte.device
    mixed = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if mixed else net.wte.dtype
    first = {block.attn.mask: block for block in reversed(net.blocks) if not block.attn.not_in_c}
    checked = [block for block in first.values() if _choose_backend(net, block, dtype) == "native"]
    if not checked or device.type != "cpu":
        return
    tokens = torch.randint(net.n_vocab, (1, net.n_ctx), generator=torch.Generator().manual_seed(0))
    with torch.compiler.set_stance("force_eager"):
        h = net.embed(tokens)  # (1, T, C)
        values = net.blocks[0].attn(net.blocks[0].ln_1(h))[1]
        off = max(_compare_backends(block, h, values) for block in checked)
    if off <= TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]):
        return
    log.warning(
        "attention in C is not used, which is slower: its outputs differ from PyTorch's by %.1f %% of the largest",
        100 * off,
    )
    for block in net.blocks:
        block.attn.backend = _name_fallback(block)


def _choose_backend(net: GPT, block: Block, dtype: torch.dtype) -> str:
    attention, device = block.attn, net.wte.device
    if attention.mask is not None:
        return dispatch.sparse_backend(attention.backend, device, dtype)
    if attention.backend != "auto":
        return attention.backend
    return dispatch.attention_backend(device, dtype, t=net.n_ctx, causal=net.causal)


def _name_fallback(block: Block) -> str:
    return "sdpa" if block.attn.mask is None else "blocks"


def _compare_backends(block: Block, h: Tensor, values: Tensor | None) -> float:
    """Largest difference between attention in C and by PyTorch, relative to the largest output."""
    x, was, outputs = block.ln_1(h), block.attn.backend, []
    for backend in ("native", _name_fallback(block)):
        block.attn.backend = backend
        outputs.append(block.attn(x, values)[0].float())
    block.attn.backend = was
    return float((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max())
