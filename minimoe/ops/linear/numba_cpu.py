"""Linear maps on the CPU: products in tiles for many tokens, a loop over the weights for few.

With few tokens the time is that of reading the weights: the loop reads each once, whatever the number of tokens, on all
cores (see `few_rows`). With many tokens, and in float32 with small weights, `products`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
from jaxtyping import Float, Int

from minimoe.arrays import is_bfloat16
from minimoe.few_rows import dots, factors_of, part_of, quads
from minimoe.loops import FEW_PRODUCTS, address, at_address, holds_bfloat16, jit, storage
from minimoe.products import Product, compute, operand, round_in_place
from minimoe.quantized import Int8, parts
from minimoe.shapes import Array
from minimoe.stages import NONE, begin, go_on, new_stages, pieces_for, together

FEW_ROWS = 48  # tokens up to which `products`, where weights are first copied side by side, are slower


def forward(
    x: Float[Array, "N I"], weights: Sequence[Float[Array, "_ I"] | Int[Int8, "_ I"]]
) -> list[Float[Array, "N _"]]:
    dtype, narrow = weights[0].dtype, is_bfloat16(weights[0]) or isinstance(weights[0], Int8)
    same = all(w.dtype == dtype for w in weights) and (dtype == x.dtype or narrow)
    work = len(x) * sum(w.size for w in weights)
    if len(x) <= FEW_ROWS and same and (work >= FEW_PRODUCTS or narrow):
        return _forward_few(x, [w if isinstance(w, Int8) else np.ascontiguousarray(w) for w in weights])
    narrowed, x = operand(x, *weights), np.ascontiguousarray(x)
    xs = [narrowed if is_bfloat16(w) else x for w in weights]
    types = [xw.dtype if isinstance(w, Int8) else np.result_type(xw, w) for xw, w in zip(xs, weights, strict=True)]
    ys = [np.empty((len(x), len(w)), kind) for w, kind in zip(weights, types, strict=True)]
    products = [Product([(xw, w.T)], y, is_bfloat16(w)) for xw, w, y in zip(xs, weights, ys, strict=True)]
    compute(products)  # (N, I) -> (N, O)
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
    if any(w.shape[1] != x.shape[1] for w in weights):
        raise ValueError(f"cannot multiply {x.shape} by the transposes of {[w.shape for w in weights]}")
    bf16 = is_bfloat16(weights[0])
    N = len(x)
    x = np.ascontiguousarray(x, np.float32 if bf16 else x.dtype)
    held = [parts(w) for w in weights]  # addresses keep nothing alive
    table = np.array([(address(w), address(scale), len(w)) for w, scale in held], np.int64)
    out = np.empty(N * int(table[:, 2].sum()), x.dtype)
    few(x, table, storage(held[0][0][:0]).dtype, numba.get_num_threads(), out)
    ys, start = [], 0
    for w in weights:
        ys.append(out[start : start + N * len(w)].reshape(N, len(w)))
        start += N * len(w)
    return ys


@jit()
def few(x, table, dtype, threads, out):
    if holds_bfloat16(dtype):
        x = x.copy()
        round_in_place(x)
    rows = 0
    for weight in range(len(table)):
        rows += table[weight, 2]
    threads = threads if rows * x.size >= FEW_PRODUCTS else 1
    together(few_stage, (x, table, dtype, threads, new_stages(1)[0], out), threads)


@jit()
def few_stage(x, table, dtype, threads, stage, out):
    """What each thread does: pieces of the rows of all weights, one weight after another."""
    pieces, factors = pieces_for(threads), factors_of(x, dtype, len(x) > 1)
    piece = begin(stage, pieces)
    while piece != NONE:
        _rows(x, factors, table, dtype, out, piece, pieces)
        piece = go_on(stage, pieces)


@jit(inline="always")
def _rows(x, factors, table, dtype, out, piece, pieces):
    """A piece of the rows; results of a weight lie after those of the weight before it."""
    N, start, before, total = x.shape[0], 0, 0, 0
    for weight in range(len(table)):
        total += quads(table[weight, 2])
    for weight in range(len(table)):
        place, scale, rows = table[weight]
        w, y = at_address(place, (rows, x.shape[1]), dtype), out[start : start + N * rows].reshape(N, rows)
        first, end = part_of(rows, before, total, piece, pieces)
        dots(x, factors, w, scale, first, end, y)
        start, before = start + N * rows, before + quads(rows)
