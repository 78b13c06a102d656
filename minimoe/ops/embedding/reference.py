"""Embedding in array code."""

from __future__ import annotations

from jaxtyping import Float, Int

from minimoe.arrays import widen, xp_of
from minimoe.shapes import Array


def forward(tokens: Int[Array, " N"], table: Float[Array, "V D"]) -> Float[Array, "N D"]:
    return widen(table[tokens])


def backward(dx: Float[Array, "N D"], tokens: Int[Array, " N"], vocab_size: int) -> Float[Array, "V D"]:
    # forward: x[n] = table[tokens[n]]
    xp = xp_of(dx)
    _, D = dx.shape
    dtable = xp.zeros((vocab_size, D), dx.dtype)
    xp.add.at(dtable, tokens, dx)
    return dtable
