"""RMSNorm as jitted loops: one pass over a row for its mean square, one to scale it, while it lies in the cache.

The gradient of the weight is a sum over all tokens. It is taken in blocks of a fixed number of rows, whose partial sums
are added in order: the result does not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from minimoe.loops import FAST, jit, weight_view, widen
from minimoe.shapes import Array
from minimoe.stages import SMALL, share, threads_if

ROWS = 64  # per block of the backward


def forward(
    x: Float[Array, "N D"], weight: Float[Array, " D"], eps: float, residual: Float[Array, "N D"] | None = None
) -> tuple[Float[Array, "N D"], Float[Array, "N D"], Float[Array, " N"]]:
    """See the contract."""
    rows = np.ascontiguousarray(x)
    added = rows[:0] if residual is None else np.ascontiguousarray(residual)
    y, r = np.empty(x.shape, x.dtype), np.empty(x.shape[0], x.dtype)
    h = rows if residual is None else np.empty(x.shape, x.dtype)
    _norm(rows, added, weight_view(weight), eps, threads_if(x.size >= SMALL), y, h, r)
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
    _backward(dy, h, weight_view(weight), r, dh, threads_if(h.size >= SMALL), dx, partial, dweight)
    return dx, dweight


@jit()
def _norm(x, residual, weight, eps, threads, y, h, r):
    """h = x + residual; without one (no rows) h is x already."""
    share(_norm_rows, len(x), (x, residual, weight, eps, y, h, r), threads)


@jit()
def _norm_rows(start, stop, x, residual, weight, eps, y, h, r):
    for n in range(start, stop):
        norm_row(x, residual, weight, eps, n, y, h, r)


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


@jit()
def _backward(dy, h, weight, r, dh, threads, dx, partial, dweight):
    """`dh` has no rows where there is none."""
    blocks, D = partial.shape
    share(_backward_blocks, blocks, (dy, h, weight, r, dh, dx, partial), threads)
    for block in range(blocks):
        for d in range(D):
            dweight[d] += partial[block, d]


@jit()
def _backward_blocks(start, stop, dy, h, weight, r, dh, dx, partial):
    for n in range(start * ROWS, min(len(h), stop * ROWS)):
        _backward_row(dy, h, weight, r, n, dx, partial, n // ROWS)
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
