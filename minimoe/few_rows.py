"""Products of few tokens with a weight that is read once, where it lies: y[n, row] = x[n] · w[row].

The time is that of reading the weight. bfloat16 and int8 are widened in registers, or bfloat16 is multiplied in pairs
where the processor does that. Of one token, two rows that lie far apart are read side by side: a processor recognises
where long streams go. Of several, a number of the weight is used for up to four tokens at once (`tiles.stream_turned`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from minimoe.loops import FAST, at_address, jit, pair, widen
from minimoe.tiles import FEWER, MULTIPLIES_PAIRS, PAIR, REGISTER, stream_turned


@jit(fastmath=FAST)
def dots(x, w, scale, start, stop, out):
    """out[n, row] = x[n] · w[row] for the rows start .. stop - 1: a matrix product for a few rows of x.

    `scale` is the address of the rows' float32 scales (int8), or 0. Where `w` is stored in bfloat16, x must have been
    rounded to it. With one row of x two streams of rows took 5 to 17% less than four, and rows that are neighbours,
    streams within a few KiB, twice as long.
    """
    N, first = x.shape[0], start
    zero = x.dtype.type(0)
    if N == 1:
        half = (stop - start) // 4 * 2
        for row in range(start, start + half):
            other = row + half
            y0 = y1 = zero
            for i in range(x.shape[1]):
                y0 += widen(w[row, i]) * x[0, i]
                y1 += widen(w[other, i]) * x[0, i]
            out[0, row], out[0, other] = y0, y1
        first += 2 * half
    elif N > 1:
        first += _in_tiles(x, w, start, (stop - start) // FEWER * FEWER, out)
    for row in range(first, stop):
        for n in range(N):
            y0 = zero
            for i in range(x.shape[1]):
                y0 += widen(w[row, i]) * x[n, i]
            out[n, row] = y0
    if scale != 0:
        factors = at_address(scale, w.shape[0], np.float32)
        for n in range(N):
            for row in range(start, stop):
                out[n, row] *= factors[row]


def _in_tiles(x: Any, w: Any, start: Any, rows: Any, out: Any) -> Any:
    """`dots` of whole FEWERs of rows if tiles take these numbers; return how many rows are done, all or none."""
    raise NotImplementedError("for jitted code only")


@overload(_in_tiles, jit_options={"error_model": "numpy", "fastmath": False})
def _in_tiles_of(x, w, start, rows, out):
    if w.dtype == types.uint16 and MULTIPLIES_PAIRS:
        return _pairs_in_tiles
    if w.dtype == x.dtype or (x.dtype == types.float32 and w.dtype in (types.uint16, types.int8)):
        return _numbers_in_tiles
    return lambda x, w, start, rows, out: 0


def _numbers_in_tiles(x, w, start, rows, out):
    N, K = x.shape
    if K == 0 or K * x.itemsize % REGISTER:
        return 0
    right = w[start : start + rows].reshape(rows, 1, K)
    stream_turned(x.reshape(1, N, K), right, out.reshape(1, N, out.shape[1])[:, :, start : start + rows])
    return rows


def _pairs_in_tiles(x, w, start, rows, out):
    N, K = x.shape[0], x.shape[1] // 2
    if K == 0 or x.shape[1] % 2 or K * 4 % REGISTER:
        return 0
    left = np.empty((1, N, K), PAIR)
    for n in range(N):
        for i in range(K):
            left[0, n, i] = pair(x[n, 2 * i], x[n, 2 * i + 1])
    right = w[start : start + rows].view(PAIR).reshape(rows, 1, K)
    stream_turned(left, right, out.reshape(1, N, out.shape[1])[:, :, start : start + rows])
    return rows


@jit(inline="always")
def quads(rows):
    """How many fours the rows are, the last perhaps not whole: work is cut between them."""
    return (rows + 3) // 4


@jit(inline="always")
def part_of(rows, before, total, piece, pieces):
    """Which rows of a weight, first and end, belong to a piece of the work.

    There are `total` fours of rows, `before` of them in weights before this one, all cut into equal pieces. A piece is
    a long stream for `dots`: in blocks of 32 rows, int8 rows of 1,024 were read 20% slower. It begins and ends between
    fours, so a row is added up in the same way however many pieces there are.
    """
    first, end = total * piece // pieces - before, total * (piece + 1) // pieces - before
    return min(max(4 * first, 0), rows), min(max(4 * end, 0), rows)
