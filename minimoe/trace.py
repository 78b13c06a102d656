"""Tracing: every named intermediate of a forward pass, in execution order.

The model carries no code for this. `Recorder` wraps a backend and hands on every op call, its arrays copied; the static
`schedule` says which call produces which names. What happens inside an op (attention scores, SwiGLU hidden states) is
computed from its recorded inputs by the room's `explain`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from minimoe import mixtral, schedule
from minimoe.arrays import to_host
from minimoe.backends import ROOMS, Backend
from minimoe.checkpoint import load_tensors, save_tensors
from minimoe.checkpoint.memory import free_memory
from minimoe.config import ModelConfig
from minimoe.layers import Choice
from minimoe.params import Params, leaves
from minimoe.placement import explained
from minimoe.schedule import Cost, Step, names
from minimoe.shapes import Array, Routing


class TraceError(ValueError):
    """A trace that cannot be made or read; the message says what would be right."""


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

    Inner arrays of an op are the reference's: in bfloat16 they are shown before they are rounded as operands. Shapes:
    `minimoe.schedule.letters(name)`.

    Attributes
    ----------
    config : ModelConfig
    tokens, mask : (B, T) token ids; False = padding
    routing : Routing of all layers, or None for a dense model
    arrays : {name: array}, on the host; those that were asked for
    stored : the type in which the weights are stored, by name
    """

    config: ModelConfig
    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    routing: Routing | None
    arrays: dict[str, Array]
    stored: str

    def __getitem__(self, name: str) -> Array:
        try:
            return self.arrays[name]
        except KeyError:
            known = list(self.arrays) or ["(nothing)"]
            raise KeyError(f"no {name!r} in this trace; names are like {', '.join(known[:4])}, …") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def __repr__(self) -> str:
        return f"Trace of tokens {self.tokens.shape}: {len(self)} arrays, {', '.join(list(self)[:3])}, …"

    __eq__, __hash__ = object.__eq__, object.__hash__  # a mapping's own would compare arrays

    @property
    def steps(self) -> list[Step]:
        """Every op call of the pass: its equation, and the names of what it reads and writes."""
        return schedule.schedule(self.config)

    def cost(self, step: Step) -> Cost:
        """Count floating-point operations and bytes of one step, for these tokens and this routing."""
        B, T = self.tokens.shape
        held = self.mask.sum(axis=1)
        seen = np.minimum(np.arange(1, T + 1), self.config.sliding_window or T)  # keys that the t-th token sees
        visible = sum(int(seen[:length].sum()) for length in held)
        used = 1
        if self.routing is not None and step.layer is not None:
            used = len(np.unique(self.routing.ids[step.layer][self.routing.ids[step.layer] >= 0]))
        stored = {"bfloat16": 2, "float32": 4, "float64": 8, "int8": 4}[self.stored]
        return schedule.cost(
            self.config, step, B, T, visible=visible, experts=used, stored=stored, computed=max(stored, 4),
            int8=self.stored == "int8",
        )  # fmt: skip

    def summary(self) -> str:
        """Return a table of all steps: what each computes, the shapes it writes, its operations and bytes."""
        rows = [("step", "writes", "MFLOP", "kB", "equation")]
        for step in self.steps:
            cost, meaning = self.cost(step), schedule.sizes(self.config, *self.tokens.shape)
            shapes = [
                "×".join(str(meaning[letter]) for letter in schedule.letters(name).split()) for name in step.writes
            ]
            rows.append(
                (step.name, ", ".join(shapes), f"{cost.flops / 1e6:.3f}", f"{cost.bytes / 1e3:.1f}", step.equation)
            )
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}" for a, b, c, d, e in rows
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the arrays under their names; tokens, mask and routing beside them."""
        routing = {} if self.routing is None else dataclasses.asdict(self.routing)
        extra = {"tokens": self.tokens, "mask": self.mask, **{f"routing.{name}": x for name, x in routing.items()}}
        metadata = {"minimoe": "trace 1", "config": json.dumps(dataclasses.asdict(self.config)), "stored": self.stored}
        save_tensors(path, {**self.arrays, **extra}, metadata)

    @staticmethod
    def load(path: str | Path) -> Trace:
        """Read what `save` wrote.

        Raises
        ------
        CheckpointError
            If the file is missing or damaged.
        TraceError
            If it holds something else than a trace.
        """
        from safetensors import safe_open

        tensors = load_tensors(path)
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
        if metadata.get("minimoe") != "trace 1":
            raise TraceError(f"{path}: holds no trace that this version wrote")
        config = ModelConfig(**json.loads(metadata["config"]))
        parts = {name: tensors.pop(f"routing.{name}", None) for name in ("ids", "weights", "logits")}
        routing = None if parts["ids"] is None else Routing(**parts)
        tokens, mask = tensors.pop("tokens"), tensors.pop("mask")
        arrays = {name: tensors[name] for name in names(config) if name in tensors}
        return Trace(config, tokens, mask, routing, arrays, metadata["stored"])


class Recorder:
    """A backend wrapper that hands every call on. Weights do not change: they are handed on as they are, not copied."""

    def __init__(self, params: Params, take: Callable[[Call], None]) -> None:
        self._take = take
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
            self._take(Call(room, name, inputs, self._copy(output)))
            return output

        return recorded

    def _copy(self, value: Any) -> Any:
        """Copy arrays to the host: buffers may be reused, and a cache changes in place."""
        if id(value) in self._weights:
            return value
        if isinstance(value, tuple | list):
            return type(value)(self._copy(item) for item in value)
        return np.array(to_host(value)) if hasattr(value, "dtype") and hasattr(value, "shape") else value


def record(
    ops: Backend,
    config: ModelConfig,
    params: Params,
    inputs: mixtral.Inputs,
    *,
    choose: Sequence[Choice] | None = None,
    only: str | Iterable[str] = "*",
) -> Trace:
    """Run a forward pass and name what it computes.

    Parameters
    ----------
    choose : the routing to impose, one a layer
    only : the names to keep, or patterns of them: `"layers.*.gating.*"`; the routing is always kept

    Raises
    ------
    TraceError
        If a pattern matches no name, or what is to be kept would not fit into the memory that is free.
    """
    compute = np.float64 if params.dtype == np.float64 else np.float32
    wanted = _wanted(config, inputs.tokens.shape, only, np.dtype(compute).itemsize)
    expected = iter(schedule.schedule(config))
    arrays: dict[str, Array] = {}

    def take(call: Call) -> None:
        step = next(expected)
        assert (call.room, call.function) == (step.room, step.function), "the schedule does not match the model"
        if not wanted.isdisjoint(step.writes):
            made = dict(zip(step.writes, _made(ops, call), strict=True))
            arrays.update((name, _multiplied(config, name, x)) for name, x in made.items() if name in wanted)

    with explained(ops):
        logits, routed = mixtral.forward(Recorder(params, take).wrap(ops), config, params, inputs, choose=choose)
    assert next(expected, None) is None, "the schedule does not match the model"
    if "logits" in arrays:
        arrays["logits"] = arrays["logits"].reshape(logits.shape)
    routing = mixtral.collect_routing(ops, routed)
    if routing is not None:
        routing = Routing(to_host(routing.ids), to_host(routing.weights), to_host(routing.logits))
    return Trace(config, inputs.tokens, inputs.mask, routing, arrays, params.storage)


def _made(ops: Backend, call: Call) -> Sequence[Array]:
    """The arrays that one call writes, in the schedule's order."""
    out, given = call.output, call.inputs
    if call.room == "rmsnorm":
        return out[:1] if given["residual"] is None else (out[1], out[0])
    if call.room == "attention":
        inner = ops.attention.explain(*(given[name] for name in ("q", "k", "q_pos", "k_pos", "window", "scale", "cap")))
        B, T, H, C = out[0].shape
        return inner["scores"], inner["probs"], out[0].reshape(B * T, H * C)
    if call.room == "experts":
        w1, w2, w3 = (_on_host(given[name]) for name in ("w1", "w2", "w3"))
        inner = ops.experts.explain(given["x"], w1, w2, w3, given["ids"], given["weights"], given["activation"])
        return inner["hidden"], inner["slots"], out[0]
    return out if isinstance(out, tuple | list) else [out]


def _multiplied(config: ModelConfig, name: str, x: Array) -> Array:
    """What the decoder makes of an op's output: it multiplies embeddings and logits itself."""
    factor = {"tok_embeddings": config.embedding_multiplier, "logits": config.output_multiplier}.get(name, 1)
    return x if factor == 1 else x * factor


def _wanted(config: ModelConfig, shape: tuple[int, int], only: str | Iterable[str], itemsize: int) -> set[str]:
    """The names that the patterns match, if they fit into memory."""
    patterns = [only] if isinstance(only, str) else list(only)
    every = names(config)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in every):
            raise TraceError(f"no name of this trace matches {pattern!r}; names are like {', '.join(every[:4])}, …")
    wanted = {name for name in every if any(fnmatchcase(name, pattern) for pattern in patterns)}
    sizes = {name: itemsize * prod(schedule.shape(config, name, *shape)) for name in wanted}
    total, free = sum(sizes.values()), free_memory()
    if total > free:
        kinds = {name.split(".", 2)[-1]: 0 for name in wanted}
        for name, size in sizes.items():
            kinds[name.split(".", 2)[-1]] += size
        largest = ", ".join(sorted(kinds, key=lambda kind: -kinds[kind])[:2])
        raise TraceError(
            f"this trace would take {total / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: choose names, such as "
            f"only=['layers.*.gating.*', 'logits'] (the largest are {largest})"
        )
    return wanted


def _on_host(weights: Any) -> Any:
    return [to_host(w) for w in weights] if isinstance(weights, list) else to_host(weights)
