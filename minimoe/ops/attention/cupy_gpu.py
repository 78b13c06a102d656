"""Grouped-query attention on the GPU (`kernels.cu`): in tiles, so that memory grows with T and S and not with T·S.

Where values are bfloat16, a probability is rounded before its product with them, which takes its sum to be known: keys
are passed first, then values. Otherwise both are passed together, and divided at the end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from minimoe.arrays import is_bfloat16, widen, xp_of
from minimoe.cuda import c_type, contiguous, int64, launch, rounded
from minimoe.shapes import Array

KERNELS = Path(__file__).with_name("kernels.cu")
THREADS, BACKWARD_THREADS = 128, 256
FEW_ROWS = 16  # queries of a key/value head, T·G, up to which scalar code keeps up with the memory
BLOCKS = 2 * 132  # keys are dealt to several blocks where there would be fewer: two for each multiprocessor of an H100
SHARED = 72 * 1024  # bytes of a block for four tiles of keys or values: three blocks share a multiprocessor
STAGES, FEW_AT_ONCE = 4, 2  # as in kernels.cu
Scalars = tuple[int, float, float]  # window, scale, cap
UNBOUNDED = 1 << 62  # a window that sees everything


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
    (_, T, H, C), K, xp = q.shape, k.shape[2], xp_of(q)
    few = max(1, FEW_ROWS // (H // K))  # tokens
    scalars = _scalars(C, window, scale, cap)
    if not is_bfloat16(v):
        return _together(*_prepared(q, k, v, q_pos, k_pos), scalars)
    if is_bfloat16(k) and T * (H // K) > FEW_ROWS and WIDTHS[-1] >= C:
        return _on_tensor_cores(*_prepared(q, k, v, q_pos, k_pos), scalars)
    turns = [  # more than one only where heads are very wide, or keys stored in another type than values
        _keys_then_values(*_prepared(q[:, t : t + few], k, v, q_pos[:, t : t + few], k_pos, alike=False), scalars)
        for t in range(0, max(1, T), few)
    ]
    if len(turns) == 1:
        return turns[0]
    outs, lses = zip(*turns, strict=True)
    return xp.concatenate(outs, axis=1), xp.concatenate(lses, axis=1)


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
    (B, T, H, C), (S, K) = q.shape, k.shape[1:3]
    q, k, v, q_pos, k_pos = _prepared(q, k, v, q_pos, k_pos)
    dout, out, lse = contiguous(dout), contiguous(out), contiguous(lse)
    xp, types = xp_of(q), f"<{c_type(q)}, {c_type(k)}>"
    dq, delta, dk, dv = xp.empty_like(q), xp.empty_like(lse), xp.empty(k.shape, q.dtype), xp.empty(v.shape, q.dtype)
    tile, shared = _backward_tile(C, q.itemsize)
    scalars, sizes = _scalars(C, window, scale, cap), [T, S, H, K, C, tile]
    inputs = [dout, q, k, v, q_pos, k_pos, *scalars]
    grid = (-(-T * (H // K) // tile), B * K)
    launch(
        KERNELS, f"attention_backward_q{types}", grid, BACKWARD_THREADS, [*inputs, out, lse, dq, delta, *sizes], shared
    )
    grid = (-(-S // tile), B * K)
    launch(
        KERNELS, f"attention_backward_kv{types}", grid, BACKWARD_THREADS, [*inputs, lse, delta, dk, dv, *sizes], shared
    )
    return dq, dk, dv


def _together(
    q: Array, k: Array, v: Array, q_pos: Array, k_pos: Array, scalars: Scalars
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """Keys and values in one pass, maxima and sums of each part joined afterwards."""
    (B, T, H, C), (S, K) = q.shape, k.shape[1:3]
    at_once = 2 if T * (H // K) <= FEW_ROWS else 4  # rows that share what a thread has read
    rows, items, tile = _of_a_block(q, K, k.itemsize, at_once)
    blocks, tiles = -(-T * (H // K) // rows), -(-S // tile)
    parts = _parts(tiles, blocks * B * K)
    packs = -(-C * k.itemsize // 16)
    shared = 4 * tile * 16 * (packs | 1) + rows * (packs * 16 + 8 + (tile + 3) * q.itemsize) + -(-tiles // parts)
    xp, out, lse = xp_of(q), *_results(q)
    sums, tops, totals = out, lse, None
    if parts > 1:
        sums, (tops, totals) = xp.empty((parts, *out.shape), q.dtype), xp.empty((2, parts, *lse.shape), q.dtype)
    kernel, sizes = f"attention_rows<{c_type(q)}, {at_once}, {items}>", [T, S, H, K, C, rows, tile, _in_packs(k, v)]
    arguments = [q, k, v, q_pos, k_pos, *scalars, sums, tops, totals, *sizes]
    launch(KERNELS, kernel, (blocks, parts, B * K), THREADS, arguments, shared)
    if parts > 1:
        merge = f"attention_merge<{c_type(q)}>"
        threads, joined = min(256, 32 * -(-C // 32)), [sums, tops, totals, out, lse, C, parts]
        launch(KERNELS, merge, B * T * H, threads, joined, parts * q.itemsize)
    return out, lse


def _keys_then_values(
    q: Array, k: Array, v: Array, q_pos: Array, k_pos: Array, scalars: Scalars
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """Few rows: scores, maxima and sums of each part; then its sums of values; then these are added up."""
    (B, T, H, C), (S, K) = q.shape, k.shape[1:3]
    rows, items, tile = _of_a_block(q, K, max(k.itemsize, v.itemsize), FEW_AT_ONCE)
    blocks, tiles = -(-T * (H // K) // rows), -(-S // tile)
    parts = _parts(tiles, blocks * B * K)
    packs, v_packs, sights = -(-C * k.itemsize // 16), -(-C * v.itemsize // 16), -(-tiles // parts)
    queries = packs * (16 // k.itemsize) * q.itemsize
    xp, out, lse = xp_of(q), *_results(q)
    scores = xp.empty((B * K, T * (H // K), S), q.dtype)
    tops, totals = xp.empty((2, parts, *lse.shape), q.dtype)
    sums = out if parts == 1 else xp.empty((parts, *out.shape), q.dtype)
    grid, sizes = (blocks, parts, B * K), [T, S, H, K, C, rows, tile]
    shared = STAGES * tile * 16 * (packs | 1) + rows * (queries + 8 + 4 * tile + 8) + sights
    arguments = [q, k, q_pos, k_pos, *scalars, scores, tops, totals, *sizes, _in_packs(k)]
    launch(KERNELS, f"attention_scores<{c_type(k)}>", grid, THREADS, arguments, shared)
    tiles_or_sums = max(STAGES * tile * 16 * (v_packs | 1), items * THREADS * FEW_AT_ONCE * 4 * q.itemsize)
    shared = tiles_or_sums + rows * (8 * tile + 8) + sights
    arguments = [v, q_pos, k_pos, scalars[0], scores, tops, totals, sums, lse, *sizes, _in_packs(v)]
    launch(KERNELS, f"attention_values<{items}>", grid, THREADS, arguments, shared)
    if parts > 1:
        _add(sums, out)
    return out, lse


def _on_tensor_cores(
    q: Array, k: Array, v: Array, q_pos: Array, k_pos: Array, scalars: Scalars
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """Many rows: both passes in one launch, or in two where keys are dealt to several blocks."""
    (B, T, H, C), (S, K) = q.shape, k.shape[1:3]
    width = next(w for w in WIDTHS if w >= C)
    blocks, tiles = -(-T * (H // K) // 64), -(-S // KEYS[width])
    parts = _parts(tiles, blocks * B * K)
    shared = 4 * KEYS[width] * 2 * (width + 8) + -(-tiles // parts)
    xp, out, lse = xp_of(q), *_results(q)

    def run(*results: Array | None) -> None:
        arguments = [q, k, v, q_pos, k_pos, *scalars, *results, T, S, H, K, C, _in_packs(k, v)]
        launch(KERNELS, f"attention_tiles<{width}, {KEYS[width]}>", (blocks, parts, B * K), THREADS, arguments, shared)

    if parts == 1:
        run(out, lse, None, None)
    else:
        sums, (tops, totals) = xp.empty((parts, *out.shape), q.dtype), xp.empty((2, parts, *lse.shape), q.dtype)
        run(None, None, tops, totals)
        run(sums, lse, tops, totals)
        _add(sums, out)
    return out, lse


def _results(q: Array) -> tuple[Array, Array]:
    """Room for out and lse."""
    xp = xp_of(q)
    return xp.empty(q.shape, q.dtype), xp.empty(q.shape[:3], q.dtype)


def _add(sums: Array, out: Array) -> None:
    launch(KERNELS, "attention_add", -(-out.size // THREADS), THREADS, [sums, out, out.size, len(sums)])


def _prepared(
    q: Array, k: Array, v: Array, q_pos: Array, k_pos: Array, alike: bool = True
) -> tuple[Array, Array, Array, Array, Array]:
    """Contiguous arrays of types that kernels are made for: queries in float32 beside bfloat16, keys `alike` values."""
    if is_bfloat16(k) or is_bfloat16(v):
        q = q.astype(np.float32, copy=False)
    if not alike and not is_bfloat16(k):
        k = k.astype(np.float32, copy=False)
    if alike and k.dtype != v.dtype:
        q, k, v = (widen(rounded(q)) if is_bfloat16(k) else q), widen(k), widen(v)
    return contiguous(q), contiguous(k), contiguous(v), int64(q_pos), int64(k_pos)


def _scalars(C: int, window: int | None, scale: float | None, cap: float | None) -> Scalars:
    scale = C**-0.5 if scale is None else float(scale)
    return UNBOUNDED if window is None else int(window), scale, 0.0 if cap is None else float(cap)


def _in_packs(*arrays: Array) -> bool:
    """Whether the rows of these arrays begin at multiples of 16 bytes."""
    return all(x.data.ptr % 16 == 0 and x.shape[-1] * x.itemsize % 16 == 0 for x in arrays)


def _parts(tiles: int, blocks: int) -> int:
    """To how many blocks the keys of each are dealt: from shapes alone, since a graph may be replayed."""
    return max(1, min(tiles, -(-BLOCKS // max(1, blocks))))


def _of_a_block(q: Array, K: int, itemsize: int, at_once: int) -> tuple[int, int, int]:
    """Without tensor cores: rows of a block, as many as its threads hold sums of; which of `ITEMS`; keys of a tile.

    `itemsize` is that of keys and values; `at_once` rows share what a thread has read of them.
    """
    (_, T, H, C), columns = q.shape, -(-q.shape[3] // 4)
    groups = min(-(-T * (H // K) // at_once), 8, THREADS * max(ITEMS) // columns)
    if groups == 0:
        raise ValueError(
            f"heads of {C} numbers are wider than the {4 * THREADS * max(ITEMS)} that kernels are made for"
        )
    items = next(n for n in ITEMS if n * THREADS >= groups * columns)
    stride = 16 * (-(-C * itemsize // 16) | 1)
    tile = next(n for n in (64, 32, 16, 8, 4, 2, 1) if 4 * n * stride <= SHARED or n == 1)
    return at_once * groups, items, tile


def _backward_tile(C: int, itemsize: int) -> tuple[int, int]:
    """Rows and keys of a tile, and bytes of shared memory: two blocks share a multiprocessor."""

    def shared(tile: int) -> int:
        return itemsize * (6 * tile * (C | 1) + 2 * tile * (tile + 1))

    tile = next(n for n in (32, 16, 8, 4, 2, 1) if shared(n) <= 110 * 1024 or n == 1)
    return tile, shared(tile)


WIDTHS = (32, 64, 128, 256)
KEYS = {32: 64, 64: 64, 128: 64, 256: 32}  # of a tile: the registers of wide heads hold fewer scores
ITEMS = (1, 2, 4)
REALS, TYPES = ("float", "double"), ("float, float", "double, double", "float, bfloat16")
INSTANCES: tuple[Any, ...] = (
    *(f"attention_rows<{real}, {rows}, {items}>" for real in REALS for rows in (2, 4) for items in ITEMS),
    *(f"attention_scores<{stored}>" for stored in ("float", "bfloat16")),
    *(f"attention_values<{items}>" for items in ITEMS),
    *(f"attention_tiles<{width}, {KEYS[width]}>" for width in WIDTHS),
    *(f"attention_merge<{real}>" for real in REALS),
    "attention_add",
    *(f"attention_backward_{name}<{types}>" for name in ("q", "kv") for types in TYPES),
)
