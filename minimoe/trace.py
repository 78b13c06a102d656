"""Tracing: every named intermediate of a forward pass, in execution order.

The model carries no code for this. `Recorder` wraps a backend and writes down the inputs and outputs of every op call,
copied; `schedule` says which call of which op produces which name. What happens inside an op (attention scores, SwiGLU
hidden states) is computed from its recorded inputs by the room's `explain`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from minimoe import mixtral
from minimoe.arrays import to_host
from minimoe.backends import ROOMS, Backend
from minimoe.config import ModelConfig
from minimoe.layers import Choice
from minimoe.params import Params, leaves
from minimoe.shapes import Array, Routing


@dataclass(frozen=True, eq=False)
class Call:
    """One op call: the room, its function, its arguments by name, and what it returned. Arrays are host copies."""

    room: str
    function: str
    inputs: dict[str, Any]
    output: Any


@dataclass(frozen=True, eq=False)
class Trace(Mapping[str, Array]):
    """Named intermediates, in execution order; `trace["layers.0.gating.logits"]`.

    Inner arrays of an op are the reference's: in bfloat16 they are shown before they are rounded as operands. Names per
    layer and shapes: attention.q (N, H·C), attention.k and v (N, K·C), q_rotated (N, H, C), k_rotated (N, K, C), scores
    and probs (B, H, T, S), context (N, H·C), gating.logits (N, E), gating.ids and weights (N, k), experts.hidden
    (N, k, F), experts.slots (N, k, D), everything else (N, D); logits (B, T, V).

    Attributes
    ----------
    arrays : {name: array}, on the host
    calls : the op calls behind them
    routing : Routing of all layers, or None for a dense model
    tokens : (B, T) token ids
    """

    arrays: dict[str, Array]
    calls: list[Call]
    routing: Routing | None
    tokens: Array

    def __getitem__(self, name: str) -> Array:
        try:
            return self.arrays[name]
        except KeyError:
            raise KeyError(f"no {name!r} in this trace; names are like {', '.join(list(self.arrays)[:4])}, …") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def __repr__(self) -> str:
        return f"Trace of tokens {self.tokens.shape}: {len(self)} arrays, {', '.join(list(self)[:3])}, …"

    __eq__, __hash__ = object.__eq__, object.__hash__  # a mapping's own would compare arrays


class Recorder:
    """A list of calls, and the backend wrapper that fills it. Weights do not change: they are kept, not copied."""

    def __init__(self, params: Params) -> None:
        self.calls: list[Call] = []
        # Held, or their ids could be given to others; a dense model's experts are handed on as a stack of one.
        held = [leaf for _, leaf in leaves(params)]
        held += [w for p in params.layers for w in (p.feed_forward.w1, p.feed_forward.w2, p.feed_forward.w3)]
        self._weights = {id(leaf): leaf for leaf in held}

    def wrap(self, ops: Backend) -> Backend:
        """Return `ops` with every function of every room recorded."""
        return dataclasses.replace(ops, **{room: self._room(room, getattr(ops, room)) for room in ROOMS})

    def _room(self, room: str, functions: Any) -> Any:
        return SimpleNamespace(**{name: self._function(room, name, f) for name, f in vars(functions).items()})

    def _function(self, room: str, name: str, function: Any) -> Any:
        signature = inspect.signature(function)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            inputs = {key: self._copy(value) for key, value in bound.arguments.items()}
            output = function(*args, **kwargs)
            self.calls.append(Call(room, name, inputs, self._copy(output)))
            return output

        return recorded

    def _copy(self, value: Any) -> Any:
        """Copy arrays to the host: buffers may be reused, and a cache changes in place."""
        if id(value) in self._weights:
            return value
        if isinstance(value, tuple | list):
            return type(value)(self._copy(item) for item in value)
        return np.array(to_host(value)) if hasattr(value, "dtype") and hasattr(value, "shape") else value


def schedule(config: ModelConfig) -> list[tuple[str, str, str]]:
    """Return (room, function, prefix of names) of every op call in a forward pass without cache, in order."""
    calls = [("rope", "table", "rope"), ("embedding", "forward", "tok_embeddings")]
    for i in range(config.num_layers):
        layer = f"layers.{i}."
        calls += [
            ("rmsnorm", "forward", layer + "attention_norm"),
            ("linear", "forward", layer + "attention.qkv"),
            ("rope", "forward", layer + "attention.q_rotated"),
            ("rope", "forward", layer + "attention.k_rotated"),
            ("attention", "forward", layer + "attention"),
            ("linear", "forward", layer + "attention.out"),
            ("rmsnorm", "forward", layer + "ffn_norm"),
        ]
        if not config.dense:
            calls.append(("gating", "forward", layer + "gating"))
        calls.append(("experts", "forward", layer + "experts"))
    return [*calls, ("rmsnorm", "forward", "norm"), ("linear", "forward", "logits")]


def record(
    ops: Backend,
    config: ModelConfig,
    params: Params,
    inputs: mixtral.Inputs,
    *,
    choose: Sequence[Choice] | None = None,
) -> Trace:
    """Run a forward pass, its routing imposed where `choose` is given, and name what it computed."""
    recorder = Recorder(params)
    _, routed = mixtral.forward(recorder.wrap(ops), config, params, inputs, choose=choose)
    expected = schedule(config)
    made = [(call.room, call.function) for call in recorder.calls]
    assert made == [(room, function) for room, function, _ in expected], "the schedule does not match the model"
    arrays: dict[str, Array] = {}
    for call, (_, _, prefix) in zip(recorder.calls, expected, strict=True):
        arrays |= _names(ops, config, call, prefix)
    B, T = inputs.tokens.shape
    arrays["logits"] = arrays["logits"].reshape(B, T, -1)
    routing = mixtral.collect_routing(ops, routed)
    if routing is not None:
        routing = Routing(to_host(routing.ids), to_host(routing.weights), to_host(routing.logits))
    return Trace(_in_order(config, arrays), recorder.calls, routing, inputs.tokens)


def names(config: ModelConfig) -> list[str]:
    """Return the names of a trace, in execution order."""
    found = ["tok_embeddings"]
    for i in range(config.num_layers):
        inner = ["attention_norm", *(f"attention.{n}" for n in ("q", "k", "v", "q_rotated", "k_rotated"))]
        inner += [*(f"attention.{n}" for n in ("scores", "probs", "context", "out")), "attention_residual", "ffn_norm"]
        if not config.dense:
            inner += [f"gating.{n}" for n in ("logits", "ids", "weights")]
        inner += ["experts.hidden", "experts.slots", "experts.out", "out"]
        found += [f"layers.{i}.{name}" for name in inner]
    return [*found, "norm", "logits"]


def _in_order(config: ModelConfig, arrays: dict[str, Array]) -> dict[str, Array]:
    return {name: arrays[name] for name in names(config)}


def _names(ops: Backend, config: ModelConfig, call: Call, prefix: str) -> dict[str, Array]:
    """The named arrays that one call yields."""
    out, given = call.output, call.inputs
    if call.room == "rmsnorm":
        named = {prefix: out[0]}
        layer, _, norm = prefix.rpartition(".")
        if norm == "ffn_norm":
            named[f"{layer}.attention_residual"] = out[1]
        else:  # this norm makes the sum that ended the block before it
            number = config.num_layers if prefix == "norm" else int(layer.rpartition(".")[2])
            if number:
                named[f"layers.{number - 1}.out"] = out[1]
        return named
    if prefix.endswith("attention.qkv"):
        return dict(zip((prefix[:-3] + name for name in "qkv"), out, strict=True))
    if call.room == "linear":
        return {prefix: out[0]}
    if call.room == "attention":
        inner = ops.attention.explain(*(given[name] for name in ("q", "k", "q_pos", "k_pos", "window")))
        B, T, H, C = out[0].shape
        return {f"{prefix}.{n}": a for n, a in inner.items()} | {f"{prefix}.context": out[0].reshape(B * T, H * C)}
    if call.room == "gating":
        return {f"{prefix}.{name}": a for name, a in zip(("logits", "ids", "weights"), out, strict=True)}
    if call.room == "experts":
        w1, w2, w3 = (_on_host(given[name]) for name in ("w1", "w2", "w3"))
        inner = ops.experts.explain(given["x"], w1, w2, w3, given["ids"], given["weights"])
        return {f"{prefix}.{n}": a for n, a in inner.items()} | {f"{prefix}.out": out[0]}
    return {prefix: out} if prefix != "rope" else {}


def _on_host(weights: Any) -> Any:
    return [to_host(w) for w in weights] if isinstance(weights, list) else to_host(weights)
