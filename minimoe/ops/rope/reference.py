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


def backward(dy: Float[Array, "N H C"], cos: Float[Array, "N c"], sin: Float[Array, "N c"]) -> Float[Array, "N H C"]:
    # forward: y = R(angle) x, and R(angle)ᵀ = R(-angle)
    return forward(dy, cos, -sin)
