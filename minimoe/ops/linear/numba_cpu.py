"""Linear maps on the CPU: BLAS for many tokens, a loop over the weights for few.

With few tokens the time is that of reading the weights: the loop reads each once, whatever the number of tokens, on all
cores, and widens bfloat16 in registers. With many tokens, or with weights so small that the call itself costs most,
NumPy's BLAS.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
from jaxtyping import Float, Int

from minimoe.arrays import is_bfloat16
from minimoe.loops import address, at_address, dots, jit, rounded, storage
from minimoe.products import Product, compute, operand
from minimoe.quantized import Int8, parts
from minimoe.shapes import Array

FEW_ROWS = 16  # tokens up to which BLAS, which rearranges the weights for itself first, is slower
FEW_PRODUCTS = 300_000  # below, one core is done before others have woken up
ROWS = 32  # of a block, the work that is dealt to threads


def forward(
    x: Float[Array, "N I"], weights: Sequence[Float[Array, "_ I"] | Int[Int8, "_ I"]]
) -> list[Float[Array, "N _"]]:
    dtype, narrow = weights[0].dtype, is_bfloat16(weights[0]) or isinstance(weights[0], Int8)
    same = all(w.dtype == dtype for w in weights) and (dtype == x.dtype or narrow)
    work = len(x) * sum(w.size for w in weights)
    if len(x) <= FEW_ROWS and same and (work >= FEW_PRODUCTS or narrow):
        return _forward_few(x, [w if isinstance(w, Int8) else np.ascontiguousarray(w) for w in weights])
    xs = [operand(x, w) for w in weights]
    types = [xw.dtype if isinstance(w, Int8) else np.result_type(xw, w) for xw, w in zip(xs, weights, strict=True)]
    ys = [np.empty((len(x), len(w)), kind) for w, kind in zip(weights, types, strict=True)]
    compute([Product([(xw, w.T)], y) for xw, w, y in zip(xs, weights, ys, strict=True)])  # (N, I) -> (N, O)
    return ys


def backward(
    dys: Sequence[Float[Array, "N _"]], x: Float[Array, "N I"], weights: Sequence[Float[Array, "_ I"]]
) -> tuple[Float[Array, "N I"], list[Float[Array, "_ I"]]]:
    # forward: y = x · wᵀ
    dx = np.empty(x.shape, np.result_type(*dys, *weights))
    dws = [np.empty((dy.shape[1], x.shape[1]), np.result_type(dy, x)) for dy in dys]
    gradients = [Product([(dy.T, x)], dw) for dy, dw in zip(dys, dws, strict=True)]  # (O, N) · (N, I) -> (O, I)
    compute([*gradients, Product(list(zip(dys, weights, strict=True)), dx)])  # dx: (N, O) · (O, I), summed over weights
    return dx, dws


def _forward_few(
    x: Float[Array, "N I"], weights: Sequence[Float[Array, "_ I"] | Int[Int8, "_ I"]]
) -> list[Float[Array, "N _"]]:
    """One launch for all weights, by address: one compiled loop for any number of them, memory-mapped or not."""
    bf16 = is_bfloat16(weights[0])
    N = len(x)
    x = np.ascontiguousarray(x, np.float32 if bf16 else x.dtype)
    held = [parts(w) for w in weights]  # addresses keep nothing alive
    table = np.array([(address(w), address(scale), len(w)) for w, scale in held], np.int64)
    out = np.empty(N * int(table[:, 2].sum()), x.dtype)
    few(x, table, storage(held[0][0][:0]).dtype, bf16, out)
    ys, start = [], 0
    for w in weights:
        ys.append(out[start : start + N * len(w)].reshape(N, len(w)))
        start += N * len(w)
    return ys


@jit(parallel=True)
def few(x, table, dtype, bf16, out):
    if bf16:
        x = x.copy()
        for n in range(x.shape[0]):
            for i in range(x.shape[1]):
                x[n, i] = rounded(x[n, i])
    blocks = 0
    for i in range(len(table)):
        blocks += (table[i, 2] + ROWS - 1) // ROWS
    if ROWS * blocks * x.size < FEW_PRODUCTS:
        for block in range(blocks):
            _block(x, table, dtype, out, block)
    else:
        for block in numba.prange(blocks):
            _block(x, table, dtype, out, np.int64(block))  # prange counts unsigned


@jit()
def _block(x, table, dtype, out, block):
    """Block `block` of ROWS rows, counted through all the weights; their results lie one after the other in `out`."""
    N, weight, start = x.shape[0], 0, 0
    while block >= (table[weight, 2] + ROWS - 1) // ROWS:
        block -= (table[weight, 2] + ROWS - 1) // ROWS
        start += N * table[weight, 2]
        weight += 1
    place, scale, rows = table[weight]
    w = at_address(place, (rows, x.shape[1]), dtype)
    y = out[start : start + N * rows].reshape(N, rows)
    dots(x, w, scale, ROWS * block, min(ROWS * (block + 1), rows), y)
