"""The whole decoder once more, one token at a time and one name at a time: slow, float64, obviously right.

It shares no code with the package and has no cache, no batch, no chunks: every token looks back at all those before it.
"""

import math

import numpy as np


def forward(config, params, tokens):
    """Every named intermediate of one sequence of tokens (T,): {name: array with one row per token}."""
    T, k = len(tokens), config.num_experts_per_token
    found = {"tok_embeddings": np.array([params.tok_embeddings[t] for t in tokens])}
    x = found["tok_embeddings"]
    for i, layer in enumerate(params.layers):
        a, f = layer.attention, layer.feed_forward
        here = found.setdefault

        def name(rest, i=i):
            return f"layers.{i}.{rest}"

        y = here(name("attention_norm"), norm(x, layer.attention_norm, config.norm_eps))
        for w in "qkv":
            here(name(f"attention.{w}"), np.array([getattr(a, f"w{w}") @ row for row in y]))
        q, keys, v = (found[name(f"attention.{w}")].reshape(T, -1, config.head_dim) for w in "qkv")
        q, keys = (np.array([rotate(x[t], t, config.rope_theta) for t in range(T)]) for x in (q, keys))
        here(name("attention.q_rotated"), q)
        here(name("attention.k_rotated"), keys)
        attend(config, q, keys, v, lambda rest, value, here=here, name=name: here(name(f"attention.{rest}"), value))
        out = here(name("attention.out"), np.array([a.wo @ row for row in found[name("attention.context")]]))
        h = here(name("attention_residual"), x + out)
        y = here(name("ffn_norm"), norm(h, layer.ffn_norm, config.norm_eps))
        if config.dense:
            ids, weights = np.zeros((T, 1), int), np.ones((T, 1))
        else:
            logits = here(name("gating.logits"), np.array([f.gate @ row for row in y]))
            ids = here(name("gating.ids"), np.array([sorted(range(len(z)), key=lambda e, z=z: (-z[e], e))[:k]
                                                     for z in logits]))  # fmt: skip
            weights = here(name("gating.weights"), np.array([softmax(z[chosen]) for z, chosen in
                                                             zip(logits, ids, strict=True)]))  # fmt: skip
        hidden = [[silu(f.w1[e] @ row) * (f.w3[e] @ row) for e in chosen] for row, chosen in zip(y, ids, strict=True)]
        slots = [[f.w2[e] @ z for e, z in zip(chosen, row, strict=True)] for row, chosen in
                 zip(hidden, ids, strict=True)]  # fmt: skip
        here(name("experts.hidden"), np.array(hidden))
        here(name("experts.slots"), np.array(slots))
        here(name("experts.out"), np.array([weights[t] @ np.array(slots[t]) for t in range(T)]))
        x = here(name("out"), h + found[name("experts.out")])
    found["norm"] = norm(x, params.norm, config.norm_eps)
    head = params.tok_embeddings if config.tie_embeddings else params.output
    return found | {"logits": np.array([head @ row for row in found["norm"]])}


def attend(config, q, k, v, put):
    T, H, C = q.shape
    G, W = H // config.num_kv_heads, config.sliding_window or T
    scores, context = np.full((H, T, T), -np.inf), np.zeros((T, H, C))
    probs = np.zeros((H, T, T))
    for h in range(H):
        for t in range(T):
            seen = range(max(0, t - W + 1), t + 1)
            scores[h, t, seen] = [q[t, h] @ k[s, h // G] / math.sqrt(C) for s in seen]
            probs[h, t, seen] = softmax(scores[h, t, seen])
            context[t, h] = sum(probs[h, t, s] * v[s, h // G] for s in seen)
    put("scores", scores)
    put("probs", probs)
    put("context", context.reshape(T, H * C))


def norm(x, weight, eps):
    return np.array([row / math.sqrt(row @ row / len(row) + eps) * weight for row in x])


def rotate(heads, position, theta):
    """Each pair (i, i + C/2) is one complex number, turned by its angle."""
    C = heads.shape[-1]
    z = heads[:, : C // 2] + 1j * heads[:, C // 2 :]
    z = z * np.exp(1j * np.array([position * theta ** (-2 * i / C) for i in range(C // 2)]))
    return np.concatenate([z.real, z.imag], axis=-1)


def softmax(z):
    e = np.array([math.exp(value - max(z)) for value in z])
    return e / e.sum()


def silu(z):
    return np.array([value / (1 + math.exp(-value)) for value in z])
