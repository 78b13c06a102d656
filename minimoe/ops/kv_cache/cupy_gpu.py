"""The rolling key/value cache on the GPU (`kernels.cu`): what stays is decided there, and nothing is asked back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from minimoe.arrays import xp_of
from minimoe.cuda import c_type, contiguous, int64, launch
from minimoe.shapes import Array

KERNELS = Path(__file__).with_name("kernels.cu")


def forward(
    k_cache: Float[Array, "B R K C"],
    v_cache: Float[Array, "B R K C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    positions: Int[Array, "B T"],
) -> None:
    if (k.dtype, k_cache.dtype) == (v.dtype, v_cache.dtype):
        _write(k_cache, v_cache, k, v, positions)
    else:
        _write(k_cache, None, k, None, positions)
        _write(v_cache, None, v, None, positions)


def write_positions(cache_positions: Int[Array, "B R"], positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
    (B, R), T = cache_positions.shape, positions.shape[1]
    slots = xp_of(positions).empty((B, T), np.int64)
    launch(KERNELS, "kv_cache_positions", B, _threads(T), [cache_positions, slots, int64(positions), T, R])
    return slots


def backward(
    dk_cache: Float[Array, "B R K C"], dv_cache: Float[Array, "B R K C"], positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T K C"], Float[Array, "B T K C"]]:
    xp, (B, R, K, C), T = xp_of(dk_cache), dk_cache.shape, positions.shape[1]
    dk, dv = (xp.empty((B, T, K, C), x.dtype) for x in (dk_cache, dv_cache))
    kernel = f"kv_cache_backward<{c_type(dk)}>"
    grid, per = _grid(B, T)
    launch(KERNELS, kernel, grid, _threads(K * C), [dk_cache, dv_cache, dk, dv, int64(positions), T, R, K * C, per])
    return dk, dv


def _write(k_cache: Array, v_cache: Array | None, k: Array, v: Array | None, positions: Array) -> None:
    (B, R, K, C), T = k_cache.shape, k.shape[1]
    k, v = contiguous(k), None if v is None else contiguous(v)
    kernel = f"kv_cache_forward<{c_type(k)}, {c_type(k_cache)}>"
    grid, per = _grid(B, T)
    launch(KERNELS, kernel, grid, _threads(K * C), [k_cache, v_cache, k, v, int64(positions), T, R, K * C, per])


def _grid(B: int, T: int) -> tuple[tuple[int, int], int]:
    """Blocks, and tokens of a block: each block looks for the newest of all T positions, so one must not be for one."""
    per = min(T, 16)
    return (-(-T // per) if T else 0, B), per


def _threads(numbers: int) -> int:
    return min(1024, 32 * -(-numbers // 32))


STORED = ("float", "double", "bfloat16")
INSTANCES = (
    *(f"kv_cache_forward<{new}, {stored}>" for new in STORED for stored in STORED),
    "kv_cache_positions",
    *(f"kv_cache_backward<{real}>" for real in ("float", "double")),
)
