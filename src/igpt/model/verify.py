"""Check of attention in C against PyTorch's, on a network's own queries, keys and values, before its first use."""

import logging

import torch

from igpt.model import dispatch
from igpt.model.gpt import GPT

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # largest difference, relative to the largest output


@torch.no_grad()
def verify_attention(net: GPT) -> None:
    """Switches the network to `sdpa`, with a warning, if attention in C differs from it in the first block.

    Compares all positions of one image of random tokens. Networks with attention that C does not support are skipped.
    """
    block, device = net.blocks[0], net.wte.device
    mixed = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if mixed else net.wte.dtype
    requested = block.attn.backend
    if requested == "auto" and device.type == "cpu":
        requested = dispatch.attention_backend(device, dtype, t=net.n_ctx, causal=net.causal)
    if requested != "native" or device.type != "cpu" or block.attn.not_in_c:
        return
    tokens = torch.randint(net.n_vocab, (1, net.n_ctx), generator=torch.Generator().manual_seed(0))
    with torch.compiler.set_stance("force_eager"):
        x, was = block.ln_1(net.embed(tokens)), block.attn.backend  # (1, T, C)
        outputs = []
        for backend in ("native", "sdpa"):
            block.attn.backend = backend
            outputs.append(block.attn(x)[0].float())
        block.attn.backend = was
    largest = float(outputs[1].abs().max())
    off = float((outputs[0] - outputs[1]).abs().max())
    if off <= TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]) * largest:
        return
    log.warning(
        "attention in C is not used, which is slower: its outputs differ from PyTorch's by %.1f %% of the largest",
        100 * off / largest,
    )
    for other in net.blocks:
        other.attn.backend = "sdpa"
