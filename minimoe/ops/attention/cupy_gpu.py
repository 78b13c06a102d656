"""Grouped-query attention on the GPU (`kernels.cu`): in tiles, so that memory grows with T and S and not with T·S.

One exception to the storage rule's letter: where keys are bfloat16, what is rounded before its product with v is
exp(score - running maximum) and not that divided by its sum, which is known last. The relative error is the same.
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
SHARED = 72 * 1024  # bytes of a block for two tiles of keys and values: three blocks share a multiprocessor
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
    (B, T, H, C), (S, K) = q.shape, k.shape[1:3]
    q, k, v, q_pos, k_pos = _prepared(q, k, v, q_pos, k_pos)
    on_tensor_cores = is_bfloat16(k) and T * (H // K) > FEW_ROWS and C <= 256
    kernel, rows, tile, shared, sizes = _on_tensor_cores(C) if on_tensor_cores else _scalar(q, k)
    blocks, tiles = -(-T * (H // K) // rows), -(-S // tile)
    parts = max(1, min(tiles, -(-BLOCKS // max(1, blocks * B * K))))  # from shapes alone: a graph may be replayed
    shared += -(-tiles // parts)
    xp, shape = xp_of(q), (B, T, H, C)
    out, lse = xp.empty(shape, q.dtype), xp.empty(shape[:3], q.dtype)
    sums, tops, totals = out, lse, None
    if parts > 1:
        sums, (tops, totals) = xp.empty((parts, *shape), q.dtype), xp.empty((2, parts, *shape[:3]), q.dtype)
    scalars = _scalars(C, window, scale, cap)
    arguments = [q, k, v, q_pos, k_pos, *scalars, sums, tops, totals, T, S, H, K, C, *sizes, _in_packs(k, v)]
    launch(KERNELS, kernel, (blocks, parts, B * K), THREADS, arguments, shared)
    if parts > 1:
        merge = f"attention_merge<{c_type(q)}>"
        threads, joined = min(256, 32 * -(-C // 32)), [sums, tops, totals, out, lse, C, parts]
        launch(KERNELS, merge, B * T * H, threads, joined, parts * q.itemsize)
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


def _prepared(q: Array, k: Array, v: Array, q_pos: Array, k_pos: Array) -> tuple[Array, ...]:
    """Contiguous arrays of the types in `TYPES`: keys and values alike, and queries in float32 beside bfloat16."""
    if is_bfloat16(k) or is_bfloat16(v):
        q = q.astype(np.float32, copy=False)
    if k.dtype != v.dtype:
        q, k, v = (widen(rounded(q)) if is_bfloat16(k) else q), widen(k), widen(v)
    return contiguous(q), contiguous(k), contiguous(v), int64(q_pos), int64(k_pos)


def _scalars(C: int, window: int | None, scale: float | None, cap: float | None) -> tuple[int, float, float]:
    scale = C**-0.5 if scale is None else float(scale)
    return UNBOUNDED if window is None else int(window), scale, 0.0 if cap is None else float(cap)


def _in_packs(*arrays: Array) -> bool:
    """Whether the rows of these arrays begin at multiples of 16 bytes."""
    return all(x.data.ptr % 16 == 0 and x.shape[-1] * x.itemsize % 16 == 0 for x in arrays)


def _on_tensor_cores(C: int) -> tuple[str, int, int, int, list[int]]:
    """Kernel, rows of a block, keys of a tile, bytes of shared memory, and sizes that the kernel must be told."""
    width = next(w for w in WIDTHS if w >= C)
    return f"attention_tiles<{width}, {KEYS[width]}>", 64, KEYS[width], 4 * KEYS[width] * 2 * (width + 8), []


def _scalar(q: Array, k: Array) -> tuple[str, int, int, int, list[int]]:
    """The same of the kernel without tensor cores, whose blocks have as many rows as their threads can hold sums of."""
    (_, T, H, C), K = q.shape, k.shape[2]
    columns, packs = -(-C // 4), -(-C * k.itemsize // 16)
    at_once = 2 if T * (H // K) <= FEW_ROWS else 4  # rows that share what a thread has read
    groups = min(-(-T * (H // K) // at_once), 8, THREADS * max(ITEMS) // columns)
    if groups == 0:
        raise ValueError(
            f"heads of {C} numbers are wider than the {4 * THREADS * max(ITEMS)} that kernels are made for"
        )
    items = next(n for n in ITEMS if n * THREADS >= groups * columns)
    rows, stride = at_once * groups, 16 * (packs | 1)
    tile = next(n for n in (64, 32, 16, 8, 4, 2, 1) if 4 * n * stride <= SHARED or n == 1)
    width = packs * 16 // k.itemsize
    shared = 4 * tile * stride + rows * (width * q.itemsize + 8 + (tile + 3) * q.itemsize)
    return f"attention_rows<{c_type(q)}, {c_type(k)}, {at_once}, {items}>", rows, tile, shared, [rows, tile]


def _backward_tile(C: int, itemsize: int) -> tuple[int, int]:
    """Rows and keys of a tile, and bytes of shared memory: two blocks share a multiprocessor."""

    def shared(tile: int) -> int:
        return itemsize * (6 * tile * (C | 1) + 2 * tile * (tile + 1))

    tile = next(n for n in (32, 16, 8, 4, 2, 1) if shared(n) <= 110 * 1024 or n == 1)
    return tile, shared(tile)


WIDTHS = (32, 64, 128, 256)
KEYS = {32: 64, 64: 64, 128: 64, 256: 32}  # of a tile: the registers of wide heads hold fewer scores
ITEMS = (1, 2, 4)
TYPES = ("float, float", "double, double", "float, bfloat16")
INSTANCES: tuple[Any, ...] = (
    *(f"attention_rows<{types}, {rows}, {items}>" for types in TYPES for rows in (2, 4) for items in ITEMS),
    *(f"attention_tiles<{width}, {KEYS[width]}>" for width in WIDTHS),
    *(f"attention_merge<{real}>" for real in ("float", "double")),
    *(f"attention_backward_{name}<{types}>" for name in ("q", "kv") for types in TYPES),
)
