"""One token per sequence on the CPU as one compiled call: what a CUDA graph is on a device.

Op by op, a step of a small model spends four fifths of its time in Python: a call of a jitted loop costs a microsecond
or more, preparing its arguments several, and there are thirteen loops in a layer. Here one jitted function calls the
rooms' own loops in the order of `layers.forward`. It has no arithmetic of its own, and is tested against the ops.

Threads enter the step once and meet between its stages (see `stages`). Only products and attention are cut into pieces;
all else is one thread's, a token of each sequence being too little for more.

Weights and cache are handed over as tables of addresses, made once for many steps, so that one compiled function serves
any number of layers and experts, stacked or memory-mapped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
from jaxtyping import Float, Int

from minimoe.arrays import is_bfloat16
from minimoe.backends import Backend
from minimoe.cache import KVCache
from minimoe.config import ModelConfig
from minimoe.loops import FEW_PRODUCTS, address, at_address, by_address, call, holds_bfloat16, jit, storage
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
from minimoe.stages import alone, done, enter, new_stages, pieces_for

MOST_TOKENS = min(linear.FEW_ROWS, experts.FEW_ROWS, gating.FEW_ROWS)  # per step; more go op by op
ROOMS = {
    "attention": attention, "embedding": embedding, "experts": experts, "gating": gating, "kv_cache": kv_cache,
    "linear": linear, "rmsnorm": rmsnorm, "rope": rope,
}  # fmt: skip

# Stages of a layer; attention and experts have several each.
NORM, PROJECT, ROTATE, ATTEND = range(4)
MERGE, OUT, ROUTE, EXPERTS = range(ATTEND + attention.FEW_STAGES, ATTEND + attention.FEW_STAGES + 4)
COMBINE = EXPERTS + experts.FEW_STAGES
STAGES = COMBINE + 1

# Columns of a layer's table: where each array begins, and its rows' scales (0 = none).
NORM1, NORM2, POST1, POST2, GATE, WQ, WK, WV, WO, KEYS, VALUES = range(11)
COLUMNS = 11

# What a step is called with: where its arrays lie, the model's sizes, and how it computes.
TASK = np.dtype(
    [(name, np.int64) for name in (
        "table", "chosen", "ends", "stages", "tokens", "q_pos", "cache_pos", "slots", "seen", "ids", "pairs", "offsets",
        "place", "segments", "counts", "cos", "sin", "x", "residual", "y", "h", "normed", "r", "qkv", "q", "context",
        "lse", "queries", "scores", "tops", "totals", "sums", "router", "weights", "xs", "ys", "gate_in", "up",
        "hidden", "logits", *"BRLVDFHKCEk", "rows", "columns", "threads", "window", "gelu", "renormalise",
    )] + [(name, np.float64) for name in ("eps", "scale", "cap", "embedding_multiplier")]
)  # fmt: skip


def prepared(
    ops: Backend, config: ModelConfig, params: Params, cache: KVCache
) -> Callable[[Int[Array, "B 1"], Int[Array, "B 1"]], Float[Array, "B V"]] | None:
    """Return what does `mixtral.decode` with this cache in one call; None where it has to be done op by op.

    That is so on other backends, where an op has been wrapped (its wrapper must see it called), in float64, with more
    than MOST_TOKENS sequences or attention.FEW_QUERIES query heads per key/value head, and with weights of mixed types.

    Returns
    -------
    step : (tokens (B, 1), positions (B, 1)) -> logits (B, V)
        Reads the arrays of `params` and `cache` where they now are, and keeps them alive. It has room of its own for
        what it computes: not to be called by two threads at once.
    """
    B, G = len(cache.lengths), config.num_heads // config.num_kv_heads
    if not (_own(ops) and ops.graphs) or B > MOST_TOKENS or G > attention.FEW_QUERIES or not _alike(params):
        return None
    c, kept = config, storage(params.norm).dtype
    some = params.layers[0].attention.wq
    stored = np.dtype(np.int8) if isinstance(some, Int8) else kept
    head = np.dtype(np.int8) if isinstance(params.head, Int8) else kept
    shape = attention.few_shape(G, c.head_dim, kept)
    arrays, task = _arrays(c, params, cache, shape), np.zeros(1, TASK)
    for name, array in arrays.items():
        task[name] = address(array)
    task["window"], task["scale"], task["cap"] = attention.scalars(
        c.head_dim, c.sliding_window, c.attention_scale, c.attention_cap
    )
    sizes = (
        B, cache.positions.shape[1], c.num_layers, c.vocab_size, c.hidden_size, c.intermediate_size, c.num_heads,
        c.num_kv_heads, c.head_dim, c.num_experts, c.num_experts_per_token,
    )  # fmt: skip
    for name, value in zip("BRLVDFHKCEk", sizes, strict=True):
        task[name] = value
    task["rows"], task["columns"] = shape.rows, shape.columns
    task["gelu"], task["renormalise"] = c.activation == "gelu_tanh", c.renormalise
    task["eps"], task["embedding_multiplier"] = c.norm_eps, c.embedding_multiplier
    row = 2 * (c.num_heads + c.num_kv_heads) * c.head_dim + 3 * c.num_experts_per_token * c.intermediate_size
    products = B * max(
        c.hidden_size * row, c.hidden_size * c.vocab_size, c.num_heads * c.head_dim * cache.positions.shape[1]
    )  # of a layer, of the head, of attention to a full cache
    most_threads = max(1, products // FEW_PRODUCTS)  # one thread has done few before several have met a dozen times
    function, place = _compiled(kept, stored, head).address, address(task)

    def step(tokens: Int[Array, "B 1"], positions: Int[Array, "B 1"]) -> Float[Array, "B V"]:
        _ = params  # held: addresses keep nothing alive
        cos, sin = rope.table(positions.reshape(-1), c.head_dim, c.rope_theta, np.float32)
        logits, threads = np.empty((B, c.vocab_size), np.float32), min(numba.get_num_threads(), most_threads)
        now = {"tokens": tokens, "q_pos": positions, "cos": cos, "sin": sin, "cache_pos": cache.positions}
        for name, array in now.items():
            arrays[name][...] = array
        arrays["stages"][...] = 0
        task["logits"], task["threads"] = address(logits), threads
        _run(function, place, threads)
        if arrays["stages"][-1, 1, 0] != pieces_for(threads):
            raise RuntimeError("a compiled step of decoding did not come to its end: see the message above")
        cache.positions[...] = arrays["cache_pos"]  # now that all has gone well: Ctrl-C comes when `_run` has returned
        if c.output_multiplier != 1:
            logits *= np.float32(c.output_multiplier)
        return logits

    return step


def _arrays(c: ModelConfig, params: Params, cache: KVCache, queries: attention.FewShape) -> dict[str, Array]:
    """What a step reads and writes, by the names in TASK: made once, and filled anew in each step."""
    B, R = cache.positions.shape
    D, F, H, K, C, E, k = (
        c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim, c.num_experts,
        c.num_experts_per_token,
    )  # fmt: skip
    both = zip(params.layers, cache.layers, strict=True)
    blocks = -(-R // attention.KEYS) * B  # of keys, at most
    rows, columns = queries.rows, queries.columns
    ints: dict[str, Any] = {
        "tokens": (B, 1), "q_pos": (B, 1), "cache_pos": (B, R), "slots": (B, 1), "seen": (B, 2), "ids": (B, k),
        "pairs": B * k, "offsets": E + 1, "place": (B, k), "segments": (E, 3), "counts": 2,
    }  # fmt: skip
    floats: dict[str, Any] = {
        "cos": (B, C // 2), "sin": (B, C // 2), "x": (B, D), "residual": (B, D), "y": (B, D), "h": (B, D),
        "normed": (B, D), "r": B, "qkv": B * (H + 2 * K) * C, "q": B * H * C, "context": B * H * C, "lse": B * H,
        "queries": B * K * rows * columns, "scores": blocks * K * rows * attention.KEYS, "tops": blocks * H,
        "totals": blocks * H, "sums": blocks * K * rows * columns,
        "router": (B, E), "weights": (B, k), "xs": (B * k, D), "ys": (B * k, D), "gate_in": (B * k, F),
        "up": (B * k, F), "hidden": (B * k, F),
    }  # fmt: skip
    return {
        "table": np.array([_layer_table(layer, held.k, held.v) for layer, held in both], np.int64),
        "chosen": np.array([_experts_table(layer) for layer in params.layers], np.int64),
        "ends": np.array([_place(params.tok_embeddings), _place(params.norm), _place(params.head)], np.int64),
        "stages": new_stages(STAGES * c.num_layers + 3),
        **{name: np.zeros(shape, np.int64) for name, shape in ints.items()},
        **{name: np.zeros(shape, np.float32) for name, shape in floats.items()},
    }


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
def _run(function, task, threads):
    if threads > 1:
        enter(function, task, threads)
    else:
        call(function, task)


@cache
def _compiled(kept: np.dtype[Any], stored: np.dtype[Any], head: np.dtype[Any]) -> Any:
    """Compile a step where norms, gate, embeddings and cache are `kept` (uint16 for bfloat16), matrices `stored`.

    All else comes in a record at an address, so a step costs Python little, and its code is compiled only once.
    """
    bf16, f32, i64 = kept == np.uint16, np.float32, np.int64
    narrow, narrow_head = bool(bf16 and stored == kept), bool(bf16 and head == kept)
    queried = attention.few_shape(1, 2, kept)  # C is even: see ModelConfig
    factors, each, held = queried.kind, queried.each, queried.kind if queried.each > 1 else kept

    @by_address("void(int64)")
    def step(place_of_task):
        """What each thread does: the whole model, in stages. What a stage of one piece asks for, one thread does alone.

        Before a product its input is rounded where the weights are stored in bfloat16.
        """
        task = at_address(place_of_task, 1, TASK)[0]
        B, R, L, V, D, F = task.B, task.R, task.L, task.V, task.D, task.F
        H, K, C, E, k, threads = task.H, task.K, task.C, task.E, task.k, task.threads
        eps, scale, cap, window = task.eps, task.scale, task.cap, task.window
        gelu, renormalise = task.gelu != 0, task.renormalise != 0
        table, chosen = at_address(task.table, (L, COLUMNS, 2), i64), at_address(task.chosen, (L, 2, 3, E), i64)
        ends, stages = at_address(task.ends, (3, 2), i64), at_address(task.stages, (STAGES * L + 3, 2, 16), i64)
        tokens, q_pos = at_address(task.tokens, (B,), i64), at_address(task.q_pos, (B, 1), i64)
        cos, sin = at_address(task.cos, (B, C // 2), f32), at_address(task.sin, (B, C // 2), f32)
        cache_pos, slots = at_address(task.cache_pos, (B, R), i64), at_address(task.slots, (B, 1), i64)
        seen, counts = at_address(task.seen, (B, 2), i64), at_address(task.counts, (2,), i64)
        x, residual = at_address(task.x, (B, D), f32), at_address(task.residual, (B, D), f32)
        y, h = at_address(task.y, (B, D), f32), at_address(task.h, (B, D), f32)
        normed, r = at_address(task.normed, (B, D), f32), at_address(task.r, (B,), f32)
        qkv, q = at_address(task.qkv, (B * (H + 2 * K) * C,), f32), at_address(task.q, (B, 1, H, C), f32)
        context, lse = at_address(task.context, (B, 1, H, C), f32), at_address(task.lse, (B, 1, H), f32)
        router, ids = at_address(task.router, (B, E), f32), at_address(task.ids, (B, k), i64)
        weights, place = at_address(task.weights, (B, k), f32), at_address(task.place, (B, k), i64)
        pairs, offsets = at_address(task.pairs, (B * k,), i64), at_address(task.offsets, (E + 1,), i64)
        xs, ys = at_address(task.xs, (B * k, D), f32), at_address(task.ys, (B * k, D), f32)
        gate_in, up = at_address(task.gate_in, (B * k, F), f32), at_address(task.up, (B * k, F), f32)
        hidden, segments = at_address(task.hidden, (B * k, F), f32), at_address(task.segments, (E, 3), i64)
        logits = at_address(task.logits, (B * V,), f32)
        q_end, k_end = B * H * C, B * (H + K) * C
        new_q, new_k = qkv[:q_end].reshape(B, H, C), qkv[q_end:k_end].reshape(B, K, C)
        new_v, rotated = qkv[k_end:].reshape(B, K, C), q.reshape(B, H, C)
        everyone, allowed, unkept = np.arange(E), np.ones(E, np.bool_), np.empty((0, k, D), f32)
        projections, one = np.empty((3, 3), i64), np.empty((1, 3), i64)

        if alone(stages[0]):
            kv_cache.write_all_positions(cache_pos, q_pos, slots)
            counts[0] = attention.few_blocks(attention.few_seen(q_pos, cache_pos, window, seen))
            embeddings = at_address(ends[0, 0], (V, D), kept)
            for n in range(B):
                embedding.copy_row(tokens, embeddings, n, x)
                for d in range(D):
                    x[n, d], residual[n, d] = x[n, d] * f32(task.embedding_multiplier), 0
            weights[:], ids[:] = 1, 0  # of a dense model, which has no gate
            done(stages[0])
        blocks = counts[0]
        G, rows, columns = H // K, task.rows, task.columns
        queries = at_address(task.queries, (B, K, rows, columns // each), factors)
        scores = at_address(task.scores, (B, blocks, K, rows, attention.KEYS), f32)
        sums = at_address(task.sums, (B, blocks, K, rows, columns), f32)
        tops, totals = at_address(task.tops, (B, blocks, K, G), f32), at_address(task.totals, (B, blocks, K, G), f32)

        for i in range(L):
            row, stage = table[i], stages[1 + STAGES * i : 1 + STAGES * (i + 1)]
            if alone(stage[NORM]):
                norm = at_address(row[NORM1, 0], (D,), kept)
                for n in range(B):
                    rmsnorm.norm_row(x, residual, norm, eps, n, y, h, r)
                    if narrow:
                        round_row(y[n], y[n])
                done(stage[NORM])

            for j in range(3):
                projections[j, 0], projections[j, 1] = row[WQ + j, 0], row[WQ + j, 1]
                projections[j, 2] = (H if j == 0 else K) * C
            linear.few_stage(y, projections, stored, threads, stage[PROJECT], qkv)

            k_cache = at_address(row[KEYS, 0], (B, R, K, C), kept)
            v_cache = at_address(row[VALUES, 0], (B, R, K, C), kept)
            if alone(stage[ROTATE]):
                rope.rotate_into_cache(new_q, new_k, new_v, cos, sin, k_cache, v_cache, slots, rotated)
                attention.few_queries(q, holds_bfloat16(k_cache), queries)
                done(stage[ROTATE])
            keys = at_address(row[KEYS, 0], (B, R, K, C // each), held)  # the same memory, as factors
            values = at_address(row[VALUES, 0], (B, R, K, C // each), held)
            attention.few_stages(
                queries, keys, values, q_pos, cache_pos, window, scale, cap, seen, threads, stage[ATTEND:], scores,
                tops, totals, sums, lse,
            )  # fmt: skip
            if alone(stage[MERGE]):
                attention.few_out(sums, context)
                if narrow:
                    round_row(context.reshape(-1), context.reshape(-1))
                done(stage[MERGE])
            one[0, 0], one[0, 1], one[0, 2] = row[WO, 0], row[WO, 1], D
            linear.few_stage(context.reshape(B, H * C), one, stored, threads, stage[OUT], x.reshape(-1))

            if alone(stage[ROUTE]):
                norm, post = at_address(row[NORM2, 0], (D,), kept), at_address(row[POST1, 0], (D,), kept)
                for n in range(B):
                    if row[POST1, 0] != 0:
                        rmsnorm.norm_row(x, x[:0], post, eps, n, x, x, r)
                    rmsnorm.norm_row(x, h, norm, eps, n, y, residual, r)
                    if bf16:
                        round_row(y[n], normed[n])
                    if narrow:
                        round_row(y[n], y[n])
                if row[GATE, 0] != 0:
                    gate = at_address(row[GATE, 0], (E, D), kept)
                    gating.few_logits(normed if bf16 else y, gate, router)
                    for n in range(B):
                        gating.choose(router[n], allowed, True, False, renormalise, ids[n], weights[n])
                experts.dispatch_into(ids, pairs, offsets, place)
                counts[1] = experts.few_segments(y, everyone, pairs, offsets, k, xs, segments)
                done(stage[ROUTE])

            touched = segments[: counts[1]]
            experts.few_stages(xs, chosen[i], stored, gelu, touched, threads, stage[EXPERTS:], gate_in, up, hidden, ys)
            if alone(stage[COMBINE]):
                post = at_address(row[POST2, 0], (D,), kept)
                for n in range(B):
                    experts.combine_token(ys, place, weights, x, unkept, n)
                    if row[POST2, 0] != 0:
                        rmsnorm.norm_row(x, x[:0], post, eps, n, x, x, r)
                done(stage[COMBINE])

        if alone(stages[-2]):
            norm = at_address(ends[1, 0], (D,), kept)
            for n in range(B):
                rmsnorm.norm_row(x, residual, norm, eps, n, y, h, r)
                if narrow_head:
                    round_row(y[n], y[n])
            done(stages[-2])
        one[0, 0], one[0, 1], one[0, 2] = ends[2, 0], ends[2, 1], V
        linear.few_stage(y, one, head, threads, stages[-1], logits)

    return step
