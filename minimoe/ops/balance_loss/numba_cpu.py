"""Load-balancing losses as jitted loops: a softmax over E numbers per token, added up in blocks of tokens.

The blocks have a fixed size and their sums are added in order: the result does not depend on the number of threads.
Sums over tokens are taken in float64, whatever the type of the logits.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from minimoe.loops import exp, jit
from minimoe.shapes import Array, Scalar
from minimoe.stages import SMALL, share, threads_if

TOKENS = 256  # per block


def forward(
    logits: Float[Array, "L N E"], ids: Int[Array, "L N k"], active: Bool[Array, " N"] | None, form: str
) -> Scalar:
    """See the contract."""
    L, N, E = logits.shape
    keep, count = _active(active, N)
    shares = _shares(ids, keep, count, E, form)
    if count == 0:
        return 0.0
    total = np.zeros((L, (N + TOKENS - 1) // TOKENS, E))
    _sum_probs(np.ascontiguousarray(logits), keep, threads_if(logits.size >= SMALL), total)
    mean_probs = total.sum(axis=1) / count  # (L, blocks, E) -> (L, E)
    if form == "concatenated":
        return float(E * (shares.mean(axis=0) * mean_probs.mean(axis=0)).sum())
    return float(E * (shares * mean_probs).sum() / L)


def backward(
    dloss: float, logits: Float[Array, "L N E"], ids: Int[Array, "L N k"], active: Bool[Array, " N"] | None, form: str
) -> Float[Array, "L N E"]:
    """See the contract."""
    L, N, E = logits.shape
    keep, count = _active(active, N)
    # forward: loss = E · Σ_e share · mean_probs, the mean over layers as `form` says
    shares = _shares(ids, keep, count, E, form)
    slope = np.repeat(shares.mean(axis=0, keepdims=True), L, axis=0) if form == "concatenated" else shares
    dprobs = (slope * (dloss * E / (L * max(count, 1)))).astype(logits.dtype)  # (L, E), the same for every token
    dlogits = np.empty(logits.shape, logits.dtype)
    _backward(np.ascontiguousarray(logits), keep, dprobs, threads_if(logits.size >= SMALL), dlogits)
    return dlogits


def _active(active: Bool[Array, " N"] | None, N: int) -> tuple[Bool[Array, " N"], int]:
    """Which tokens count, and how many do."""
    keep = np.ones(N, np.bool_) if active is None else np.ascontiguousarray(active)
    return keep, int(np.count_nonzero(keep))


def _shares(ids: Int[Array, "L N k"], keep: Bool[Array, " N"], count: int, E: int, form: str) -> Float[Array, "L E"]:
    """The shares f summed over the slots that count, in float64."""
    if form not in ("concatenated", "per_layer", "switch"):
        raise ValueError(f"balance form must be concatenated, per_layer or switch, not {form!r}")
    L, _, k = ids.shape
    chosen = np.zeros((L, E))
    _count(np.ascontiguousarray(ids), keep, 1 if form == "switch" else k, chosen)
    return chosen / max(count, 1)


@jit()
def _count(ids, keep, slots, chosen):
    L, N, _ = ids.shape
    for layer in range(L):
        for n in range(N):
            for slot in range(slots):
                if keep[n] and ids[layer, n, slot] >= 0:
                    chosen[layer, ids[layer, n, slot]] += 1


@jit()
def _sum_probs(logits, keep, threads, total):
    L, blocks, _ = total.shape
    share(_sum_blocks, L * blocks, (logits, keep, total), threads)


@jit()
def _sum_blocks(start, stop, logits, keep, total):
    blocks = total.shape[1]
    for block in range(start, stop):
        _sum_block(logits, keep, block // blocks, block % blocks, total)


@jit()
def _sum_block(logits, keep, layer, block, total):
    _, N, E = logits.shape
    probs = np.empty(E, logits.dtype)
    for n in range(block * TOKENS, min(N, (block + 1) * TOKENS)):
        if keep[n]:
            _softmax(logits, layer, n, probs)
            for e in range(E):
                total[layer, block, e] += probs[e]


@jit()
def _softmax(logits, layer, n, probs):
    E = logits.shape[2]
    top = logits[layer, n, 0]
    for e in range(1, E):
        top = max(top, logits[layer, n, e])
    total = logits.dtype.type(0)
    for e in range(E):
        probs[e] = exp(logits[layer, n, e] - top)
        total += probs[e]
    for e in range(E):
        probs[e] /= total


@jit()
def _backward(logits, keep, dprobs, threads, dlogits):
    L, N, _ = logits.shape
    share(_backward_blocks, L * ((N + TOKENS - 1) // TOKENS), (logits, keep, dprobs, dlogits), threads)


@jit()
def _backward_blocks(start, stop, logits, keep, dprobs, dlogits):
    blocks = (logits.shape[1] + TOKENS - 1) // TOKENS
    for block in range(start, stop):
        _backward_block(logits, keep, dprobs, block // blocks, block % blocks, dlogits)


@jit()
def _backward_block(logits, keep, dprobs, layer, block, dlogits):
    _, N, E = logits.shape
    probs = np.empty(E, logits.dtype)
    for n in range(block * TOKENS, min(N, (block + 1) * TOKENS)):
        if not keep[n]:
            for e in range(E):
                dlogits[layer, n, e] = 0
            continue
        # forward: probs = softmax(logits)
        _softmax(logits, layer, n, probs)
        along = logits.dtype.type(0)
        for e in range(E):
            along += probs[e] * dprobs[layer, e]
        for e in range(E):
            dlogits[layer, n, e] = probs[e] * (dprobs[layer, e] - along)
