"""Mistakes in rotary positions, attention and the rolling cache."""

from __future__ import annotations

from minimoe.golden.cases.draw import GROK
from minimoe.golden.mutants.mutant import Mutant
from minimoe.golden.mutants.planting import Edit, room

_ANGLE = "    angle = positions[:, None].astype(xp.float64) * frequency  # (N,) -> (N, c)"
_TURN = "first * cos - second * sin, second * cos + first * sin"
ROPE = [
    Mutant(
        "rope-interleaved",
        "RoPE turns neighbouring elements (2i, 2i + 1) instead of the pairs (i, i + C/2)",
        "split the head in two halves, or permute the rows of wq and wk to the interleaved order when loading",
        "op",
        (
            room("rope", "xp.split(x, 2, axis=-1)", "x[..., 0::2], x[..., 1::2]"),
            room("rope", f"xp.concatenate([{_TURN}], axis=-1)", f"xp.stack([{_TURN}], axis=-1).reshape(x.shape)"),
        ),
        seen="Mistral's own files and GGUF are interleaved, Hugging Face's are half-split",
    ),
    Mutant(
        "rope-opposite-direction",
        "RoPE turns by minus the angle",
        "first · cos - second · sin, second · cos + first · sin",
        "op",
        (room("rope", _TURN, "first * cos + second * sin, second * cos - first * sin"),),
    ),
    Mutant(
        "rope-frequency-halved",
        "the exponent of theta is -i/C instead of -2i/C",
        "pair i of C/2 turns by theta^(-2i/C) per position",
        "op",
        (room("rope", "theta ** (-2 * i / head_dim)", "theta ** (-i / head_dim)"),),
    ),
    Mutant(
        "rope-angles-in-float32",
        "rotary angles are computed in float32: off by about 1e-3 near position 30,000",
        "take position · frequency in float64, and round cos and sin once",
        "op",
        (
            room("rope", "frequency = theta ** (-2 * i / head_dim)  # (c,)",
                 "frequency = 1 / (xp.float32(theta) ** (2 * i.astype(xp.float32) / xp.float32(head_dim)))"),
            room("rope", _ANGLE, _ANGLE.replace("64", "32")),
        ),
        seen="transformers, mistral-inference",
    ),
    Mutant(
        "rope-gradient-turned-forward",
        "the gradient of RoPE is turned forward again",
        "turn back: the transposed rotation is that by the negative angle",
        "op",
        (room("rope", "return forward(dy, cos, -sin)", "return forward(dy, cos, sin)"),),
    ),
]  # fmt: skip


def _scale(name: str, says: str, factor: str) -> Mutant:
    """A wrong scale of the scores; the gradient has it too."""
    right = "attention scores are q · k / sqrt(C), C the width of one head"
    return Mutant(
        name, says, right, "op",
        (
            room("attention", "return q.shape[-1] ** -0.5 if", f"return {factor} if"),
        ),
    )  # fmt: skip


def _mask(name: str, says: str, remedy: str, right: str, wrong: str, seen: str = "") -> Mutant:
    return Mutant(name, says, remedy, "op", (room("attention", right, wrong),), seen=seen)


_CAUSAL = "a query sees the keys at its own position and before: 0 <= q_pos - k_pos"
_WINDOW = "W counts the query itself: q_pos - k_pos < W"
_HALVES = "transpose(0, 2, 3, 1, 4)"
ATTENTION = [
    _scale("attention-scale-missing", "attention scores are not divided by sqrt(C)", "1.0"),
    _scale("attention-scale-1/C", "attention scores are divided by C instead of its root", "q.shape[-1] ** -1.0"),
    _scale("attention-scale-of-all-heads", "attention scores are divided by sqrt(H · C), the width of all heads",
           "(q.shape[-1] * q.shape[-2]) ** -0.5"),
    Mutant(
        "kv-heads-tiled",
        "query head h reads key/value head h mod K: key/value heads are tiled instead of repeated",
        "query head h reads key/value head h // (H / K): repeat each head, interleaved",
        "op",
        (
            room("attention", f"return x.reshape(B, T, K, H // K, C).{_HALVES}",
                 "return x.reshape(B, T, H // K, K, C).transpose(0, 3, 2, 1, 4)"),
            room("attention", "return x.transpose(0, 3, 1, 2, 4)", "return x.transpose(0, 3, 2, 1, 4)"),
            room("attention",
                 'return {"scores": scores.reshape(B, K * G, T, S), "probs": probs.reshape(B, K * G, T, S)}',
                 'return {"scores": scores.swapaxes(1, 2).reshape(B, K * G, T, S), '
                 '"probs": probs.swapaxes(1, 2).reshape(B, K * G, T, S)}'),
        ),
    ),
    _mask("sees-the-next-token", "the causal mask is off by one: a query sees the key after it", _CAUSAL,
          "(distance >= 0)", "(distance >= -1)"),
    _mask("does-not-see-itself", "the causal mask is off by one: a query does not see its own key", _CAUSAL,
          "(distance >= 0)", "(distance > 0)"),
    _mask("causal-mask-missing", "queries see the keys that come after them", _CAUSAL,
          "& (distance >= 0)", "& (distance == distance)"),
    _mask("window-one-wider", "the window's mask lets W + 1 keys through, while the cache holds W", _WINDOW,
          "(distance < window)", "(distance <= window)", "an early reference masked W + 1"),
    _mask("window-one-narrower", "the window lets W - 1 keys through", _WINDOW,
          "(distance < window)", "(distance < window - 1)"),
    _mask("empty-keys-attended", "keys at position -1 (padding, empty slots of the cache) are attended",
          "mask out every key whose position is -1",
          "(k_pos >= 0)[:, None, :] & (distance >= 0)", "(distance >= 0)"),
    Mutant(
        "masked-scores-zero",
        "invisible scores are set to 0 before the softmax, where exp(0) = 1 counts",
        "set them to -inf (or the lowest number) before the softmax",
        "op",
        (
            room("attention", "scores, -xp.inf)\n", "scores, 0.0)\n"),
            room("attention", "probs * (dprobs - delta)",
                 "probs * (dprobs - delta) * visible(q_pos, k_pos, window)[:, None, None]"),
        ),
    ),
    Mutant(
        "unseeing-query-averages",
        "a query that sees no key averages all values: masked scores are low, not -inf",
        "a query that sees no key outputs zeros",
        "op",
        (
            room("attention", "scores, -xp.inf)\n", "scores, -1e30)\n"),
            room("attention", "xp.isneginf(scores)", "(scores < -1e29)"),  # the slope of a cap, there too, is finite
        ),
        seen="torch-style masks filled with finfo.min",
    ),
    _mask("attention-softmax-overflows", "exp is taken without subtracting the maximum, and overflows float32 above 88",
          "subtract each row's largest score before exp",
          "weights = xp.exp(scores - top)\n",
          "weights = xp.exp(scores.astype(xp.float32)).astype(scores.dtype)\n"),
    Mutant(
        "float16-overflow-in-attention",
        "q · k exceeds 65504 before it is scaled, and overflows in float16",
        "scale the queries before the product, or accumulate and scale in float32",
        "op",
        (
            room("attention", "    scores = matmul(qg, kh[:, :, None].swapaxes(-1, -2)) * _factor(q, scale)",
                 "    scores = matmul(qg, kh[:, :, None].swapaxes(-1, -2)).astype(xp.float16).astype(q.dtype)\n"
                 "    scores = scores * _factor(q, scale)"),
        ),
        profiles=("float16",),
    ),
    Mutant(
        "kv-gradient-of-one-head",
        "the gradients of keys and values come from the first query head of each group only",
        "sum them over the H / K query heads that share the key/value head",
        "op",
        (
            room("attention", "@ doutg).sum(axis=2)", "@ doutg)[:, :, 0]"),
            room("attention", "@ qg).sum(axis=2)", "@ qg)[:, :, 0]"),
        ),
    ),
    Mutant(
        "softmax-gradient-without-sum",
        "the gradient of the attention softmax lacks its second term",
        "dscores = probs · (dprobs - Σ probs · dprobs)",
        "op",
        (room("attention", "probs * (dprobs - delta)", "probs * dprobs"),),
    ),
]  # fmt: skip
_CAP = "scores = cap * xp.tanh(scores / cap)"
_CAP_SLOPE = "dscores = dscores * (1 - (xp.where(xp.isneginf(scores), 0, scores) / cap) ** 2)"
_BOUNDED = "scores are cap · tanh(scale · q · k / cap), then -inf where a key is invisible"


def _cap(name: str, says: str, *edits: tuple[str, str], seen: str = "", inference_only: bool = False) -> Mutant:
    """A wrong scale or cap of Grok-1's scores."""
    changes = tuple(room("attention", *edit) for edit in edits)
    return Mutant(name, says, _BOUNDED, "op", changes, seen=seen, inference_only=inference_only, tag=GROK)


CAP = [
    _cap("attention-cap-missing", "attention scores are not bounded", (_CAP, "pass"), (_CAP_SLOPE, "pass"),
         seen="fused attention that has no cap"),
    _cap("attention-cap-clips", "attention scores are cut off at the cap instead of bent by tanh",
         (_CAP, "scores = xp.clip(scores, -cap, cap)"), (_CAP_SLOPE, "dscores = dscores * (abs(scores) < cap)")),
    _cap("attention-cap-not-multiplied-again", "attention scores are tanh(score / cap), without the factor cap",
         (_CAP, "scores = xp.tanh(scores / cap)"),
         (_CAP_SLOPE, "dscores = dscores * (1 - xp.where(xp.isneginf(scores), 0, scores) ** 2) / cap")),
    _cap("attention-cap-before-the-scale", "q · k is capped first and scaled afterwards",
         (_CAP, f"scores = _factor(q, scale) * {_CAP[9:].replace('scores /', 'scores / _factor(q, scale) /')}"),
         (_CAP_SLOPE, _CAP_SLOPE.replace("/ cap)", "/ factor / cap)"))),
    _cap("attention-cap-after-the-mask", "scores are masked first and capped then: -inf becomes -cap, and is seen",
         ("scores, -xp.inf)\n", "scores, -xp.inf if cap is None else -cap)\n")),
    _cap("attention-cap-on-the-probabilities", "the cap is applied to the probabilities, after the softmax",
         (_CAP, "pass"), (_CAP_SLOPE, "pass"), ("    probs = weights / xp.where(nothing, 1, total)",
          "    probs = weights / xp.where(nothing, 1, total)\n"
          "    probs = probs if cap is None else cap * xp.tanh(probs / cap)"), inference_only=True),
    _cap("attention-cap-without-slope", "the gradient of the scores passes the cap as if it were not there",
         (_CAP_SLOPE, "pass")),
    _cap("attention-scale-ignored", "scores are divided by sqrt(C) although another scale is given",
         ("** -0.5 if scale is None else scale", "** -0.5")),
    _cap("attention-scale-beside-the-root", "the given scale is applied on top of 1/sqrt(C) instead of in its place",
         ("** -0.5 if scale is None else scale", "** -0.5 * (1 if scale is None else scale)")),
]  # fmt: skip
CACHE = [
    Mutant(
        "cache-slot-off-by-one",
        "keys and values are written one slot after the one where their position is noted",
        "position p stands in slot p mod R: keys, values and positions alike",
        "op",
        (
            room("kv_cache", "k_cache[b, slot] = k[b, t]", "k_cache[b, (slot + 1) % k_cache.shape[1]] = k[b, t]"),
            room("kv_cache", "v_cache[b, slot] = v[b, t]", "v_cache[b, (slot + 1) % v_cache.shape[1]] = v[b, t]"),
        ),
    ),
    Mutant(
        "cache-slots-shifted",
        "position p stands in slot (p + 1) mod R, keys, values and positions alike: attention does not notice",
        "position p stands in slot p mod R, where others who read the cache look for it",
        "op",
        (room("kv_cache", "return b, t, positions[b, t] % slots", "return b, t, (positions[b, t] + 1) % slots"),),
    ),
    Mutant(
        "padding-written-to-the-cache",
        "padding (position -1) is written, to the slot -1 mod R of a real key",
        "write only what has a position of 0 or more",
        "op",
        (room("kv_cache", "(positions >= 0) & (positions > newest - slots)", "positions > newest - slots"),),
    ),
    Mutant(
        "chunk-written-before-it-is-attended",
        "a chunk is written to the rolling cache before its queries have attended: it overwrites keys they still need",
        "let a chunk attend to [cache ‖ new], and write it afterwards",
        "block",
        (
            Edit(
                "layers",
                "    keys, values, k_pos = k, v, batch.q_pos\n",
                "    ops.kv_cache.forward(cache.k, cache.v, k, v, batch.q_pos)\n"
                "    held = xp.full(cache.k.shape[:2], -1) if batch.cache_pos is None else batch.cache_pos.copy()\n"
                "    ops.kv_cache.write_positions(held, batch.q_pos)\n"
                "    return ops.attention.forward(q, cache.k, cache.v, batch.q_pos, held, W, scale, cap)\n",
            ),
        ),
        inference_only=True,
    ),
]
MUTANTS = [*ROPE, *ATTENTION, *CAP, *CACHE]
