"""RMSNorm in array code."""

from __future__ import annotations

from jaxtyping import Float

from minimoe.arrays import widen, xp_of
from minimoe.shapes import Array


def forward(
    x: Float[Array, "N D"], weight: Float[Array, " D"], eps: float, residual: Float[Array, "N D"] | None = None
) -> tuple[Float[Array, "N D"], Float[Array, "N D"], Float[Array, " N"]]:
    xp = xp_of(x)
    h = x if residual is None else x + residual
    r = 1 / xp.sqrt((h * h).mean(axis=-1) + eps)  # (N, D) -> (N,)
    y = h * r[:, None] * widen(weight)
    return y, h, r


def backward(
    dy: Float[Array, "N D"],
    h: Float[Array, "N D"],
    weight: Float[Array, " D"],
    r: Float[Array, " N"],
    dh: Float[Array, "N D"] | None = None,
) -> tuple[Float[Array, "N D"], Float[Array, " D"]]:
    normed = h * r[:, None]
    # forward: y = normed · weight
    dweight = (dy * normed).sum(axis=0)  # (N, D) -> (D,)
    dnormed = dy * widen(weight)
    # forward: normed = h · r(h), and dr/dh = -r³ h / D
    dx = r[:, None] * (dnormed - normed * (dnormed * normed).mean(axis=-1, keepdims=True))
    return (dx if dh is None else dx + dh), dweight
