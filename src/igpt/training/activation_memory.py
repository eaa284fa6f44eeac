"""Bytes of activations that a training step holds, counted tensor by tensor for this project's layers.

`tests/training/test_cost_estimate.py` compares them with what autograd saves.
"""

from collections.abc import Sequence
from typing import Any

import torch

from igpt.model import dispatch, token_loss
from igpt.model.config import GPTConfig
from igpt.model.linear_attention import CHUNK
from igpt.model.patterns import Pattern
from igpt.model.sparse_mask import SparseMask
from igpt.training.communication import NARROW, WIDE


def estimate_activation_bytes(
    network: GPTConfig, images: int, *, precision: str, recompute: bool, backends: Sequence[str], on_gpu: bool,
    residual: str = "float32", has_copies: bool = True, is_cached: bool = True,
) -> float:  # fmt: skip
    """Bytes of activations saved at the end of the forward pass of `images` images.

    With `recompute`: during the backward pass of the largest block, after its activations were recomputed, or at the
    end of the forward pass. `has_copies`: autocast makes bfloat16 copies of matrices under `bf16-mixed`; `is_cached`:
    it keeps these until the end of the forward pass.
    """
    c, tokens = network.n_embd, images * network.n_ctx
    product = WIDE if precision == "32-true" else NARROW  # bytes per element of matmul inputs
    is_narrow = precision == "bf16-true" or residual == "bfloat16"
    stream = NARROW if is_narrow else WIDE  # bytes per element of the residual stream
    layers = list(zip(network.patterns, backends, strict=True))
    sizes = {
        (pattern, backend): _estimate_block_bytes(
            network,
            pattern,
            images,
            precision=precision,
            backend=backend,
            on_gpu=on_gpu,
            is_narrow=is_narrow,
            has_copies=has_copies,
        )
        for pattern, backend in dict.fromkeys(layers)
    }
    head = tokens * c * (product + (stream if on_gpu or not is_narrow else 2 * WIDE))
    if not token_loss.is_large(tokens, network.n_vocab):  # else computed again, in chunks
        head += tokens * network.n_vocab * WIDE
    if on_gpu and network.relative_bias:  # of every pair's bias, in the backward pass of one layer at a time
        head += images * network.n_head * network.n_ctx**2 * product
    if recompute:
        first_value = tokens * 3 * c * product if network.value_residual else 0
        cache = len(layers) * _count_copied_weights(network) * NARROW if is_cached and precision == "bf16-mixed" else 0
        return len(layers) * tokens * c * stream + first_value + max(*sizes.values(), cache) + head
    return sum(sizes[layer] for layer in layers) + head


def estimate_backward_bytes(
    network: GPTConfig, images: int, *, precision: str, recompute: bool, backends: Sequence[str], on_gpu: bool,
    residual: str,
) -> float:  # fmt: skip
    """Bytes that the backward pass needs at most besides what was saved for it: gradients of activations."""
    tokens = images * network.n_ctx
    product = WIDE if precision == "32-true" else NARROW
    is_narrow = precision == "bf16-true" or residual == "bfloat16"
    stream = NARROW if is_narrow else WIDE
    is_chunked = token_loss.is_large(tokens, network.n_vocab)
    # of scores and of their logarithms
    of_loss = 2 * WIDE * (token_loss.CHUNK if is_chunked else tokens * network.n_vocab)
    head = 0 if is_chunked else tokens * network.n_vocab * WIDE  # which is free by then
    of_block = tokens * (network.hidden_size * product + network.n_embd * stream) - head
    if recompute:  # the largest block is not computed again yet
        kinds = {*zip(network.patterns, backends, strict=True)}
        how: Any = {"precision": precision, "on_gpu": on_gpu, "is_narrow": is_narrow}
        of_loss -= int(max(_estimate_block_bytes(network, kind, images, backend=by, **how) for kind, by in kinds))
    return float(max(of_loss, of_block, 0))


def _count_copied_weights(network: GPTConfig) -> int:
    """Weights of a block of which autocast makes a copy; the MLP's of quick-GELU are multiplied by constants before."""
    of_mlp = (3 if network.activation == "swiglu" else 2) * network.n_embd * network.hidden_size
    return 4 * network.n_embd**2 + (0 if network.activation == "quick_gelu" else of_mlp)


def _estimate_block_bytes(
    network: GPTConfig, pattern: str | Pattern, images: int, *, precision: str, backend: str, on_gpu: bool,
    is_narrow: bool, has_copies: bool = True,
) -> float:  # fmt: skip
    """Bytes of activations that one block saves; `is_narrow`: with a residual stream in bfloat16."""
    c, tokens, hidden = network.n_embd, images * network.n_ctx, network.hidden_size
    product = WIDE if precision == "32-true" else NARROW
    stream = NARROW if is_narrow else WIDE
    is_gated, is_scaled = network.activation == "swiglu", network.activation == "quick_gelu"
    normed = 2 * stream  # its two norms' inputs
    if is_narrow and not on_gpu:
        normed = 2 * 2 * WIDE  # computed in float32: the input and the normalised input are saved
    block: float = tokens * c * (3 * product + normed)  # two normed inputs, attention's output
    block += tokens * hidden * product * (4 if is_gated else 2)  # the MLP's inner activations
    unfused_norm = network.qk_norm and product == NARROW and not on_gpu
    if unfused_norm:
        block += tokens * 4 * c * WIDE  # of queries and keys, as above
    if network.value_residual or (network.qk_norm and not unfused_norm):
        block += tokens * 3 * c * product  # q, k, v as they were before
    block += _estimate_attention_bytes(network, pattern, images, product=product, backend=backend, on_gpu=on_gpu)
    of_mlp = (3 if is_gated else 2) * c * hidden
    if is_scaled:
        block += of_mlp * product  # the MLP's matrices times the constants of quick-GELU
    if precision == "bf16-mixed" and has_copies:  # of the other matrices, saved for the backward pass
        block += _count_copied_weights(network) * product
    return block


def _estimate_attention_bytes(
    network: GPTConfig, pattern: str | Pattern, images: int, *, product: int, backend: str, on_gpu: bool
) -> float:
    """Bytes that attention itself saves: queries, keys, values, scores, masks."""
    c, t, h = network.n_embd, network.n_ctx, network.n_head
    if pattern == "linear":  # float32: queries, keys and values (which bfloat16 has not saved), then what chunks need
        saved = images * t * c * (3 if product == WIDE else 2)
        if not network.causal:
            return WIDE * (saved + images * c * (5 * t + c // h))
        padded = -(-t // CHUNK) * CHUNK
        return WIDE * (saved + images * padded * (4 * c + h * CHUNK + c * (c // h) / CHUNK))
    is_dense = backend in ("sdpa", "bmm")
    if network.relative_bias:
        mask = t**2 if network.causal or pattern != "full" else 0
        if on_gpu and backend == "sdpa":
            return images * t * (3 * c * product + h * WIDE) + h * t**2 * product + mask
        width = WIDE if backend == "sdpa" else product  # which is computed in float32
        return images * width * (3 * c * t + h * t**2) + mask
    mask = 0
    if isinstance(pattern, Pattern):
        scores = SparseMask(pattern).count_saved_scores(backend)
        if is_dense:
            mask = t**2 * (product if backend == "sdpa" else 1)
    else:
        dtype = torch.float32 if product == WIDE else torch.bfloat16
        scores = dispatch.count_saved_scores(dtype, backend, t=t, causal=network.causal)
    return images * (3 * c * t * product + h * (scores * product if scores else t * WIDE)) + mask


def count_table_bytes(network: GPTConfig, backends: Sequence[str]) -> int:
    """Bytes of dense masks and of indices of offsets; the tables of other backends are small."""
    layers = zip(network.patterns, backends, strict=True)
    masks = {pattern for pattern, backend in layers if isinstance(pattern, Pattern) and backend in ("sdpa", "bmm")}
    return network.n_ctx**2 * (len(masks) + 4 * network.relative_bias)
