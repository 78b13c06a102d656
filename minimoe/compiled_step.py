"""One token per sequence on the CPU as one compiled call: what a CUDA graph is on a device.

Op by op, a step of a small model spends four fifths of its time in Python: a call of a jitted loop costs a microsecond
or more, preparing its arguments several, and there are thirteen loops in a layer. Here one jitted function calls the
rooms' own loops in the order of `layers.forward`. It has no arithmetic of its own, and is tested against the ops.

Weights and cache are handed over as tables of addresses, made once for many steps, so that one compiled function serves
any number of layers and experts, stacked or memory-mapped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from minimoe.arrays import is_bfloat16
from minimoe.backends import Backend
from minimoe.cache import KVCache
from minimoe.config import ModelConfig
from minimoe.loops import address, at_address, jit, storage
from minimoe.ops.attention import numba_cpu as attention
from minimoe.ops.embedding import numba_cpu as embedding
from minimoe.ops.experts import numba_cpu as experts
from minimoe.ops.gating import numba_cpu as gating
from minimoe.ops.kv_cache import numba_cpu as kv_cache
from minimoe.ops.linear import numba_cpu as linear
from minimoe.ops.rmsnorm import numba_cpu as rmsnorm
from minimoe.ops.rope import numba_cpu as rope
from minimoe.params import LayerParams, Params, leaves
from minimoe.products import round_row
from minimoe.quantized import Int8, kept_dtype, parts
from minimoe.shapes import Array

MOST_TOKENS = min(linear.FEW_ROWS, experts.FEW_ROWS, gating.FEW_ROWS)  # per step; more go op by op
ROOMS = {
    "attention": attention, "embedding": embedding, "experts": experts, "gating": gating, "kv_cache": kv_cache,
    "linear": linear, "rmsnorm": rmsnorm, "rope": rope,
}  # fmt: skip

# Columns of a layer's table: where each array begins, and its rows' scales (0 = none).
NORM1, NORM2, POST1, POST2, GATE, WQ, WK, WV, WO, KEYS, VALUES = range(11)


def prepared(
    ops: Backend, config: ModelConfig, params: Params, cache: KVCache
) -> Callable[[Int[Array, "B 1"], Int[Array, "B 1"]], Float[Array, "B V"]] | None:
    """Return what does `mixtral.decode` with this cache in one call; None where it has to be done op by op.

    That is so on other backends, where an op has been wrapped (its wrapper must see it called), in float64, with more
    than MOST_TOKENS sequences or attention.FEW_QUERIES query heads per key/value head, and with weights of mixed types.

    Returns
    -------
    step : (tokens (B, 1), positions (B, 1)) -> logits (B, V)
        Reads the arrays of `params` and `cache` where they now are, and keeps them alive.
    """
    B, G = len(cache.lengths), config.num_heads // config.num_kv_heads
    if not (_own(ops) and ops.graphs) or B > MOST_TOKENS or G > attention.FEW_QUERIES or not _alike(params):
        return None
    c, kept = config, storage(params.norm).dtype
    some = params.layers[0].attention.wq
    stored = np.dtype(np.int8) if isinstance(some, Int8) else kept
    head = np.dtype(np.int8) if isinstance(params.head, Int8) else kept
    both = zip(params.layers, cache.layers, strict=True)
    table = np.array([_layer_table(layer, held.k, held.v) for layer, held in both], np.int64)
    chosen = np.array([_experts_table(layer) for layer in params.layers], np.int64)
    ends = np.array([_place(params.tok_embeddings), _place(params.norm), _place(params.head)], np.int64)
    window, scale, cap = attention.scalars(c.head_dim, c.sliding_window, c.attention_scale, c.attention_cap)
    sizes = (
        c.vocab_size, c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim,
        c.num_experts_per_token, window,
    )  # fmt: skip
    numbers = (c.norm_eps, scale, cap, float(c.embedding_multiplier), float(c.output_multiplier))
    forms = (c.activation == "gelu_tanh", c.renormalise, False)

    def step(tokens: Int[Array, "B 1"], positions: Int[Array, "B 1"]) -> Float[Array, "B V"]:
        _ = params  # held: addresses keep nothing alive
        cos, sin = rope.table(positions.reshape(-1), c.head_dim, c.rope_theta, np.float32)
        logits, held = np.empty((B, c.vocab_size), np.float32), cache.positions.copy()
        _step(
            tokens, positions, cos, sin, held, table, chosen, ends, sizes, numbers, forms,
            kept, stored, head, kept == np.uint16, logits,
        )  # fmt: skip
        cache.positions[...] = held  # now that all has gone well: Ctrl-C comes when the compiled call has returned
        return logits

    return step


def _own(ops: Backend) -> bool:
    """Whether every op that a step calls is the Numba dialect's, and nobody's who wrapped it."""
    unused = {"backward", "explain"}
    return all(
        function is getattr(module, name, None)
        for room, module in ROOMS.items()
        for name, function in vars(getattr(ops, room)).items()
        if name not in unused
    )


def _alike(params: Params) -> bool:
    """Whether matrices are of one type, all else of one type too (float32 or bfloat16), and all of it contiguous."""
    kinds: dict[bool, set[Any]] = {True: set(), False: set()}
    for name, leaf in leaves(params):
        matrix = not name.endswith(("norm", "gate", "tok_embeddings"))
        for w in leaf if isinstance(leaf, list) else [leaf]:
            kinds[matrix].add(w.dtype)
            held = [w.values, w.scale] if isinstance(w, Int8) else [w]
            if not all(array.flags.c_contiguous for array in held):
                return False
    (kept, *mixed), (stored, *more) = kinds[False], kinds[True]
    fits = (kept == np.float32 or is_bfloat16(params.norm)) and stored in (kept, np.int8)
    return fits and kept == kept_dtype(params.layers[0].attention.wk) and not mixed and not more


def _place(w: Array | Int8 | None) -> tuple[int, int]:
    """Where an array begins, and its scales."""
    if w is None:
        return 0, 0
    values, scale = parts(w)
    return address(values), address(scale)


def _layer_table(layer: LayerParams, keys: Array, values: Array) -> list[tuple[int, int]]:
    a, f = layer.attention, layer.feed_forward
    norms = [layer.attention_norm, layer.ffn_norm, layer.attention_post_norm, layer.ffn_post_norm]
    return [_place(x) for x in (*norms, f.gate, a.wq, a.wk, a.wv, a.wo, keys, values)]


def _experts_table(layer: LayerParams) -> list[list[list[int]]]:
    """(2, 3, E): where w1, w2 and w3 of each expert begin, and their scales."""
    f = layer.feed_forward
    places = [[_place(w[e]) for e in range(len(w))] for w in (f.w1, f.w2, f.w3)]
    return [[[place[part] for place in row] for row in places] for part in range(2)]


@jit()
def _step(
    tokens, q_pos, cos, sin, cache_pos, table, chosen, ends, sizes, numbers, forms, kept, stored, head, bf16, logits
):
    """`kept` is the type of norms, gate, embeddings, cache (uint16 for bfloat16), `stored` and `head` of matrices."""
    V, D, F, H, K, C, k, window = sizes
    eps, scale, cap, embedding_multiplier, output_multiplier = numbers
    gelu, renormalise, forced = forms
    B, R, E = len(tokens), cache_pos.shape[1], chosen.shape[3]
    narrow, narrow_head = bf16 and stored == kept, bf16 and head == kept
    f32 = np.float32
    everyone, allowed = np.arange(E), np.ones(E, np.bool_)
    active = np.ones(B, np.bool_)
    x, residual, y, h = np.empty((B, D), f32), np.zeros((B, D), f32), np.empty((B, D), f32), np.empty((B, D), f32)
    r, q, context = np.empty(B, f32), np.empty((B, H, C), f32), np.empty((B, 1, H, C), f32)
    lse = np.empty((B, 1, H), f32)
    qkv, projections, one = np.empty(B * (H + 2 * K) * C, f32), np.empty((3, 3), np.int64), np.empty((1, 3), np.int64)
    router, weights, ids = np.empty((B, E), f32), np.ones((B, k), f32), np.zeros((B, k), np.int64)
    gate_in, up, hidden = np.empty((B * k, F), f32), np.empty((B * k, F), f32), np.empty((B * k, F), f32)
    ys, none = np.empty((B * k, D), f32), np.empty((0, k, D), f32)

    slots = kv_cache.write_all_positions(cache_pos, q_pos)
    embedding.gather(tokens.reshape(-1), at_address(ends[0, 0], (V, D), kept), x)
    if embedding_multiplier != 1:
        x *= f32(embedding_multiplier)
    for i in range(len(table)):
        places = table[i]
        norm = at_address(places[NORM1, 0], (D,), kept)
        rmsnorm.norm_rows(x, residual, norm, eps, y, h, r)
        for j in range(3):
            projections[j] = places[WQ + j, 0], places[WQ + j, 1], (H if j == 0 else K) * C
        linear.few(y, projections, stored, narrow, qkv)
        q_end, k_end = B * H * C, B * (H + K) * C
        new_q, new_k = qkv[:q_end].reshape(B, H, C), qkv[q_end:k_end].reshape(B, K, C)
        k_cache = at_address(places[KEYS, 0], (B, R, K, C), kept)
        v_cache = at_address(places[VALUES, 0], (B, R, K, C), kept)
        rope.rotate_into_cache(new_q, new_k, qkv[k_end:].reshape(B, K, C), cos, sin, k_cache, v_cache, slots, q)
        queries = q.reshape(B, 1, H, C)
        attention.forward_few(queries, k_cache, v_cache, q_pos, cache_pos, window, scale, cap, bf16, context, lse)
        one[0] = places[WO, 0], places[WO, 1], D
        linear.few(context.reshape(B, H * C), one, stored, narrow, x.reshape(-1))
        if places[POST1, 0] != 0:
            norm = at_address(places[POST1, 0], (D,), kept)
            rmsnorm.norm_rows(x, x[:0], norm, eps, x, x, r)

        norm = at_address(places[NORM2, 0], (D,), kept)
        rmsnorm.norm_rows(x, h, norm, eps, y, residual, r)
        seen = y if stored == kept else y.copy()
        if bf16:
            for n in range(B):
                round_row(y[n], seen[n])
        if places[GATE, 0] != 0:
            gating.few_logits(seen, at_address(places[GATE, 0], (E, D), kept), router)
            gating.choose_all(router, allowed, active, forced, renormalise, ids, weights)
        pairs, offsets, place = experts.dispatch(ids, E)
        experts.few(y, chosen[i], everyone, stored, gelu, narrow, pairs, offsets, k, gate_in, up, hidden, ys)
        experts.combine(ys, place, weights, x, none)
        if places[POST2, 0] != 0:
            norm = at_address(places[POST2, 0], (D,), kept)
            rmsnorm.norm_rows(x, x[:0], norm, eps, x, x, r)

    norm = at_address(ends[1, 0], (D,), kept)
    rmsnorm.norm_rows(x, residual, norm, eps, y, h, r)
    one[0] = ends[2, 0], ends[2, 1], V
    linear.few(y, one, head, narrow_head, logits.reshape(-1))
    if output_multiplier != 1:
        logits *= f32(output_multiplier)
