"""RMSNorm as jitted loops: one pass over a row for its mean square, one to scale it, while it lies in the cache.

The gradient of the weight is a sum over all tokens. It is taken in blocks of a fixed number of rows, whose partial sums
are added in order: the result does not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numba import prange

from minimoe.loops import FAST, jit, weight_view, widen
from minimoe.shapes import Array

SMALL = 1 << 14  # numbers; below, starting the threads costs more than they save
ROWS = 64  # per block of the backward


def forward(
    x: Float[Array, "N D"], weight: Float[Array, " D"], eps: float, residual: Float[Array, "N D"] | None = None
) -> tuple[Float[Array, "N D"], Float[Array, "N D"], Float[Array, " N"]]:
    """See the contract."""
    rows = np.ascontiguousarray(x)
    added = rows[:0] if residual is None else np.ascontiguousarray(residual)
    y, r = np.empty(x.shape, x.dtype), np.empty(x.shape[0], x.dtype)
    h = rows if residual is None else np.empty(x.shape, x.dtype)
    norm_rows(rows, added, weight_view(weight), eps, y, h, r)
    return y, x if residual is None else h, r


def backward(
    dy: Float[Array, "N D"],
    h: Float[Array, "N D"],
    weight: Float[Array, " D"],
    r: Float[Array, " N"],
    dh: Float[Array, "N D"] | None = None,
) -> tuple[Float[Array, "N D"], Float[Array, " D"]]:
    """See the contract."""
    N, D = h.shape
    dx = np.empty((N, D), h.dtype)
    partial = np.zeros(((N + ROWS - 1) // ROWS, D), h.dtype)
    dweight = np.zeros(D, h.dtype)
    dy, h, r = np.ascontiguousarray(dy), np.ascontiguousarray(h), np.ascontiguousarray(r)
    dh = h[:0] if dh is None else np.ascontiguousarray(dh)
    _backward(dy, h, weight_view(weight), r, dh, dx, partial, dweight)
    return dx, dweight


@jit(parallel=True)
def norm_rows(x, residual, weight, eps, y, h, r):
    """h = x + residual; without one (no rows) h is x already."""
    N, D = x.shape
    if N * D < SMALL:
        for n in range(N):
            norm_row(x, residual, weight, eps, n, y, h, r)
    else:
        for n in prange(N):
            norm_row(x, residual, weight, eps, np.int64(n), y, h, r)  # prange counts unsigned: compiled anew


@jit()
def _add_row(x, residual, n, h):
    for d in range(x.shape[1]):
        h[n, d] = x[n, d] + residual[n, d]


@jit(fastmath=FAST)
def norm_row(x, residual, weight, eps, n, y, h, r):
    D = h.shape[1]
    if len(residual) > 0:
        _add_row(x, residual, n, h)
    square = h.dtype.type(0)
    for d in range(D):
        square += h[n, d] * h[n, d]
    r[n] = 1 / np.sqrt(square / D + eps)
    scale = r[n]  # read back: rounded to the type of h, so that the loop below stays in that type
    for d in range(D):
        y[n, d] = h[n, d] * scale * widen(weight[d])


@jit(parallel=True)
def _backward(dy, h, weight, r, dh, dx, partial, dweight):
    """`dh` has no rows where there is none."""
    N, D = h.shape
    blocks = partial.shape[0]
    if N * D < SMALL:
        for block in range(blocks):
            _backward_block(dy, h, weight, r, dh, dx, partial, block)
    else:
        for block in prange(blocks):
            _backward_block(dy, h, weight, r, dh, dx, partial, np.int64(block))
    for block in range(blocks):
        for d in range(D):
            dweight[d] += partial[block, d]


@jit()
def _backward_block(dy, h, weight, r, dh, dx, partial, block):
    for n in range(block * ROWS, min(len(h), (block + 1) * ROWS)):
        _backward_row(dy, h, weight, r, n, dx, partial, block)
        if len(dh) > 0:
            _add_row(dx, dh, n, dx)


@jit(fastmath=FAST)
def _backward_row(dy, h, weight, r, n, dx, partial, block):
    D = h.shape[1]
    scale = r[n]
    # forward: normed = h · r(h), and dr/dh = -r³ h / D
    along = h.dtype.type(0)  # Σ_d dnormed · normed
    for d in range(D):
        along += dy[n, d] * widen(weight[d]) * (h[n, d] * scale)
    mean = along / h.dtype.type(D)
    for d in range(D):
        normed = h[n, d] * scale
        # forward: y = normed · weight
        partial[block, d] += dy[n, d] * normed
        dx[n, d] = scale * (dy[n, d] * widen(weight[d]) - normed * mean)
