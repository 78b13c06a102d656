"""AdamW as one jitted pass: w, g, m and v are read once, w, m and v written once, and nothing else touches memory.

Array code makes a temporary array for every operation, about twenty passes; here memory is the limit, not arithmetic.
The operations of one element stand in the order of the reference and nothing is fused, so both round alike.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numba import prange

from minimoe.loops import FAST, jit
from minimoe.shapes import Array, Scalar

SMALL = 1 << 17  # numbers; below, starting the threads costs more than they save
BLOCK = 1 << 13  # numbers that are squared and added up by one thread, whatever the number of threads


def forward(
    w: Float[Array, "..."],
    g: Float[Array, "..."],
    m: Float[Array, "..."],
    v: Float[Array, "..."],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float = 1.0,
) -> None:
    """See the contract."""
    if not (w.flags.c_contiguous and m.flags.c_contiguous and v.flags.c_contiguous):
        raise ValueError("w, m and v are changed in place and must be contiguous")
    number = w.dtype.type
    _step(
        w.reshape(-1),
        np.ascontiguousarray(g).reshape(-1),
        m.reshape(-1),
        v.reshape(-1),
        number(beta1),
        number(1 - beta1),
        number(beta2),
        number(1 - beta2),
        number(1 - beta1**step),
        number(1 - beta2**step),
        number(lr),
        number(lr * weight_decay),
        number(eps),
        number(scale),
    )


def squared_norm(g: Float[Array, "..."]) -> Scalar:
    """See the contract."""
    flat = np.ascontiguousarray(g).reshape(-1)
    return float(_squared_norm(flat, np.empty((flat.size + BLOCK - 1) // BLOCK)))


@jit(parallel=True)
def _step(w, g, m, v, beta1, rest1, beta2, rest2, bias1, bias2, lr, decay, eps, scale):
    if w.size < SMALL:
        for i in range(w.size):
            _step_one(w, g, m, v, beta1, rest1, beta2, rest2, bias1, bias2, lr, decay, eps, scale, i)
    else:
        for i in prange(w.size):
            _step_one(w, g, m, v, beta1, rest1, beta2, rest2, bias1, bias2, lr, decay, eps, scale, i)


@jit(inline="always")
def _step_one(w, g, m, v, beta1, rest1, beta2, rest2, bias1, bias2, lr, decay, eps, scale, i):
    gradient = g[i] * scale
    m[i] = beta1 * m[i] + rest1 * gradient
    v[i] = beta2 * v[i] + rest2 * gradient * gradient
    w[i] = w[i] - decay * w[i] - lr * (m[i] / bias1) / (np.sqrt(v[i] / bias2) + eps)


@jit(parallel=True)
def _squared_norm(g, partial):
    if g.size < SMALL:
        for block in range(partial.size):
            partial[block] = _square_block(g, block)
    else:
        for block in prange(partial.size):
            partial[block] = _square_block(g, block)
    total = 0.0
    for block in range(partial.size):
        total += partial[block]
    return total


@jit(fastmath=FAST)
def _square_block(g, block):
    total = 0.0
    for i in range(block * BLOCK, min(g.size, (block + 1) * BLOCK)):
        total += np.float64(g[i]) * np.float64(g[i])
    return total
