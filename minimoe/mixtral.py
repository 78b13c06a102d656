"""The decoder: embed, blocks, norm, logits. One path serves prefill, chunks, decoding with a cache, and training.

x      = tok_embeddings[tokens]   (times the embedding multiplier)
x      = block_i(x)                i = 0 .. L-1 (in code a pair x, residual whose sum it is: see `layers`)
logits = RMSNorm(x) · outputᵀ     (times the output multiplier; both are 1 but in Grok-1)

Source: Jiang et al., Mixtral of Experts, arXiv 2401.04088, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from minimoe import layers
from minimoe.backends import Backend
from minimoe.cache import CacheError, CacheFullError, KVCache, check_cache, check_count, new_cache
from minimoe.config import ModelConfig
from minimoe.inputs import Inputs, TokenError, check_inputs, choices, next_tokens
from minimoe.layers import Batch, Choice, Routed
from minimoe.params import Params
from minimoe.shapes import Array, Routing, Scalar

# What a caller of the decoder needs besides it.
__all__ = [
    "CacheError", "CacheFullError", "Inputs", "KVCache", "Losses", "Step", "TokenError", "check_count", "check_inputs",
    "choices", "collect_routing", "decode", "forward", "loss_and_grads", "new_cache", "next_tokens",
]  # fmt: skip


Step = Callable[[Int[Array, "B 1"], Int[Array, "B 1"]], Float[Array, "B V"]]  # tokens, positions -> logits


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
    """Compute logits on the device: (B, T, V), or (B, 1, V) of each sequence's last unmasked position.

    Logits of masked positions (of a row that is masked altogether, too) are computed but mean nothing.
    """
    B, T = inputs.tokens.shape
    if cache is not None:
        check_cache(cache, config, params)
        slots = cache.positions.shape[1]
        cache.broken = T > 1 and bool(inputs.positions.max() >= slots)  # until all has gone well
    batch = _batch(ops, config, params, *_on_device(ops, inputs), cache)
    x, residual, routed, _ = _blocks(ops, config, params, ops.asarray(inputs.tokens), batch, cache, choose)
    if cache is not None:
        ops.kv_cache.write_positions(cache.positions, batch.q_pos)
        cache.lengths = np.maximum(cache.lengths, inputs.positions.max(axis=1) + 1)
        cache.broken = False
    if last_only:
        rows = ops.asarray(np.arange(B) * T + inputs.positions.argmax(axis=1))
        x, residual = x[rows], residual[rows]
    return _logits(ops, config, params, x, residual).reshape(B, -1, config.vocab_size), routed


def decode(
    ops: Backend,
    config: ModelConfig,
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "B 1"],
    positions: Int[Array, "B 1"],
) -> Float[Array, "B V"]:
    """One token per sequence, all of it on the device, so that it can be captured: `forward` without its checks.

    Parameters
    ----------
    cache : not empty; its `lengths`, on the host, are the caller's to keep
    tokens, positions : (B, 1) on the device, valid
    """
    batch = _batch(ops, config, params, positions, None, cache)
    x, residual, _, _ = _blocks(ops, config, params, tokens, batch, cache)
    ops.kv_cache.write_positions(cache.positions, positions)
    return _logits(ops, config, params, x, residual)


def _logits(
    ops: Backend, config: ModelConfig, params: Params, x: Float[Array, "N D"], residual: Float[Array, "N D"]
) -> Float[Array, "N V"]:
    y, _, _ = ops.rmsnorm.forward(x, params.norm, config.norm_eps, residual)
    logits = ops.linear.forward(y, [params.head])[0]  # (N, D) -> (N, V)
    return _times(logits, config.output_multiplier)


def _times(x: Array, factor: float) -> Array:
    return x if factor == 1 else x * factor


@dataclass(frozen=True)
class Losses:
    """The parts of the training loss: total = cross_entropy + balance_coefficient · balance, in nats.

    On a device they may still be computed: `arrays.numbers` waits for them.
    """

    total: Scalar
    cross_entropy: Scalar
    balance: Scalar


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
    batch = _batch(ops, config, params, *_on_device(ops, inputs), None)
    tokens = ops.asarray(inputs.tokens)
    x, residual, routed, saved = _blocks(
        ops, config, params, tokens, batch, None, choose, _noise(ops, config, params, jitter), keep=True
    )
    y, h, r = ops.rmsnorm.forward(x, params.norm, config.norm_eps, residual)
    logits = _times(ops.linear.forward(y, [params.head])[0], config.output_multiplier)
    targets = ops.asarray(next_tokens(inputs))
    cross_entropy, _, lse = ops.cross_entropy.forward(logits, targets)
    balance, dlogits_router = _balance(ops, config, routed, batch.active)
    losses = Losses(cross_entropy + config.balance_coefficient * balance, cross_entropy, balance)

    # forward: cross_entropy(logits), logits = output_multiplier · y · headᵀ, y = RMSNorm(x + residual)
    dlogits = _times(ops.cross_entropy.backward(1.0, logits, targets, lse), config.output_multiplier)
    dy, (dhead,) = ops.linear.backward([dlogits], y, [params.head])
    dh, dnorm = ops.rmsnorm.backward(dy, h, params.norm, r)
    grads = []
    for i in reversed(range(config.num_layers)):
        dlogits_i = None if dlogits_router is None else dlogits_router[i]
        # forward: the block hands on x and residual, whose sum h has the one gradient dh
        dh, grad = layers.backward(ops, config, params.layers[i], batch, saved[i], dh, dh, dlogits_i)
        grads.append(grad)
    # forward: x = embedding_multiplier · table[tokens]
    dtable = ops.embedding.backward(_times(dh, config.embedding_multiplier), tokens.reshape(-1), config.vocab_size)
    if params.output is None:
        dtable, dhead = dtable + dhead, None
    return losses, Params(dtable, grads[::-1], dnorm, dhead), routed


def collect_routing(ops: Backend, routed: Sequence[Routed]) -> Routing | None:
    """Stack the layers' routing, on the device; None for a dense model."""
    logits = [r.logits for r in routed if r.logits is not None]
    if not logits:
        return None
    xp = ops.xp
    return Routing(xp.stack([r.ids for r in routed]), xp.stack([r.weights for r in routed]), xp.stack(logits))


def _on_device(ops: Backend, inputs: Inputs) -> tuple[Int[Array, "B T"], Bool[Array, " N"] | None]:
    """Positions, and which tokens are no padding (None where all are)."""
    active = None if inputs.mask.all() else ops.asarray(inputs.mask.reshape(-1))
    return ops.asarray(inputs.positions), active


def _batch(
    ops: Backend,
    config: ModelConfig,
    params: Params,
    q_pos: Int[Array, "B T"],
    active: Bool[Array, " N"] | None,
    cache: KVCache | None,
) -> Batch:
    compute = np.float64 if params.dtype == np.float64 else np.float32
    cos, sin = ops.rope.table(q_pos.reshape(-1), config.head_dim, config.rope_theta, compute)
    cache_pos = slots = None
    if cache is not None and cache.lengths.any():
        cache_pos = cache.positions
        if q_pos.shape[1] == 1:  # written first, as the keys will be; the cache's own change when all has gone well
            cache_pos = cache_pos.copy()
            slots = ops.kv_cache.write_positions(cache_pos, q_pos)
    return Batch(q_pos, cos, sin, active, cache_pos, slots)


def _blocks(
    ops: Backend,
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    batch: Batch,
    cache: KVCache | None,
    choose: Sequence[Choice] | None = None,
    jitter: Callable[[tuple[int, ...]], Array] | None = None,
    keep: bool = False,
) -> tuple[Float[Array, "N D"], Float[Array, "N D"], list[Routed], list[Any]]:
    """Embed the tokens and run all blocks."""
    x = ops.embedding.forward(tokens.reshape(-1), params.tok_embeddings)  # (B, T) -> (N, D)
    x = _times(x, config.embedding_multiplier)
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
) -> tuple[Scalar, Float[Array, "L N E"] | None]:
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
