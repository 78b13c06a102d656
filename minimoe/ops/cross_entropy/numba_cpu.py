"""Cross-entropy as jitted loops: a row of logits is read from memory once per direction.

The forward keeps one number per token, lse; the backward makes the probabilities again from it, so nothing of size
(N, V) is stored in between.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from minimoe.loops import FMA, exp, jit
from minimoe.shapes import Array, Scalar
from minimoe.stages import SMALL, share, threads_if

LANES = 64  # four vectors of 512 bits in float32


def forward(
    logits: Float[Array, "N V"], targets: Int[Array, " N"]
) -> tuple[Scalar, Float[Array, " N"], Float[Array, " N"]]:
    """See the contract."""
    losses, lse = np.empty(logits.shape[0], logits.dtype), np.empty(logits.shape[0], logits.dtype)
    logits, targets = np.ascontiguousarray(logits), np.ascontiguousarray(targets, np.int64)
    loss = _forward(logits, targets, threads_if(logits.size >= SMALL), losses, lse)
    return loss, losses, lse


def backward(
    dloss: float, logits: Float[Array, "N V"], targets: Int[Array, " N"], lse: Float[Array, " N"]
) -> Float[Array, "N V"]:
    """See the contract."""
    dlogits = np.empty(logits.shape, logits.dtype)
    scale = logits.dtype.type(dloss / max(int(np.count_nonzero(targets >= 0)), 1))
    logits, lse, targets = (*map(np.ascontiguousarray, (logits, lse)), np.ascontiguousarray(targets, np.int64))
    _backward(scale, logits, targets, lse, threads_if(logits.size >= SMALL), dlogits)
    return dlogits


@jit()
def _forward(logits, targets, threads, losses, lse):
    N = len(logits)
    share(_forward_rows, N, (logits, targets, losses, lse), threads)
    # The mean is added up by one thread, in the order of n, whatever the number of threads.
    total, counted = 0.0, 0
    for n in range(N):
        if targets[n] >= 0:
            total += losses[n]
            counted += 1
    return total / max(counted, 1)


@jit()
def _forward_rows(start, stop, logits, targets, losses, lse):
    for n in range(start, stop):
        _forward_row(logits, targets, n, losses, lse)


@jit()
def _forward_row(logits, targets, n, losses, lse):
    top = _row_max(logits, n)
    lse[n] = top + np.log(_row_sum_exp(logits, n, top))
    losses[n] = lse[n] - logits[n, targets[n]] if targets[n] >= 0 else 0


@jit()
def _row_max(logits, n):
    # Eight running maxima: with one, every comparison would wait for the one before. (The compiler itself splits a
    # maximum, unlike a sum, only if it is told that there are no NaN.)
    V = logits.shape[1]
    whole = V // 8 * 8
    a = b = c = d = e = f = g = h = logits[n, 0]
    for v in range(0, whole, 8):
        a = max(a, logits[n, v])
        b = max(b, logits[n, v + 1])
        c = max(c, logits[n, v + 2])
        d = max(d, logits[n, v + 3])
        e = max(e, logits[n, v + 4])
        f = max(f, logits[n, v + 5])
        g = max(g, logits[n, v + 6])
        h = max(h, logits[n, v + 7])
    for v in range(whole, V):
        a = max(a, logits[n, v])
    return max(max(max(a, b), max(c, d)), max(max(e, f), max(g, h)))


@jit(fastmath=FMA)
def _row_sum_exp(logits, n, top):
    # Sums side by side in the lanes of vectors. The order of additions is written down, not left to the compiler, which
    # was seen to choose another one in code read from the cache than in code just compiled.
    V = logits.shape[1]
    sums = np.zeros(LANES, logits.dtype)
    for v in range(0, V, LANES):
        for lane in range(min(LANES, V - v)):
            sums[lane] += exp(logits[n, v + lane] - top)
    total = logits.dtype.type(0)
    for lane in range(LANES):
        total += sums[lane]
    return total


@jit()
def _backward(scale, logits, targets, lse, threads, dlogits):
    share(_backward_rows, len(logits), (scale, logits, targets, lse, dlogits), threads)


@jit()
def _backward_rows(start, stop, scale, logits, targets, lse, dlogits):
    for n in range(start, stop):
        _backward_row(scale, logits, targets, lse, n, dlogits)


@jit()
def _backward_row(scale, logits, targets, lse, n, dlogits):
    V = logits.shape[1]
    if targets[n] < 0:
        for v in range(V):
            dlogits[n, v] = 0
        return
    # forward: lse = log Σ exp(logits)
    shift = lse[n]
    for v in range(V):
        dlogits[n, v] = exp(logits[n, v] - shift)
    # forward: - logits[n, targets[n]]
    dlogits[n, targets[n]] -= 1
    for v in range(V):
        dlogits[n, v] *= scale
