"""Image GPT written out in numpy, head by head, in float64, from the description of OpenAI's `model.py`."""

import numpy as np

Weights = dict[str, np.ndarray]


def norm(x: np.ndarray, g: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * g


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(x: np.ndarray, w_qkv: np.ndarray, w_out: np.ndarray, n_head: int, causal: bool) -> np.ndarray:
    t, c = x.shape
    d = c // n_head
    w_q, w_k, w_v = w_qkv[:c], w_qkv[c : 2 * c], w_qkv[2 * c :]
    heads = []
    for head in range(n_head):
        rows = slice(head * d, (head + 1) * d)
        q, k, v = x @ w_q[rows].T, x @ w_k[rows].T, x @ w_v[rows].T
        scores = q @ k.T / np.sqrt(d)
        if causal:
            scores = np.where(np.tril(np.ones((t, t), bool)), scores, -1e10)
        heads.append(softmax(scores) @ v)
    return np.concatenate(heads, axis=1) @ w_out.T


def residuals(w: Weights, tokens: np.ndarray, keep: np.ndarray | None, n_head: int, causal: bool) -> list[np.ndarray]:
    """h^0 … h^L of one image: tokens (T,) → (L + 1) × (T, C)."""
    content = w["wte"][tokens]
    if keep is not None:
        content = content * keep[:, None]
    if causal:
        content = np.vstack([w["sos"], content[:-1]])
    stream = [content + w["wpe"]]
    n_layer = sum(name.endswith("ln_1.g") for name in w)
    for i in range(n_layer):
        h, p = stream[-1], f"h.{i}."
        a = attention(
            norm(h, w[p + "ln_1.g"]), w[p + "attn.c_attn.weight"], w[p + "attn.c_proj.weight"], n_head, causal
        )
        h = h + a
        m = norm(h, w[p + "ln_2.g"]) @ w[p + "mlp.c_fc.weight"].T
        m = m / (1 + np.exp(-1.702 * m))
        stream.append(h + m @ w[p + "mlp.c_proj.weight"].T)
    return stream


def logits(w: Weights, tokens: np.ndarray, keep: np.ndarray | None, n_head: int, causal: bool) -> np.ndarray:
    """(T,) → (T, V)."""
    return norm(residuals(w, tokens, keep, n_head, causal)[-1], w["ln_f.g"]) @ w["wtet"].T
