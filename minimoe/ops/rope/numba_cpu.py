"""Rotary position embedding as jitted loops; the table of angles stays NumPy's float64, rounded once."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from minimoe.loops import jit, storage, stored
from minimoe.shapes import Array
from minimoe.stages import SMALL, share, threads_if


def table(
    positions: Int[Array, " N"], head_dim: int, theta: float, dtype: Any
) -> tuple[Float[Array, "N c"], Float[Array, "N c"]]:
    """See the contract. Made once per call of the model and shared by its layers, so not worth a loop of its own."""
    angle = positions[:, None].astype(np.float64) * _frequency(head_dim, theta)  # (N,) -> (N, c)
    return np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)


@cache
def _frequency(head_dim: int, theta: float) -> Float[Array, " c"]:
    i = np.arange(head_dim // 2, dtype=np.float64)
    return theta ** (-2 * i / head_dim)


def forward(x: Float[Array, "N H C"], cos: Float[Array, "N c"], sin: Float[Array, "N c"]) -> Float[Array, "N H C"]:
    """See the contract."""
    y = np.empty(x.shape, x.dtype)
    x, cos, sin = (np.ascontiguousarray(array) for array in (x, cos, sin))
    _rotate(x, cos, sin, threads_if(x.size >= SMALL), y)
    return y


def forward_into_cache(
    q: Float[Array, "N H C"],
    k: Float[Array, "N K C"],
    v: Float[Array, "N K C"],
    cos: Float[Array, "N c"],
    sin: Float[Array, "N c"],
    k_cache: Float[Array, "B R K C"],
    v_cache: Float[Array, "B R K C"],
    slots: Int[Array, "B T"],
) -> Float[Array, "N H C"]:
    """See the contract."""
    y = np.empty(q.shape, q.dtype)
    q, k, v, cos, sin = (np.ascontiguousarray(x) for x in (q, k, v, cos, sin))
    slots = np.ascontiguousarray(slots, np.int64)
    rotate_into_cache(q, k, v, cos, sin, storage(k_cache), storage(v_cache), slots, y)
    return y


def backward(dy: Float[Array, "N H C"], cos: Float[Array, "N c"], sin: Float[Array, "N c"]) -> Float[Array, "N H C"]:
    """See the contract."""
    # forward: y = R(angle) x, and R(angle)ᵀ = R(-angle)
    return forward(dy, cos, -sin)


@jit()
def _rotate(x, cos, sin, threads, y):
    share(_rotate_tokens, len(x), (x, cos, sin, y), threads)


@jit()
def _rotate_tokens(start, stop, x, cos, sin, y):
    for n in range(start, stop):
        _rotate_token(x, cos, sin, n, y)


@jit()
def _rotate_token(x, cos, sin, n, y):
    _, H, C = x.shape
    c = C // 2
    for h in range(H):
        for i in range(c):
            first, second = x[n, h, i], x[n, h, i + c]
            y[n, h, i] = first * cos[n, i] - second * sin[n, i]
            y[n, h, i + c] = second * cos[n, i] + first * sin[n, i]


@jit()  # a token of each sequence at most: too little for threads
def rotate_into_cache(q, k, v, cos, sin, k_cache, v_cache, slots, y):
    (N, K, C), T = k.shape, slots.shape[1]
    turned = np.empty(k.shape, k.dtype)
    for n in range(N):
        _rotate_token(q, cos, sin, n, y)
        b, slot = n // T, slots[n // T, n % T]
        if slot >= 0:
            _rotate_token(k, cos, sin, n, turned)
            for h in range(K):
                for i in range(C):
                    k_cache[b, slot, h, i] = stored(turned[n, h, i], k_cache[b, slot, h, i])
                    v_cache[b, slot, h, i] = stored(v[n, h, i], v_cache[b, slot, h, i])
