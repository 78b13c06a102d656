"""The key/value cache of a whole model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from minimoe.backends import Backend
from minimoe.config import ModelConfig
from minimoe.params import Params
from minimoe.placement import explained, require
from minimoe.quantized import kept_dtype
from minimoe.shapes import Array


class CacheError(ValueError):
    """A cache that does not fit the model or the tokens."""


class CacheFullError(CacheError):
    """More tokens than the cache was made for."""


@dataclass(frozen=True, eq=False)
class LayerCache:
    """One layer's rolling cache: k and v (B, R, K, C), changed in place."""

    k: Float[Array, "B R K C"]
    v: Float[Array, "B R K C"]


@dataclass(eq=False)
class KVCache:
    """Keys and values of all layers, and which position each slot holds. Made by `new_cache`, for one model.

    Attributes
    ----------
    layers : L caches of R = min(W, max_length) slots
    positions : (B, R) int64, on the backend's device; -1 = empty
    lengths : (B,) int64 on the host: the position that each sequence's next token takes by default
    max_length : longest sequence it takes, in tokens (rolling or not)
    broken : whether a call was interrupted while it wrote over keys that its repetition would need
    """

    layers: list[LayerCache]
    positions: Int[Array, "B R"]
    lengths: Int[Array, " B"]
    max_length: int
    broken: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(int(layer.k.nbytes + layer.v.nbytes) for layer in self.layers)

    def forget(self, length: int) -> bool:
        """Keep the first `length` tokens of every sequence only; False, and nothing done, where that is not possible.

        It is not where a rolling cache has overwritten keys that those tokens would see.
        """
        longest, slots = int(self.lengths.max()), self.positions.shape[1]
        if self.broken or (longest > slots and longest > length):
            return False
        self.positions[self.positions >= length] = -1
        self.lengths[:] = np.minimum(self.lengths, length)
        return True


def new_cache(ops: Backend, config: ModelConfig, params: Params, batch: int, max_length: int) -> KVCache:
    """Return an empty cache for `batch` sequences of at most `max_length` tokens."""
    check_count("batch", batch, 1)
    check_count("max_length", max_length, 1)
    shape = _shape(config, batch, max_length)
    itemsize = sum(np.dtype(kept_dtype(w)).itemsize for p in params.layers for w in (p.attention.wk, p.attention.wv))
    require(ops, math.prod(shape) * itemsize, f"keys and values of {batch} × {max_length:,} tokens")
    with explained(ops):
        caches = [
            LayerCache(*(ops.xp.zeros(shape, kept_dtype(w)) for w in (p.attention.wk, p.attention.wv)))
            for p in params.layers
        ]
    return KVCache(caches, ops.xp.full(shape[:2], -1, ops.xp.int64), np.zeros(batch, np.int64), int(max_length))


def check_cache(cache: KVCache, config: ModelConfig, params: Params) -> None:
    """Raise a CacheError unless `cache` is whole, and made for a model of these sizes, window and storage type."""
    if cache.broken:
        raise CacheError("a call with this cache was interrupted after it had overwritten keys: make a new one")
    shape = _shape(config, len(cache.lengths), cache.max_length)
    for held, p in zip_longest(cache.layers, params.layers):
        if held is None or p is None or held.k.shape != shape or held.k.dtype != kept_dtype(p.attention.wk):
            raise CacheError("this cache was made for another model: use model.new_cache")


def _shape(config: ModelConfig, batch: int, max_length: int) -> tuple[int, int, int, int]:
    """(B, R, K, C) with R = min(W, max_length)."""
    R = max_length if config.sliding_window is None else min(config.sliding_window, max_length)
    return batch, R, config.num_kv_heads, config.head_dim


def check_count(name: str, value: Any, least: int) -> None:
    """Raise a ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
