"""Rotary position embedding in array code."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int

from minimoe.arrays import xp_of
from minimoe.shapes import Array


def table(
    positions: Int[Array, " N"], head_dim: int, theta: float, dtype: Any
) -> tuple[Float[Array, "N c"], Float[Array, "N c"]]:
    xp = xp_of(positions)
    i = xp.arange(head_dim // 2, dtype=xp.float64)
    frequency = theta ** (-2 * i / head_dim)  # (c,)
    angle = positions[:, None].astype(xp.float64) * frequency  # (N,) -> (N, c)
    return xp.cos(angle).astype(dtype), xp.sin(angle).astype(dtype)


def forward(x: Float[Array, "N H C"], cos: Float[Array, "N c"], sin: Float[Array, "N c"]) -> Float[Array, "N H C"]:
    xp = xp_of(x)
    first, second = xp.split(x, 2, axis=-1)  # (N, H, C) -> 2 × (N, H, c)
    cos, sin = cos[:, None], sin[:, None]  # (N, c) -> (N, 1, c)
    return xp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


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
    b, t = xp_of(q).nonzero(slots >= 0)
    n, slot = b * slots.shape[1] + t, slots[b, t]
    k_cache[b, slot] = forward(k, cos, sin)[n].astype(k_cache.dtype)
    v_cache[b, slot] = v[n].astype(v_cache.dtype)
    return forward(q, cos, sin)


def backward(dy: Float[Array, "N H C"], cos: Float[Array, "N c"], sin: Float[Array, "N c"]) -> Float[Array, "N H C"]:
    # forward: y = R(angle) x, and R(angle)ᵀ = R(-angle)
    return forward(dy, cos, -sin)
