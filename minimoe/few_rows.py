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

from minimoe.loops import FAST, INLINED, at_address, jit, pair, widen
from minimoe.tiles import FEWER, MULTIPLIES_PAIRS, PAIR, REGISTER, stream_turned

_WIDENED = ((types.float32, types.uint16), (types.float32, types.int8))  # what tiles widen a weight to, and from


@jit(fastmath=FAST)
def dots(x, factors, w, scale, start, stop, out):
    """out[n, row] = x[n] · w[row] for the rows start .. stop - 1: a matrix product for a few rows of x.

    x, w and out are C-contiguous; `factors` is what `factors_of` has made of x. `scale` is the address of the rows'
    float32 scales (int8), or 0. Where `w` is stored in bfloat16, x must have been rounded to it, as pairs take only the
    upper halves of its numbers. Of one row of x, two streams took 5 to 17% less than four; rows that are neighbours are
    streams within a few KiB, and int8 rows of 1,024 were read at half the speed so.
    """
    N, first = x.shape[0], start
    zero = x.dtype.type(0)
    if N == 1:
        half = (stop - start) // FEWER * (FEWER // 2)
        for row in range(start, start + half):
            other = row + half
            y0 = y1 = zero
            for i in range(x.shape[1]):
                y0 += widen(w[row, i]) * x[0, i]
                y1 += widen(w[other, i]) * x[0, i]
            out[0, row], out[0, other] = y0, y1
        first += 2 * half
    else:
        first += in_tiles(factors, w, start, (stop - start) // FEWER * FEWER, out)
    for row in range(first, stop):
        for n in range(N):
            y0 = zero
            for i in range(x.shape[1]):
                y0 += widen(w[row, i]) * x[n, i]
            out[n, row] = y0
    if scale != 0:
        numbers = at_address(scale, w.shape[0], np.float32)
        for n in range(N):
            for row in range(start, stop):
                out[n, row] *= numbers[row]


def factors_of(x: Any, dtype: Any, several: Any) -> Any:
    """What `dots` multiplies in tiles with weights stored so, inside jitted code: x, or its numbers in pairs.

    It is made before a piece of work is begun (see `stages`), as it may need memory: pairs do if there are `several`
    rows of x for a weight.
    """
    raise NotImplementedError("for jitted code only")


@overload(factors_of, jit_options={"error_model": "numpy", "fastmath": False})
def _factors_of(x, dtype, several):
    if dtype.dtype == types.uint16 and x.dtype == types.float32 and MULTIPLIES_PAIRS:
        return _in_pairs
    return lambda x, dtype, several: x


def _in_pairs(x, dtype, several):
    if not several or x.shape[1] * 2 % REGISTER:
        return x.view(PAIR)[:0]
    factors = np.empty((x.shape[0], x.shape[1] // 2), PAIR)
    for n in range(x.shape[0]):
        for i in range(factors.shape[1]):
            factors[n, i] = pair(x[n, 2 * i], x[n, 2 * i + 1])
    return factors


def in_tiles(factors: Any, w: Any, start: Any, rows: Any, out: Any) -> Any:
    """`dots` of whole FEWERs of rows, if tiles take these numbers; return how many rows are done: all, or none."""
    raise NotImplementedError("for jitted code only")


@overload(in_tiles, jit_options={"error_model": "numpy", "fastmath": False})
def _in_tiles(factors, w, start, rows, out):
    pairs = factors.dtype == types.uint32
    if not pairs and w.dtype != factors.dtype and (factors.dtype, w.dtype) not in _WIDENED:
        return lambda factors, w, start, rows, out: 0

    def impl(factors, w, start, rows, out):
        N, width = factors.shape
        if N == 0 or width == 0 or width * factors.itemsize % REGISTER:
            return 0
        right = _as_factors(w[start : start + rows], factors).reshape(rows, 1, width)
        places = out.reshape(1, N, out.shape[1])[:, :, start : start + rows]
        stream_turned(factors.reshape(1, N, width), right, places)
        return rows

    return impl


def _as_factors(w: Any, factors: Any) -> Any:
    """View rows of a weight as tiles read them: pairs if the other factors are pairs."""
    raise NotImplementedError("for jitted code only")


@overload(_as_factors, jit_options=INLINED)
def _viewed(w, factors):
    if factors.dtype == types.uint32:
        return lambda w, factors: w.view(PAIR)
    return lambda w, factors: w


@jit(inline="always")
def quads(rows):
    """How many fours the rows are, the last perhaps not whole: work is cut between them."""
    return (rows + FEWER - 1) // FEWER


@jit(inline="always")
def part_of(rows, before, total, piece, pieces):
    """Which rows of a weight, first and end, belong to a piece of the work.

    There are `total` fours of rows, `before` of them in weights before this one, all cut into equal pieces. A piece is
    a long stream for `dots`: in blocks of 32 rows, int8 rows of 1,024 were read 20% slower. It begins and ends between
    fours, so a row is added up in the same way however many pieces there are.
    """
    first, end = total * piece // pieces - before, total * (piece + 1) // pieces - before
    return min(max(FEWER * first, 0), rows), min(max(FEWER * end, 0), rows)
