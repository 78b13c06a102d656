"""Experts on the CPU: a counting sort puts the tokens of each expert side by side, in three ways from there on.

Few tokens for each expert (decode, short prompts, small batches): the time is that of reading the chosen experts'
weights, so two fused loops read each chosen weight once, whatever the number of tokens that share it:
hidden = act(w1 x) ⊙ (w3 x) for all rows of w1 and w3, then slots = w2 hidden.

Many tokens (prompts): the same two steps in tiles (see `tiles`), with an expert's tokens in the lanes. Rows of weights
are read where they lie and widened a few at a time; what passes between the steps never changes its order. Where the
processor multiplies pairs of bfloat16, they are not widened, and tokens and hidden numbers are packed in pairs, too.

In both the experts come as a table of addresses: one compiled loop for any E, stacked or memory-mapped.

Otherwise (training with many tokens, whose backward needs arrays row by row; weights that the loops cannot read as they
lie): one product for each segment (see `products`), and fused loops around it. Products turn the weights and leave the
tokens as they are, which is less where an expert has more tokens than rows; prompts of 128 tokens for each expert and
3,584 rows took a sixth longer that way.
Whichever it was, the combine reads each token's k results in slot order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from jaxtyping import Float, Int

from minimoe.arrays import is_bfloat16
from minimoe.few_rows import dots, factors_of, part_of, quads
from minimoe.loops import (
    FAST,
    FEW_PRODUCTS,
    address,
    at_address,
    bytes_of,
    copy,
    holds_bfloat16,
    holds_pairs,
    jit,
    pair,
    rounded,
    sigmoid,
    storage,
    widen,
)  # fmt: skip
from minimoe.ops.experts import Saved, check_activation
from minimoe.products import Product, compute, operand
from minimoe.quantized import Int8, parts
from minimoe.shapes import Array
from minimoe.stages import NONE, SMALL, begin, go_on, new_stages, pieces_for, share, threads_if, together
from minimoe.tiles import LINE, LINES, MULTIPLIES_PAIRS, PAIR, multiply_lines, turn
from minimoe.tiles import ROWS as TILE_ROWS

# Tokens of each expert up to which it is faster to read its weights once, as they lie: with AVX-512 40, else 24.
FEW_ROWS = 40 if LINES > 1 else 24
FEW_STAGES = 2
# Blocks of many tokens: rows of a weight, of which a stretch is widened at a time, and a part of that multiplied with
# so many panels of tokens. What is read again stays in a core's own cache.
CHUNK, STRETCH, DEPTH, PANELS = 48, 1024, 256, 12
ROOT, CUBE = 2 * math.sqrt(2 / math.pi), 0.044715  # gelu_tanh(z) = z · sigmoid(ROOT · (z + CUBE · z³))


def forward(
    x: Float[Array, "N D"],
    w1: Sequence[Float[Array, "F D"] | Int[Int8, "F D"]],
    w2: Sequence[Float[Array, "D F"] | Int[Int8, "D F"]],
    w3: Sequence[Float[Array, "F D"] | Int[Int8, "F D"]],
    ids: Int[Array, "N k"],
    weights: Float[Array, "N k"],
    keep: bool = False,
    activation: str = "silu",
) -> tuple[Float[Array, "N D"], Saved | None]:
    check_activation(activation)
    if ids.size and ids.max() >= len(w1):
        raise IndexError(f"expert {ids.max()} is chosen, and there are {len(w1)}")
    (N, D), k, F, gelu = x.shape, ids.shape[1], w1[0].shape[0], activation == "gelu_tanh"
    x = operand(x, w1[0])
    weights = np.ascontiguousarray(weights, x.dtype)
    pairs, offsets, place = dispatch(np.ascontiguousarray(ids), len(w1))
    out = np.empty((N, D), x.dtype)
    slots = np.empty((N, k, D) if keep else (0, k, D), x.dtype)
    segments = _segments(offsets)
    few_each = all(rows.stop - rows.start <= FEW_ROWS for _, rows in segments)
    chosen = [e for e, _ in segments] if few_each or not keep else []  # only of these are the weights touched
    views = [w[e] for w in (w1, w2, w3) for e in chosen]
    _check_shapes([w.shape for w in views], F, D)
    if few_each and _alike(x, views):
        gate_in, up, ys = _forward_few(x, views, np.array(chosen, np.int64), F, pairs, offsets, k, gelu)
    elif not keep and _alike(x, views):
        ys = _forward_many(x, views, segments, F, pairs, k, gelu)
    else:
        xs = np.empty((len(pairs), D), x.dtype)
        threads = threads_if(len(pairs) * F >= SMALL)
        _gather(x, pairs, k, threads, xs)  # (N, D) -> (M, D)
        gate_in, up = (np.empty((len(pairs), F), x.dtype) for _ in range(2))
        halves = ((w1, gate_in), (w3, up))  # each (M_e, D) -> (M_e, F)
        rounded = is_bfloat16(w1[0])
        compute([Product([(xs[rows], w[e].T)], y[rows], rounded) for e, rows in segments for w, y in halves])
        hidden = np.empty_like(up)
        rounded = is_bfloat16(w2[0])
        _activate(gate_in, up, gelu, rounded, threads, hidden)
        ys = xs  # xs is read no more, and has the shape of the results
        compute([Product([(hidden[rows], w2[e].T)], ys[rows], rounded) for e, rows in segments])  # -> (M_e, D)
    _combine(ys, place, weights, threads_if(ys.size >= SMALL), out, slots)
    return out, Saved(pairs, offsets, gate_in, up, slots) if keep else None


def backward(
    dout: Float[Array, "N D"],
    x: Float[Array, "N D"],
    w1: Sequence[Float[Array, "F D"]],
    w2: Sequence[Float[Array, "D F"]],
    w3: Sequence[Float[Array, "F D"]],
    weights: Float[Array, "N k"],
    saved: Saved,
    activation: str = "silu",
) -> tuple[
    Float[Array, "N D"], Float[Array, "E F D"], Float[Array, "E D F"], Float[Array, "E F D"], Float[Array, "N k"]
]:
    (N, D), k, E, F = x.shape, weights.shape[1], len(w1), w1[0].shape[0]
    pairs, offsets, M = saved.pairs, saved.offsets, len(saved.pairs)
    dout, weights = np.ascontiguousarray(dout), np.ascontiguousarray(weights)
    # forward: out = Σ_slot weights · slots
    dweights = np.empty((N, k), x.dtype)
    threads = threads_if(M * F >= SMALL)
    _dot_slots(dout, saved.slots, threads, dweights)
    xs, dys = np.empty((M, D), x.dtype), np.empty((M, D), x.dtype)
    _gather(np.ascontiguousarray(x), pairs, k, threads, xs)
    _gather_weighted(dout, weights.reshape(-1), pairs, k, threads, dys)
    # forward: y = hidden · w2ᵀ, hidden = act(gate_in) ⊙ up
    dhidden = np.empty((M, F), x.dtype)
    segments = _segments(offsets)
    compute([Product([(dys[rows], w2[e])], dhidden[rows]) for e, rows in segments])  # (M_e, D) -> (M_e, F)
    hidden, dgate_in = np.empty_like(dhidden), np.empty_like(dhidden)
    _activate_backward(saved.gate_in, saved.up, activation == "gelu_tanh", threads, dhidden, hidden, dgate_in)
    dup = dhidden
    # forward: gate_in = xe · w1ᵀ, up = xe · w3ᵀ
    dw1, dw2, dw3 = (np.empty((E, *shape), x.dtype) for shape in ((F, D), (D, F), (F, D)))
    dxs = np.empty((M, D), x.dtype)
    products = []
    for e in range(E):
        rows = slice(offsets[e], offsets[e + 1])  # without tokens a product over no rows: zeros
        products += [
            Product([(dgate_in[rows].T, xs[rows])], dw1[e]),
            Product([(dup[rows].T, xs[rows])], dw3[e]),
            Product([(dgate_in[rows], w1[e]), (dup[rows], w3[e])], dxs[rows]),  # (M_e, F) -> (M_e, D)
            Product([(dys[rows].T, hidden[rows])], dw2[e]),
        ]
    compute(products)
    # forward: xe = x[pairs // k]
    dx = np.empty((N, D), x.dtype)
    _sum_slots(dxs, _places(pairs, N * k).reshape(N, k), threads, dx)
    return dx, dw1, dw2, dw3, dweights


def _segments(offsets: Int[Array, " E+1"]) -> list[tuple[int, slice]]:
    """The experts that have tokens, each with the rows of its segment."""
    bounds = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    return [(e, slice(start, stop)) for e, (start, stop) in enumerate(bounds) if stop > start]


def _check_shapes(shapes: list[tuple[int, ...]], F: int, D: int) -> None:
    """Refuse weights, first all w1, then all w2, then all w3, that would be read beyond their end."""
    third = len(shapes) // 3
    if shapes != [(F, D)] * third + [(D, F)] * third + [(F, D)] * third:
        raise ValueError(f"w1 and w3 must be {(F, D)}, and w2 {(D, F)}, not {sorted(set(shapes))}")


def _alike(x: Float[Array, "N D"], views: list[Array]) -> bool:
    """Whether the fused loops can read these weights: of one type that suits `x`, and contiguous."""
    dtype = views[0].dtype if views else x.dtype
    suits = dtype == x.dtype or dtype == np.int8 or (is_bfloat16(views[0]) and x.dtype == np.float32)
    return suits and all(w.dtype == dtype and (isinstance(w, Int8) or w.flags.c_contiguous) for w in views)


def _forward_few(
    x: Float[Array, "N D"],
    views: list[Array],
    listed: Int[Array, " C"],
    F: int,
    pairs: Int[Array, " M"],
    offsets: Int[Array, " E+1"],
    k: int,
    gelu: bool,
) -> tuple[Float[Array, "M F"], Float[Array, "M F"], Float[Array, "M D"]]:
    M, D = len(pairs), x.shape[1]
    gate_in, up, hidden = (np.empty((M, F), x.dtype) for _ in range(3))
    ys = np.empty((M, D), x.dtype)
    if views:
        held, table, dtype = _table(views)
        few(x, table, listed, dtype, gelu, pairs, offsets, k, numba.get_num_threads(), gate_in, up, hidden, ys)
        del held
    return gate_in, up, ys


def _table(views: list[Array]) -> tuple[list[Any], Int[Array, "2 3 C"], Any]:
    """What must be kept alive, where each weight and its scales (0 = none) begin, and the type that the loops read."""
    held = [parts(w) for w in views]
    table = np.array([[address(w) for w, _ in held], [address(scale) for _, scale in held]], np.int64)
    return held, table.reshape(2, 3, -1), storage(held[0][0]).dtype


@jit()
def few(x, table, listed, dtype, gelu, pairs, offsets, k, threads, gate_in, up, hidden, ys):
    """`listed` (C,) experts; `table` (2, 3, C): where their w1, w2 and w3 lie, and the scales of the rows of these."""
    (M, F), D = gate_in.shape, x.shape[1]
    xs, segments = np.empty((M, D), x.dtype), np.empty((len(listed), 3), np.int64)
    segments = segments[: few_segments(x, listed, pairs, offsets, k, xs, segments)]
    threads = threads if 3 * M * F * D >= FEW_PRODUCTS else 1
    stages = new_stages(FEW_STAGES)
    together(few_stages, (xs, table, dtype, gelu, segments, threads, stages, gate_in, up, hidden, ys), threads)


@jit()
def few_segments(x, listed, pairs, offsets, k, xs, segments):
    """Gather the pairs' tokens, list the experts that have any (place in the list, first row, end), count these."""
    for row in range(len(pairs)):
        copy(x[pairs[row] // k], xs[row])
    count = 0
    for i in range(len(listed)):
        start, stop = offsets[listed[i]], offsets[listed[i] + 1]
        if stop > start:
            segments[count, 0], segments[count, 1], segments[count, 2] = i, start, stop
            count += 1
    return count


@jit()
def few_stages(xs, table, dtype, gelu, segments, threads, stages, gate_in, up, hidden, ys):
    """What each thread does, in FEW_STAGES stages: pieces of all the experts' rows, one expert after another."""
    pieces, several = pieces_for(threads), len(segments) < len(xs)
    factors = factors_of(xs, dtype, several)
    piece = begin(stages[0], pieces)
    while piece != NONE:
        _hidden_rows(xs, factors, table, dtype, gelu, segments, piece, pieces, gate_in, up, hidden)
        piece = go_on(stages[0], pieces)
    factors = factors_of(hidden, dtype, several)
    piece = begin(stages[1], pieces)
    while piece != NONE:
        _output_rows(hidden, factors, table, dtype, segments, piece, pieces, ys)
        piece = go_on(stages[1], pieces)


@jit(inline="always")
def _hidden_rows(xs, factors, table, dtype, gelu, segments, piece, pieces, gate_in, up, hidden):
    """A piece of the rows of w1, and the same of w3, for all tokens of their experts."""
    F, D, bf16 = gate_in.shape[1], xs.shape[1], holds_bfloat16(dtype)
    for n in range(len(segments)):
        i, first, last = segments[n]
        start, stop = part_of(F, quads(F) * n, quads(F) * len(segments), piece, pieces)
        w1, w3 = at_address(table[0, 0, i], (F, D), dtype), at_address(table[0, 2, i], (F, D), dtype)
        dots(xs[first:last], factors[first:last], w1, table[1, 0, i], start, stop, gate_in[first:last])
        dots(xs[first:last], factors[first:last], w3, table[1, 2, i], start, stop, up[first:last])
        for row in range(first, last):
            _activate_row(gate_in[row, start:stop], up[row, start:stop], gelu, bf16, hidden[row, start:stop])


@jit(inline="always")
def _output_rows(hidden, factors, table, dtype, segments, piece, pieces, ys):
    """A piece of the rows of w2, for all tokens of their experts."""
    F, D = hidden.shape[1], ys.shape[1]
    for n in range(len(segments)):
        i, first, last = segments[n]
        start, stop = part_of(D, quads(D) * n, quads(D) * len(segments), piece, pieces)
        w2 = at_address(table[0, 1, i], (D, F), dtype)
        dots(hidden[first:last], factors[first:last], w2, table[1, 1, i], start, stop, ys[first:last])


def _forward_many(
    x: Float[Array, "N D"],
    views: list[Array],
    segments: Sequence[tuple[int, slice]],
    F: int,
    pairs: Int[Array, " M"],
    k: int,
    gelu: bool,
) -> Float[Array, "M D"]:
    held, table, dtype = _table(views)
    panels, lanes = [], LINE // x.itemsize
    for i, (_, rows) in enumerate(segments):
        panels += [(i, row, min(row + lanes, rows.stop)) for row in range(rows.start, rows.stop, lanes)]
    P, D = len(panels), x.shape[1]
    kind, per = x.dtype, 1
    if MULTIPLIES_PAIRS and dtype == np.uint16 and D % 2 == F % 2 == 0:
        kind, dtype, per = PAIR, PAIR, 2
    xs, hidden = np.empty((P, D // per, lanes), kind), np.empty((P, F // per, lanes), kind)
    ys = np.empty((len(pairs), D), x.dtype)
    results = xs if kind == ys.dtype else np.empty((P, D, lanes), ys.dtype)  # xs are read no more by then
    threads = numba.get_num_threads()
    many(x, table, np.array(panels, np.int64), dtype, gelu, pairs, k, threads, xs, hidden, results, ys)
    del held
    return ys


@jit()
def many(x, table, panels, dtype, gelu, pairs, k, threads, xs, hidden, results, ys):
    """A panel is up to a line of tokens of one expert, side by side: `panels` (P, 3), place in the list and rows.

    `xs` (P, D, lanes), `hidden` (P, F, lanes) and `results` (P, D, lanes) are room; the first two may hold pairs, and
    then have half as many lines.
    """
    P = len(panels)
    first = np.empty(panels[-1, 0] + 2, np.int64)  # panel of each expert
    first[0] = 0
    for panel in range(P):
        first[panels[panel, 0] + 1] = panel + 1
    arguments = (x, table, panels, first, dtype, gelu, pairs, k, threads, new_stages(4), xs, hidden, results, ys)
    together(_many_stages, arguments, threads)


@jit()
def _many_stages(x, table, panels, first, dtype, gelu, pairs, k, threads, stages, xs, hidden, results, ys):
    """What each thread does: xs -> hidden -> results (P, D, lanes).

    A piece of the products is a block of CHUNK rows of one weight, for all panels of its expert.
    """
    rows = np.empty((xs.shape[2], xs.shape[1]), xs.dtype)  # before a piece is begun: see `stages`
    panel = begin(stages[0], len(panels))
    while panel != NONE:
        _load_panel(x, pairs, k, panels[panel], rows, xs[panel])
        panel = go_on(stages[0], len(panels))
    _hidden_blocks(table, first, gelu, dtype, threads, stages[1], xs, hidden, ys.dtype)
    _output_blocks(table, first, dtype, threads, stages[2], hidden, results)
    panel = begin(stages[3], len(panels))
    while panel != NONE:
        tokens = ys[panels[panel, 1] : panels[panel, 2]]
        turn(results[panel, :, : len(tokens)], tokens)
        panel = go_on(stages[3], len(panels))


@jit(inline="always")
def _hidden_blocks(table, first, gelu, dtype, threads, stage, xs, hidden, wide_dtype):
    """Blocks of rows of w1, and the same of w3: all of one expert, whose tokens stay in a cache, then of the next."""
    listed, lanes, most = len(first) - 1, xs.shape[2], 0
    per = 2 if holds_pairs(xs) else 1
    D, F = xs.shape[1], hidden.shape[1] * per
    for i in range(listed):
        most = max(most, first[i + 1] - first[i])
    gate_in, up = np.empty((most, CHUNK, lanes), wide_dtype), np.empty((most, CHUNK, lanes), wide_dtype)
    wide, room = np.empty((CHUNK, STRETCH + 16), xs.dtype), np.empty((CHUNK, lanes), wide_dtype)
    each = (F + CHUNK - 1) // CHUNK
    blocks = listed * each
    block = begin(stage, blocks)
    while block != NONE:
        i, start = block // each, CHUNK * (block % each)
        stop, mine = min(start + CHUNK, F), xs[first[i] : first[i + 1]]
        following = min(block + threads, blocks - 1)  # probably; only a guess at what is to be asked for
        w1, w3 = table[0, 0, i], table[0, 2, i]
        after = _row_at(table[0, 0, following // each], CHUNK * (following % each), D, dtype)
        g, u = gate_in[: len(mine), : stop - start], up[: len(mine), : stop - start]
        _product(w1, table[1, 0, i], F, start, mine, dtype, _row_at(w3, start, D, dtype), wide, g)
        _product(w3, table[1, 2, i], F, start, mine, dtype, after, wide, u)
        for panel in range(len(mine)):
            target = hidden[first[i] + panel, start // per : stop // per]
            _activate_panel(gate_in[panel], up[panel], gelu, dtype, room, target)
        block = go_on(stage, blocks)


@jit(inline="always")
def _output_blocks(table, first, dtype, threads, stage, hidden, results):
    """Blocks of rows of w2, in the same order: with some rows of each expert in turn it took a fifth longer."""
    listed, D, F = len(first) - 1, results.shape[1], hidden.shape[1]
    wide = np.empty((CHUNK, STRETCH + 16), hidden.dtype)
    each = (D + CHUNK - 1) // CHUNK
    blocks = listed * each
    block = begin(stage, blocks)
    while block != NONE:
        i, start = block // each, CHUNK * (block % each)
        following = min(block + threads, blocks - 1)
        stop, mine = min(start + CHUNK, D), slice(first[i], first[i + 1])
        after = _row_at(table[0, 1, following // each], CHUNK * (following % each), F, dtype)
        out = results[mine, start:stop]
        _product(table[0, 1, i], table[1, 1, i], D, start, hidden[mine], dtype, after, wide, out)
        block = go_on(stage, blocks)


@jit()
def _activate_panel(gate_in, up, gelu, dtype, room, hidden):
    """The first rows of gate_in and up (CHUNK, lanes) -> hidden: as many rows as it has, or pairs of rows."""
    numbers = hidden.size * (2 if holds_pairs(hidden) else 1)
    g, u = gate_in.reshape(-1)[:numbers], up.reshape(-1)[:numbers]
    if holds_pairs(hidden):
        _activate_row(g, u, gelu, True, room.reshape(-1)[:numbers])
        for i in range(hidden.shape[0]):
            even, odd, target = room[2 * i], room[2 * i + 1], hidden[i]
            for lane in range(len(target)):
                target[lane] = pair(even[lane], odd[lane])
    else:
        _activate_row(g, u, gelu, holds_bfloat16(dtype), hidden.reshape(-1))


@jit()
def _row_at(place, row, width, dtype):
    """Where a row of a weight begins."""
    return place + row * width * bytes_of(dtype)


@jit()
def _product(place, scale, rows, start, xs, dtype, after, wide, out):
    """out[panel, i] = w[start + i] · xs[panel] for some of the `rows` rows of the weight at an address.

    Meanwhile it asks for what will be read next: the next stretch of these rows, their first one for the next group of
    panels, or the rows at `after`. `wide` is room for a stretch; its rows are longer, as rows whole pages apart would
    compete for few places of a cache.
    """
    P, width, height = xs.shape[0], xs.shape[1], out.shape[1]
    w = at_address(place, (rows, width), dtype)
    row_bytes, tiles = width * w.itemsize, height // TILE_ROWS
    groups = (P + PANELS - 1) // PANELS  # of about equal size
    for group in range(groups):
        first, end = group * P // groups, (group + 1) * P // groups
        for k in range(0, width, STRETCH):
            length = min(STRETCH, width - k)
            for i in range(height):
                source, target = w[start + i, k : k + length], wide[i]
                for j in range(length):
                    target[j] = widen(source[j])
            ahead = place + start * row_bytes
            if k + STRETCH < width:
                ahead += (k + STRETCH) * w.itemsize
            elif group == groups - 1:
                ahead = after
            for i in range(0, length, DEPTH):
                left, depth = wide[:height, i:], min(DEPTH, length - i)
                for panel in range(first, end, LINES):
                    right, target = xs[panel, k + i :], out[panel]
                    row = (panel - first) * tiles  # each large tile asks for a part of as many rows as it has lines
                    multiply_lines(
                        left.ctypes.data, left.strides[0], left.strides[1], height,
                        right.ctypes.data, right.strides[0], xs.strides[0], depth,
                        target.ctypes.data, target.strides[0], out.strides[0], min(np.int64(LINES), end - panel),
                        k + i == 0, right.dtype,
                        ahead + row * row_bytes + i * w.itemsize, row_bytes, depth * w.itemsize if row < height else 0,
                    )  # fmt: skip
    if scale != 0:
        factors = at_address(scale, (rows,), np.float32)
        for panel in range(P):
            for i in range(height):
                for lane in range(out.shape[2]):
                    out[panel, i, lane] *= factors[start + i]


@jit()
def _load_panel(x, pairs, k, panel, rows, xs):
    """Turn a panel's tokens into lanes; zeros beyond the last. `rows` is room for them as they lie."""
    tokens = panel[2] - panel[1]
    for lane in range(tokens):
        source, target = x[pairs[panel[1] + lane] // k], rows[lane]
        if holds_pairs(rows):
            for d in range(len(target)):
                target[d] = pair(source[2 * d], source[2 * d + 1])
        else:
            copy(source, target)
    rows[tokens:] = 0
    turn(rows, xs)


@jit()
def dispatch(ids, E):
    """Counting sort: the pairs n·k + slot by expert, the bounds of the segments, and each pair's row (-1 = none)."""
    offsets, place = np.empty(E + 1, np.int64), np.empty(ids.shape, np.int64)
    pairs = np.empty(ids.size, np.int64)
    dispatch_into(ids, pairs, offsets, place)
    return pairs[: offsets[E]], offsets, place


@jit()
def dispatch_into(ids, pairs, offsets, place):
    """`dispatch` into arrays; `pairs` has room for all, and is filled as far as tokens are routed."""
    (N, k), E = ids.shape, len(offsets) - 1
    offsets[:] = 0
    for n in range(N):
        for slot in range(k):
            if ids[n, slot] >= 0:
                offsets[ids[n, slot] + 1] += 1
    for e in range(E):
        offsets[e + 1] += offsets[e]
    free = offsets[:-1].copy()  # the next free row of every expert
    for n in range(N):
        for slot in range(k):
            e = ids[n, slot]
            place[n, slot] = -1
            if e >= 0:
                place[n, slot] = free[e]
                pairs[free[e]] = n * k + slot
                free[e] += 1


@jit()
def _places(pairs, size):
    """The inverse of `pairs`: each pair's row, -1 where it was not routed."""
    place = np.full(size, -1, np.int64)
    for row in range(len(pairs)):
        place[pairs[row]] = row
    return place


@jit()
def _gather(x, pairs, k, threads, xs):
    share(_gather_rows, len(pairs), (x, pairs, k, xs), threads)


@jit()
def _gather_rows(start, stop, x, pairs, k, xs):
    for row in range(start, stop):
        copy(x[pairs[row] // k], xs[row])


@jit()
def _gather_weighted(dout, weights, pairs, k, threads, dys):
    share(_gather_weighted_rows, len(pairs), (dout, weights, pairs, k, dys), threads)


@jit()
def _gather_weighted_rows(start, stop, dout, weights, pairs, k, dys):
    for row in range(start, stop):
        source, target, weight = dout[pairs[row] // k], dys[row], weights[pairs[row]]
        for d in range(dout.shape[1]):
            target[d] = weight * source[d]


@jit()
def _activate(gate_in, up, gelu, bf16, threads, hidden):
    share(_activate_rows, len(up), (gate_in, up, gelu, bf16, hidden), threads)


@jit()
def _activate_rows(start, stop, gate_in, up, gelu, bf16, hidden):
    for row in range(start, stop):
        _activate_row(gate_in[row], up[row], gelu, bf16, hidden[row])


@jit()
def _activate_row(gate_in, up, gelu, bf16, hidden):
    root, cube = up.dtype.type(ROOT), up.dtype.type(CUBE)
    for f in range(len(up)):
        z = gate_in[f]
        bend = root * (z + cube * z * z * z) if gelu else z
        hidden[f] = z * sigmoid(bend) * up[f]
    if bf16:
        for f in range(len(up)):
            hidden[f] = rounded(hidden[f])


@jit()
def _activate_backward(gate_in, up, gelu, threads, dhidden, hidden, dgate_in):
    """Fill hidden and dgate_in, and put dup in the place of dhidden.

    Under two names that memory would keep the loop from vectorising: it would look as if one step could feed the next.
    """
    share(_activate_backward_rows, len(up), (gate_in, up, gelu, dhidden, hidden, dgate_in), threads)


@jit()
def _activate_backward_rows(start, stop, gate_in, up, gelu, dhidden, hidden, dgate_in):
    for row in range(start, stop):
        _activate_row_backward(gate_in[row], up[row], gelu, dhidden[row], hidden[row], dgate_in[row])


@jit()
def _activate_row_backward(g, u, gelu, dh, h, dg):
    # forward: hidden = act(gate_in) ⊙ up
    # act = z · s, s = sigmoid(bend(z));  d act / dz = s · (1 + z · (1 - s) · bend'(z)), and silu's bend is z
    one, root, cube, steep = u.dtype.type(1), u.dtype.type(ROOT), u.dtype.type(CUBE), u.dtype.type(3 * ROOT * CUBE)
    for f in range(len(u)):
        z = g[f]
        bend = root * (z + cube * z * z * z) if gelu else z
        slope = root + steep * z * z if gelu else one
        s = sigmoid(bend)
        act = z * s
        h[f] = act * u[f]
        dg[f] = dh[f] * u[f] * (s * (one + z * (one - s) * slope))
        dh[f] = dh[f] * act


@jit()
def _combine(ys, place, weights, threads, out, slots):
    """Weighted sum over k in slot order; keeps the slots too where there is room for them."""
    share(_combine_tokens, len(place), (ys, place, weights, out, slots), threads)


@jit()
def _combine_tokens(start, stop, ys, place, weights, out, slots):
    for n in range(start, stop):
        combine_token(ys, place, weights, out, slots, n)


@jit()
def combine_token(ys, place, weights, out, slots, n):
    total = out[n]
    for d in range(len(total)):
        total[d] = 0
    for slot in range(place.shape[1]):
        row = place[n, slot]
        if row >= 0:
            y, weight = ys[row], weights[n, slot]
            for d in range(ys.shape[1]):
                total[d] += weight * y[d]
        if len(slots) > 0:
            kept = slots[n, slot]
            for d in range(ys.shape[1]):
                kept[d] = ys[row, d] if row >= 0 else 0


@jit()
def _sum_slots(dxs, place, threads, out):
    """Sum over k in slot order."""
    share(_sum_slots_of_tokens, len(place), (dxs, place, out), threads)


@jit()
def _sum_slots_of_tokens(start, stop, dxs, place, out):
    for n in range(start, stop):
        total = out[n]
        for d in range(len(total)):
            total[d] = 0
        for slot in range(place.shape[1]):
            row = place[n, slot]
            if row >= 0:
                y = dxs[row]
                for d in range(dxs.shape[1]):
                    total[d] += y[d]


@jit()
def _dot_slots(dout, slots, threads, dweights):
    share(_dot_slots_of_tokens, len(slots), (dout, slots, dweights), threads)


@jit(fastmath=FAST)
def _dot_slots_of_tokens(start, stop, dout, slots, dweights):
    k, D = slots.shape[1:]
    for n in range(start, stop):
        for slot in range(k):
            total, dy, y = dout.dtype.type(0), dout[n], slots[n, slot]
            for d in range(D):
                total += dy[d] * y[d]
            dweights[n, slot] = total
