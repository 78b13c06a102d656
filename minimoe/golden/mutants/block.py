"""Mistakes in how a block and the decoder put the ops together."""

from __future__ import annotations

from minimoe.golden.cases.draw import GROK
from minimoe.golden.mutants.mutant import Mutant
from minimoe.golden.mutants.planting import Edit

_NORM1 = "y, h, r = ops.rmsnorm.forward(x, layer.attention_norm, config.norm_eps, residual)"
_NORM2 = "y2, h2, r2 = ops.rmsnorm.forward(attended, layer.ffn_norm, config.norm_eps, h)"
_DNORM1 = "ops.rmsnorm.backward(dy, s.h, layer.attention_norm, s.r, dh2)"
_DNORM2 = "ops.rmsnorm.backward(dy2, s.h2, layer.ffn_norm, s.r2, dresidual)"
_RETURN = "return out, h2, routed, saved"
_ROUTE = "routed = route(ops, config, layer.feed_forward, y2, batch.active, choice)"
_LAST = "y, _, _ = ops.rmsnorm.forward(x, params.norm, config.norm_eps, residual)"
_LAST_TRAIN = "y, h, r = ops.rmsnorm.forward(x, params.norm, config.norm_eps, residual)"
_Q = "q = ops.rope.forward(q.reshape(N, config.num_heads, C), batch.cos, batch.sin)"
_K = "k = ops.rope.forward(k.reshape(N, config.num_kv_heads, C), batch.cos, batch.sin)"
_INTO = "q = ops.rope.forward_into_cache(q, k, v, batch.cos, batch.sin, cache.k, cache.v, batch.slots)"
_UNTURNED = "ops.kv_cache.forward(cache.k, cache.v, k.reshape(B, T, -1, C), v.reshape(B, T, -1, C), batch.q_pos)"
_DQ = "dq = ops.rope.backward(dq.reshape(N, -1, config.head_dim), batch.cos, batch.sin).reshape(N, -1)"
_DK = _DQ.replace("dq", "dk")
_TABLE = "ops.rope.table(q_pos.reshape(-1),"
_IMPORT = "from minimoe.backends import Backend"
_STREAM = "h = x + Attention(Norm(x)); out = h + Experts(Norm(h))"


def _layer(
    name: str, says: str, remedy: str, *edits: tuple[str, str], seen: str = "", inference_only: bool = False,
    tag: str = "",
) -> Mutant:  # fmt: skip
    return Mutant(
        name,
        says,
        remedy,
        "block",
        tuple(Edit("layers", *edit) for edit in edits),
        seen=seen,
        inference_only=inference_only,
        tag=tag,
    )


RESIDUALS = [
    _layer("attention-residual-forgotten", "what attention wrote is not added to the stream, but replaces it", _STREAM,
           (_NORM2, _NORM2.replace(" h)", " 0 * h)")), (_DNORM1, _DNORM1.replace("dh2", "None"))),
    _layer("experts-residual-forgotten", "what the experts wrote is not added to the stream, but replaces it", _STREAM,
           (_RETURN, _RETURN.replace("h2", "0 * h2")), (_DNORM2, _DNORM2.replace("dresidual", "None"))),
    _layer("residual-from-the-normed-states", "both residuals are taken after the norm instead of before it",
           _STREAM + ": the stream itself passes by",
           (_NORM2, _NORM2.replace(" h)", " y)")), (_RETURN, _RETURN.replace("h2", "y2")),
           (_DNORM2, _DNORM2.replace("dy2", "dy2 + dresidual").replace(", dresidual)", ", None)")),
           (_DNORM1, _DNORM1.replace("dy,", "dy + dh2,").replace(", dh2)", ", None)"))),
    _layer("residual-from-the-block-input",
           "the experts' output is added to the block's input: what attention wrote is lost",
           _STREAM, (_RETURN, _RETURN.replace("h2", "h")),
           (_DNORM2, _DNORM2.replace(", dresidual)", ", None)")),
           (_DNORM1, _DNORM1.replace("dh2)", "dh2 + dresidual)"))),
    _layer("experts-beside-attention", "experts read the normed block input, beside attention instead of after it",
           _STREAM, (_NORM2, f"{_NORM2.replace('attended', '0 * attended')}\n    h2 = attended + h"),
           seen="GPT-J and PaLM mean it so", inference_only=True),
    _layer("norm-after-instead-of-before",
           "the sums are normed (post-norm) instead of what attention and experts read (pre-norm)", _STREAM,
           (_NORM1, f"{_NORM1}\n    y = h"),
           (_NORM2, f"{_NORM2.replace('ffn_norm', 'attention_norm')}\n    h2 = y2"),
           (_RETURN, "h2 = h2 + out\n"
            "    out = h2 / xp_of(h2).sqrt((h2 * h2).mean(axis=-1, keepdims=True) + config.norm_eps) * layer.ffn_norm\n"
            "    return out, 0 * h2, routed, saved"),
           (_IMPORT, f"from minimoe.arrays import xp_of\n{_IMPORT}"),
           seen="the original transformer", inference_only=True),
]  # fmt: skip
NORMS = [
    _layer("attention-norm-skipped", "attention reads the stream without a norm", "norm the stream before attention",
           (_NORM1, f"{_NORM1}\n    y = h"), (_DNORM1, "dy + dh2, 0 * layer.attention_norm")),
    _layer("ffn-norm-skipped", "gate and experts read the stream without a norm",
           "norm the stream before gate and experts",
           (_NORM2, f"{_NORM2}\n    y2 = h2"), (_DNORM2, "dy2 + dresidual, 0 * layer.ffn_norm")),
    Mutant("final-norm-skipped", "the last norm is missing: the output matrix reads the stream as it is",
           "norm the stream before the output matrix", "block",
           (Edit("mixtral", _LAST, _LAST.replace("y, _, _", "_, y, _")),
            Edit("mixtral", _LAST_TRAIN, f"{_LAST_TRAIN}\n    y = h"),
            Edit("mixtral", "dh, dnorm = ops.rmsnorm.backward(dy, h, params.norm, r)",
                 "dh, dnorm = dy, 0 * params.norm"))),
    _layer("gate-reads-the-unnormed-states", "the gate reads the stream before its norm",
           "gate and experts read the same normed states",
           (_ROUTE, _ROUTE.replace("y2", "h2")), ("dweights, dlogits, s.y2, f.gate", "dweights, dlogits, s.h2, f.gate"),
           ("dy2 = dy2 + dx", "dresidual = dresidual + dx")),
    _layer("experts-read-the-unnormed-states", "the experts read the stream before its norm",
           "gate and experts read the same normed states",
           ("ops.experts.forward(y2,", "ops.experts.forward(h2,"),
           ("ops.experts.backward(dout, s.y2,", "ops.experts.backward(dout, s.h2,"),
           ("dgate = None\n", "dgate = None\n    dresidual, dy2 = dresidual + dy2, 0 * dy2\n")),
]  # fmt: skip
_POSTS = "h = x + Norm(Attention(Norm(x))); out = h + Norm(Experts(Norm(h)))"
_POST, _DPOST = "return y, (h, r)", "return ops.rmsnorm.backward(dy, h, weight, r)"
_POST1 = "attended, before = _post_norm(ops, config, attended, layer.attention_post_norm)"
_POST2 = "out, before2 = _post_norm(ops, config, out, layer.ffn_post_norm)"
_DPOST1 = "dattended, dattention_post_norm = _post_norm_backward(ops, dh2, layer.attention_post_norm, s.attended)"
_DPOST2 = "dout, dffn_post_norm = _post_norm_backward(ops, dout, layer.ffn_post_norm, s.written)"


def _one_post_norm(name: str, says: str, forward: str, backward: str) -> Mutant:
    """One of the two is left out, forward and backward."""
    written, d = forward.partition(",")[0], backward.partition(" = ")[2].split(", ")[1]
    weight, grad = forward.rpartition(", ")[2][:-1], backward.partition(" = ")[0].split(", ")
    return _layer(
        name, says, _POSTS, (forward, forward.replace(written, "_", 1)),
        (backward, f"{grad[0]}, {grad[1]} = {d}, 0 * {weight}"), tag=GROK,
    )  # fmt: skip


POST_NORMS = [
    _layer("post-norms-missing", "what attention and experts write joins the stream without a norm", _POSTS,
           (_POST, _POST.replace("y,", "x,")), (_DPOST, "return dy, 0 * weight"), seen="Mixtral means it so", tag=GROK),
    _one_post_norm("attention-post-norm-missing", "what attention writes joins the stream without a norm", _POST1,
                   _DPOST1),
    _one_post_norm("ffn-post-norm-missing", "what the experts write joins the stream without a norm", _POST2, _DPOST2),
    _layer("post-norms-of-the-sums", "the post-norms are of the stream's sums instead of what is added to it", _POSTS,
           (_POST1, _POST1.replace("config, attended", "config, attended + h")),
           (_NORM2, _NORM2.replace(" h)", " 0 * h)")),
           (_POST2, _POST2.replace("config, out", "config, out + h2")), (_RETURN, _RETURN.replace("h2", "0 * h2")),
           seen="the original transformer", inference_only=True, tag=GROK),
]  # fmt: skip
POSITIONS = [
    _layer("keys-not-rotated", "RoPE turns the queries only", "turn queries and keys",
           (_K, f"{_K.replace('k =', '_ =')}\n        k = k.reshape(N, config.num_kv_heads, C)"),
           (_INTO, f"{_INTO}\n        {_UNTURNED}"), (_DK, "dk = dk.reshape(N, -1)")),
    _layer("rope-missing", "queries and keys are not turned at all", "turn queries and keys by their positions",
           (_Q, f"{_Q.replace('q =', '_ =')}\n        q = q.reshape(N, config.num_heads, C)"),
           (_K, f"{_K.replace('k =', '_ =')}\n        k = k.reshape(N, config.num_kv_heads, C)"),
           (_INTO, _UNTURNED),
           (_DQ, "dq = dq.reshape(N, -1)"), (_DK, "dk = dk.reshape(N, -1)")),
    _layer("attention-scale-of-hidden-size", "attention scores are divided by sqrt(D) instead of sqrt(C)",
           "attention scores are q · k / sqrt(C), C the width of one head",
           ("q = q.reshape(B, T, config.num_heads, C)",
            "q = q.reshape(B, T, config.num_heads, C) * (C / config.hidden_size) ** 0.5"),
           (_DQ, _DQ.replace("dq.reshape(", "(config.head_dim / config.hidden_size) ** 0.5 * dq.reshape(", 1))),
    Mutant("positions-restarted", "rotary positions start at 0 in every chunk and at every new token",
           "positions go on where the cache ends", "block",
           (Edit("mixtral", _TABLE,
                 "ops.rope.table((q_pos if cache is None else xp_of(q_pos).where(q_pos < 0, -1, q_pos "
                 "- xp_of(q_pos).where(q_pos < 0, 2**31, q_pos).min(axis=1, keepdims=True))).reshape(-1),"),
            Edit("mixtral", _IMPORT, f"from minimoe.arrays import xp_of\n{_IMPORT}")),
           inference_only=True),
    Mutant("new-token-position-off-by-one", "tokens after the prompt are turned by one position too many",
           "the first new token takes the position after the prompt's last", "block",
           (Edit("mixtral", _TABLE,
                 "ops.rope.table((q_pos + (cache is not None and cache.lengths.any())).reshape(-1),"),),
           inference_only=True),
    Mutant("last-column-read", "the next token is read from the last column, where a shorter prompt has padding",
           "read the logits of each sequence's last unmasked token", "block",
           (Edit("mixtral", "inputs.positions.argmax(axis=1)", "T - 1"),), inference_only=True),
    Mutant("end-ignored", "a sequence that has produced the end-of-text token goes on", "repeat the end-of-text token",
           "block", (Edit("generate", "if config.eos_id is not None:", "if config.eos_id is not None and B < 0:"),),
           inference_only=True),
    Mutant("padding-attended-in-order", "attention does not look at the mask: padding has a position and is attended",
           "give padding the position -1: it neither sees nor is seen", "block",
           (Edit("layers", "context, lse = _attend(ops, config, q, k, v, batch, cache)",
                 "import dataclasses\n"
                 "    if cache is None:\n"
                 "        rows = ops.xp.broadcast_to(ops.xp.arange(T), (B, T))\n"
                 "        batch = dataclasses.replace(batch, q_pos=rows)\n"
                 "    context, lse = _attend(ops, config, q, k, v, batch, cache)"),),
           inference_only=True),
]  # fmt: skip
JITTER = [
    Mutant("jitter-left-on", "the router's noise is on outside of training: two runs differ",
           "draw noise in training only", "random",
           (Edit("layers", "noise = None if jitter is None else jitter(y2.shape)",
                 "import numpy as np\n    noise = ops.asarray(np.random.default_rng().uniform(0.9, 1.1, y2.shape))"),),
           seen="transformers' router_jitter_noise", inference_only=True),
]  # fmt: skip
MUTANTS = [*RESIDUALS, *NORMS, *POST_NORMS, *POSITIONS, *JITTER]
