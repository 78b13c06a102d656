"""A backend whose arithmetic is disturbed, and the routing that is imposed on it.

It is the reference's own code: every room's `reference.py` is loaded once more, its array library replaced by one that
makes `Noisy` arrays. Arrays between ops are plain float64.

Where a profile rounds results to 16 bits is said here too, op by op, after transformers' modeling_mixtral.py (5.x) and
mistral-inference's transformer_layers.py, moe.py and rope.py. What is not said rounds each of its steps.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from minimoe.arrays import is_bfloat16
from minimoe.backends import ROOMS, Backend
from minimoe.golden.noise import Noise, Noisy, plain
from minimoe.golden.profiles import Profile
from minimoe.shapes import Array

_WEIGHTS = {"table", "weight", "gate", "w1", "w2", "w3"}  # exact; left as they are stored until they are multiplied


def perturbed(ops: Backend, profile: Profile, seed: Any) -> Backend:
    """Return a backend that computes what the reference does, with the rounding errors of `profile`.

    `ops` is the NumPy backend, whose table says which functions there are; one seed makes the same errors again.
    """
    noise = Noise(profile.accumulate * magnified(profile), profile.round_off, profile.tiny, seed)
    unit = noise.round_off if profile.rounds == "results" else noise.accumulate
    rooms: dict[str, Any] = {}
    for room in ROOMS:
        own = _functions(room, noise, profile)
        names = vars(getattr(ops, room))
        rooms[room] = SimpleNamespace(**{name: _disturbed(own[name], noise, unit) for name in names})
    return dataclasses.replace(ops, **rooms)


def magnified(profile: Profile) -> float:
    """By how much the errors are larger than the profile's: float64 cannot hold errors of its own unit roundoff.

    Errors this small are proportional to their unit, so that what they do can be divided again.
    """
    return 2.0**20 if profile.name == "float64" else 1.0


def replaying(ops: Backend, choices: Iterator[Array]) -> Backend:
    """Return `ops` with a gate that takes the given expert choices, call by call, unless its caller forces some."""

    def forward(
        x: Array, gate: Array, k: int, active: Any = None, allowed: Any = None, ids: Any = None, *rest: Any
    ) -> Any:
        golden = next(choices)
        return ops.gating.forward(x, gate, k, active, allowed, golden if ids is None else ids, *rest)

    return dataclasses.replace(ops, gating=SimpleNamespace(**vars(ops.gating) | {"forward": forward}))


def noting(ops: Backend, choices: list[Array]) -> Backend:
    """Return `ops` with a gate that writes down the experts it chose."""

    def forward(*args: Any) -> Any:
        found = ops.gating.forward(*args)
        choices.append(found[1])
        return found

    return dataclasses.replace(ops, gating=SimpleNamespace(**vars(ops.gating) | {"forward": forward}))


def _disturbed(function: Callable[..., Any], noise: Noise, unit: float) -> Callable[..., Any]:
    """Hand `function` noisy arrays (views: what it writes in place is written), and hand on plain ones."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        given = {name: x if name in _WEIGHTS else _noisy(x, noise, unit) for name, x in bound.items()}
        with np.errstate(invalid="ignore"):  # an invisible key's score is -inf
            return plain(function(**given))

    return call


def _noisy(x: Any, noise: Noise, unit: float) -> Any:
    if isinstance(x, list | tuple):
        return [_noisy(item, noise, unit) for item in x]
    return noise.array(x, unit) if isinstance(x, np.ndarray) and x.dtype.kind in "fV" else x


class _NoisyNumPy:
    """NumPy, but that new arrays of floats are noisy: what is computed from them must be disturbed."""

    def __init__(self, noise: Noise, unit: float) -> None:
        self.noise, self.unit = noise, unit

    def __getattr__(self, name: str) -> Any:
        found = getattr(np, name)
        if name not in ("empty", "zeros", "zeros_like", "arange"):
            return found
        return lambda *args, **kwargs: _noisy(found(*args, **kwargs), self.noise, self.unit)


# ---- where a profile rounds


def _functions(room: str, noise: Noise, profile: Profile) -> dict[str, Any]:
    """The functions of a room: the reference's over noisy arrays, with the profile's own where it has some."""
    results = profile.rounds == "results"
    xp = _NoisyNumPy(noise, noise.round_off if results else noise.accumulate)
    reference = _load(room, xp)
    if profile.rounds == "operands":
        reference.matmul = _rounding_operands  # type: ignore[attr-defined]
    functions = dict(vars(reference))
    if room == "rope":
        functions |= _rope(reference, xp, profile)
    elif results:
        functions |= _RESULTS[room](reference) if room in _RESULTS else {}
    return functions


def _load(room: str, xp: _NoisyNumPy) -> ModuleType:
    """The reference of a room as a module of its own, computing with `xp`."""
    spec = importlib.util.find_spec(f"minimoe.ops.{room}.reference")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    replaced = {"xp_of": lambda _: xp, "matmul": lambda a, b: a @ b, "widen": lambda x: x.astype(np.float64)}
    for name, function in replaced.items():
        if hasattr(module, name):
            setattr(module, name, function)
    return module


def _rounding_operands(a: Array, b: Array) -> Array:
    """The product that minimoe's bfloat16 has: both operands rounded, the rest in float32."""
    noise = (a if isinstance(a, Noisy) else b).noise
    a, b = (x if is_bfloat16(x) else noise.rounded(plain(x).astype(np.float64)) for x in (a, b))
    return noise.array(noise.product(a, b), noise.accumulate)


def _rope(reference: ModuleType, xp: _NoisyNumPy, profile: Profile) -> dict[str, Any]:
    """Angles are float64 by definition, and float32 in the implementations that round every result."""
    noise = xp.noise
    results = profile.rounds == "results"
    xp.unit = noise.accumulate if results or profile.name == "float64" else 2.0**-53
    unit = noise.round_off if results and not profile.rotates_in_float32 else noise.accumulate

    def table(positions: Array, head_dim: int, theta: float, dtype: Any) -> list[Array]:
        wide = (plain(x) for x in reference.table(positions, head_dim, theta, dtype))
        return [noise.array(noise.disturbed(x, unit), unit) for x in wide]

    turned = reference.forward

    def forward(x: Array, cos: Array, sin: Array) -> Array:
        return turned(x.fine(), cos.fine(), sin.fine()).rounded()

    if profile.rotates_in_float32:
        reference.forward = forward  # type: ignore[attr-defined]
    return {"table": table, "forward": reference.forward}


def _rmsnorm(reference: ModuleType) -> dict[str, Any]:
    def forward(x: Array, weight: Array, eps: float, residual: Array | None = None) -> tuple[Array, Array, Array]:
        h = x if residual is None else x + residual
        wide = h.fine()
        r = 1 / np.sqrt((wide * wide).mean(axis=-1) + eps)
        return (wide * r[:, None]).rounded() * weight.astype(np.float64), h, r

    return {"forward": forward}


def _attention(reference: ModuleType) -> dict[str, Any]:
    """As eager attention has it; fused attention keeps scores and probabilities in float32, which rounds less."""

    def inner(
        q: Array, k: Array, q_pos: Array, k_pos: Array, window: int | None, scale: float | None, cap: float | None
    ) -> tuple[Array, Array, Array]:
        G = q.shape[2] // k.shape[2]
        keys = np.repeat(k, G, axis=2).transpose(0, 2, 3, 1)  # (B, S, K, C) -> (B, H, C, S)
        scores: Array = (q.transpose(0, 2, 1, 3) @ keys) * reference._factor(q, scale)  # (B, H, T, S)
        if cap is not None:
            scores = cap * np.tanh(scores / cap)
        scores = np.where(reference.visible(q_pos, k_pos, window)[:, None], scores, -np.inf)
        wide = scores.fine()
        top = np.maximum(wide.max(axis=-1, keepdims=True), -1e300)  # no visible key: exp(-inf) = 0, not NaN
        weights = np.exp(wide - top)
        total = weights.sum(axis=-1, keepdims=True)
        probs = weights / np.where(total == 0, 1, total)
        lse = np.where(total == 0, -np.inf, top + np.log(np.where(total == 0, 1, total)))[..., 0]
        return scores, probs.rounded(), lse.swapaxes(1, 2)

    def forward(
        q: Array, k: Array, v: Array, q_pos: Array, k_pos: Array, window: int | None, scale: Any = None, cap: Any = None
    ) -> tuple[Array, Array]:
        _, probs, lse = inner(q, k, q_pos, k_pos, window, scale, cap)
        values = np.repeat(v, q.shape[2] // v.shape[2], axis=2).swapaxes(1, 2)  # (B, S, K, C) -> (B, H, S, C)
        return (probs @ values).swapaxes(1, 2), lse

    def explain(
        q: Array, k: Array, q_pos: Array, k_pos: Array, window: int | None, scale: Any = None, cap: Any = None
    ) -> dict[str, Array]:
        return dict(zip(("scores", "probs"), inner(q, k, q_pos, k_pos, window, scale, cap), strict=False))

    return {"forward": forward, "explain": explain}


def _gating(reference: ModuleType) -> dict[str, Any]:
    reference.matmul = lambda x, gate: (x @ gate).fine()  # type: ignore[attr-defined]  # the softmax is float32

    def forward(
        x: Array, gate: Array, k: int, active: Any = None, allowed: Any = None, ids: Any = None,
        renormalise: bool = True,
    ) -> tuple[Array, Array, Array]:  # fmt: skip
        logits, ids, weights = reference.forward(x, gate, k, active, allowed, ids, renormalise)
        return logits, ids, weights.rounded()

    return {"forward": forward}


def _cross_entropy(reference: ModuleType) -> dict[str, Any]:
    """In float32, of logits that are rounded."""
    return {"forward": lambda logits, targets: reference.forward(logits.fine(), targets)}


def _experts(reference: ModuleType) -> dict[str, Any]:
    """The activation is one function, float32 inside and rounded once; its product with the other half, once more."""
    act = reference.act
    reference.act = lambda z, activation: act(z.fine(), activation).rounded()  # type: ignore[attr-defined]
    return {}


_RESULTS: dict[str, Callable[[ModuleType], dict[str, Any]]] = {
    "rmsnorm": _rmsnorm, "attention": _attention, "gating": _gating, "experts": _experts,
    "cross_entropy": _cross_entropy,
}  # fmt: skip
