"""Linear maps without bias: one input, one or several weights (query, key and value read the same x).

y_i = x · w_iᵀ
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from jaxtyping import Float, Int

from minimoe.quantized import Int8
from minimoe.shapes import Array


class Linear(Protocol):
    """The contract of this room."""

    def forward(
        self, x: Float[Array, "N I"], weights: Sequence[Float[Array, "_ I"] | Int[Int8, "_ I"]]
    ) -> list[Float[Array, "N _"]]:
        """Map x by each weight.

        Parameters
        ----------
        x : (N, I) float; rounded to bfloat16 where a weight is stored in bfloat16
        weights : arrays (O_i, I); for inference also in int8 (see `minimoe.quantized`)

        Returns
        -------
        list of (N, O_i), float32 or float64
        """

    def backward(
        self, dys: Sequence[Float[Array, "N _"]], x: Float[Array, "N I"], weights: Sequence[Float[Array, "_ I"]]
    ) -> tuple[Float[Array, "N I"], list[Float[Array, "_ I"]]]:
        """Return dx (N, I), summed over the outputs in order, and the dw_i (O_i, I).

        Rounding to bfloat16 counts as the identity (straight through); gradients are float32 or better.
        """
