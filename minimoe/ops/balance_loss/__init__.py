"""Load-balancing losses: they push the router towards giving every expert an equal share.

P[l, n] = softmax(logits[l, n]);  P̄ = its mean over tokens;  f[slot, e] = share of tokens whose choice `slot` is e

=============  =======================================================  =======================
form           loss                                                     exactly balanced
=============  =======================================================  =======================
concatenated   E · Σ_slot Σ_e f[slot, e] · P̄[e], f and P̄ over all       k
               layers' tokens at once (what transformers computes)
per_layer      the same within each layer, then the mean over layers    k
switch         per layer, first choices only: E · Σ_e f[0, e] · P̄[e],   1
               then the mean over layers
=============  =======================================================  =======================

The concatenated form balances the sum over layers only: layers cancel each other out, and each may be far from balance.
Sources: Fedus et al., Switch Transformers, arXiv 2101.03961, equations 4 to 6; transformers' load_balancing_loss_func.
"""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Bool, Float, Int

from minimoe.shapes import Array, Scalar


class BalanceLoss(Protocol):
    """The contract of this room."""

    def forward(
        self,
        logits: Float[Array, "L N E"],
        ids: Int[Array, "L N k"],
        active: Bool[Array, " N"] | None,
        form: str,
    ) -> Scalar:
        """Return the loss; tokens that are not active are not counted. 0.0 where no token is."""

    def backward(
        self,
        dloss: float,
        logits: Float[Array, "L N E"],
        ids: Int[Array, "L N k"],
        active: Bool[Array, " N"] | None,
        form: str,
    ) -> Float[Array, "L N E"]:
        """Return dlogits. The shares f are piecewise constant: the gradient flows through P alone."""
