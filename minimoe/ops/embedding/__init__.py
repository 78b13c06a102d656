"""Token embedding: row `tokens[n]` of a table.

x[n] = table[tokens[n]]
"""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Float, Int

from minimoe.shapes import Array


class Embedding(Protocol):
    """The contract of this room."""

    def forward(self, tokens: Int[Array, " N"], table: Float[Array, "V D"]) -> Float[Array, "N D"]:
        """Gather rows.

        Parameters
        ----------
        tokens : (N,) int, each in [0, V)
        table : (V, D) float32, float64 or bfloat16

        Returns
        -------
        (N, D), in the table's type; float32 from a bfloat16 table (the residual stream is never bfloat16).
        """

    def backward(self, dx: Float[Array, "N D"], tokens: Int[Array, " N"], vocab_size: int) -> Float[Array, "V D"]:
        """Add every `dx[n]` to row `tokens[n]`, in the order of n."""
