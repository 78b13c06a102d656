"""Grouped-query attention over positions: causal, with an optional sliding window.

Key s is visible to query t iff  k_pos[s] >= 0  and  0 <= q_pos[t] - k_pos[s] < W.

scores[t, s] = q[t] · k[s] / sqrt(C)        query head h reads key/value head h // G
probs[t]     = softmax over the visible s
out[t]       = Σ_s probs[t, s] · v[s]       zeros where no key is visible

Where a cap is given, scores[t, s] = cap · tanh(q[t] · k[s] / sqrt(C) / cap), before the softmax: none exceeds the cap.

Positions instead of masks: the slots of a rolling cache need no unrolling, and padding or an empty slot carries
position -1. Sources: Vaswani et al., arXiv 1706.03762, equation 1; Ainslie et al. (GQA), arXiv 2305.13245;
Jiang et al. (Mistral 7B, the window), arXiv 2310.06825, section 2; xAI, Grok-1 (the cap), released code, 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from jaxtyping import Float, Int

from minimoe.shapes import Array


class Attention(Protocol):
    """The contract of this room."""

    explain: Callable[..., dict[str, Array]]
    """What happens inside, computed by the reference whatever the dialect, from `forward`'s inputs without v: `scores`
    (capped; -inf where invisible) and `probs`, both (B, H, T, S)."""

    def forward(
        self,
        q: Float[Array, "B T H C"],
        k: Float[Array, "B S K C"],
        v: Float[Array, "B S K C"],
        q_pos: Int[Array, "B T"],
        k_pos: Int[Array, "B S"],
        window: int | None,
        scale: float | None = None,
        cap: float | None = None,
    ) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
        """Attend.

        Parameters
        ----------
        q : (B, T, H, C) rotated queries
        k, v : (B, S, K, C) rotated keys, and values; where they are bfloat16, q and the probabilities are rounded
            to it before their products
        q_pos, k_pos : (B, T), (B, S) positions; -1 marks padding and empty slots. Keys may stand in any order, but no
            position twice in a sequence
        window : W, or None
        scale : what q · k is multiplied by; None is 1 / sqrt(C)
        cap : positive, the bound of a score; None is none

        Returns
        -------
        out : (B, T, H, C)
        lse : (B, T, H) log of the sum of exp(scores), for the backward; -inf where no key is visible
        """

    def backward(
        self,
        dout: Float[Array, "B T H C"],
        q: Float[Array, "B T H C"],
        k: Float[Array, "B S K C"],
        v: Float[Array, "B S K C"],
        q_pos: Int[Array, "B T"],
        k_pos: Int[Array, "B S"],
        window: int | None,
        out: Float[Array, "B T H C"],
        lse: Float[Array, "B T H"],
        scale: float | None = None,
        cap: float | None = None,
    ) -> tuple[Float[Array, "B T H C"], Float[Array, "B S K C"], Float[Array, "B S K C"]]:
        """Return dq, dk, dv. The probabilities are computed again from lse instead of being kept."""
