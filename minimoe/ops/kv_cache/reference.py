"""The rolling key/value cache in array code."""

from __future__ import annotations

from jaxtyping import Float, Int

from minimoe.arrays import xp_of
from minimoe.shapes import Array


def kept(positions: Int[Array, "B T"], slots: int) -> tuple[Int[Array, " M"], Int[Array, " M"], Int[Array, " M"]]:
    """Return (b, t, slot) of the M entries that stay in a cache of `slots` slots; no slot occurs twice in a row b."""
    xp = xp_of(positions)
    newest = positions.max(axis=1, keepdims=True)
    b, t = xp.nonzero((positions >= 0) & (positions > newest - slots))
    return b, t, positions[b, t] % slots


def forward(
    k_cache: Float[Array, "B R K C"],
    v_cache: Float[Array, "B R K C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    positions: Int[Array, "B T"],
) -> None:
    b, t, slot = kept(positions, k_cache.shape[1])
    k_cache[b, slot] = k[b, t].astype(k_cache.dtype)
    v_cache[b, slot] = v[b, t].astype(v_cache.dtype)


def write_positions(cache_positions: Int[Array, "B R"], positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
    b, t, slot = kept(positions, cache_positions.shape[1])
    cache_positions[b, slot] = positions[b, t]
    slots = xp_of(positions).full(positions.shape, -1)
    slots[b, t] = slot
    return slots


def backward(
    dk_cache: Float[Array, "B R K C"], dv_cache: Float[Array, "B R K C"], positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T K C"], Float[Array, "B T K C"]]:
    xp = xp_of(dk_cache)
    B, R, K, C = dk_cache.shape
    dk = xp.zeros((B, positions.shape[1], K, C), dk_cache.dtype)
    dv = xp.zeros_like(dk)
    # forward: cache[b, slot] = new[b, t]
    b, t, slot = kept(positions, R)
    dk[b, t], dv[b, t] = dk_cache[b, slot], dv_cache[b, slot]
    dk_cache[b, slot], dv_cache[b, slot] = 0, 0
    return dk, dv
