"""What users hand to a model, checked: tokens, masks, positions, forced routing, experts switched off."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from minimoe.arrays import to_host
from minimoe.backends import Backend
from minimoe.cache import CacheError, CacheFullError, KVCache
from minimoe.config import ModelConfig
from minimoe.layers import Choice
from minimoe.shapes import Array, Routing


class TokenError(ValueError):
    """Token ids, masks or positions that no text gives; the message says which and what would be right."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Checked inputs of one call, on the host: tokens, positions (-1 = padding) and mask, all (B, T)."""

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    mask: Bool[Array, "B T"]


def check_inputs(
    tokens: Any, vocab_size: int, mask: Any = None, positions: Any = None, cache: KVCache | None = None
) -> Inputs:
    """Check what a user gave, and fill in positions: counting the unmasked tokens, from where the cache ends.

    Raises
    ------
    TokenError
        If tokens are not integers in [0, V) of shape (B, T), or mask or positions do not fit them.
    CacheFullError
        If a sequence would exceed the cache's max_length.
    """
    tokens = check_tokens(tokens, vocab_size, mask)
    B, T = tokens.shape
    seen = np.ones((B, T), bool) if mask is None else np.asarray(mask)
    start = np.zeros(B, np.int64) if cache is None else cache.lengths
    if cache is not None and len(cache.lengths) != B:
        raise CacheError(f"the cache holds {len(cache.lengths)} sequences, tokens have {B}")
    if positions is None:
        pos = np.where(seen, start[:, None] + np.cumsum(seen, axis=1) - 1, -1)
    else:
        pos = _check_positions(positions, seen, start)
    if cache is not None and pos.max() >= cache.max_length:
        raise CacheFullError(
            f"position {pos.max()} does not fit the cache: it was made for max_length = {cache.max_length} tokens"
        )
    return Inputs(np.where(seen, tokens, 0), pos.astype(np.int64), seen)


def check_tokens(tokens: Any, vocab_size: int, mask: Any = None) -> Int[Array, "B T"]:
    """Return tokens as a (B, T) int64 array, or say what is wrong with them. Masked entries may hold anything."""
    try:
        array = np.asarray(tokens)
    except ValueError:
        raise TokenError("tokens must form a rectangle (B, T): pad the sequences and pass a mask") from None
    if array.dtype == bool or not np.issubdtype(array.dtype, np.integer):
        raise TokenError(f"token ids must be integers, not {array.dtype} (an empty list has no type: use [[bos]])")
    if array.ndim != 2 or array.size == 0:
        raise TokenError(f"tokens must have shape (T,) or (B, T) with at least one token, not {array.shape}")
    counted = array
    if mask is not None:
        m = np.asarray(mask)
        if m.dtype != bool or m.shape != array.shape:
            raise TokenError(f"mask must be boolean of shape {array.shape}, not {m.dtype} of shape {m.shape}")
        counted = array[m]
    if counted.size and (counted.min() < 0 or counted.max() >= vocab_size):
        wrong = counted[(counted < 0) | (counted >= vocab_size)][0]
        raise TokenError(f"token id {wrong} is outside [0, {vocab_size})")
    return array.astype(np.int64)


def _check_positions(positions: Any, mask: Array, start: Array) -> Int[Array, "B T"]:
    pos = np.asarray(positions)
    if not np.issubdtype(pos.dtype, np.integer) or pos.shape != mask.shape:
        raise TokenError(f"positions must be integers of shape {mask.shape}, not {pos.dtype} of shape {pos.shape}")
    pos = np.where(mask, pos.astype(np.int64), -1)  # of an unsigned type, -1 would wrap
    for b, row in enumerate(pos):
        used = row[mask[b]]
        if used.size and (used[0] < start[b] or np.any(np.diff(used) <= 0)):
            raise TokenError(
                f"positions of sequence {b} must rise strictly from {start[b]} or later, not {used[:8].tolist()}"
            )
    return pos


def check_routing(routing: Routing, config: ModelConfig, tokens: int) -> None:
    """Raise a ValueError unless `routing` can be imposed on this many tokens."""
    L, E, k = config.num_layers, config.num_experts, config.num_experts_per_token
    if not isinstance(routing, Routing):
        raise ValueError(f"routing must be a minimoe.Routing, such as Routing(ids), not {type(routing).__name__}")
    if config.dense:
        raise ValueError("a dense model has no router: routing cannot be forced")
    if routing.ids.shape != (L, tokens, k):
        raise ValueError(f"routing ids must have shape (L, N, k) = {(L, tokens, k)}, not {routing.ids.shape}")
    ids = np.asarray(to_host(routing.ids))
    if not np.issubdtype(ids.dtype, np.integer) or ids.min() < -1 or ids.max() >= E:
        raise ValueError(f"routing ids must be integers in [0, {E}), or -1 for a token that is not routed")
    ordered = np.sort(ids, axis=-1)
    if np.any((np.diff(ordered, axis=-1) == 0) & (ordered[..., 1:] >= 0)):
        raise ValueError("routing ids name an expert twice for one token")
    if np.any((ids < 0).any(axis=-1) != (ids < 0).all(axis=-1)):
        raise ValueError("routing ids must give a token all its k experts, or none (-1 in every slot)")
    if routing.weights is not None and not np.isfinite(to_host(routing.weights).astype(np.float64)).all():
        raise ValueError("routing weights must be finite")


def choices(
    ops: Backend,
    config: ModelConfig,
    tokens: int,
    routing: Routing | None,
    disabled_experts: Iterable[tuple[int, int]],
) -> list[Choice]:
    """Turn forced routing and switched-off experts into one `Choice` per layer."""
    L, E, k = config.num_layers, config.num_experts, config.num_experts_per_token
    allowed = np.ones((L, E), bool)
    for pair in disabled_experts:
        if config.dense:
            raise ValueError("a dense model has no router: no expert can be disabled")
        layer, expert = _pair(pair)
        if not (0 <= layer < L and 0 <= expert < E):
            raise ValueError(f"disabled_experts: no expert {expert} in layer {layer} (L = {L}, E = {E})")
        allowed[layer, expert] = False
    if (allowed.sum(axis=1) < k).any():
        layer = int(np.argmax(allowed.sum(axis=1) < k))
        raise ValueError(f"disabled_experts leaves {allowed[layer].sum()} experts in layer {layer}, fewer than k = {k}")
    if routing is not None:
        check_routing(routing, config, tokens)
        if not allowed.all():
            raise ValueError("routing and disabled_experts exclude each other: forced ids are taken as they are")
        ids = ops.asarray(routing.ids).astype(ops.xp.int64)
        weights = None if routing.weights is None else ops.asarray(routing.weights)
        return [Choice(ids=ids[i], weights=None if weights is None else weights[i]) for i in range(L)]
    return [Choice(allowed=None if row.all() else ops.asarray(row)) for row in allowed]


def _pair(pair: Any) -> tuple[int, int]:
    """One (layer, expert) of disabled_experts."""
    try:
        layer, expert = (index(number) for number in pair)
    except (TypeError, ValueError):
        raise ValueError(f"disabled_experts must be (layer, expert) pairs such as [(0, 3)], not {pair!r}") from None
    return layer, expert


def next_tokens(inputs: Inputs) -> Int[Array, " N"]:
    """The target of every position: the next token where both are unmasked, else -1."""
    targets = np.full(inputs.tokens.shape, -1, np.int64)
    both = inputs.mask[:, :-1] & inputs.mask[:, 1:]
    targets[:, :-1] = np.where(both, inputs.tokens[:, 1:], -1)
    return targets.reshape(-1)
