"""AdamW as one jitted pass: w, g, m and v are read once, w, m and v written once, and nothing else touches memory.

Array code makes a temporary array for every operation, about twenty passes; here memory is the limit, not arithmetic.
The operations of one element stand in the order of the reference and nothing is fused, so both round alike.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from minimoe.loops import FAST, jit
from minimoe.shapes import Array, Scalar
from minimoe.stages import SMALL, share, threads_if

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
        threads_if(w.size >= SMALL),
    )


def squared_norm(g: Float[Array, "..."]) -> Scalar:
    """See the contract."""
    flat = np.ascontiguousarray(g).reshape(-1)
    blocks = (flat.size + BLOCK - 1) // BLOCK
    return float(_squared_norm(flat, threads_if(flat.size >= SMALL), np.empty(blocks)))


@jit()
def _step(w, g, m, v, beta1, rest1, beta2, rest2, bias1, bias2, lr, decay, eps, scale, threads):
    arguments = (w, g, m, v, beta1, rest1, beta2, rest2, bias1, bias2, lr, decay, eps, scale)
    share(_step_some, w.size, arguments, threads)


@jit()
def _step_some(start, stop, w, g, m, v, beta1, rest1, beta2, rest2, bias1, bias2, lr, decay, eps, scale):
    w, g, m, v = w[start:stop], g[start:stop], m[start:stop], v[start:stop]  # from 0 on: LLVM can vectorise
    for i in range(len(w)):
        gradient = g[i] * scale
        m[i] = beta1 * m[i] + rest1 * gradient
        v[i] = beta2 * v[i] + rest2 * gradient * gradient
        w[i] = w[i] - decay * w[i] - lr * (m[i] / bias1) / (np.sqrt(v[i] / bias2) + eps)


@jit()
def _squared_norm(g, threads, partial):
    share(_square_blocks, partial.size, (g, partial), threads)
    total = 0.0
    for block in range(partial.size):
        total += partial[block]
    return total


@jit()
def _square_blocks(start, stop, g, partial):
    for block in range(start, stop):
        partial[block] = _square_block(g, block)


@jit(fastmath=FAST)
def _square_block(g, block):
    total = 0.0
    for i in range(block * BLOCK, min(g.size, (block + 1) * BLOCK)):
        total += np.float64(g[i]) * np.float64(g[i])
    return total
