"""Embedding as jitted loops: rows are gathered in parallel, gradients are added column block by column block.

Several tokens may add to one row of the table, so threads that share the tokens would need atomics (and an order of
additions that depends on luck). Threads that share the *columns* do not meet: each walks over all tokens in the order
of n and adds its own columns.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from numba import prange

from minimoe.arrays import is_bfloat16
from minimoe.loops import jit, weight_view, widen
from minimoe.shapes import Array

SMALL = 1 << 15  # numbers; below, starting the threads costs more than they save
COLUMNS = 32  # per block: two cache lines of float32, so that threads do not write into one line


def forward(tokens: Int[Array, " N"], table: Float[Array, "V D"]) -> Float[Array, "N D"]:
    """See the contract."""
    x = np.empty((tokens.size, table.shape[1]), np.float32 if is_bfloat16(table) else table.dtype)
    gather(np.ascontiguousarray(tokens, np.int64), weight_view(table), x)
    return x


def backward(dx: Float[Array, "N D"], tokens: Int[Array, " N"], vocab_size: int) -> Float[Array, "V D"]:
    """See the contract."""
    # forward: x[n] = table[tokens[n]]
    dtable = np.zeros((vocab_size, dx.shape[1]), dx.dtype)
    _scatter_add(np.ascontiguousarray(dx), np.ascontiguousarray(tokens, np.int64), dtable)
    return dtable


@jit(parallel=True)
def gather(tokens, table, x):
    N, D = x.shape
    if N * D < SMALL:
        for n in range(N):
            copy_row(tokens, table, n, x)
    else:
        for n in prange(N):
            copy_row(tokens, table, np.int64(n), x)  # prange counts unsigned: that would be compiled anew


@jit()
def copy_row(tokens, table, n, x):
    row = tokens[n]
    for d in range(x.shape[1]):
        x[n, d] = widen(table[row, d])


@jit(parallel=True)
def _scatter_add(dx, tokens, dtable):
    N, D = dx.shape
    if N * D < SMALL:
        _add_columns(dx, tokens, 0, D, dtable)
    else:
        for block in prange((D + COLUMNS - 1) // COLUMNS):
            _add_columns(dx, tokens, block * COLUMNS, min(D, (block + 1) * COLUMNS), dtable)


@jit()
def _add_columns(dx, tokens, start, stop, dtable):
    for n in range(tokens.size):
        row = tokens[n]
        for d in range(start, stop):
            dtable[row, d] += dx[n, d]
