"""Rotary position embedding on the GPU (`kernels.cu`): kernels for the table, to turn and turn back, and for a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxtyping import Float, Int

from minimoe.arrays import xp_of
from minimoe.cuda import c_type, contiguous, int64, launch
from minimoe.shapes import Array

KERNELS = Path(__file__).with_name("kernels.cu")
THREADS = 256


def table(
    positions: Int[Array, " N"], head_dim: int, theta: float, dtype: Any
) -> tuple[Float[Array, "N c"], Float[Array, "N c"]]:
    xp, N, c = xp_of(positions), len(positions), head_dim // 2
    cos, sin = (xp.empty((N, c), dtype) for _ in range(2))
    kernel = f"rope_table<{c_type(cos)}>"
    launch(KERNELS, kernel, -(-N * c // THREADS), THREADS, [int64(positions), float(theta), cos, sin, N, c])
    return cos, sin


def forward(x: Float[Array, "N H C"], cos: Float[Array, "N c"], sin: Float[Array, "N c"]) -> Float[Array, "N H C"]:
    return _turned(x, cos, sin, 1.0)


def forward_into_cache(
    q: Float[Array, "N H C"],
    k: Float[Array, "N K C"],
    v: Float[Array, "N K C"],
    cos: Float[Array, "N c"],
    sin: Float[Array, "N c"],
    k_cache: Float[Array, "B R K C"],
    v_cache: Float[Array, "B R K C"],
    slots: Int[Array, "B T"],
) -> Float[Array, "N H C"]:
    xp, (N, H, C), (_, R, K, _), T = xp_of(q), q.shape, k_cache.shape, slots.shape[1]
    q, k, v, cos, sin = (contiguous(x.astype(q.dtype, copy=False)) for x in (q, k, v, cos, sin))
    y = xp.empty_like(q)
    kernel = f"rope_into_cache<{c_type(q)}, {c_type(k_cache)}, {c_type(v_cache)}>"
    grid = (N, -(-(H + 2 * K) * C // 2 // THREADS))
    arguments = [q, k, v, cos, sin, int64(slots), y, k_cache, v_cache, T, R, H, K, C // 2]
    launch(KERNELS, kernel, grid, THREADS, arguments)
    return y


def backward(dy: Float[Array, "N H C"], cos: Float[Array, "N c"], sin: Float[Array, "N c"]) -> Float[Array, "N H C"]:
    # forward: y = R(angle) x, and R(angle)ᵀ = R(-angle)
    return _turned(dy, cos, sin, -1.0)


def _turned(x: Array, cos: Array, sin: Array, direction: float) -> Array:
    xp, (N, H, C) = xp_of(x), x.shape
    x = contiguous(x)
    y = xp.empty_like(x)
    grid = (N, -(-H * C // 2 // THREADS))
    launch(KERNELS, f"rope<{c_type(x)}>", grid, THREADS, [x, contiguous(cos), contiguous(sin), direction, y, H, C // 2])
    return y


REALS, STORED = ("float", "double"), ("float", "double", "bfloat16")
INSTANCES = (
    *(f"{name}<{real}>" for name in ("rope_table", "rope") for real in REALS),
    *(f"rope_into_cache<{real}, {keys}, {values}>" for real in REALS for keys in STORED for values in STORED),
)
