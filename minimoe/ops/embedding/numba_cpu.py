"""Embedding as jitted loops: rows are gathered in parallel, gradients are added column block by column block.

Several tokens may add to one row of the table, so threads that share the tokens would need atomics (and an order of
additions that depends on luck). Threads that share the *columns* do not meet: each walks over all tokens in the order
of n and adds its own columns.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from minimoe.arrays import is_bfloat16
from minimoe.loops import jit, weight_view, widen
from minimoe.shapes import Array
from minimoe.stages import SMALL, share, threads_if

COLUMNS = 32  # per block: two cache lines of float32, so that threads do not write into one line


def forward(tokens: Int[Array, " N"], table: Float[Array, "V D"]) -> Float[Array, "N D"]:
    """See the contract."""
    x = np.empty((tokens.size, table.shape[1]), np.float32 if is_bfloat16(table) else table.dtype)
    _gather(np.ascontiguousarray(tokens, np.int64), weight_view(table), threads_if(x.size >= SMALL), x)
    return x


def backward(dx: Float[Array, "N D"], tokens: Int[Array, " N"], vocab_size: int) -> Float[Array, "V D"]:
    """See the contract."""
    # forward: x[n] = table[tokens[n]]
    dtable = np.zeros((vocab_size, dx.shape[1]), dx.dtype)
    dx, tokens = np.ascontiguousarray(dx), np.ascontiguousarray(tokens, np.int64)
    _scatter_add(dx, tokens, threads_if(dx.size >= SMALL), dtable)
    return dtable


@jit()
def _gather(tokens, table, threads, x):
    share(_copy_rows, len(x), (tokens, table, x), threads)


@jit()
def _copy_rows(start, stop, tokens, table, x):
    for n in range(start, stop):
        copy_row(tokens, table, n, x)


@jit()
def copy_row(tokens, table, n, x):
    row = tokens[n]
    for d in range(x.shape[1]):
        x[n, d] = widen(table[row, d])


@jit()
def _scatter_add(dx, tokens, threads, dtable):
    share(_add_columns, (dx.shape[1] + COLUMNS - 1) // COLUMNS, (dx, tokens, dtable), threads)


@jit()
def _add_columns(start, stop, dx, tokens, dtable):
    """Blocks of columns, start to stop."""
    first, end = start * COLUMNS, min(dx.shape[1], stop * COLUMNS)
    for n in range(tokens.size):
        row = tokens[n]
        for d in range(first, end):
            dtable[row, d] += dx[n, d]
