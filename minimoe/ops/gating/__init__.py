"""The router: top-k softmax gating.

logits[n]  = x[n] · gateᵀ                       in float32 or better
ids[n]     = the k experts of largest logit, in descending order; ties go to the lower expert id
weights[n] = softmax(logits[n, ids[n]])         or softmax(logits[n])[ids[n]], where weights are not renormalised

Softmax over all experts, top-k, then renormalising is the same in exact arithmetic, but in float32 it ties losers at
zero once logits are about 100 apart. Without renormalising (Switch, Grok-1) a token's weights add up to less than 1.
Sources: Jiang et al., Mixtral of Experts, arXiv 2401.04088, section 2.1; Fedus et al., Switch Transformers,
arXiv 2101.03961, section 2.1.
"""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Bool, Float, Int

from minimoe.shapes import Array


class Gating(Protocol):
    """The contract of this room."""

    def forward(
        self,
        x: Float[Array, "N D"],
        gate: Float[Array, "E D"],
        k: int,
        active: Bool[Array, " N"] | None = None,
        allowed: Bool[Array, " E"] | None = None,
        ids: Int[Array, "N k"] | None = None,
        renormalise: bool = True,
    ) -> tuple[Float[Array, "N E"], Int[Array, "N k"], Float[Array, "N k"]]:
        """Choose k experts per token.

        Parameters
        ----------
        x : (N, D); rounded to bfloat16 where the gate is stored in it
        gate : (E, D)
        k : experts per token
        active : (N,) False marks padding: not routed, ids -1 and weights 0
        allowed : (E,) False switches an expert off; at least k must stay. Its logits are returned all the same
        ids : (N, k) a choice to force: `k` and `allowed` are then not looked at. A token that is not routed has -1 in
            all its slots
        renormalise : False takes the softmax over all E logits, those of experts that are switched off too

        Returns
        -------
        logits : (N, E)
        ids : (N, k) int64, slot 0 the first choice
        weights : (N, k)
        """

    def backward(
        self,
        dweights: Float[Array, "N k"],
        dlogits: Float[Array, "N E"] | None,
        x: Float[Array, "N D"],
        gate: Float[Array, "E D"],
        ids: Int[Array, "N k"],
        weights: Float[Array, "N k"],
        logits: Float[Array, "N E"] | None = None,
    ) -> tuple[Float[Array, "N D"], Float[Array, "E D"]]:
        """Return dx and dgate; `logits` are given where the forward did not renormalise.

        The choice itself is piecewise constant and has no gradient: what flows back comes through the weights, and
        through `dlogits` from the balance loss.
        """
