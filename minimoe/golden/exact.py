"""The truth of a model that float64 would not fit into memory, and its bounds.

Weights stay mapped as they are stored. `Weight` stands for one of them and claims to be float64, so that the model
computes in float64; the numbers are widened when an op reads them, a matrix at a time, and forgotten after it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from minimoe import mixtral
from minimoe.backends import Backend, make_backend
from minimoe.checkpoint.memory import require_memory
from minimoe.config import ModelConfig
from minimoe.golden import bounds
from minimoe.golden.perturbing import magnified, perturbed
from minimoe.golden.profiles import PROFILES
from minimoe.params import Params, leaves, map_leaves
from minimoe.shapes import Array, Routing
from minimoe.trace import record


class NotFiniteError(ValueError):
    """A model whose weights make NaN or Inf."""


class Weight:
    """A stored matrix that is float64 to whoever asks, and is widened only while it is used.

    `widen=False` leaves that to the op: disturbed arithmetic takes weights as they are stored, and in pieces.
    """

    dtype = np.dtype(np.float64)

    def __init__(self, stored: Array, widen: bool) -> None:
        self.stored, self.shape, self.ndim, self.size, self._widen = (
            stored,
            stored.shape,
            stored.ndim,
            stored.size,
            widen,
        )

    @property
    def T(self) -> Array:
        """The transpose, as a matrix product takes it."""
        return (self.stored.astype(np.float64) if self._widen else self.stored).T

    def __getitem__(self, rows: Any) -> Array:
        return self.stored[rows].astype(np.float64)


def held(params: Params, widen: bool) -> Params:
    """Return the tree with matrices as `Weight`; vectors and gates are small, and are float64 at once."""

    def hold(w: Array) -> Any:
        return w.astype(np.float64) if w.ndim == 1 else Weight(w, widen)

    found = map_leaves(params, hold)
    for layer, old in zip(found.layers, params.layers, strict=True):
        if old.feed_forward.gate is not None:
            layer.feed_forward.gate = old.feed_forward.gate.astype(np.float64)
    return found


def truth(config: ModelConfig, params: Params, tokens: Int[Array, "B T"], names: Sequence[str]) -> dict[str, Array]:
    """Compute the named intermediates in float64.

    Raises
    ------
    NotEnoughMemoryError
        If the largest matrix in float64, or what is to be kept, exceeds the memory that is free.
    NotFiniteError
        If there is NaN or Inf in it.
    """
    largest = max(w.size for _, leaf in leaves(params) for w in (leaf if isinstance(leaf, list) else [leaf]))
    require_memory(3 * 8 * largest, "the largest matrix in float64, and what is computed with it,")
    found = _record(make_backend("numpy"), config, held(params, True), tokens, names, None)
    for name, x in found.items():
        if not np.isfinite(x).all() and not name.endswith("attention.scores"):  # of invisible keys they are -inf
            raise NotFiniteError(f"{name}: holds NaN or Inf: the weights before it are damaged, or were never finite")
    return found


def limits(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    true: dict[str, Array],
    profile: str,
    samples: int,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, tuple[float, float]]:
    """Return the bound of every float in the truth, made as `bounds.make` does, from so many disturbed runs."""
    floats = [name for name, x in true.items() if x.dtype.kind == "f"]
    ids = np.stack([x for name, x in true.items() if name.endswith("gating.ids")]) if not config.dense else None
    weights, unit = held(params, False), magnified(PROFILES[profile])
    seed = [zlib.crc32(profile.encode()), zlib.crc32(tokens.tobytes())]
    noisy = perturbed(make_backend("numpy"), PROFILES[profile], seed)
    errors: dict[str, list[float]] = {name: [] for name in floats}
    for _ in range(samples):
        found = _record(noisy, config, weights, tokens, floats, ids)
        for name in floats:
            errors[name].append(bounds.largest_error(found[name], true[name]) / unit)
        progress()
    return {name: bounds.bound(np.array(errors[name]), true[name], PROFILES[profile]) for name in floats}


def _record(
    ops: Backend, config: ModelConfig, params: Params, tokens: Array, names: Sequence[str], ids: Array | None
) -> dict[str, Array]:
    inputs = mixtral.check_inputs(tokens, config.vocab_size)
    choose = mixtral.choices(ops, config, tokens.size, None if ids is None else Routing(ids), ())
    return record(ops, config, params, inputs, choose=choose, only=names).arrays
