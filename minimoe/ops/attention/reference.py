"""Grouped-query attention in array code. Scores for all (t, s) at once: memory B·H·T·S, slow and plain on purpose."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int

from minimoe.arrays import matmul, widen, xp_of
from minimoe.shapes import Array


def visible(q_pos: Int[Array, "B T"], k_pos: Int[Array, "B S"], window: int | None) -> Bool[Array, "B T S"]:
    """Which key each query sees."""
    distance = q_pos[:, :, None] - k_pos[:, None, :]  # (B, T, S)
    seen = (k_pos >= 0)[:, None, :] & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def forward(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    q_pos: Int[Array, "B T"],
    k_pos: Int[Array, "B S"],
    window: int | None,
    scale: float | None = None,
    cap: float | None = None,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    _, probs, lse = _softmax_scores(q, k, q_pos, k_pos, window, scale, cap)
    out = matmul(probs, _by_head(v)[:, :, None])  # (B, K, G, T, S) @ (B, K, 1, S, C) -> (B, K, G, T, C)
    return _ungroup(out), _ungroup(lse[..., None])[..., 0]


def backward(
    dout: Float[Array, "B T H C"],
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    q_pos: Int[Array, "B T"],
    k_pos: Int[Array, "B S"],
    window: int | None,
    out: Float[Array, "B T H C"],
    lse: Float[Array, "B T H"],
    scale: float | None = None,
    cap: float | None = None,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B S K C"], Float[Array, "B S K C"]]:
    xp, K, factor = xp_of(q), k.shape[2], _factor(q, scale)
    scores, probs, _ = _softmax_scores(q, k, q_pos, k_pos, window, scale, cap)
    kh, vh = widen(_by_head(k)), widen(_by_head(v))  # (B, K, S, C)
    qg, doutg = _group(q, K), _group(dout, K)  # (B, K, G, T, C)
    # forward: out = probs · v, and v serves the G query heads of its group
    dv = (probs.swapaxes(-1, -2) @ doutg).sum(axis=2)  # (B, K, G, S, C) -> (B, K, S, C)
    dprobs = doutg @ vh[:, :, None].swapaxes(-1, -2)  # (B, K, G, T, S)
    # forward: probs = softmax(scores);  Σ_s probs · dprobs = dout · out
    delta = (doutg * _group(out, K)).sum(axis=-1, keepdims=True)  # (B, K, G, T, 1)
    dscores = probs * (dprobs - delta)
    if cap is not None:
        # forward: scores = cap · tanh(scores / cap);  d tanh(z) / dz = 1 - tanh(z)²
        dscores = dscores * (1 - (xp.where(xp.isneginf(scores), 0, scores) / cap) ** 2)
    # forward: scores = q · kᵀ / sqrt(C)
    dq = dscores @ kh[:, :, None] * factor
    dk = (dscores.swapaxes(-1, -2) @ qg).sum(axis=2) * factor
    return _ungroup(dq), dk.swapaxes(1, 2), dv.swapaxes(1, 2)


def explain(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    q_pos: Int[Array, "B T"],
    k_pos: Int[Array, "B S"],
    window: int | None,
    scale: float | None = None,
    cap: float | None = None,
) -> dict[str, Array]:
    """Return the inner arrays by name: `scores` (capped; -inf where invisible) and `probs`, both (B, H, T, S)."""
    scores, probs, _ = _softmax_scores(q, k, q_pos, k_pos, window, scale, cap)
    B, K, G, T, S = scores.shape
    return {"scores": scores.reshape(B, K * G, T, S), "probs": probs.reshape(B, K * G, T, S)}


def _softmax_scores(
    q: Array, k: Array, q_pos: Array, k_pos: Array, window: int | None, scale: float | None, cap: float | None
) -> tuple[Float[Array, "B K G T S"], Float[Array, "B K G T S"], Float[Array, "B K G T"]]:
    xp = xp_of(q)
    qg, kh = _group(q, k.shape[2]), _by_head(k)  # (B, K, G, T, C), (B, K, S, C)
    scores = matmul(qg, kh[:, :, None].swapaxes(-1, -2)) * _factor(q, scale)  # (B, K, G, T, S)
    if cap is not None:
        scores = cap * xp.tanh(scores / cap)
    scores = xp.where(visible(q_pos, k_pos, window)[:, None, None], scores, -xp.inf)
    top = scores.max(axis=-1, keepdims=True)
    top = xp.where(xp.isneginf(top), 0, top)  # no visible key: exp(-inf) = 0, not NaN
    weights = xp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    nothing = total == 0
    probs = weights / xp.where(nothing, 1, total)
    lse = xp.where(nothing, -xp.inf, top + xp.log(xp.where(nothing, 1, total)))
    return scores, probs, lse[..., 0]


def _factor(q: Float[Array, "B T H C"], scale: float | None) -> float:
    """What q · k is multiplied by."""
    return q.shape[-1] ** -0.5 if scale is None else scale


def _group(x: Float[Array, "B T H C"], K: int) -> Float[Array, "B K G T C"]:
    B, T, H, C = x.shape
    return x.reshape(B, T, K, H // K, C).transpose(0, 2, 3, 1, 4)


def _ungroup(x: Float[Array, "B K G T C"]) -> Float[Array, "B T H C"]:
    B, K, G, T, C = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, C)


def _by_head(x: Float[Array, "B S K C"]) -> Float[Array, "B K S C"]:
    return x.swapaxes(1, 2)
