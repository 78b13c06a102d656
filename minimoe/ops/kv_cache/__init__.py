"""The rolling key/value cache: position p lives in slot p mod R.

cache[b, p mod R] = new[b, t]   where p = positions[b, t]

R = min(W, longest sequence). Where R = W, writing position p overwrites p - W, which has just left the window; where
R < W no position ever comes round again. Of a chunk longer than R only the last R positions stay. Padding (position -1)
is not written. Source: Jiang et al., Mistral 7B, arXiv 2310.06825, section 2 (rolling buffer cache).
"""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Float, Int

from minimoe.shapes import Array


class KVCacheOp(Protocol):
    """The contract of this room. The caches are changed in place."""

    def forward(
        self,
        k_cache: Float[Array, "B R K C"],
        v_cache: Float[Array, "B R K C"],
        k: Float[Array, "B T K C"],
        v: Float[Array, "B T K C"],
        positions: Int[Array, "B T"],
    ) -> None:
        """Write the new keys and values, rounded to the caches' type.

        Parameters
        ----------
        k_cache, v_cache : (B, R, K, C)
        k, v : (B, T, K, C)
        positions : (B, T) -1 for padding; rising along each row otherwise
        """

    def write_positions(self, cache_positions: Int[Array, "B R"], positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """Write which position each slot now holds, by the same rule; return the slot of each, -1 where none is."""

    def backward(
        self, dk_cache: Float[Array, "B R K C"], dv_cache: Float[Array, "B R K C"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T K C"], Float[Array, "B T K C"]]:
        """Return dk, dv of what `forward` wrote, and set those slots of dk_cache, dv_cache to zero.

        What was overwritten has no influence on the cache any more: its gradient is zero.
        """
