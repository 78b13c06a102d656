"""Linear maps in array code."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float, Int

from minimoe.arrays import matmul, widen
from minimoe.quantized import Int8
from minimoe.shapes import Array


def forward(
    x: Float[Array, "N I"], weights: Sequence[Float[Array, "_ I"] | Int[Int8, "_ I"]]
) -> list[Float[Array, "N _"]]:
    return [matmul(x, w.T) for w in weights]  # (N, I) -> (N, O)


def backward(
    dys: Sequence[Float[Array, "N _"]], x: Float[Array, "N I"], weights: Sequence[Float[Array, "_ I"]]
) -> tuple[Float[Array, "N I"], list[Float[Array, "_ I"]]]:
    # forward: y = x · wᵀ
    dx = dys[0] @ widen(weights[0])  # (N, O) -> (N, I)
    for dy, w in zip(dys[1:], weights[1:], strict=True):
        dx = dx + dy @ widen(w)
    dws = [dy.T @ x for dy in dys]  # (O, N) @ (N, I) -> (O, I)
    return dx, dws
