"""Cross-entropy in array code."""

from __future__ import annotations

from jaxtyping import Float, Int

from minimoe.arrays import xp_of
from minimoe.shapes import Array, Scalar


def forward(
    logits: Float[Array, "N V"], targets: Int[Array, " N"]
) -> tuple[Scalar, Float[Array, " N"], Float[Array, " N"]]:
    xp = xp_of(logits)
    counted = targets >= 0
    top = logits.max(axis=-1, keepdims=True)
    lse = (top + xp.log(xp.exp(logits - top).sum(axis=-1, keepdims=True)))[:, 0]  # (N, V) -> (N,)
    target_logits = xp.take_along_axis(logits, xp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
    losses = xp.where(counted, lse - target_logits, 0)
    return float(losses.sum(dtype=xp.float64) / max(int(counted.sum()), 1)), losses, lse


def backward(
    dloss: float, logits: Float[Array, "N V"], targets: Int[Array, " N"], lse: Float[Array, " N"]
) -> Float[Array, "N V"]:
    xp = xp_of(logits)
    counted = targets >= 0
    # forward: lse = log Σ exp(logits)
    dlogits = xp.exp(logits - lse[:, None])
    # forward: - logits[n, targets[n]]
    n = xp.arange(targets.size)
    dlogits[n, xp.maximum(targets, 0)] -= 1
    scale = counted.astype(logits.dtype) * logits.dtype.type(dloss / max(int(counted.sum()), 1))
    return dlogits * scale[:, None]
