"""The whole decoder once more, one token at a time and one name at a time: slow, float64, obviously right.

It shares no code with the package and has no cache, no batch, no chunks: every token looks back at all those before it.
"""

import math

import numpy as np


def forward(config, params, tokens):
    """Every named intermediate of one sequence of tokens (T,): {name: array, mostly with one row per token}."""
    found = {"tok_embeddings": np.array([params.tok_embeddings[t] for t in tokens])}
    x = found["tok_embeddings"]
    for i, layer in enumerate(params.layers):
        inner = block(config, layer, x)
        found |= {f"layers.{i}.{name}": np.array(value) for name, value in inner.items()}
        x = inner["out"]
    found["norm"] = norm(x, params.norm, config.norm_eps)
    head = params.tok_embeddings if config.tie_embeddings else params.output
    found["logits"] = np.array([head @ row for row in found["norm"]])
    return found


def block(config, layer, x):
    found = {"attention_norm": norm(x, layer.attention_norm, config.norm_eps)}
    found |= attention(config, layer.attention, found["attention_norm"])
    found["attention_residual"] = x + found["attention.out"]
    found["ffn_norm"] = norm(found["attention_residual"], layer.ffn_norm, config.norm_eps)
    found |= feed_forward(config, layer.feed_forward, found["ffn_norm"])
    found["out"] = found["attention_residual"] + found["experts.out"]
    return found


def attention(config, weights, y):
    T, H, K, C = len(y), config.num_heads, config.num_kv_heads, config.head_dim
    W = config.sliding_window or T
    q = np.array([weights.wq @ row for row in y])
    k = np.array([weights.wk @ row for row in y])
    v = np.array([weights.wv @ row for row in y])
    q_rotated = np.array([rotate(q[t].reshape(H, C), t, config.rope_theta) for t in range(T)])
    k_rotated = np.array([rotate(k[t].reshape(K, C), t, config.rope_theta) for t in range(T)])
    scores, probs, context = np.full((H, T, T), -np.inf), np.zeros((H, T, T)), np.zeros((T, H, C))
    for h in range(H):
        shared = h // (H // K)
        for t in range(T):
            seen = range(max(0, t - W + 1), t + 1)
            scores[h, t, seen] = [q_rotated[t, h] @ k_rotated[s, shared] / math.sqrt(C) for s in seen]
            probs[h, t, seen] = softmax(scores[h, t, seen])
            context[t, h] = sum(probs[h, t, s] * v[s].reshape(K, C)[shared] for s in seen)
    context = context.reshape(T, H * C)
    return {
        "attention.q": q, "attention.k": k, "attention.v": v,
        "attention.q_rotated": q_rotated, "attention.k_rotated": k_rotated,
        "attention.scores": scores, "attention.probs": probs, "attention.context": context,
        "attention.out": np.array([weights.wo @ row for row in context]),
    }  # fmt: skip


def feed_forward(config, weights, y):
    rows = [experts(config, weights, row) for row in y]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def experts(config, weights, y):
    """One token: its logits, its choice, and what each of its experts makes of it."""
    found, chosen, shares = {}, [0], np.ones(1)
    if not config.dense:
        z = weights.gate @ y
        chosen = sorted(range(len(z)), key=lambda e: (-z[e], e))[: config.num_experts_per_token]
        shares = softmax(z[chosen])
        found = {"gating.logits": z, "gating.ids": chosen, "gating.weights": shares}
    hidden = [silu(weights.w1[e] @ y) * (weights.w3[e] @ y) for e in chosen]
    slots = [weights.w2[e] @ h for e, h in zip(chosen, hidden, strict=True)]
    out = sum(share * slot for share, slot in zip(shares, slots, strict=True))
    return found | {"experts.hidden": hidden, "experts.slots": slots, "experts.out": out}


def norm(x, weight, eps):
    return np.array([row / math.sqrt(row @ row / len(row) + eps) * weight for row in x])


def rotate(heads, position, theta):
    """Each pair (i, i + C/2) is one complex number, turned by its angle."""
    C = heads.shape[-1]
    turn = np.exp([1j * position * theta ** (-2 * i / C) for i in range(C // 2)])
    turned = (heads[:, : C // 2] + 1j * heads[:, C // 2 :]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def softmax(z):
    e = np.array([math.exp(value - max(z)) for value in z])
    return e / e.sum()


def silu(z):
    return np.array([value / (1 + math.exp(-value)) for value in z])
