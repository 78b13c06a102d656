"""Sampling in array code, in float64."""

from __future__ import annotations

from jaxtyping import Float, Int

from minimoe.arrays import xp_of
from minimoe.shapes import Array


def forward(
    logits: Float[Array, "B V"], temperature: float, top_p: float, uniform: Float[Array, " B"]
) -> Int[Array, " B"]:
    xp = xp_of(logits)
    if temperature == 0:
        return logits.argmax(axis=-1)  # the first of equals
    scaled = logits.astype(xp.float64)
    scaled = (scaled - scaled.max(axis=-1, keepdims=True)) / temperature
    probs = xp.exp(scaled)
    probs = probs / probs.sum(axis=-1, keepdims=True)
    order = xp.argsort(-probs, axis=-1, kind="stable")  # (B, V), most probable first
    mass = xp.cumsum(xp.take_along_axis(probs, order, axis=-1), axis=-1)
    size = xp.minimum((mass < top_p).sum(axis=-1), mass.shape[1] - 1) + 1  # (B,) tokens in the nucleus
    total = xp.take_along_axis(mass, size[:, None] - 1, axis=-1)
    rank = xp.minimum((mass <= uniform[:, None] * total).sum(axis=-1), size - 1)
    return xp.take_along_axis(order, rank[:, None], axis=-1)[:, 0]
