"""The rolling key/value cache as jitted loops: one copy of K·C numbers per token that stays.

Of the tokens of one row no two that stay share a slot, so they can be copied in any order, by any thread. The caches
are written where they are: they may be views with strides, and are never copied.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from minimoe.loops import jit, storage, stored
from minimoe.shapes import Array
from minimoe.stages import SMALL, share, threads_if


def forward(
    k_cache: Float[Array, "B R K C"],
    v_cache: Float[Array, "B R K C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    positions: Int[Array, "B T"],
) -> None:
    """See the contract."""
    new_k, new_v = storage(np.ascontiguousarray(k)), storage(np.ascontiguousarray(v))
    positions = np.ascontiguousarray(positions, np.int64)
    _write(storage(k_cache), storage(v_cache), new_k, new_v, positions, threads_if(k.size >= SMALL))


def write_positions(cache_positions: Int[Array, "B R"], positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """See the contract."""
    slots = np.empty(positions.shape, np.int64)
    write_all_positions(cache_positions, np.ascontiguousarray(positions, np.int64), slots)
    return slots


def backward(
    dk_cache: Float[Array, "B R K C"], dv_cache: Float[Array, "B R K C"], positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T K C"], Float[Array, "B T K C"]]:
    """See the contract."""
    B, _, K, C = dk_cache.shape
    dk = np.zeros((B, positions.shape[1], K, C), dk_cache.dtype)
    dv = np.zeros_like(dk)
    _take(dk_cache, dv_cache, dk, dv, np.ascontiguousarray(positions, np.int64), threads_if(dk.size >= SMALL))
    return dk, dv


@jit()
def _oldest_kept(positions, b, R):
    """The lowest position of row b that stays in R slots; padding (-1) is below it."""
    newest = np.int64(-1)
    for t in range(positions.shape[1]):
        newest = max(newest, positions[b, t])
    return max(newest - R + 1, 0)


@jit()
def _write(k_cache, v_cache, k, v, positions, threads):
    for b in range(len(k)):
        oldest = _oldest_kept(positions, b, k_cache.shape[1])
        share(_write_tokens, k.shape[1], (k_cache, v_cache, k, v, positions, b, oldest), threads)


@jit()
def _write_tokens(start, stop, k_cache, v_cache, k, v, positions, b, oldest):
    for t in range(start, stop):
        _write_token(k_cache, v_cache, k, v, positions, b, t, oldest)


@jit()
def _write_token(k_cache, v_cache, k, v, positions, b, t, oldest):
    _, R, K, C = k_cache.shape
    if positions[b, t] < oldest:
        return
    slot = positions[b, t] % R
    for h in range(K):
        for c in range(C):
            k_cache[b, slot, h, c] = stored(k[b, t, h, c], k_cache[b, slot, h, c])
            v_cache[b, slot, h, c] = stored(v[b, t, h, c], v_cache[b, slot, h, c])


@jit()
def write_all_positions(cache_positions, positions, slots):
    (B, T), R = positions.shape, cache_positions.shape[1]
    for b in range(B):
        oldest = _oldest_kept(positions, b, R)
        for t in range(T):
            slots[b, t] = -1
            if positions[b, t] >= oldest:
                slots[b, t] = positions[b, t] % R
                cache_positions[b, slots[b, t]] = positions[b, t]


@jit()
def _take(dk_cache, dv_cache, dk, dv, positions, threads):
    for b in range(len(dk)):
        oldest = _oldest_kept(positions, b, dk_cache.shape[1])
        share(_take_tokens, dk.shape[1], (dk_cache, dv_cache, dk, dv, positions, b, oldest), threads)


@jit()
def _take_tokens(start, stop, dk_cache, dv_cache, dk, dv, positions, b, oldest):
    for t in range(start, stop):
        _take_token(dk_cache, dv_cache, dk, dv, positions, b, t, oldest)


@jit()
def _take_token(dk_cache, dv_cache, dk, dv, positions, b, t, oldest):
    _, R, K, C = dk_cache.shape
    if positions[b, t] < oldest:
        return
    # forward: cache[b, slot] = new[b, t]
    slot = positions[b, t] % R
    for h in range(K):
        for c in range(C):
            dk[b, t, h, c] = dk_cache[b, slot, h, c]
            dv[b, t, h, c] = dv_cache[b, slot, h, c]
            dk_cache[b, slot, h, c] = 0
            dv_cache[b, slot, h, c] = 0
