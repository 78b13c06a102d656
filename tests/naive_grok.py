"""Grok-1's decoder in plain loops over Python floats, after what its authors released (xai-org/grok-1, model.py, 2024).

One sequence, no cache, one number at a time; nothing is taken from the package but the arrays of weights. What differs
from Mixtral: embeddings times a multiplier; a norm before and one after attention and experts, the latter before the
sum; scores times a given factor, then 30 · tanh(score / 30); GELU in its tanh form; gate probabilities over all
experts, of which the chosen keep theirs; logits times a multiplier.
"""

import math


def forward(tokens, w, *, heads, kv_heads, k, eps, theta, scale, cap, embedding_multiplier, output_multiplier):
    """Logits of every token, and the stream after every block; `w` maps names to nested lists or arrays."""
    stream = [[embedding_multiplier * value for value in w["tok_embeddings"][token]] for token in tokens]
    streams = []
    for i in range(sum(name.endswith(".attention.wq") for name in w)):
        here = {
            name.removeprefix(f"layers.{i}."): value for name, value in w.items() if name.startswith(f"layers.{i}.")
        }
        stream = block(stream, here, heads, kv_heads, k, eps, theta, scale, cap)
        streams.append(stream)
    logits = []
    for row in stream:
        normed = rms_norm(row, w["norm"], eps)
        logits.append([output_multiplier * dot(normed, embedding) for embedding in w["tok_embeddings"]])
    return logits, streams


def block(stream, w, heads, kv_heads, k, eps, theta, scale, cap):
    attended = attention(
        [rms_norm(row, w["attention_norm"], eps) for row in stream], w, heads, kv_heads, theta, scale, cap
    )
    out = []
    for row, written in zip(stream, attended, strict=True):
        middle = add(row, rms_norm(written, w["attention_post_norm"], eps))
        mixed = mixture(rms_norm(middle, w["ffn_norm"], eps), w, k)
        out.append(add(middle, rms_norm(mixed, w["ffn_post_norm"], eps)))
    return out


def attention(rows, w, heads, kv_heads, theta, scale, cap):
    width = len(w["attention.wq"]) // heads
    queries = [cut(times(w["attention.wq"], row), width) for row in rows]
    keys = [cut(times(w["attention.wk"], row), width) for row in rows]
    values = [cut(times(w["attention.wv"], row), width) for row in rows]
    out = []
    for t, per_head in enumerate(queries):
        joined = []
        for h, query in enumerate(per_head):
            shared = h // (heads // kv_heads)
            turned = rotate(query, t, theta)
            scores = [scale * dot(turned, rotate(keys[s][shared], s, theta)) for s in range(t + 1)]
            shares = softmax([cap * math.tanh(score / cap) for score in scores])
            joined += [sum(shares[s] * values[s][shared][c] for s in range(t + 1)) for c in range(width)]
        out.append(times(w["attention.wo"], joined))
    return out


def mixture(row, w, k):
    """The k experts of largest probability, each times its probability among all of them."""
    shares = softmax(times(w["feed_forward.gate"], row))
    chosen = sorted(range(len(shares)), key=lambda e: (-shares[e], e))[:k]
    out = [0.0] * len(row)
    for e in chosen:
        expert = f"feed_forward.experts.{e}."
        opened = [gelu(value) for value in times(w[expert + "w1"], row)]
        hidden = [a * b for a, b in zip(opened, times(w[expert + "w3"], row), strict=True)]
        out = add(out, [shares[e] * value for value in times(w[expert + "w2"], hidden)])
    return out


def gelu(z):
    return 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def rotate(vector, position, theta):
    """Element i and element i + half turn together, by position · theta^(-i / half)."""
    half = len(vector) // 2
    out = list(vector)
    for i in range(half):
        angle = position * theta ** (-i / half)
        out[i] = vector[i] * math.cos(angle) - vector[i + half] * math.sin(angle)
        out[i + half] = vector[i + half] * math.cos(angle) + vector[i] * math.sin(angle)
    return out


def rms_norm(row, weight, eps):
    size = math.sqrt(sum(value * value for value in row) / len(row) + eps)
    return [value / size * factor for value, factor in zip(row, weight, strict=True)]


def softmax(values):
    exps = [math.exp(value - max(values)) for value in values]
    return [value / sum(exps) for value in exps]


def times(matrix, vector):
    return [dot(row, vector) for row in matrix]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def add(a, b):
    return [x + y for x, y in zip(a, b, strict=True)]


def cut(vector, width):
    return [vector[i : i + width] for i in range(0, len(vector), width)]
