"""AdamW: Adam with decoupled weight decay, and the norm that gradient clipping needs.

m ← β1 m + (1 - β1) g
v ← β2 v + (1 - β2) g²
w ← w - lr · weight_decay · w - lr · (m / (1 - β1^t)) / (sqrt(v / (1 - β2^t)) + eps)

Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101, algorithm 2 (with the schedule
multiplier inside lr, as torch.optim.AdamW has it).
"""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Float

from minimoe.shapes import Array, Scalar


class AdamW(Protocol):
    """The contract of this room. Arrays of any one shape, contiguous; w, m and v are changed in place."""

    def forward(
        self,
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
        """Take step number `step` (the first is 1) with the gradient ``scale · g`` (clipping sets the scale)."""

    def squared_norm(self, g: Float[Array, "..."]) -> Scalar:
        """Return Σ g², added up in float64."""
