"""Rotary position embedding, half-split: element i is paired with element i + C/2.

angle[n, i] = position[n] · theta^(-2i / C)
y[i]        = x[i] · cos - x[i + C/2] · sin
y[i + C/2]  = x[i + C/2] · cos + x[i] · sin

Source: Su et al., RoFormer, arXiv 2104.09864, equation 34. The paper pairs neighbours (2i, 2i + 1), as Mistral's own
checkpoints do; Hugging Face's layout, ours, pairs halves. The two differ by a permutation of the rows of wq and wk.
"""

from __future__ import annotations

from typing import Any, Protocol

from jaxtyping import Float, Int

from minimoe.shapes import Array


class Rope(Protocol):
    """The contract of this room."""

    def table(
        self, positions: Int[Array, " N"], head_dim: int, theta: float, dtype: Any
    ) -> tuple[Float[Array, "N c"], Float[Array, "N c"]]:
        """Cosines and sines, each (N, C/2): angles in float64, rounded once, at the end, to `dtype`."""

    def forward(
        self, x: Float[Array, "N H C"], cos: Float[Array, "N c"], sin: Float[Array, "N c"]
    ) -> Float[Array, "N H C"]:
        """Rotate every head of x by the angles of its position."""

    def forward_into_cache(
        self,
        q: Float[Array, "N H C"],
        k: Float[Array, "N K C"],
        v: Float[Array, "N K C"],
        cos: Float[Array, "N c"],
        sin: Float[Array, "N c"],
        k_cache: Float[Array, "B R K C"],
        v_cache: Float[Array, "B R K C"],
        slots: Int[Array, "B T"],
    ) -> Float[Array, "N H C"]:
        """Rotate q; rotate k too, and write it and v to a cache: what a step of decoding would do in three calls.

        Parameters
        ----------
        q, k, v : not rotated, N = B·T
        k_cache, v_cache : (B, R, K, C) changed in place; what is written is rounded to their types
        slots : (B, T) where each token is written, -1 where none is; no slot twice in a row of the batch

        Returns
        -------
        y : (N, H, C) q rotated
        """

    def backward(
        self, dy: Float[Array, "N H C"], cos: Float[Array, "N c"], sin: Float[Array, "N c"]
    ) -> Float[Array, "N H C"]:
        """Rotate back: the transpose of a rotation is the rotation by the negative angle."""
