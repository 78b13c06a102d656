"""The decoder: embed, blocks, norm, logits. One path serves prefill, chunks, decoding with a cache, and training.

x      = tok_embeddings[tokens]
x      = block_i(x)                i = 0 .. L-1
logits = RMSNorm(x) · outputᵀ

Source: Jiang et al., Mixtral of Experts, arXiv 2401.04088, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from minimoe import layers
from minimoe.backends import Backend
from minimoe.config import ModelConfig
from minimoe.layers import Batch, Choice, LayerCache, Routed
from minimoe.params import Params
from minimoe.shapes import Array, Routing


class TokenError(ValueError):
    """Token ids, masks or positions that no text gives; the message says which and what would be right."""


class CacheFullError(ValueError):
    """More tokens than the cache was made for."""


@dataclass(eq=False)
class KVCache:
    """Keys and values of all layers, and which position each slot holds.

    Attributes
    ----------
    layers : L caches of R = min(W, max_length) slots
    positions : (B, R) int64, on the backend's device; -1 = empty
    lengths : (B,) int64 on the host: the position that each sequence's next token takes
    max_length : longest sequence it takes, in tokens (rolling or not)
    """

    layers: list[LayerCache]
    positions: Int[Array, "B R"]
    lengths: Int[Array, " B"]
    max_length: int

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(int(layer.k.nbytes + layer.v.nbytes) for layer in self.layers)


def new_cache(ops: Backend, config: ModelConfig, params: Params, batch: int, max_length: int) -> KVCache:
    """Return an empty cache for `batch` sequences of at most `max_length` tokens."""
    check_count("batch", batch, 1)
    check_count("max_length", max_length, 1)
    R = max_length if config.sliding_window is None else min(config.sliding_window, max_length)
    shape = (batch, R, config.num_kv_heads, config.head_dim)
    caches = [
        LayerCache(ops.xp.zeros(shape, layers.storage_dtype(p)), ops.xp.zeros(shape, layers.storage_dtype(p)))
        for p in params.layers
    ]
    return KVCache(caches, ops.xp.full((batch, R), -1, ops.xp.int64), np.zeros(batch, np.int64), int(max_length))


def check_count(name: str, value: Any, least: int) -> None:
    """Raise a ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")


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
        raise TokenError(f"the cache holds {len(cache.lengths)} sequences, tokens have {B}")
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
    """Return tokens as an (B, T) int64 array, or say what is wrong with them. Masked entries may hold anything."""
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
    if config.dense:
        raise ValueError("a dense model has no router: routing cannot be forced")
    if routing.ids.shape != (L, tokens, k):
        raise ValueError(f"routing ids must have shape (L, N, k) = {(L, tokens, k)}, not {routing.ids.shape}")
    ids = np.asarray(routing.ids)
    if not np.issubdtype(ids.dtype, np.integer) or ids.min() < -1 or ids.max() >= E:
        raise ValueError(f"routing ids must be integers in [0, {E}), or -1 for a token that is not routed")
    ordered = np.sort(ids, axis=-1)
    if np.any((np.diff(ordered, axis=-1) == 0) & (ordered[..., 1:] >= 0)):
        raise ValueError("routing ids name an expert twice for one token")
    if np.any((ids < 0).any(axis=-1) != (ids < 0).all(axis=-1)):
        raise ValueError("routing ids must give a token all its k experts, or none (-1 in every slot)")


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
    for layer, expert in disabled_experts:
        if config.dense:
            raise ValueError("a dense model has no router: no expert can be disabled")
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


def forward(
    ops: Backend,
    config: ModelConfig,
    params: Params,
    inputs: Inputs,
    *,
    cache: KVCache | None = None,
    last_only: bool = False,
    choose: Sequence[Choice] | None = None,
) -> tuple[Float[Array, "B _ V"], list[Routed]]:
    """Compute logits on the device: (B, T, V), or (B, 1, V) of each sequence's last unmasked position."""
    B, T = inputs.tokens.shape
    batch = _batch(ops, config, params, inputs, cache)
    x, residual, routed, _ = _blocks(ops, config, params, inputs, batch, cache, choose)
    if cache is not None:
        if batch.cache_pos is None or T > 1:
            ops.kv_cache.write_positions(cache.positions, batch.q_pos)
        cache.lengths = np.maximum(cache.lengths, inputs.positions.max(axis=1) + 1)
    if last_only:
        rows = ops.asarray(np.arange(B) * T + inputs.positions.argmax(axis=1))
        x, residual = x[rows], residual[rows]
    y, _, _ = ops.rmsnorm.forward(x, params.norm, config.norm_eps, residual)
    logits = ops.linear.forward(y, [params.head])[0]  # (B T, D) -> (B T, V)
    return logits.reshape(B, -1, config.vocab_size), routed


@dataclass(frozen=True)
class Losses:
    """The parts of the training loss: total = cross_entropy + balance_coefficient · balance, in nats."""

    total: float
    cross_entropy: float
    balance: float


def loss_and_grads(
    ops: Backend,
    config: ModelConfig,
    params: Params,
    inputs: Inputs,
    *,
    choose: Sequence[Choice] | None = None,
    jitter: np.random.Generator | None = None,
) -> tuple[Losses, Params, list[Routed]]:
    """Next-token cross-entropy plus balance loss, and their gradients in the shape of `params`.

    A token counts as a target where it and its predecessor are unmasked. `jitter` draws the router's noise where the
    config asks for it.
    """
    batch = _batch(ops, config, params, inputs, None)
    x, residual, routed, saved = _blocks(
        ops, config, params, inputs, batch, None, choose, _noise(ops, config, params, jitter), keep=True
    )
    y, h, r = ops.rmsnorm.forward(x, params.norm, config.norm_eps, residual)
    logits = ops.linear.forward(y, [params.head])[0]
    targets = ops.asarray(next_tokens(inputs))
    cross_entropy, _, lse = ops.cross_entropy.forward(logits, targets)
    balance, dlogits_router = _balance(ops, config, routed, batch.active)
    losses = Losses(cross_entropy + config.balance_coefficient * balance, cross_entropy, balance)

    # forward: cross_entropy(logits), logits = y · headᵀ, y = RMSNorm(x + residual)
    dlogits = ops.cross_entropy.backward(1.0, logits, targets, lse)
    dy, (dhead,) = ops.linear.backward([dlogits], y, [params.head])
    dh, dnorm = ops.rmsnorm.backward(dy, h, params.norm, r)
    grads = []
    for i in reversed(range(config.num_layers)):
        dlogits_i = None if dlogits_router is None else dlogits_router[i]
        # forward: the block hands on x and residual, whose sum h has the one gradient dh
        dh, grad = layers.backward(ops, config, params.layers[i], batch, saved[i], dh, dh, dlogits_i)
        grads.append(grad)
    dtable = ops.embedding.backward(dh, ops.asarray(inputs.tokens.reshape(-1)), config.vocab_size)
    if params.output is None:
        dtable, dhead = dtable + dhead, None
    return losses, Params(dtable, grads[::-1], dnorm, dhead), routed


def next_tokens(inputs: Inputs) -> Int[Array, " N"]:
    """The target of every position: the next token where both are unmasked, else -1."""
    targets = np.full(inputs.tokens.shape, -1, np.int64)
    both = inputs.mask[:, :-1] & inputs.mask[:, 1:]
    targets[:, :-1] = np.where(both, inputs.tokens[:, 1:], -1)
    return targets.reshape(-1)


def collect_routing(ops: Backend, routed: Sequence[Routed]) -> Routing | None:
    """Stack the layers' routing, on the device; None for a dense model."""
    logits = [r.logits for r in routed if r.logits is not None]
    if not logits:
        return None
    xp = ops.xp
    return Routing(xp.stack([r.ids for r in routed]), xp.stack([r.weights for r in routed]), xp.stack(logits))


def _batch(ops: Backend, config: ModelConfig, params: Params, inputs: Inputs, cache: KVCache | None) -> Batch:
    q_pos = ops.asarray(inputs.positions)
    compute = np.float64 if params.dtype == np.float64 else np.float32
    cos, sin = ops.rope.table(q_pos.reshape(-1), config.head_dim, config.rope_theta, compute)
    active = None if inputs.mask.all() else ops.asarray(inputs.mask.reshape(-1))
    cache_pos = None
    if cache is not None and cache.lengths.any():
        if q_pos.shape[1] == 1:
            ops.kv_cache.write_positions(cache.positions, q_pos)  # written first, as the keys will be
        cache_pos = cache.positions
    return Batch(q_pos, cos, sin, active, cache_pos)


def _blocks(
    ops: Backend,
    config: ModelConfig,
    params: Params,
    inputs: Inputs,
    batch: Batch,
    cache: KVCache | None,
    choose: Sequence[Choice] | None = None,
    jitter: Callable[[tuple[int, ...]], Array] | None = None,
    keep: bool = False,
) -> tuple[Float[Array, "N D"], Float[Array, "N D"], list[Routed], list[Any]]:
    """Embed the tokens and run all blocks."""
    x = ops.embedding.forward(ops.asarray(inputs.tokens.reshape(-1)), params.tok_embeddings)  # (B, T) -> (N, D)
    residual = None
    all_routed, all_saved = [], []
    for i, layer in enumerate(params.layers):
        x, residual, routed, saved = layers.forward(
            ops, config, layer, x, residual, batch,
            cache=None if cache is None else cache.layers[i],
            choice=layers.FREE if choose is None else choose[i],
            jitter=jitter, keep=keep,
        )  # fmt: skip
        all_routed.append(routed)
        all_saved.append(saved)
    return x, residual, all_routed, all_saved


def _balance(
    ops: Backend, config: ModelConfig, routed: Sequence[Routed], active: Array | None
) -> tuple[float, Float[Array, "L N E"] | None]:
    """The balance loss and its gradient, scaled by the coefficient; none in a dense model."""
    routing = collect_routing(ops, routed)
    if routing is None:
        return 0.0, None
    form, coefficient = config.balance_form, config.balance_coefficient
    loss = ops.balance_loss.forward(routing.logits, routing.ids, active, form)
    return loss, ops.balance_loss.backward(coefficient, routing.logits, routing.ids, active, form)


def _noise(
    ops: Backend, config: ModelConfig, params: Params, rng: np.random.Generator | None
) -> Callable[[tuple[int, ...]], Array] | None:
    if rng is None or config.router_jitter == 0 or config.dense:
        return None
    low, high = 1 - config.router_jitter, 1 + config.router_jitter
    compute = np.float64 if params.dtype == np.float64 else np.float32

    def draw(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
        return ops.asarray(generator.uniform(low, high, shape).astype(compute))

    return partial(draw, rng)
