"""What the golden kit asks an implementation to compute: the table of calls.

A *call* is one computation with named inputs, settings and outputs: an op (`gating`), its gradient (`gating.backward`),
a block, the whole model, one training step. Every part of the kit reads this table: the vectors are made by it from the
reference in float64, our backends are held against them through it, the noise that makes the bounds and the catalogue
of mistakes wrap the backend it is given, and adapters for other implementations fill in the same outputs by name.

A gradient call takes what the forward takes, and the gradients that arrive; nothing an implementation keeps in
between has a place in the contract. Outputs stand in execution order, so the first wrong one is nearest to the cause.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minimoe import generate, layers, mixtral
from minimoe.arrays import to_host
from minimoe.backends import Backend
from minimoe.config import ModelConfig
from minimoe.layers import Batch, Choice
from minimoe.params import LayerParams, Params, leaves, map_leaves, named, stack_experts
from minimoe.shapes import Array, Routing
from minimoe.trace import record

Arrays = dict[str, Array]


@dataclass(frozen=True)
class Tensor:
    """An input or output of a call.

    Attributes
    ----------
    name, letters : its name, and its shape in the letters of `minimoe.shapes`; a name with a `*` stands for several
    kind : "weight" (stored: in the bfloat16 profile it is bfloat16), "float" (computed), or "exact" (ids, positions)
    optional : an input that not every case has; an output that helps to find a mistake, but may be left out
    """

    name: str
    letters: str
    kind: str = "float"
    optional: bool = False


@dataclass(frozen=True)
class Call:
    """One entry of the table.

    Attributes
    ----------
    level : "op", "block", "model" or "training"
    says : one line
    inputs, settings, outputs : arrays, JSON values, arrays
    optional : settings that a case has only where it does something otherwise than Mixtral, as Grok-1 does
    compute : compute(ops, model, **inputs, **settings) -> {name: array}; `model` is (config, params), or None for ops
    """

    name: str
    level: str
    says: str
    inputs: tuple[Tensor, ...]
    settings: tuple[str, ...]
    outputs: tuple[Tensor, ...]
    compute: Callable[..., Arrays]
    optional: tuple[str, ...] = ()

    @property
    def gradient(self) -> bool:
        """Whether only an implementation that trains needs it."""
        return self.name.endswith(".backward") or self.level == "training" or self.name == "adamw"


@dataclass(frozen=True)
class GoldenModel:
    """The weights that block, model and training calls compute with."""

    config: ModelConfig
    params: Params


def run(
    call: str,
    ops: Backend,
    inputs: Mapping[str, Array],
    settings: Mapping[str, Any],
    model: GoldenModel | None = None,
) -> Arrays:
    """Compute a call on one of our backends: inputs and outputs are host arrays.

    Parameters
    ----------
    inputs : in the type to compute in (`cast` makes them); weights of ops as bfloat16 where they are stored so
    model : with weights of the storage type, on the host
    """
    if model is not None:
        model = GoldenModel(model.config, stack_experts(map_leaves(model.params, ops.asarray)))
    found = CALLS[call].compute(ops, model, **{name: ops.asarray(x) for name, x in inputs.items()}, **settings)
    return {name: np.asarray(to_host(x)) for name, x in found.items()}


def cast(call: str, inputs: Mapping[str, Array], compute: Any, store: Any) -> Arrays:
    """Return inputs with computed floats in the type `compute` and weights in the type `store`."""
    kinds = {tensor.name: tensor.kind for tensor in CALLS[call].inputs}
    wanted = {"float": compute, "weight": store}
    return {name: x.astype(wanted[kinds[name]]) if kinds[name] in wanted else x for name, x in inputs.items()}


# ---- ops


def _embedding(ops: Backend, _: Any, tokens: Array, table: Array) -> Arrays:
    return {"x": ops.embedding.forward(tokens, table)}


def _embedding_backward(ops: Backend, _: Any, tokens: Array, dx: Array, vocab_size: int) -> Arrays:
    return {"dtable": ops.embedding.backward(dx, tokens, vocab_size)}


def _rmsnorm(ops: Backend, _: Any, x: Array, weight: Array, eps: float, residual: Array | None = None) -> Arrays:
    y, h, _r = ops.rmsnorm.forward(x, weight, eps, residual)
    return {"y": y} if residual is None else {"h": h, "y": y}


def _rmsnorm_backward(
    ops: Backend, _: Any, x: Array, weight: Array, dy: Array, eps: float, residual: Array | None = None,
    dh: Array | None = None,
) -> Arrays:  # fmt: skip
    _y, h, r = ops.rmsnorm.forward(x, weight, eps, residual)
    dx, dweight = ops.rmsnorm.backward(dy, h, weight, r, dh)
    return {"dx": dx, "dweight": dweight}


def _linear(ops: Backend, _: Any, x: Array, w: Array) -> Arrays:
    return {"y": ops.linear.forward(x, [w])[0]}


def _linear_backward(ops: Backend, _: Any, x: Array, w: Array, dy: Array) -> Arrays:
    dx, (dw,) = ops.linear.backward([dy], x, [w])
    return {"dx": dx, "dw": dw}


def _rope(ops: Backend, _: Any, x: Array, positions: Array, theta: float) -> Arrays:
    cos, sin = ops.rope.table(positions, x.shape[-1], theta, x.dtype)
    return {"cos": cos, "sin": sin, "y": ops.rope.forward(x, cos, sin)}


def _rope_backward(ops: Backend, _: Any, dy: Array, positions: Array, theta: float) -> Arrays:
    cos, sin = ops.rope.table(positions, dy.shape[-1], theta, dy.dtype)
    return {"dx": ops.rope.backward(dy, cos, sin)}


def _attention(
    ops: Backend, _: Any, q: Array, k: Array, v: Array, q_pos: Array, k_pos: Array, window: int | None,
    scale: float | None = None, cap: float | None = None,
) -> Arrays:  # fmt: skip
    inner = ops.attention.explain(q, k, q_pos, k_pos, window, scale, cap)
    return {**inner, "out": ops.attention.forward(q, k, v, q_pos, k_pos, window, scale, cap)[0]}


def _attention_backward(
    ops: Backend, _: Any, q: Array, k: Array, v: Array, dout: Array, q_pos: Array, k_pos: Array, window: int | None,
    scale: float | None = None, cap: float | None = None,
) -> Arrays:  # fmt: skip
    out, lse = ops.attention.forward(q, k, v, q_pos, k_pos, window, scale, cap)
    grads = ops.attention.backward(dout, q, k, v, q_pos, k_pos, window, out, lse, scale, cap)
    return dict(zip(("dq", "dk", "dv"), grads, strict=True))


def _kv_cache(
    ops: Backend, _: Any, k_cache: Array, v_cache: Array, cache_positions: Array, k: Array, v: Array, positions: Array
) -> Arrays:
    k_cache, v_cache, cache_positions = (ops.xp.array(x) for x in (k_cache, v_cache, cache_positions))
    ops.kv_cache.forward(k_cache, v_cache, k, v, positions)
    ops.kv_cache.write_positions(cache_positions, positions)
    return {"k_cache": k_cache, "v_cache": v_cache, "cache_positions": cache_positions}


def _gating(
    ops: Backend, _: Any, x: Array, gate: Array, k: int, active: Array | None = None, ids: Array | None = None,
    renormalise: bool = True, disabled: Sequence[int] = (),
) -> Arrays:  # fmt: skip
    allowed = None
    if disabled:
        allowed = ops.asarray(~np.isin(np.arange(gate.shape[0]), disabled))
    found = ops.gating.forward(x, gate, k, active, allowed, ids, renormalise)
    return dict(zip(("logits", "ids", "weights"), found, strict=True))


def _gating_backward(
    ops: Backend, _: Any, x: Array, gate: Array, ids: Array, dweights: Array, dlogits: Array | None = None,
    renormalise: bool = True,
) -> Arrays:  # fmt: skip
    logits, _ids, weights = ops.gating.forward(x, gate, ids.shape[1], None, None, ids, renormalise)
    dx, dgate = ops.gating.backward(dweights, dlogits, x, gate, ids, weights, None if renormalise else logits)
    return {"dx": dx, "dgate": dgate}


def _experts(
    ops: Backend, _: Any, x: Array, w1: Array, w2: Array, w3: Array, ids: Array, weights: Array,
    activation: str = "silu",
) -> Arrays:  # fmt: skip
    inner = ops.experts.explain(x, w1, w2, w3, ids, weights, activation)
    return {**inner, "out": ops.experts.forward(x, w1, w2, w3, ids, weights, False, activation)[0]}


def _experts_backward(
    ops: Backend, _: Any, x: Array, w1: Array, w2: Array, w3: Array, ids: Array, weights: Array, dout: Array,
    activation: str = "silu",
) -> Arrays:  # fmt: skip
    _out, saved = ops.experts.forward(x, w1, w2, w3, ids, weights, True, activation)
    assert saved is not None
    grads = ops.experts.backward(dout, x, w1, w2, w3, weights, saved, activation)
    return dict(zip(("dx", "dw1", "dw2", "dw3", "dweights"), grads, strict=True))


def _cross_entropy(ops: Backend, _: Any, logits: Array, targets: Array) -> Arrays:
    loss, losses, _lse = ops.cross_entropy.forward(logits, targets)
    return {"losses": losses, "loss": np.asarray(loss)}


def _cross_entropy_backward(ops: Backend, _: Any, logits: Array, targets: Array) -> Arrays:
    _loss, _losses, lse = ops.cross_entropy.forward(logits, targets)
    return {"dlogits": ops.cross_entropy.backward(1.0, logits, targets, lse)}


def _balance_loss(ops: Backend, _: Any, logits: Array, ids: Array, form: str, active: Array | None = None) -> Arrays:
    return {"loss": np.asarray(ops.balance_loss.forward(logits, ids, active, form))}


def _balance_loss_backward(
    ops: Backend, _: Any, logits: Array, ids: Array, form: str, active: Array | None = None
) -> Arrays:
    return {"dlogits": ops.balance_loss.backward(1.0, logits, ids, active, form)}


def _adamw(ops: Backend, _: Any, w: Array, g: Array, m: Array, v: Array, **settings: float) -> Arrays:
    w, m, v = (ops.xp.array(x) for x in (w, m, v))
    ops.adamw.forward(w, g, m, v, **settings)  # type: ignore[arg-type]
    return {"m": m, "v": v, "w": w}


def _sampling(ops: Backend, _: Any, logits: Array, uniform: Array, temperature: float, top_p: float) -> Arrays:
    return {"ids": ops.sampling.forward(logits, temperature, top_p, uniform)}


# ---- the block, the model, training


def _block(
    ops: Backend, model: GoldenModel, x: Array, layer: int, positions: Array | None = None,
    mask: Array | None = None, ids: Array | None = None,
) -> Arrays:  # fmt: skip
    """One block is a model of one layer whose embedding table holds the states: the trace names all of its inside."""
    (B, T, D), params = x.shape, model.params
    config = model.config.replace(
        num_layers=1, vocab_size=B * T, tie_embeddings=True, embedding_multiplier=1.0, bos_id=None, eos_id=None
    )
    alone = Params(x.reshape(B * T, D), [params.layers[layer]], params.norm, None)
    rows = np.arange(B * T).reshape(B, T)
    inputs = mixtral.check_inputs(rows, B * T, to_host(mask), to_host(positions))
    inputs = replace(inputs, tokens=rows)  # padding keeps its states: an implementation that attends to it reads them
    choose = None if ids is None else [Choice(ids=ids)]
    arrays = record(ops, config, alone, inputs, choose=choose).arrays
    found = {name.removeprefix("layers.0."): a for name, a in arrays.items() if name.startswith("layers.0.")}
    return found | {"out": found["out"].reshape(B, T, D)}


def _block_backward(ops: Backend, model: GoldenModel, x: Array, dout: Array, layer: int, ids: Array) -> Arrays:
    (B, T, D), config, params = x.shape, model.config, model.params.layers[layer]
    x, dout = x.reshape(B * T, D), dout.reshape(B * T, D)
    q_pos = ops.asarray(np.broadcast_to(np.arange(T), (B, T)))
    batch = Batch(q_pos, *ops.rope.table(q_pos.reshape(-1), config.head_dim, config.rope_theta, x.dtype))
    choice = Choice(ids=ids)
    _out, _residual, _routed, saved = layers.forward(ops, config, params, x, None, batch, choice=choice, keep=True)
    assert saved is not None
    dx, grads = layers.backward(ops, config, params, batch, saved, dout, dout, None)
    return {"dx": dx.reshape(B, T, D)} | {f"grads.{name}": g for name, g in _named_layer(grads)}


def _model(
    ops: Backend, model: GoldenModel, tokens: Array, mask: Array | None = None, positions: Array | None = None,
    ids: Array | None = None,
) -> Arrays:  # fmt: skip
    inputs = mixtral.check_inputs(to_host(tokens), model.config.vocab_size, to_host(mask), to_host(positions))
    return record(ops, model.config, model.params, inputs, choose=_choices(ops, model, ids, tokens.size)).arrays


def _model_chunks(ops: Backend, model: GoldenModel, tokens: Array, chunks: list[int], max_length: int) -> Arrays:
    config, params = model.config, model.params
    cache = mixtral.new_cache(ops, config, params, len(tokens), max_length)
    found: dict[str, list[Array]] = {}
    start = 0
    for length in chunks:
        piece = to_host(tokens)[:, start : start + length]
        inputs = mixtral.check_inputs(piece, config.vocab_size, cache=cache)
        logits, routed = mixtral.forward(ops, config, params, inputs, cache=cache)
        for i, layer in enumerate([] if config.dense else routed):
            for name in ("logits", "ids", "weights"):
                x = getattr(layer, name).reshape(*piece.shape, -1)  # (B T, _) -> (B, T, _)
                found.setdefault(f"layers.{i}.gating.{name}", []).append(x)
        found.setdefault("logits", []).append(logits)
        start += length
    joined = {name: ops.xp.concatenate(parts, axis=1) for name, parts in found.items()}
    return {name: x if name == "logits" else x.reshape(-1, x.shape[-1]) for name, x in joined.items()}


def _model_generate(
    ops: Backend, model: GoldenModel, tokens: Array, uniform: Array, temperature: float, top_p: float,
    mask: Array | None = None,
) -> Arrays:  # fmt: skip
    steps = generate.generate_ids(
        ops, model.config, model.params, to_host(tokens), mask=to_host(mask), max_new_tokens=len(uniform),
        temperature=temperature, top_p=top_p, seed=_Given(to_host(uniform)),
    )  # fmt: skip
    return {"ids": np.stack(list(steps), axis=1)}


class _Given:
    """Stands in for a random generator: hands out the rows of `uniform` (steps, B)."""

    def __init__(self, uniform: Array) -> None:
        self._rows = iter(uniform)

    def random(self, size: int) -> Array:
        return next(self._rows)


def _training(
    ops: Backend, model: GoldenModel, tokens: Array, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, clip: float, mask: Array | None = None, ids: Array | None = None,
) -> Arrays:  # fmt: skip
    config = model.config
    inputs = mixtral.check_inputs(to_host(tokens), config.vocab_size, to_host(mask))
    choose = _choices(ops, model, ids, tokens.size)
    losses, grads, _ = mixtral.loss_and_grads(ops, config, model.params, inputs, choose=choose)
    found: dict[str, Any] = {
        "cross_entropy": losses.cross_entropy,
        "balance_loss": losses.balance,
        "loss": losses.total,
    }
    found |= {f"grads.{name}": ops.xp.array(g) for name, g in named(grads)}
    flat = dict(leaves(grads))
    norm = math.sqrt(sum(ops.adamw.squared_norm(g) for g in flat.values()))
    params = map_leaves(model.params, ops.xp.array)
    for name, w in leaves(params):
        ops.adamw.forward(
            w, flat[name], ops.xp.zeros_like(w), ops.xp.zeros_like(w), step=1, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
            weight_decay=weight_decay if w.ndim > 1 else 0.0, scale=min(1.0, clip / norm),
        )  # fmt: skip
    found |= {"gradient_norm": norm} | {f"updated.{name}": w for name, w in named(params)}
    return {name: np.asarray(x) if isinstance(x, float) else x for name, x in found.items()}


def _choices(ops: Backend, model: GoldenModel, ids: Array | None, N: int) -> list[Choice] | None:
    return mixtral.choices(ops, model.config, N, None if ids is None else Routing(to_host(ids)), ())


def _named_layer(grads: LayerParams) -> list[tuple[str, Array]]:
    whole = Params(np.zeros((0, 0)), [grads], np.zeros(0), None)
    return [(name.removeprefix("layers.0."), g) for name, g in named(whole) if name.startswith("layers.0.")]


# ---- the table


def _f(name: str, letters: str, optional: bool = False) -> Tensor:
    return Tensor(name, letters, "float", optional)


def _w(name: str, letters: str) -> Tensor:
    return Tensor(name, letters, "weight")


def _i(name: str, letters: str, optional: bool = False) -> Tensor:
    return Tensor(name, letters, "exact", optional)


_QKV = (_f("q", "B T H C"), _w("k", "B S K C"), _w("v", "B S K C"))
_POS = (_i("q_pos", "B T"), _i("k_pos", "B S"))
_EXPERTS = (_w("w1", "E F D"), _w("w2", "E D F"), _w("w3", "E F D"), _i("ids", "N k"), _f("weights", "N k"))
_TRACE = (
    _f("tok_embeddings", "N D", True), _f("layers.*", "see `minimoe.trace`", True), _f("norm", "N D", True),
    _f("logits", "B T V"),
)  # fmt: skip
_TABLE = [
    Call("embedding", "op", "x[n] = table[tokens[n]]", (_i("tokens", "N"), _w("table", "V D")), (),
         (_f("x", "N D"),), _embedding),
    Call("embedding.backward", "op", "add every dx[n] to row tokens[n]", (_i("tokens", "N"), _f("dx", "N D")),
         ("vocab_size",), (_f("dtable", "V D"),), _embedding_backward),
    Call("rmsnorm", "op", "y = h · weight / sqrt(mean(h²) + eps), h = x + residual",
         (_f("x", "N D"), _w("weight", "D"), _f("residual", "N D", True)), ("eps",),
         (_f("h", "N D", True), _f("y", "N D")), _rmsnorm),
    Call("rmsnorm.backward", "op", "gradients of h and of weight; dh is what reaches h on its other way",
         (_f("x", "N D"), _w("weight", "D"), _f("dy", "N D"), _f("residual", "N D", True), _f("dh", "N D", True)),
         ("eps",), (_f("dx", "N D"), _f("dweight", "D")), _rmsnorm_backward),
    Call("linear", "op", "y = x · wᵀ", (_f("x", "N I"), _w("w", "O I")), (), (_f("y", "N O"),), _linear),
    Call("linear.backward", "op", "dx = dy · w, dw = dyᵀ · x", (_f("x", "N I"), _w("w", "O I"), _f("dy", "N O")), (),
         (_f("dx", "N I"), _f("dw", "O I")), _linear_backward),
    Call("rope", "op", "rotate the pairs (i, i + C/2) by position · theta^(-2i/C)",
         (_f("x", "N H C"), _i("positions", "N")), ("theta",),
         (_f("cos", "N c", True), _f("sin", "N c", True), _f("y", "N H C")), _rope),
    Call("rope.backward", "op", "rotate back", (_f("dy", "N H C"), _i("positions", "N")), ("theta",),
         (_f("dx", "N H C"),), _rope_backward),
    Call("attention", "op", "key s is visible iff k_pos[s] >= 0 and 0 <= q_pos[t] - k_pos[s] < window; scale 1/√C",
         (*_QKV, *_POS), ("window",),
         (_f("scores", "B H T S", True), _f("probs", "B H T S", True), _f("out", "B T H C")), _attention,
         ("scale", "cap")),
    Call("attention.backward", "op", "gradients of q, k and v", (*_QKV, _f("dout", "B T H C"), *_POS), ("window",),
         (_f("dq", "B T H C"), _f("dk", "B S K C"), _f("dv", "B S K C")), _attention_backward, ("scale", "cap")),
    Call("kv_cache", "op", "write position p to slot p mod R; padding (position -1) is not written",
         (_w("k_cache", "B R K C"), _w("v_cache", "B R K C"), _i("cache_positions", "B R"), _w("k", "B T K C"),
          _w("v", "B T K C"), _i("positions", "B T")), (),
         (_i("k_cache", "B R K C"), _i("v_cache", "B R K C"), _i("cache_positions", "B R")), _kv_cache),
    Call("gating", "op", "top-k of x · gateᵀ, ties to the lower id; softmax over the chosen; `ids` given: forced",
         (_f("x", "N D"), _w("gate", "E D"), _i("active", "N", True), _i("ids", "N k", True)), ("k",),
         (_f("logits", "N E"), _i("ids", "N k"), _f("weights", "N k")), _gating, ("renormalise", "disabled")),
    Call("gating.backward", "op", "gradients of x and gate for the choice `ids`; dlogits comes from the balance loss",
         (_f("x", "N D"), _w("gate", "E D"), _i("ids", "N k"), _f("dweights", "N k"), _f("dlogits", "N E", True)), (),
         (_f("dx", "N D"), _f("dgate", "E D")), _gating_backward, ("renormalise",)),
    Call("experts", "op", "out = Σ over slots of weight · w2·(silu(w1·x) ⊙ w3·x); ids -1: not routed",
         (_f("x", "N D"), *_EXPERTS), (),
         (_f("hidden", "N k F", True), _f("slots", "N k D", True), _f("out", "N D")), _experts, ("activation",)),
    Call("experts.backward", "op", "gradients of x, of every expert's weights, and of the gate weights",
         (_f("x", "N D"), *_EXPERTS, _f("dout", "N D")), (),
         (_f("dx", "N D"), _f("dw1", "E F D"), _f("dw2", "E D F"), _f("dw3", "E F D"), _f("dweights", "N k")),
         _experts_backward, ("activation",)),
    Call("cross_entropy", "op", "losses[n] = logsumexp(logits[n]) - logits[n, targets[n]] in nats, 0 where the target "
         "is -1; loss is the mean over the others", (_f("logits", "N V"), _i("targets", "N")), (),
         (_f("losses", "N", True), _f("loss", "")), _cross_entropy),
    Call("cross_entropy.backward", "op", "gradient of the mean loss", (_f("logits", "N V"), _i("targets", "N")), (),
         (_f("dlogits", "N V"),), _cross_entropy_backward),
    Call("balance_loss", "op", "the form is concatenated (Hugging Face's), per_layer or switch",
         (_f("logits", "L N E"), _i("ids", "L N k"), _i("active", "N", True)), ("form",), (_f("loss", ""),),
         _balance_loss),
    Call("balance_loss.backward", "op", "gradient of the balance loss; the choices are constants",
         (_f("logits", "L N E"), _i("ids", "L N k"), _i("active", "N", True)), ("form",), (_f("dlogits", "L N E"),),
         _balance_loss_backward),
    Call("adamw", "op", "step number `step` with the gradient scale · g, decay decoupled",
         tuple(_f(name, "I O") for name in "wgmv"),
         ("step", "lr", "beta1", "beta2", "eps", "weight_decay", "scale"),
         (_f("m", "I O"), _f("v", "I O"), _f("w", "I O")), _adamw),
    Call("sampling", "op", "temperature 0: argmax, ties to the lowest id; else by the inverse of the nucleus's "
         "cumulative distribution", (_f("logits", "B V"), _f("uniform", "B")), ("temperature", "top_p"),
         (_i("ids", "B"),), _sampling),
    Call("block", "block", "one block: out = h + Experts(Norm(h)), h = x + Attention(Norm(x)); `ids` given: forced",
         (_f("x", "B T D"), _i("positions", "B T", True), _i("mask", "B T", True), _i("ids", "N k", True)), ("layer",),
         (_f("*", "see `minimoe.trace`", True), _f("out", "B T D")), _block),
    Call("block.backward", "block", "gradients of x and of every weight of the block, for the choice `ids`",
         (_f("x", "B T D"), _f("dout", "B T D"), _i("ids", "N k")), ("layer",),
         (_f("dx", "B T D"), _f("grads.*", "of each weight")), _block_backward),
    Call("model", "model", "logits of every token; `ids` given: these experts, layer by layer",
         (_i("tokens", "B T"), _i("mask", "B T", True), _i("positions", "B T", True), _i("ids", "L N k", True)), (),
         _TRACE, _model),
    Call("model.chunks", "model", "the same tokens fed in chunks through a key/value cache",
         (_i("tokens", "B T"),), ("chunks", "max_length"),
         (_f("layers.*.gating.*", "see `minimoe.trace`", True), _f("logits", "B T V")), _model_chunks),
    Call("model.generate", "model", "continue the prompts; uniform[step, b] is the random number of step and row",
         (_i("tokens", "B T"), _f("uniform", "steps B"), _i("mask", "B T", True)), ("temperature", "top_p"),
         (_i("ids", "B steps"),), _model_generate),
    Call("training", "training", "losses, every gradient, and the weights after one AdamW step from zero moments",
         (_i("tokens", "B T"), _i("mask", "B T", True), _i("ids", "L N k", True)),
         ("lr", "beta1", "beta2", "eps", "weight_decay", "clip"),
         (_f("cross_entropy", ""), _f("balance_loss", ""), _f("loss", ""), _f("grads.*", "of each weight"),
          _f("gradient_norm", ""), _f("updated.*", "of each weight")), _training),
]  # fmt: skip
CALLS: dict[str, Call] = {call.name: call for call in _TABLE}
