"""Rotary position embedding as jitted loops; the table of angles stays NumPy's float64, rounded once."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numba import prange

from minimoe.loops import jit
from minimoe.shapes import Array

SMALL = 1 << 15  # numbers; below, starting the threads costs more than they save


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
    rotate(np.ascontiguousarray(x), np.ascontiguousarray(cos), np.ascontiguousarray(sin), y)
    return y


def backward(dy: Float[Array, "N H C"], cos: Float[Array, "N c"], sin: Float[Array, "N c"]) -> Float[Array, "N H C"]:
    """See the contract."""
    # forward: y = R(angle) x, and R(angle)ᵀ = R(-angle)
    return forward(dy, cos, -sin)


@jit(parallel=True)
def rotate(x, cos, sin, y):
    N = x.shape[0]
    if x.size < SMALL:
        for n in range(N):
            _rotate_token(x, cos, sin, n, y)
    else:
        for n in prange(N):
            _rotate_token(x, cos, sin, np.int64(n), y)  # prange counts unsigned: that would be compiled anew


@jit()
def _rotate_token(x, cos, sin, n, y):
    _, H, C = x.shape
    c = C // 2
    for h in range(H):
        for i in range(c):
            first, second = x[n, h, i], x[n, h, i + c]
            y[n, h, i] = first * cos[n, i] - second * sin[n, i]
            y[n, h, i + c] = second * cos[n, i] + first * sin[n, i]
