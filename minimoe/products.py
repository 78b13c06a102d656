"""Matrix products on the CPU: out = Σ left · right, in tiles (see `tiles`), blocks of the result dealt to threads.

Within a block, for DEPTH k's and WIDTH columns at a time, `right` is copied into panels: a line of columns for every k,
zeros beyond the last. Then HEIGHT rows of `left` at a time are copied side by side and multiplied with each panel. So
what is read again and again lies close together and stays in the core's own caches, however far apart the rows of a
matrix are; and what is stored in bfloat16 or int8 is widened on the way. Where the processor multiplies pairs of
bfloat16 (see `tiles.PAIR`), both factors are packed as such instead.

A number is added up in ascending order of k, DEPTH at a time, whatever block it is in and whoever computes it: the bits
do not depend on the number of threads. A library would have threads of its own: OpenBLAS's go on spinning for
milliseconds after a product and take half a core from the Numba loop that follows.

Source: Van Zee and van de Geijn, as in `tiles`, figure 1 (the loops around the micro-kernel).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minimoe.arrays import is_bfloat16
from minimoe.arrays import widen as widened
from minimoe.loops import address, at_address, bytes_of, copy, holds_pairs, jit, pair, rounded, storage, widen
from minimoe.quantized import Int8
from minimoe.shapes import Array
from minimoe.stages import NONE, PIECES, SMALL, new_stages, share, take, threads_if, together
from minimoe.tiles import FEWER, LINE, LINES, MULTIPLIES_PAIRS, PAIR, ROWS, multiply_lines, turn

GRAIN = 1 << 21  # multiplications worth a block, or a thread, of their own: some 40 µs
LEAST_ROWS, LEAST_COLUMNS = 192, 64  # of a block: each one copies `right` or `left` for itself
HEIGHT, WIDTH, DEPTH = 96, 192, 256


class Product(NamedTuple):
    """A sum of matrix products to compute.

    Attributes
    ----------
    pairs : the factors (left, right), added up in this order; each of shapes (M, K) and (K, N), K may differ
    out : (M, N) array to fill, float32 or float64, of any strides; neither a factor nor another `out` may overlap it
    rounded : whether every `left` has been rounded to bfloat16 (see `operand`), so that no bit is lost in pairs
    """

    pairs: Sequence[tuple[Array, Array | Int8]]
    out: Array
    rounded: bool = False


def operand(x: Array, *others: Array | Int8) -> Array:
    """Return the matrix `x` as the left factor of products with `others`: rounded if any is stored in bfloat16."""
    if not any(is_bfloat16(w) for w in others):
        return np.ascontiguousarray(x)
    out = np.empty(x.shape, np.float32)
    _round_all(np.ascontiguousarray(x, np.float32), threads_if(x.size >= SMALL), out)
    return out


def multiply(left: Array, right: Array) -> Array:
    """Return left · right in a new array, `left` rounded if `right` is stored in bfloat16."""
    left = operand(left, right)
    out = np.empty((left.shape[0], right.shape[1]), np.result_type(left, right))
    compute([Product([(left, right)], out, is_bfloat16(right))])
    return out


def compute(products: Sequence[Product]) -> None:
    """Fill the `out` of all products, on up to `numba.get_num_threads()` threads.

    Blocks are begun in the order given: with the large products first, threads finish together.

    Raises
    ------
    ValueError
        If the shapes of a product do not match.
    """
    for product in products:
        for left, right in product.pairs:
            if (left.shape[1], (left.shape[0], right.shape[1])) != (right.shape[0], product.out.shape):
                raise ValueError(f"cannot multiply {left.shape} by {right.shape} into {product.out.shape}")
    written = [p if _row_by_row(p.out) else p._replace(out=np.empty(p.out.shape, p.out.dtype)) for p in products]
    for dtype in dict.fromkeys(product.out.dtype for product in written):  # mostly one
        _compute([product for product in written if product.out.dtype == dtype], dtype)
    for product, other in zip(products, written, strict=True):
        if other is not product:
            product.out[...] = other.out


def cut(product: Product, pieces: int) -> list[tuple[slice, slice]]:
    """Cut `out` into so many blocks, or fewer, of its rows or its columns, whichever there are more of.

    So with few rows and large weights every weight is read by one block only.

    >>> x, w, out = np.ones((1000, 512)), np.ones((512, 64)), np.ones((1000, 64))
    >>> [rows for rows, _ in cut(Product([(x, w)], out), 3)]
    [slice(0, 336, None), slice(336, 672, None), slice(672, 1000, None)]
    """
    M, N = product.out.shape
    longer, least, whole = (M, LEAST_ROWS, ROWS) if M >= N else (N, LEAST_COLUMNS, LINE // product.out.itemsize)
    step = -(-longer // max(1, min(pieces, longer // least)))
    step = -(-step // whole) * whole  # no block but the last ends within a tile
    parts = [slice(start, min(start + step, longer)) for start in range(0, longer, step or 1)]
    if not product.out.size:
        return []
    return [(part, slice(0, N)) if M >= N else (slice(0, M), part) for part in parts]


def _row_by_row(out: Array) -> bool:
    """Whether the numbers of a row lie side by side, as the loops write them."""
    return bool(out.strides[1] == out.itemsize)


def _work(product: Product) -> int:
    """Multiplications."""
    return int(product.out.size * sum(len(right) for _, right in product.pairs))


def _compute(products: Sequence[Product], dtype: Any) -> None:
    """`compute` of results of one type."""
    kinds = {_kind(right, dtype) for product in products for _, right in product.pairs}
    stored = kinds.pop() if len(kinds) == 1 else dtype  # of several, all are widened beforehand
    works = [_work(product) for product in products]
    work = sum(works)
    threads = threads_if(work >= 2 * GRAIN)
    least = max(GRAIN, work // (PIECES * threads)) if threads > 1 else max(work, 1)
    held: list[Array] = []  # addresses keep nothing alive
    factors: list[tuple[int, ...]] = []
    blocks: list[tuple[int, ...]] = []
    for product, its_work in zip(products, works, strict=True):
        out, first = product.out, len(factors)
        for left, right in product.pairs:
            if len(right):
                factors.append(
                    (len(right), *_lies(left.astype(dtype, copy=False), held), *_stored(right, stored, held))
                )
        if len(factors) == first:
            out[...] = 0
            continue
        pieces = its_work // least
        for rows, columns in cut(product, pieces // threads * threads or pieces):
            bounds = (rows.start, rows.stop, columns.start, columns.stop)
            blocks.append((first, len(factors), *bounds, address(out), out.strides[0]))
    if not blocks:
        return
    table, kind = np.array(factors, np.int64), dtype
    in_pairs = all(product.rounded for product in products) and all(_in_pairs(*factor) for factor in factors)
    if stored == np.uint16 and MULTIPLIES_PAIRS and in_pairs:
        stored = kind = PAIR
        table[:, 0] //= 2
    _fill(table, np.array(blocks, np.int64), stored, kind, dtype, threads)
    del held


def _kind(right: Array | Int8, dtype: Any) -> Any:
    """The type of the numbers that the loops read: as they are stored, if that is one which they widen to `dtype`."""
    if isinstance(right, Int8):
        return right.dtype
    return np.dtype(np.uint16) if is_bfloat16(right) and dtype == np.float32 else dtype


def _stored(right: Array | Int8, kind: Any, held: list[Array]) -> tuple[int, ...]:
    """Where a right factor of this type lies (see `_lies`), and the scales of its lines, or 0."""
    if not isinstance(right, Int8):
        return *_lies(storage(right) if kind == np.uint16 else widened(right).astype(kind, copy=False), held), 0
    if kind != np.int8:
        return *_lies(right.widened(kind), held), 0
    values = np.ascontiguousarray(right.values.T if right.turned else right.values)
    scale = np.ascontiguousarray(right.scale, np.float32)
    held += [values, scale]
    return address(values), values.strides[0], int(right.turned), address(scale)


def _lies(x: Array, held: list[Array]) -> tuple[int, int, int]:
    """Where a matrix lies, the bytes from line to line, and whether its lines are the columns, not the rows."""
    turned = x.strides[1] != x.itemsize and x.strides[0] == x.itemsize
    if not turned and x.strides[1] != x.itemsize:
        x = np.ascontiguousarray(x)
    held.append(x)
    return address(x), x.strides[int(turned)], int(turned)


def _in_pairs(K: int, left: int, left_step: int, left_turned: int, right: int, step: int, turned: int, *_: int) -> bool:
    """Whether numbers of both factors for k and k + 1 lie side by side."""
    return K % 2 == 0 and not left_turned and bool(turned)


@jit()
def _fill(factors, blocks, stored, kind, dtype, threads):
    """Fill all blocks.

    factors (P, 8): K; of left the address, bytes from line to line, and whether lines are columns; of right the same,
    and the address of its scales. blocks (B, 8): the factors, from and to; rows and columns, from and to; of out the
    address, and bytes from row to row.
    """
    together(_stage, (factors, blocks, stored, kind, dtype, new_stages(1)[0]), threads)


@jit()
def _stage(factors, blocks, stored, kind, dtype, stage):
    """What each thread does: whole blocks, with room for copies of its own."""
    longest = 0
    for p in range(len(factors)):
        longest = max(longest, min(factors[p, 0], DEPTH))
    lefts = np.empty(HEIGHT * (longest + 16), kind)
    lanes = LINE // lefts.itemsize
    rights, lines = np.empty((WIDTH // lanes, longest, lanes), kind), np.empty((lanes, longest), kind)
    sums = np.empty((HEIGHT, LINES * lanes), dtype)
    block = take(stage, len(blocks))
    while block != NONE:
        _fill_block(factors, blocks[block], stored, lefts, rights, lines, sums)
        block = take(stage, len(blocks))


@jit(inline="always")
def _fill_block(factors, block, stored, lefts, rights, lines, sums):
    """The loops around the tiles; what a tile cannot write to its place goes through `sums`."""
    first, end, top, bottom, start, stop = block[0], block[1], block[2], block[3], block[4], block[5]
    out, row_step = block[6], block[7]
    lanes, nothing, line = rights.shape[2], np.int64(0), np.int64(LINE)
    left, edge = np.int64(lefts.ctypes.data), np.int64(sums.ctypes.data)
    for n in range(start, stop, WIDTH):
        width = min(WIDTH, stop - n)
        panels = rights[: -(-width // lanes)]
        for p in range(first, end):
            for k in range(0, factors[p, 0], DEPTH):
                length, begin = min(DEPTH, factors[p, 0] - k), p == first and k == 0
                _load_right(factors[p], k, length, n, width, stored, lines, panels)
                for m in range(top, bottom, HEIGHT):
                    height = min(HEIGHT, bottom - m)
                    left_row, left_k = _load_left(factors[p], k, length, m, height, lefts)
                    for panel in range(0, len(panels), LINES):
                        side = min(np.int64(LINES), len(panels) - panel)
                        columns = min(side * lanes, width - panel * lanes)
                        place = out + m * row_step + (n + panel * lanes) * sums.itemsize
                        whole = columns == side * lanes and height % FEWER == 0
                        multiply_lines(
                            left, left_row, left_k, -(-height // FEWER) * FEWER,
                            panels[panel].ctypes.data, line, panels.strides[0], length,
                            place if whole else edge, row_step if whole else sums.strides[0], line, side,
                            begin or not whole, panels.dtype, nothing, nothing, nothing,
                        )  # fmt: skip
                        if not whole:
                            _store(sums[:height, :columns], begin, place, row_step)


@jit()
def _load_left(factor, k, length, m, height, room):
    """Copy some k's of some rows, and zeros up to whole tiles; return the bytes from row to row and from k to k."""
    place, step, size = factor[1], factor[2], room.itemsize
    if factor[3]:  # a line for each k
        for i in range(length):
            target = room[i * HEIGHT : (i + 1) * HEIGHT]
            copy(at_address(place + (k + i) * step + m * size, (height,), room.dtype), target[:height])
            target[height : height + FEWER] = 0
        return size, HEIGHT * size
    apart = len(room) // HEIGHT  # no power of two, as rows so far apart would compete for few places of a cache
    for i in range(height):
        target = room[i * apart : i * apart + length]
        if holds_pairs(room):
            source = at_address(place + (m + i) * step + k * 8, (2 * length,), np.float32)
            for j in range(length):
                target[j] = pair(source[2 * j], source[2 * j + 1])
        else:
            copy(at_address(place + (m + i) * step + k * size, (length,), room.dtype), target)
    for i in range(height, -(-height // FEWER) * FEWER):
        room[i * apart : i * apart + length] = 0
    return apart * size, size


@jit()
def _load_right(factor, k, length, n, width, stored, lines, panels):
    """Copy some k's of some columns, widened, into panels (P, length, lanes), and zeros beyond the last column."""
    place, step, scale = factor[4], factor[5], factor[7]
    lanes, size = LINE // panels.itemsize, bytes_of(stored)
    if width % lanes:
        panels[-1, :length] = 0
    if factor[6]:  # a line for each column
        for panel in range(len(panels)):
            columns = min(lanes, width - panel * lanes)
            for lane in range(columns):
                column = n + panel * lanes + lane
                source, target = at_address(place + column * step + k * size, (length,), stored), lines[lane]
                for i in range(length):
                    target[i] = widen(source[i])
                if scale != 0:
                    _multiply_by(target, scale, column)
            turn(lines[:columns, :length], panels[panel])
    else:
        for i in range(length):
            source = at_address(place + (k + i) * step + n * size, (width,), stored)
            for panel in range(width // lanes):
                part, target = source[panel * lanes :], panels[panel, i]
                for lane in range(lanes):
                    target[lane] = widen(part[lane])
            for column in range(width - width % lanes, width):
                panels[-1, i, column % lanes] = widen(source[column])
            if scale != 0:
                for panel in range(len(panels)):
                    _multiply_by(panels[panel, i], scale, k + i)


@jit()
def _multiply_by(numbers, scale, line):
    factor = at_address(scale, (line + 1,), np.float32)[line]
    for i in range(len(numbers)):
        numbers[i] *= factor


@jit()
def _store(sums, begin, out, row_step):
    """Put sums where they belong, or add them to what is there."""
    for i in range(sums.shape[0]):
        source, target = sums[i], at_address(out + i * row_step, (sums.shape[1],), sums.dtype)
        for j in range(len(target)):
            target[j] = source[j] if begin else target[j] + source[j]


@jit()
def _round_all(x, threads, out):
    share(_round_rows, len(x), (x, out), threads)


@jit()
def _round_rows(start, stop, x, out):
    for row in range(start, stop):
        round_row(x[row], out[row])


@jit()
def round_in_place(x):
    """Round every number of a matrix to bfloat16."""
    for row in range(len(x)):
        round_row(x[row], x[row])


@jit()
def round_row(source, target):
    """Round every number to bfloat16."""
    for i in range(len(source)):
        target[i] = rounded(source[i])
