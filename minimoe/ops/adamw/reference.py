"""AdamW in array code."""

from __future__ import annotations

from jaxtyping import Float

from minimoe.arrays import xp_of
from minimoe.shapes import Array, Scalar


def forward(
    w: Float[Array, "..."],
    g: Float[Array, "..."],
    m: Float[Array, "..."],
    v: Float[Array, "..."],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float = 1.0,
) -> None:
    xp = xp_of(w)
    g = g * scale
    m[...] = beta1 * m + (1 - beta1) * g
    v[...] = beta2 * v + (1 - beta2) * g * g
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    w[...] = w - lr * weight_decay * w - lr * m_hat / (xp.sqrt(v_hat) + eps)


def squared_norm(g: Float[Array, "..."]) -> Scalar:
    g = g.astype("float64")
    return float((g * g).sum())
