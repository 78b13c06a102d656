"""One block of the decoder, forward and backward, written once for all backends.

h   = x + residual                            the stream that enters the block
h2  = h + Attention(RMSNorm(h))
out = h2 + Experts(RMSNorm(h2))

Where there are post-norms (Grok-1), what attention and experts wrote passes one more RMSNorm before it is added.
The sums are made by the norm that follows (rmsnorm takes a residual), so a block hands on two arrays: what its experts
wrote, and the stream they are to be added to. Source: Jiang et al., Mixtral of Experts, arXiv 2401.04088, figure 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int

from minimoe.backends import Backend
from minimoe.cache import LayerCache
from minimoe.config import ModelConfig
from minimoe.ops import experts
from minimoe.params import AttentionParams, FeedForwardParams, LayerParams
from minimoe.quantized import kept_dtype
from minimoe.shapes import Array


@dataclass(frozen=True, eq=False)
class Batch:
    """What one call of the decoder tells every block.

    Attributes
    ----------
    q_pos : (B, T) position of each new token, -1 for padding
    cos, sin : (N, C/2) rotary tables of those positions
    active : (N,) or None
        False for padding; None where there is none.
    cache_pos : (B, R) or None
        Position held by each slot of the cache *as attention sees it*: before this call's tokens are written where
        T > 1, after where T = 1. None where there is no cache, or an empty one.
    slots : (B, 1) or None
        Where T = 1 and there is a cache that is not empty: the slot of each token, -1 for padding.
    """

    q_pos: Int[Array, "B T"]
    cos: Float[Array, "N c"]
    sin: Float[Array, "N c"]
    active: Bool[Array, " N"] | None = None
    cache_pos: Int[Array, "B R"] | None = None
    slots: Int[Array, "B 1"] | None = None


@dataclass(frozen=True, eq=False)
class Choice:
    """What is imposed on one layer's router: expert ids (N, k), weights (N, k), or experts that may be chosen (E,)."""

    ids: Int[Array, "N k"] | None = None
    weights: Float[Array, "N k"] | None = None
    allowed: Bool[Array, " E"] | None = None


FREE = Choice()


@dataclass(frozen=True, eq=False)
class Routed:
    """What one layer's router did: logits (N, E), None in a dense model; ids and weights (N, k)."""

    logits: Float[Array, "N E"] | None
    ids: Int[Array, "N k"]
    weights: Float[Array, "N k"]


@dataclass(frozen=True, eq=False)
class Saved:
    """What a block keeps for its backward.

    h, r, y are the stream, 1 / rms and the output of attention_norm; h2, r2, y2 those of ffn_norm (y2 after jitter);
    q and k are rotated. attended and written are what the post-norms read, and 1 / rms, where there are any.
    """

    h: Array
    r: Array
    y: Array
    q: Array
    k: Array
    v: Array
    context: Array
    lse: Array
    h2: Array
    r2: Array
    y2: Array
    jitter: Array | None
    routed: Routed
    experts: experts.Saved | None
    attended: tuple[Array, Array] | None
    written: tuple[Array, Array] | None


def forward(
    ops: Backend,
    config: ModelConfig,
    layer: LayerParams,
    x: Float[Array, "N D"],
    residual: Float[Array, "N D"] | None,
    batch: Batch,
    *,
    cache: LayerCache | None = None,
    choice: Choice = FREE,
    jitter: Callable[[tuple[int, ...]], Array] | None = None,
    keep: bool = False,
) -> tuple[Float[Array, "N D"], Float[Array, "N D"], Routed, Saved | None]:
    """Run one block.

    Parameters
    ----------
    x, residual : (N, D) the block reads x + residual
    batch : what this call tells every block
    cache : this layer's keys and values, which the new ones join
    choice : what is imposed on the router
    keep : whether a backward will follow
    jitter : draws the multiplicative noise of the router's and experts' input, in training

    Returns
    -------
    x, residual : (N, D) to hand on
    routed : what the router did
    saved : for `backward`, where `keep`
    """
    a = layer.attention
    (B, T), N, C = batch.q_pos.shape, x.shape[0], config.head_dim
    y, h, r = ops.rmsnorm.forward(x, layer.attention_norm, config.norm_eps, residual)
    q, k, v = ops.linear.forward(y, [a.wq, a.wk, a.wv])  # (N, D) -> (N, H C), 2 × (N, K C)
    if cache is not None and batch.slots is not None:  # the cache is written first: see `_attend`
        q, k, v = (x.reshape(N, -1, C) for x in (q, k, v))
        q = ops.rope.forward_into_cache(q, k, v, batch.cos, batch.sin, cache.k, cache.v, batch.slots)
    else:
        q = ops.rope.forward(q.reshape(N, config.num_heads, C), batch.cos, batch.sin)
        k = ops.rope.forward(k.reshape(N, config.num_kv_heads, C), batch.cos, batch.sin)
        k, v = k.astype(kept_dtype(a.wk), copy=False), v.astype(kept_dtype(a.wv), copy=False)  # as the cache keeps them
    q = q.reshape(B, T, config.num_heads, C)
    k, v = k.reshape(B, T, config.num_kv_heads, C), v.reshape(B, T, config.num_kv_heads, C)
    context, lse = _attend(ops, config, q, k, v, batch, cache)
    attended = ops.linear.forward(context.reshape(N, -1), [a.wo])[0]  # (N, H C) -> (N, D)
    attended, before = _post_norm(ops, config, attended, layer.attention_post_norm)

    y2, h2, r2 = ops.rmsnorm.forward(attended, layer.ffn_norm, config.norm_eps, h)
    noise = None if jitter is None else jitter(y2.shape)
    if noise is not None:
        y2 = y2 * noise  # before the gate *and* the experts
    routed = route(ops, config, layer.feed_forward, y2, batch.active, choice)
    f = layer.feed_forward
    out, kept = ops.experts.forward(y2, f.w1, f.w2, f.w3, routed.ids, routed.weights, keep, config.activation)
    out, before2 = _post_norm(ops, config, out, layer.ffn_post_norm)
    saved = Saved(h, r, y, q, k, v, context, lse, h2, r2, y2, noise, routed, kept, before, before2) if keep else None
    return out, h2, routed, saved


def _post_norm(
    ops: Backend, config: ModelConfig, x: Float[Array, "N D"], weight: Float[Array, " D"] | None
) -> tuple[Float[Array, "N D"], tuple[Array, Array] | None]:
    """Norm what a part of the block wrote, where it has such a norm; also what the backward needs."""
    if weight is None:
        return x, None
    y, h, r = ops.rmsnorm.forward(x, weight, config.norm_eps)
    return y, (h, r)


def route(
    ops: Backend,
    config: ModelConfig,
    ffn: FeedForwardParams,
    x: Float[Array, "N D"],
    active: Bool[Array, " N"] | None,
    choice: Choice,
) -> Routed:
    """Ask the gate; a dense model has none, and sends every token to expert 0 with weight 1."""
    xp, N = ops.xp, x.shape[0]
    if ffn.gate is None:
        ids, weights = xp.zeros((N, 1), xp.int64), xp.ones((N, 1), x.dtype)
        if active is not None:
            ids, weights = xp.where(active[:, None], ids, -1), xp.where(active[:, None], weights, 0)
        return Routed(None, ids, weights)
    k = config.num_experts_per_token
    logits, ids, weights = ops.gating.forward(x, ffn.gate, k, active, choice.allowed, choice.ids, config.renormalise)
    if choice.weights is not None:
        weights = xp.where(ids >= 0, choice.weights, 0).astype(weights.dtype)
    return Routed(logits, ids, weights)


def _attend(
    ops: Backend,
    config: ModelConfig,
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    batch: Batch,
    cache: LayerCache | None,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """Attend to the new keys, and to the cache where there is one; write the new keys to it unless they are there.

    A chunk attends to [cache ‖ new] and is written afterwards: written first it would overwrite keys that its early
    queries still need. A single token has been written first, since the key it overwrites has just left its window.
    """
    xp, W, scale, cap = ops.xp, config.sliding_window, config.attention_scale, config.attention_cap
    if cache is None:
        return ops.attention.forward(q, k, v, batch.q_pos, batch.q_pos, W, scale, cap)
    if batch.cache_pos is not None and batch.slots is not None:
        return ops.attention.forward(q, cache.k, cache.v, batch.q_pos, batch.cache_pos, W, scale, cap)
    keys, values, k_pos = k, v, batch.q_pos
    if batch.cache_pos is not None:
        keys, values = xp.concatenate([cache.k, k], axis=1), xp.concatenate([cache.v, v], axis=1)
        k_pos = xp.concatenate([batch.cache_pos, batch.q_pos], axis=1)  # (B, R + T)
    result = ops.attention.forward(q, keys, values, batch.q_pos, k_pos, W, scale, cap)
    ops.kv_cache.forward(cache.k, cache.v, k, v, batch.q_pos)
    return result


def backward(
    ops: Backend,
    config: ModelConfig,
    layer: LayerParams,
    batch: Batch,
    saved: Saved,
    dout: Float[Array, "N D"],
    dresidual: Float[Array, "N D"],
    dlogits: Float[Array, "N E"] | None,
) -> tuple[Float[Array, "N D"], LayerParams]:
    """Invert `forward` (without a cache).

    Parameters
    ----------
    dout, dresidual : (N, D) gradients of the two arrays handed on
    dlogits : (N, E) gradient of the router logits from the balance loss

    Returns
    -------
    dh : (N, D) gradient of x + residual
    grads : the gradients of this layer's parameters
    """
    a, f, s = layer.attention, layer.feed_forward, saved
    assert s.experts is not None
    N, E, act = dout.shape[0], config.num_experts, config.activation
    # forward: out = RMSNorm(written), written = Experts(y2)
    dout, dffn_post_norm = _post_norm_backward(ops, dout, layer.ffn_post_norm, s.written)
    dy2, dw1, dw2, dw3, dweights = ops.experts.backward(dout, s.y2, f.w1, f.w2, f.w3, s.routed.weights, s.experts, act)
    dgate = None
    if f.gate is not None:
        # forward: logits, ids, weights = Gate(y2)
        over_all = None if config.renormalise else s.routed.logits
        dx, dgate = ops.gating.backward(dweights, dlogits, s.y2, f.gate, s.routed.ids, s.routed.weights, over_all)
        dy2 = dy2 + dx
    if s.jitter is not None:
        dy2 = dy2 * s.jitter
    # forward: y2, h2 = RMSNorm(attended + h)
    dh2, dffn_norm = ops.rmsnorm.backward(dy2, s.h2, layer.ffn_norm, s.r2, dresidual)
    # forward: attended = RMSNorm(context · woᵀ)
    dattended, dattention_post_norm = _post_norm_backward(ops, dh2, layer.attention_post_norm, s.attended)
    dcontext, (dwo,) = ops.linear.backward([dattended], s.context.reshape(N, -1), [a.wo])
    # forward: context = Attention(q, k, v)
    dcontext = dcontext.reshape(s.context.shape)
    pos, W, scale, cap = batch.q_pos, config.sliding_window, config.attention_scale, config.attention_cap
    dq, dk, dv = ops.attention.backward(dcontext, s.q, s.k, s.v, pos, pos, W, s.context, s.lse, scale, cap)
    # forward: q, k = rope(...)
    dq = ops.rope.backward(dq.reshape(N, -1, config.head_dim), batch.cos, batch.sin).reshape(N, -1)
    dk = ops.rope.backward(dk.reshape(N, -1, config.head_dim), batch.cos, batch.sin).reshape(N, -1)
    # forward: q, k, v = y · [wq, wk, wv]ᵀ
    dy, (dwq, dwk, dwv) = ops.linear.backward([dq, dk, dv.reshape(N, -1)], s.y, [a.wq, a.wk, a.wv])
    # forward: y, h = RMSNorm(x + residual); h goes on to the second sum
    dh, dattention_norm = ops.rmsnorm.backward(dy, s.h, layer.attention_norm, s.r, dh2)
    assert len(dw1) == E
    grads = LayerParams(
        dattention_norm, AttentionParams(dwq, dwk, dwv, dwo), dffn_norm, FeedForwardParams(dgate, dw1, dw2, dw3),
        dattention_post_norm, dffn_post_norm,
    )  # fmt: skip
    return dh, grads


def _post_norm_backward(
    ops: Backend, dy: Float[Array, "N D"], weight: Float[Array, " D"] | None, saved: tuple[Array, Array] | None
) -> tuple[Float[Array, "N D"], Float[Array, " D"] | None]:
    """Invert `_post_norm`: the gradients of what it read, and of its weight."""
    if weight is None:
        return dy, None
    assert saved is not None
    h, r = saved
    return ops.rmsnorm.backward(dy, h, weight, r)
