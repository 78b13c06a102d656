"""Next-token cross-entropy, in nats.

loss = mean over the counted n of  logsumexp(logits[n]) - logits[n, targets[n]]

A target of -1 is not counted (padding, the end of a text).
"""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Float, Int

from minimoe.shapes import Array, Scalar


class CrossEntropy(Protocol):
    """The contract of this room."""

    def forward(
        self, logits: Float[Array, "N V"], targets: Int[Array, " N"]
    ) -> tuple[Scalar, Float[Array, " N"], Float[Array, " N"]]:
        """Return the mean loss (0.0 where nothing is counted), the losses (N,), and lse (N,) for the backward."""

    def backward(
        self, dloss: float, logits: Float[Array, "N V"], targets: Int[Array, " N"], lse: Float[Array, " N"]
    ) -> Float[Array, "N V"]:
        """Return dlogits = dloss · (softmax(logits) - onehot(targets)) / counted; rows not counted are zero."""
