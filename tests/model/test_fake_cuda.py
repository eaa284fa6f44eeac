"""Device mismatches without a card: the meta device stands for a GPU; no operator may mix its tensors with the CPU's.

Operators that make the host wait for values answer with fixed ones.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from igpt.model import dispatch, graphs
from igpt.model.features import layer_features
from igpt.model.generate import Sampling
from igpt.model.gpt import GPT
from igpt.objective.ar import AR
from igpt.objective.bert import BERT
from igpt.probe.lbfgs import logistic_regression
from tests.model.test_options import OPTIONS, make
from tests.tokens.test_every_tokenizer import CASES, SIDE

META = torch.device("meta")
COPIES = ("_to_copy", "copy_", "_copy_from")
INDEXED = ("index", "index_put_", "_index_put_impl_", "_unsafe_index")  # whose indices may lie on the CPU
MASKED = ("factorised", "local_bias_rope", "mixed")  # networks of BERT, too
ANSWERS = {torch.bool: True, torch.int64: 1, torch.int32: 1}  # of `item`; else 0.5


class OneDevice(TorchDispatchMode):
    """Fails where an operator gets tensors of the meta device and of the CPU, single numbers aside."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, leaves = operator.overloadpacket.__name__, tree_leaves((args, kwargs))
        tensors = [each for each in leaves if isinstance(each, Tensor) and each.dim()]
        if name in INDEXED and tensors and tensors[0].is_meta:
            tensors = tensors[:1]
        assert name in COPIES or len({each.device.type for each in tensors}) < 2, f"{name} mixes devices"
        first = args[0] if args and isinstance(args[0], Tensor) and args[0].is_meta else None
        if first is not None and name == "_local_scalar_dense":
            return ANSWERS.get(first.dtype, 0.5)
        if first is not None and name == "equal":
            return True
        if first is not None and name == "_to_copy" and (kwargs or {}).get("device") == torch.device("cpu"):
            return torch.ones(first.shape, dtype=(kwargs or {}).get("dtype") or first.dtype)
        if first is not None and name in ("nonzero", "nonzero_numpy"):
            places = torch.empty(max(1, first.numel() // 2), first.dim(), dtype=torch.int64, device=META)
            return places if name == "nonzero" else places.unbind(1)
        if first is not None and name == "index" and args[1][0] is not None and args[1][0].dtype == torch.bool:
            return first.new_empty(max(1, len(first) // 2), *first.shape[args[1][0].dim() :])
        if first is not None and name in ("unique_dim", "_unique2"):
            rows = torch.empty(len(first), dtype=torch.int64, device=META)
            return first.clone(), rows, rows.clone()
        return operator(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks for the type of a device takes this one: attention of one query, autocast, which is that of the CPU."""
    autocast, is_enabled = torch.autocast, torch.is_autocast_enabled
    monkeypatch.setattr(dispatch, "is_unfused_query", lambda device: device.type == "meta")
    monkeypatch.setattr(torch, "autocast", lambda kind, *args, **kwargs: autocast("cpu", *args, **kwargs))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: is_enabled("cpu"))


def build(option: str, *, causal: bool = True) -> GPT:
    """A network on the meta device whose weights were drawn there; its masks are made as on any other device."""
    with OneDevice():
        net = GPT(make(option, causal=causal).config)
        net.allocate(META)
        net.init_weights(0)
    assert all(weight.is_meta for weight in (*net.parameters(), *net.buffers()))
    return net


def test_a_mixture_is_noticed() -> None:
    """By hand: a table on the CPU, read by indices on the device."""
    with OneDevice(), pytest.raises(AssertionError, match="embedding mixes devices"):
        torch.nn.functional.embedding(torch.zeros(2, dtype=torch.int64, device=META), torch.zeros(3, 4))


@pytest.mark.parametrize("option", OPTIONS)
def test_networks(option: str) -> None:
    """Invariant: losses, gradients, features and single steps, of AR, and of BERT where masks are others."""
    for causal in (True, False) if option in MASKED else (True,):
        net, objective = build(option, causal=causal), AR() if causal else BERT(mask_probability=0.15)
        tokens = torch.zeros(3, net.n_ctx, dtype=torch.int64, device=META)
        with OneDevice():
            visible = objective.visible_mask(tokens, torch.zeros(3, dtype=torch.int64, device=META))
            loss = objective.loss(net(tokens, visible), tokens, visible)
            assert all(gradient.is_meta for gradient in torch.autograd.grad(loss, list(net.parameters())))
            with torch.no_grad():
                assert net.token_nats(net.trunk(tokens, visible), tokens).is_meta
                features = layer_features(net, tokens, visible)
                assert features.shape == (net.n_layer + 1, 3, net.n_embd)
                if causal:
                    cache = net.new_cache(3)
                    for some in (tokens[:, :0], tokens[:, :1], tokens[:, :1]):
                        assert net.step(some, cache).is_meta


def test_recorded_steps_and_draws() -> None:
    with OneDevice(), torch.no_grad():
        net = build("factorised")
        tokens, cache = torch.zeros(2, net.n_ctx, dtype=torch.int64, device=META), net.new_cache(2)
        net.step(tokens[:, :4], cache)
        step = graphs.RecordedStep(net, cache)
        for i in range(4, 6):
            logits = step(tokens[:, i : i + 1])
            for sampling in (Sampling(1.0, None, None), Sampling(0.9, 3, 0.9)):
                assert sampling.draw(logits, torch.zeros(2, device=META)).is_meta


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "permuted"])
def test_tokens_are_made(kind: str) -> None:
    tokenizer = CASES[kind].make()
    encode = tokenizer.encoder(None)
    with OneDevice():
        assert encode(torch.zeros(4, SIDE, SIDE, 3, dtype=torch.uint8, device=META)).is_meta


def test_probes() -> None:
    """Invariant: L-BFGS of all layers and strengths, and the scores of its heads."""
    with OneDevice():
        features = torch.zeros(3, 20, 8, device=META)
        labels = torch.zeros(20, dtype=torch.int64, device=META)
        heads = logistic_regression(features, labels, n_class=4, C_grid=[0.1, 1.0], max_iterations=3)
        assert heads.scores(features).is_meta
