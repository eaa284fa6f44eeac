"""Image sampling token by token, with a key/value cache that is allocated once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from igpt.model import decode
from igpt.model.block import Cache
from igpt.model.gpt import GPT


@dataclass(frozen=True)
class Sampling:
    """Temperature, top-k and top-p of token sampling. The paper's samples: temperature 1, neither k nor p.

    Raises:
        ValueError: a temperature below 0.001, top_k below 1, top_p outside (0, 1].
    """

    temperature: float
    top_k: int | None  # only the k most likely tokens; 1 is greedy
    top_p: float | None  # only the fewest most likely tokens with a total probability of at least p

    def __post_init__(self) -> None:
        if not self.temperature >= 0.001:
            raise ValueError(
                f"temperature must be at least 0.001, got {self.temperature}; for the likeliest token take top_k=1"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or null for no limit; got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], or be null for no limit; got {self.top_p}")

    def draw(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """One token per row by inverse CDF sampling: logits (B, V), uniforms (B,) → (B,) int64.

        In float64: the same uniform gives the same token in any batch, unless two tokens tie within the rounding of
        the logits.
        """
        scores = logits.double() / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            probabilities = scores.topk(self.top_k).indices
            scores = torch.full_like(scores, -torch.inf).scatter(-1, probabilities, scores.gather(-1, probabilities))
        p = scores.softmax(-1)  # (B, V)
        if self.top_p is not None and self.top_p < 1:
            ranked, order = p.sort(descending=True, stable=True)
            before = ranked.cumsum(-1) - ranked  # total probability of the more likely tokens
            p = p.scatter(-1, order, ranked.where(before < self.top_p, 0.0))
        cumulative = p.cumsum(-1)
        target = uniforms.to(p)[:, None] * cumulative[:, -1:]
        return (cumulative <= target).sum(-1).clamp(max=p.shape[-1] - 1)


def generate(
    net: GPT,
    uniforms: Tensor,
    sampling: Sampling,
    *,
    prompts: Tensor | None = None,
    known: Tensor | None = None,
    cached: bool = True,
    backend: str = "auto",
    on_token: Callable[[int], None] | None = None,
) -> Tensor:
    """Images sampled from the network: uniforms (B, T) in [0, 1) → tokens (B, T) int64.

    Where `known` (T,) is True, the token of `prompts` (B, T) replaces the drawn one. It conditions the tokens after it
    in the pixel order: in raster order, known first rows are a prompt. Row i depends on row i of the arguments alone.
    `on_token` is called with each drawn position. `backend`: one of `dispatch.DECODING`; auto: `net.decoding`, or the
    fastest. `cached=False` runs a full forward pass per token, as OpenAI's sampler does: slow, for tests.

    Raises:
        ValueError: a network that is not causal, or arguments whose shapes do not fit.
    """
    steps = generate_stream(net, uniforms, sampling, prompts=prompts, known=known, cached=cached, backend=backend)
    tokens, _ = next(steps)
    for _, settled in steps:
        if on_token is not None:
            on_token(settled - 1)
    return tokens


@torch.inference_mode()
def generate_stream(
    net: GPT,
    uniforms: Tensor,
    sampling: Sampling,
    *,
    prompts: Tensor | None = None,
    known: Tensor | None = None,
    cached: bool = True,
    backend: str = "auto",
) -> Iterator[tuple[Tensor, int]]:
    """Yields the images of `generate` as they grow: before the first token is drawn and after each.

    Yields (tokens (B, T), number of leading tokens that are final). The tensor is the same each time and written in
    place; positions not yet drawn are 0. The generator may be closed early or continued in another thread.

    Raises:
        ValueError: as `generate`, at the first `next()`.
    """
    if not net.causal:
        raise ValueError("this network was trained with a bidirectional objective: only causal (ar) ones generate")
    batch, n_ctx = uniforms.shape
    if n_ctx != net.n_ctx or (prompts is not None and prompts.shape != uniforms.shape):
        raise ValueError(f"uniforms and given must be (B, {net.n_ctx}), got {tuple(uniforms.shape)}")
    if (prompts is None) != (known is None):
        raise ValueError("given and known come together: the tokens, and which of them are to be kept")
    tokens = torch.zeros(batch, n_ctx, dtype=torch.int64, device=uniforms.device)
    shown = [False] * n_ctx if known is None else known.tolist()
    if prompts is not None and known is not None:
        tokens = torch.where(known.to(prompts.device), prompts, 0).to(uniforms.device)
    start = shown.index(False) if False in shown else n_ctx  # one pass reads all leading known tokens
    yield tokens, start
    step: decode.Step | None = None
    for i in range(start, n_ctx):
        with torch.compiler.set_stance("force_eager"):  # shapes change at every step: each would be compiled anew
            if not cached:
                logits = net(tokens)[:, i]  # (B, V)
            elif step is None:
                logits, cache = prefill(net, tokens[:, :i])
                step = decode.make_decode_step(net, cache, backend)
            else:
                logits = step(tokens[:, i - 1 : i])
        if not shown[i]:
            tokens[:, i] = sampling.draw(logits, uniforms[:, i])
            yield tokens, i + 1


def prefill(net: GPT, prompts: Tensor) -> tuple[Tensor, Cache]:
    """Logits after each prompt, (B, t) → (B, V), and the filled cache. Equal prompts are computed once."""
    batch, t = prompts.shape
    cache = net.new_cache(batch)
    distinct, which = torch.unique(prompts, dim=0, return_inverse=True) if t else (prompts, None)
    if len(distinct) == batch:
        return net.step(prompts, cache), cache
    few = net.new_cache(len(distinct))
    logits = net.step(distinct, few)[which]
    cache.length = few.length
    for layer, block in enumerate(net.blocks):
        read = slice(None) if block.attn.is_linear else slice(few.length)  # a state is whole at any length
        for all_of, some in ((cache.keys[layer], few.keys[layer]), (cache.values[layer], few.values[layer])):
            all_of[:, :, read] = some[which][:, :, read]
    return logits, cache
