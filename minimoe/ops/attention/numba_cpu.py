"""Grouped-query attention on the CPU: blocks of 64 queries, side by side in the lanes of the vector unit.

The G query heads of one key/value head read the same keys, so their T·G queries form one list, cut into blocks of
LANES = 64. Local arrays of a block keep the 64 queries in their last axis:

scores[s, lane] = Σ_c k[s, c] · q[c, lane]          probs[s, lane] = exp(scores · scale - top[lane]) / total[lane]
out[c, lane]    = Σ_s v[s, c] · probs[s, lane]

Every step is then elementwise over lanes: maximum and sum of the softmax need no reduction inside a vector, k and v
need no transposing, and sums run in one fixed order whatever the number of threads. All products, those of the
backward too, are products of tiles (see `tiles`). A block holds the scores of its own 64 queries only: memory
grows with S, not with T·S. Keys before the first and after the last that any query of the block sees are left out, so
causal attention costs half.

One token (decode), or a few, would leave most lanes empty: `few` has the queries of a head as rows instead, few as they
are, reads the cache once, where it lies, for all heads, and deals blocks of keys to threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from jaxtyping import Float, Int

from minimoe.arrays import is_bfloat16
from minimoe.loops import (
    FAST,
    FEW_PRODUCTS,
    FMA,
    copy,
    exp,
    holds_bfloat16,
    holds_pairs,
    jit,
    pair,
    rounded,
    storage,
    tanh,
    widen,
)
from minimoe.products import round_in_place, round_row
from minimoe.shapes import Array
from minimoe.stages import NONE, alone, begin, done, go_on, new_stages, pieces_for, take, together
from minimoe.tiles import AHEAD, FEWER, LINE, MULTIPLIES_PAIRS, PAIR, multiply, stream, stream_turned, turn

LANES = 64  # queries per block: four lines in float32
FEW_QUERIES = 32  # T·G up to here: rows instead of lanes; from 40 to 60 on those are faster
LEAST = 8  # keys: tiles take whole LEASTs of them
KEYS = 32 * LEAST  # of a block where queries are few
FEW_STAGES = 3
UNBOUNDED = 1 << 62  # a window that sees everything
UNCAPPED = 0.0


def forward(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    q_pos: Int[Array, "B T"],
    k_pos: Int[Array, "B S"],
    window: int | None,
    scale: float | None = None,
    cap: float | None = None,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    (B, T, H, C), K = q.shape, k.shape[2]
    q, k, v, q_pos, k_pos = _prepared(q, k, v, q_pos, k_pos)
    window, scale, cap = scalars(C, window, scale, cap)
    out, lse = np.empty(q.shape, q.dtype), np.empty((B, T, H), q.dtype)
    rest = q_pos, k_pos, window, scale, cap, numba.get_num_threads(), out, lse
    group, alike = T * (H // K), k.dtype == v.dtype and k.dtype in (q.dtype, np.uint16)
    if group <= FEW_QUERIES and alike:
        shape = few_shape(group, C, k.dtype)
        queries = np.zeros((B, K, shape.rows, shape.columns // shape.each), shape.kind)
        few(q, queries, *((k, v) if shape.each == 1 else (k.view(PAIR), v.view(PAIR))), *rest)
    else:
        many(q, k, v, *rest)
    return out, lse


def backward(
    dout: Float[Array, "B T H C"],
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    q_pos: Int[Array, "B T"],
    k_pos: Int[Array, "B S"],
    window: int | None,
    out: Float[Array, "B T H C"],
    lse: Float[Array, "B T H"],
    scale: float | None = None,
    cap: float | None = None,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B S K C"], Float[Array, "B S K C"]]:
    q, k, v, q_pos, k_pos = _prepared(q, k, v, q_pos, k_pos)
    dout, out, lse = (np.ascontiguousarray(x, q.dtype) for x in (dout, out, lse))
    dq, dk, dv = np.empty_like(q), np.empty(k.shape, q.dtype), np.empty(v.shape, q.dtype)
    window, scale, cap = scalars(q.shape[3], window, scale, cap)
    threads = numba.get_num_threads()
    _backward(dout, q, k, v, q_pos, k_pos, window, scale, cap, threads, out, lse, dq, dk, dv)
    return dq, dk, dv


def scalars(C: int, window: int | None, scale: float | None, cap: float | None) -> tuple[int, float, float]:
    """Window, scale and cap of one type each, whether given or not: one compiled loop serves all."""
    scale = C**-0.5 if scale is None else float(scale)
    return UNBOUNDED if window is None else window, scale, UNCAPPED if cap is None else float(cap)


def _prepared(q: Array, k: Array, v: Array, q_pos: Array, k_pos: Array) -> tuple[Array, ...]:
    """Contiguous arrays of the types that the loops are compiled for.

    Raises
    ------
    ValueError
        If the shapes do not belong together.
    """
    if k.shape != v.shape or q.shape[::3] != k.shape[::3] or q.shape[2] % k.shape[2]:
        shapes = f"{q.shape}, {k.shape} and {v.shape}"
        raise ValueError(f"q, k and v must be (B, T, H, C), (B, S, K, C) twice, H a multiple of K, not {shapes}")
    q = np.ascontiguousarray(q, np.float32 if is_bfloat16(k) else q.dtype)
    k, v = storage(np.ascontiguousarray(k)), storage(np.ascontiguousarray(v))
    # Positions are often a broadcast, read-only row: copied, so that Numba does not compile for that type as well.
    q_pos, k_pos = (np.array(x, np.int64, order="C") for x in (q_pos, k_pos))
    return q, k, v, q_pos, k_pos


@jit()
def many(q, k, v, q_pos, k_pos, window, scale, cap, threads, out, lse):
    """Blocks of queries, dealt to threads."""
    together(_many_stage, (q, k, v, q_pos, k_pos, window, scale, cap, new_stages(1)[0], out, lse), threads)


@jit(fastmath=FMA)
def _many_stage(q, k, v, q_pos, k_pos, window, scale, cap, stage, out, lse):
    """What each thread does: whole blocks, head by head, as those of a head read the same keys.

    The late blocks of a head come first. They see more keys than the early ones, so the last of all is short.
    """
    B, T, K = q.shape[0], q.shape[1], k.shape[2]
    heads, blocks = B * K, (T * (q.shape[2] // K) + LANES - 1) // LANES
    item = take(stage, heads * blocks)
    while item != NONE:
        head, block = item // blocks, blocks - 1 - item % blocks
        b, kh = head // K, head % K
        _forward_block(q, k, v, q_pos, k_pos, window, scale, cap, out, lse, b, kh, block)
        item = take(stage, heads * blocks)


@jit(inline="always")
def _forward_block(q, k, v, q_pos, k_pos, window, scale, cap, out, lse, b, kh, block):
    T, G, C = q.shape[1], q.shape[2] // k.shape[2], q.shape[3]
    start, lanes = block * LANES, min(LANES, T * G - block * LANES)
    position = np.full(LANES, -1, np.int64)
    tokens, heads = _places(start, lanes, kh, G)
    for lane in range(lanes):
        position[lane] = q_pos[b, tokens[lane]]
    first, last = _seen(position[:lanes], k_pos[b], window)
    # forward: scores = q · kᵀ / sqrt(C)
    qT = _to_lanes(_load_queries(q[b], tokens, heads), C)  # (C, LANES)
    if holds_bfloat16(k):
        round_in_place(qT)
    rows = _load_rows(k, q.dtype, b, kh, first, last)  # (S', C)
    scores = np.empty((len(rows), LANES), q.dtype)
    multiply(rows, qT, scores, True)
    top = np.full(LANES, -np.inf, q.dtype)
    factor = q.dtype.type(scale)
    if cap != UNCAPPED:
        _cap(scores, factor, q.dtype.type(cap))
        factor = q.dtype.type(1)
    _mask(scores, position, lanes, k_pos[b], first, window, factor)
    for s in range(scores.shape[0]):
        row = scores[s]
        for lane in range(LANES):
            top[lane] = row[lane] if row[lane] > top[lane] else top[lane]
    # probs = softmax over the visible s
    total = np.zeros(LANES, q.dtype)
    for lane in range(LANES):  # no visible key: exp(-inf - 0) = 0, not NaN
        top[lane] = 0 if top[lane] == -np.inf else top[lane]
    for s in range(scores.shape[0]):
        row = scores[s]
        for lane in range(LANES):
            row[lane] = exp(row[lane] - top[lane])
            total[lane] += row[lane]
    divisor = np.empty(LANES, q.dtype)
    for lane in range(LANES):
        divisor[lane] = 1 if total[lane] == 0 else total[lane]
    if holds_bfloat16(v):
        for s in range(scores.shape[0]):
            row = scores[s]
            for lane in range(LANES):
                row[lane] = rounded(row[lane] / divisor[lane])
        divisor[:] = 1
    # out = Σ_s probs · v; dividing C sums by the total is cheaper than dividing S probabilities
    rows = _load_rows(v, q.dtype, b, kh, first, last)
    outT = np.empty(qT.shape, q.dtype)
    multiply(rows.T, scores, outT, True)
    for c in range(C):
        row = outT[c]
        for lane in range(LANES):
            row[lane] /= divisor[lane]
    _store_lanes(outT, tokens, heads, out[b])
    for lane in range(lanes):
        lse[b, tokens[lane], heads[lane]] = -np.inf if total[lane] == 0 else top[lane] + np.log(total[lane])


@jit()
def _backward(dout, q, k, v, q_pos, k_pos, window, scale, cap, threads, out, lse, dq, dk, dv):
    stage = new_stages(1)[0]
    arguments = (dout, q, k, v, q_pos, k_pos, window, scale, cap, stage, out, lse, dq, dk, dv)
    together(_backward_stage, arguments, threads)


@jit(fastmath=FMA)
def _backward_stage(dout, q, k, v, q_pos, k_pos, window, scale, cap, stage, out, lse, dq, dk, dv):
    """What each thread does: it owns the gradients of a key/value head and takes its queries in order: no race, one
    order of sums."""
    B, K = q.shape[0], k.shape[2]
    item = take(stage, B * K)
    while item != NONE:
        _backward_head(dout, q, k, v, q_pos, k_pos, window, scale, cap, out, lse, dq, dk, dv, item // K, item % K)
        item = take(stage, B * K)


@jit(inline="always")
def _backward_head(dout, q, k, v, q_pos, k_pos, window, scale, cap, out, lse, dq, dk, dv, b, kh):
    (T, H, C), (S, K) = q.shape[1:], k.shape[1:3]
    G = H // K
    factor = q.dtype.type(scale)
    keys, values = _load_rows(k, q.dtype, b, kh, 0, S), _load_rows(v, q.dtype, b, kh, 0, S)  # (S, C)
    dkeys, dvalues = np.zeros((S, _padded(C)), q.dtype), np.zeros((S, _padded(C)), q.dtype)
    for start in range(0, T * G, LANES):
        lanes = min(LANES, T * G - start)
        position = np.full(LANES, -1, np.int64)
        tokens, heads = _places(start, lanes, kh, G)
        # No visible key, or an empty lane: exp(score - inf) = 0 everywhere
        norm, delta = np.full(LANES, np.inf, q.dtype), np.zeros(LANES, q.dtype)
        for lane in range(lanes):
            position[lane], found = q_pos[b, tokens[lane]], lse[b, tokens[lane], heads[lane]]
            norm[lane] = np.inf if found == -np.inf else found
        first, last = _seen(position[:lanes], k_pos[b], window)
        seen_keys, seen_values = keys[first:last], values[first:last]
        queries, douts = _load_queries(q[b], tokens, heads), _load_queries(dout[b], tokens, heads)
        # forward: probs = exp(scores - lse)
        qT = _to_lanes(queries, C)
        if holds_bfloat16(k):
            round_in_place(qT)
        probs = np.empty((last - first, LANES), q.dtype)
        multiply(seen_keys, qT, probs, True)
        slopes = np.empty((0, LANES), q.dtype)
        if cap != UNCAPPED:
            slopes = np.empty(probs.shape, q.dtype)
            _cap_with_slopes(probs, factor, q.dtype.type(cap), slopes)
        _mask(probs, position, lanes, k_pos[b], first, window, q.dtype.type(1) if cap != UNCAPPED else factor)
        for s in range(probs.shape[0]):
            row = probs[s]
            for lane in range(LANES):
                row[lane] = exp(row[lane] - norm[lane])
        # forward: out = probs · v, and v serves the G query heads of its group
        multiply(probs, douts, dvalues[first:last], False)
        doutT, outT = _to_lanes(douts, C), _to_lanes(_load_queries(out[b], tokens, heads), C)
        for c in range(C):
            row, drow = outT[c], doutT[c]
            for lane in range(LANES):
                delta[lane] += drow[lane] * row[lane]
        dscores = np.empty(probs.shape, q.dtype)
        multiply(seen_values, doutT, dscores, True)  # now dprobs
        # forward: probs = softmax(scores);  Σ_s probs · dprobs = dout · out;  scores = q · kᵀ / sqrt(C)
        for s in range(probs.shape[0]):
            drow, row = dscores[s], probs[s]
            for lane in range(LANES):
                drow[lane] = row[lane] * (drow[lane] - delta[lane]) * factor
        if cap != UNCAPPED:
            for s in range(probs.shape[0]):
                drow, slope = dscores[s], slopes[s]
                for lane in range(LANES):
                    drow[lane] *= slope[lane]
        multiply(dscores, queries, dkeys[first:last], False)
        dqT = np.empty(qT.shape, q.dtype)
        multiply(seen_keys.T, dscores, dqT, True)
        _store_lanes(dqT, tokens, heads, dq[b])
    for s in range(S):
        for c in range(C):
            dk[b, s, kh, c], dv[b, s, kh, c] = dkeys[s, c], dvalues[s, c]


@jit()
def _range(positions):
    """The smallest and the largest of some positions."""
    early, late = np.int64(UNBOUNDED), np.int64(-1)
    for t in range(len(positions)):
        early, late = min(early, positions[t]), max(late, positions[t])
    return early, late


@jit()
def _seen(q_pos, k_pos, window):
    """A range of keys that holds all that any of these queries sees."""
    early, late = _range(q_pos)
    first, last = len(k_pos), 0
    for s in range(len(k_pos)):
        is_seen = (k_pos[s] >= 0) & (k_pos[s] <= late) & (early - k_pos[s] < window)
        first, last = min(first, s if is_seen else first), max(last, s + 1 if is_seen else 0)
    return min(first, last), last


@jit(fastmath=FMA)
def _mask(scores, q_pos, lanes, k_pos, first, window, scale):
    """Scale the scores of the keys from `first` on; -inf where a query does not see the key."""
    early, late = _range(q_pos[:lanes])
    minus_inf = scores.dtype.type(-np.inf)
    for s in range(scores.shape[0]):
        row = scores[s]
        position = k_pos[first + s]
        if position < 0:
            row[:] = minus_inf
        elif position <= early and late - position < window:  # all queries see it
            for lane in range(LANES):
                row[lane] *= scale
        else:
            for lane in range(LANES):
                distance = q_pos[lane] - position
                row[lane] = row[lane] * scale if (distance >= 0) & (distance < window) else minus_inf


@jit(fastmath=FMA)
def _cap(scores, scale, cap):
    """Scale the scores, and bound them: cap · tanh(score / cap)."""
    for s in range(scores.shape[0]):
        row = scores[s]
        for lane in range(LANES):
            row[lane] = cap * tanh(row[lane] * scale / cap)


@jit(fastmath=FMA)
def _cap_with_slopes(scores, scale, cap, slopes):
    """`_cap`, and the slope of each score: d tanh(z) / dz = 1 - tanh(z)²."""
    one = scores.dtype.type(1)
    for s in range(scores.shape[0]):
        row, slope = scores[s], slopes[s]
        for lane in range(LANES):
            bounded = tanh(row[lane] * scale / cap)
            slope[lane] = one - bounded * bounded
            row[lane] = cap * bounded


@jit()
def _places(start, number, kh, G):
    """Token and head of the queries from `start` on of one group."""
    tokens, heads = np.empty(number, np.int64), np.empty(number, np.int64)
    for i in range(number):
        tokens[i], heads[i] = (start + i) // G, kh * G + (start + i) % G
    return tokens, heads


@jit()
def _load_queries(x, tokens, heads):
    """Rows of x (T, H, C) as (LANES, C), C padded to whole lines; zeros wherever no query is."""
    C = x.shape[2]
    local = np.zeros((LANES, _padded(C)), x.dtype)
    for lane in range(len(tokens)):
        copy(x[tokens[lane], heads[lane]], local[lane, :C])
    return local


@jit()
def _to_lanes(queries, C):
    """Turn queries (LANES, C or more) into (C, LANES)."""
    lanes = np.empty((C, LANES), queries.dtype)
    turn(queries[:, :C], lanes)
    return lanes


@jit()
def _store_lanes(x, tokens, heads, target):
    """Put x (C, LANES) in its rows of `target` (T, H, C)."""
    queries = np.empty((LANES, len(x)), x.dtype)
    turn(x, queries)
    for lane in range(len(tokens)):
        copy(queries[lane], target[tokens[lane], heads[lane]])


@jit()
def _load_rows(x, dtype, b, kh, first, last):
    """Keys or values first..last of one head as (S', C), widened."""
    C = x.shape[3]
    local = np.empty((last - first, C), dtype)
    for s in range(first, last):
        row, target = x[b, s, kh], local[s - first]
        for c in range(C):
            target[c] = widen(row[c])
    return local


@jit(inline="always")
def _padded(C):
    return (C + 15) // 16 * 16  # whole lines: 16 float32, twice 8 float64


class FewShape(NamedTuple):
    """How few queries of a key/value head are held.

    Attributes
    ----------
    rows, columns : at least T·G and C, up to what tiles take; what is beyond counts for nothing
    kind : the type of the factors; if it is PAIR, keys and values are viewed as PAIR too
    each : columns in a factor
    """

    rows: int
    columns: int
    kind: np.dtype[Any]
    each: int


def few_shape(group: int, C: int, stored: np.dtype[Any]) -> FewShape:
    """How `group` queries of size C are held for keys that are stored so.

    >>> few_shape(6, 80, np.dtype(np.float32))
    FewShape(rows=8, columns=80, kind=dtype('float32'), each=1)
    """
    in_pairs = stored == np.uint16 and MULTIPLIES_PAIRS and C % 2 == 0
    kind = PAIR if in_pairs else np.dtype(np.float32) if stored == np.uint16 else stored
    each = 2 if in_pairs else 1
    whole = each * LINE // kind.itemsize
    rows = group if group == 1 else -(-group // FEWER) * FEWER
    return FewShape(rows, -(-C // whole) * whole, kind, each)


@jit()
def few(q, queries, k, v, q_pos, k_pos, window, scale, cap, threads, out, lse):
    """Few queries: the keys that are seen are cut into blocks of KEYS, which are dealt to threads.

    `queries` is zeros, of `few_shape`. A block is read for all heads at once, in the order in which its keys lie, and a
    thread takes several blocks that are neighbours, so that what is read next can be asked for. Blocks do not depend on
    the number of threads, and their sums are added in order, so the bits do not either.
    """
    B, (K, rows, width) = len(q), queries.shape[1:]
    seen = np.empty((B, 2), np.int64)
    most = few_seen(q_pos, k_pos, window, seen)
    group, blocks = q.shape[1] * q.shape[2] // K, few_blocks(most)
    scores = np.empty((B, blocks, K, rows, KEYS), q.dtype)
    tops, totals = np.empty((B, blocks, K, group), q.dtype), np.empty((B, blocks, K, group), q.dtype)
    sums = np.empty((B, blocks, K, rows, 2 * width if holds_pairs(k) else width), q.dtype)
    few_queries(q, holds_bfloat16(k), queries)
    threads = threads if q.size * most >= FEW_PRODUCTS else 1
    arguments = (
        queries, k, v, q_pos, k_pos, window, scale, cap, seen, threads, new_stages(FEW_STAGES), scores, tops, totals,
        sums, lse,
    )  # fmt: skip
    together(few_stages, arguments, threads)
    few_out(sums, out)


@jit()
def few_seen(q_pos, k_pos, window, seen):
    """Fill `seen` (B, 2) with the range of keys that each sequence sees; return the largest number of them."""
    most = 0
    for b in range(len(seen)):
        seen[b, 0], seen[b, 1] = _seen(q_pos[b], k_pos[b], window)
        most = max(most, seen[b, 1] - seen[b, 0])
    return most


@jit()
def few_blocks(most):
    """Into how many blocks the keys of a sequence are cut, of which `most` are seen."""
    return max(1, (most + KEYS - 1) // KEYS)


@jit()
def few_queries(q, bf16, queries):
    """Put q (B, T, H, C) into `queries` (B, K, T·G or more, C or more, or half as many pairs), rounded if `bf16`."""
    (B, T, H, _), K = q.shape, queries.shape[1]
    G = H // K
    for b in range(B):
        for t in range(T):
            for h in range(H):
                _left_factors(q[b, t, h], bf16, queries[b, h // G, t * G + h % G])


@jit()
def _left_factors(row, bf16, factors):
    """Put a row where a tile finds it: rounded if `bf16`, in pairs if `factors` holds them; what is beyond it stays."""
    if holds_pairs(factors):
        for i in range(len(row) // 2):
            factors[i] = pair(rounded(row[2 * i]), rounded(row[2 * i + 1]))
    elif bf16:
        round_row(row, factors)
    else:
        copy(row, factors[: len(row)])


@jit()
def few_stages(queries, k, v, q_pos, k_pos, window, scale, cap, seen, threads, stages, scores, tops, totals, sums, lse):
    """What each thread does, in FEW_STAGES stages.

    queries (B, K, rows, width), width being columns, or half of them in pairs; k and v (B, S, K, C), or C / 2 of PAIR;
    seen (B, 2); scores (B, blocks, K, rows, KEYS); tops and totals (B, blocks, K, T·G); sums (B, blocks, K, rows,
    columns). In rows beyond T·G there may be anything.
    """
    items, (K, rows, width) = scores.shape[0] * scores.shape[1], queries.shape[1:]
    pieces = min(items, pieces_for(threads))
    room = np.empty((_keys_at_once(k.strides[1]), K, width), k.dtype)
    probs = np.zeros((K, rows, KEYS // 2 if holds_pairs(k) else KEYS), queries.dtype)
    piece = begin(stages[0], pieces)
    while piece != NONE:
        for item in range(items * piece // pieces, items * (piece + 1) // pieces):
            _few_scores(queries, k, q_pos, k_pos, window, scale, cap, seen, item, room, scores, tops, totals)
        piece = go_on(stages[0], pieces)
    if alone(stages[1]):
        _few_softmax(tops, totals, lse)
        done(stages[1])
    piece = begin(stages[2], pieces)
    while piece != NONE:
        for item in range(items * piece // pieces, items * (piece + 1) // pieces):
            _few_sums(v, scores, totals, seen, item, room, probs, sums)
        piece = go_on(stages[2], pieces)


@jit()
def _keys_at_once(size):
    """How many keys are read for a head before the next head's turn, a key of all heads being so many bytes.

    About 8 KiB: with more a tile's sums are stored less often, with less keys are read nearer to the order in which
    they lie. AHEAD at most, so that what is asked for is beyond them.
    """
    return max(LEAST, min(AHEAD, 8192 // size // LEAST * LEAST))


@jit()
def _few_block(seen, item, blocks):
    """Sequence and block of an item; from which key, and up to which, it reaches."""
    b, block = item // blocks, item % blocks
    start = seen[b, 0] + KEYS * block
    return b, block, start, max(start, min(start + KEYS, seen[b, 1]))


@jit(fastmath=FAST)
def _few_scores(queries, k, q_pos, k_pos, window, scale, cap, seen, item, room, scores, tops, totals):
    """One block: e^(score - top) of every query with every key, the largest score, and the sum over the block.

    A score is scaled, then capped, and -inf where the query does not see the key.
    """
    (K, group), T = tops.shape[2:], q_pos.shape[1]
    b, block, start, stop = _few_block(seen, item, scores.shape[1])
    keys, positions, found = k[b, start:stop], k_pos[b, start:stop], scores[b, block]
    number, end, (early, late) = len(keys), _whole(len(keys)), _range(positions)
    factor, bound, minus_inf = scores.dtype.type(scale), scores.dtype.type(cap), scores.dtype.type(-np.inf)
    s = 0
    while s < number:
        right = _right_factors(keys[s:], room)
        stream_turned(queries[b], right, found[:, :, s : s + len(right)])
        s += len(right)
    for kh in range(K):
        for i in range(group):
            row, position = found[kh, i, :end], q_pos[b, i * T // group]
            for s in range(number):
                score = row[s] * factor
                row[s] = score if cap == UNCAPPED else bound * tanh(score / bound)
            if early < 0 or late > position or position - early >= window:  # else it sees all of them
                for s in range(number):
                    distance = position - positions[s]
                    if positions[s] < 0 or distance < 0 or distance >= window:
                        row[s] = minus_inf
            row[number:] = minus_inf
            t0 = t1 = t2 = t3 = minus_inf
            for s in range(0, end, 4):
                t0, t1 = max(t0, row[s]), max(t1, row[s + 1])
                t2, t3 = max(t2, row[s + 2]), max(t3, row[s + 3])
            top, total = max(max(t0, t1), max(t2, t3)), scores.dtype.type(0)
            shift = top if top > minus_inf else total  # no visible key: e^(-inf - 0) = 0, not NaN
            for s in range(end):
                row[s] = exp(row[s] - shift)
                total += row[s]
            tops[b, block, kh, i], totals[b, block, kh, i] = top, total


@jit()
def _few_softmax(tops, totals, lse):
    """Replace `totals` by the factors that turn blocks' numbers into probabilities; fill `lse`; overwrite `tops`."""
    B, blocks, K, group = tops.shape
    T = lse.shape[1]
    G = group // T
    for b in range(B):
        for kh in range(K):
            for i in range(group):
                top, total = tops.dtype.type(-np.inf), tops.dtype.type(0)
                for block in range(blocks):
                    top = max(top, tops[b, block, kh, i])
                shift = top if top > -np.inf else total
                for block in range(blocks):
                    tops[b, block, kh, i] = exp(tops[b, block, kh, i] - shift)
                    total += totals[b, block, kh, i] * tops[b, block, kh, i]
                lse[b, i // G, kh * G + i % G] = -np.inf if total == 0 else top + np.log(total)
                divisor = total if total != 0 else tops.dtype.type(1)
                for block in range(blocks):
                    totals[b, block, kh, i] = tops[b, block, kh, i] / divisor


@jit(fastmath=FMA)
def _few_sums(v, scores, factors, seen, item, room, probs, sums):
    """One block: sums[i] = Σ_s probability[i, s] · v[s]; `scores` become probabilities."""
    K, group = factors.shape[2:]
    b, block, start, stop = _few_block(seen, item, sums.shape[1])
    values, found, end = v[b, start:stop], sums[b, block], _whole(stop - start)
    if end == 0:
        found[:] = 0
    for kh in range(K):
        for i in range(group):
            row, factor = scores[b, block, kh, i, :end], factors[b, block, kh, i]
            for s in range(end):
                row[s] *= factor
            _left_factors(row, holds_bfloat16(v), probs[kh, i])
    s, each = 0, 2 if holds_pairs(v) else 1
    while s < end:
        right = _right_factors(values[s:], room)
        stream(probs[:, :, s // each : (s + len(right)) // each], right, found, s == 0)
        s += len(right)


@jit()
def _whole(number):
    """So many keys, up to whole LEASTs."""
    return (number + LEAST - 1) // LEAST * LEAST


@jit()
def _right_factors(x, room):
    """The first of some keys or values (S', K, C) as tiles take them: whole LEASTs of them, and as wide as `room`.

    Where they are that already, they are used where they lie; else copied into `room`, zeros after them. It holds how
    many are taken at once.
    """
    number, columns = min(len(x), len(room)), x.shape[2]
    if columns == room.shape[2] and number >= LEAST:
        return x[: number // LEAST * LEAST]
    copied = room[: _whole(number)]
    for s in range(number):
        for kh in range(x.shape[1]):
            copy(x[s, kh], copied[s, kh, :columns])
            copied[s, kh, columns:] = 0
    copied[number:] = 0
    return copied


@jit()
def few_out(sums, out):
    """Add up the blocks, in order."""
    (B, blocks, K), (T, H, C) = sums.shape[:3], out.shape[1:]
    G = H // K
    for b in range(B):
        for kh in range(K):
            for i in range(T * G):
                target = out[b, i // G, kh * G + i % G]
                for c in range(C):
                    target[c] = sums[b, 0, kh, i, c]
                for block in range(1, blocks):
                    for c in range(C):
                        target[c] += sums[b, block, kh, i, c]
