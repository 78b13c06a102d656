"""Top-k softmax gating in array code."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int

from minimoe.arrays import matmul, widen, xp_of
from minimoe.shapes import Array


def forward(
    x: Float[Array, "N D"],
    gate: Float[Array, "E D"],
    k: int,
    active: Bool[Array, " N"] | None = None,
    allowed: Bool[Array, " E"] | None = None,
    ids: Int[Array, "N k"] | None = None,
    renormalise: bool = True,
) -> tuple[Float[Array, "N E"], Int[Array, "N k"], Float[Array, "N k"]]:
    xp = xp_of(x)
    logits = matmul(x, gate.T)  # (N, D) -> (N, E)
    if ids is None:
        candidates = logits if allowed is None else xp.where(allowed, logits, -xp.inf)
        ids = xp.argsort(-candidates, axis=-1, kind="stable")[:, :k]  # stable: ties to the lower id
    # (N, E) -> (N, k); an id of -1 reads expert 0 here, and its weight becomes 0 below
    chosen = xp.take_along_axis(logits, xp.maximum(ids, 0), axis=-1)
    exps = xp.exp(chosen - chosen.max(axis=-1, keepdims=True))
    weights = exps / exps.sum(axis=-1, keepdims=True)
    if not renormalise:
        weights = xp.take_along_axis(_softmax(logits), xp.maximum(ids, 0), axis=-1)
    if active is not None:
        ids = xp.where(active[:, None], ids, -1)
    weights = xp.where(ids >= 0, weights, 0)
    return logits, ids, weights


def backward(
    dweights: Float[Array, "N k"],
    dlogits: Float[Array, "N E"] | None,
    x: Float[Array, "N D"],
    gate: Float[Array, "E D"],
    ids: Int[Array, "N k"],
    weights: Float[Array, "N k"],
    logits: Float[Array, "N E"] | None = None,
) -> tuple[Float[Array, "N D"], Float[Array, "E D"]]:
    xp = xp_of(x)
    N, E = x.shape[0], gate.shape[0]
    # forward: weights = softmax(chosen), or softmax(logits)[n, ids[n]]
    mean = (weights * dweights).sum(axis=-1, keepdims=True)
    dchosen = weights * (dweights - mean)  # (N, k)
    # forward: chosen = logits[n, ids[n]]; the ids of one token are distinct. Of a softmax over all, all others shared
    scattered = xp.zeros((N, E), x.dtype) if logits is None else -_softmax(logits) * mean
    xp.put_along_axis(scattered, xp.maximum(ids, 0), dchosen, axis=-1)
    dlogits = scattered if dlogits is None else dlogits + scattered
    # forward: logits = x · gateᵀ
    return dlogits @ widen(gate), dlogits.T @ x


def _softmax(logits: Float[Array, "N E"]) -> Float[Array, "N E"]:
    xp = xp_of(logits)
    probs = xp.exp(logits - logits.max(axis=-1, keepdims=True))
    return probs / probs.sum(axis=-1, keepdims=True)
