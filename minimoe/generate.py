"""Generation: prefill the prompt, then one token at a time through the rolling cache."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int

from minimoe import mixtral
from minimoe.arrays import overwrite, to_host
from minimoe.backends import Backend
from minimoe.config import ModelConfig
from minimoe.params import Params
from minimoe.placement import explained
from minimoe.shapes import Array


class Uniform(Protocol):
    """A source of random numbers, such as numpy.random.Generator."""

    def random(self, size: int) -> Array:
        """Return `size` numbers in [0, 1)."""


def generate_ids(
    ops: Backend,
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    mask: Any = None,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | Uniform | None = None,
    max_length: int | None = None,
    cache: mixtral.KVCache | None = None,
) -> Iterator[Int[Array, " B"]]:
    """Yield the next token of every sequence, (B,) at a time; a sequence that has ended repeats eos_id.

    Parameters
    ----------
    tokens, mask : (B, T) the prompts, padded (left or right) where mask is False
    max_new_tokens : at most so many tokens per sequence
    temperature : 0 is greedy
    top_p : mass of the nucleus, in (0, 1]
    seed : makes sampling reproducible, or is itself the source of the numbers; row b of a batch draws the b-th number
        of every step
    max_length : size of the cache; None fits prompt and new tokens
    cache : holds what stands before `tokens`, and gets them and all that follows but the last token; None makes one

    Raises
    ------
    ValueError
        If a setting is out of range.
    CacheFullError
        If prompt and new tokens do not fit max_length, or the cache.
    """
    check_settings(max_new_tokens, temperature, top_p)
    inputs = mixtral.check_inputs(tokens, config.vocab_size, mask, cache=cache)
    if not inputs.mask.any(axis=1).all():
        raise mixtral.TokenError("every prompt needs at least one unmasked token")
    needed = int(inputs.positions.max()) + 1 + max_new_tokens
    max_length = max_length if cache is None else cache.max_length
    if max_length is not None and needed > max_length:
        raise mixtral.CacheFullError(
            f"{needed - max_new_tokens} prompt tokens and {max_new_tokens} new ones exceed max_length = {max_length}"
        )
    return _generate(ops, config, params, inputs, max_new_tokens, temperature, top_p, seed, max_length or needed, cache)


def _generate(
    ops: Backend,
    config: ModelConfig,
    params: Params,
    inputs: mixtral.Inputs,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | Uniform | None,
    max_length: int,
    cache: mixtral.KVCache | None = None,
) -> Iterator[Int[Array, " B"]]:
    B = len(inputs.tokens)
    rng = np.random.default_rng(seed) if seed is None or isinstance(seed, int | np.integer) else seed
    if cache is None:
        cache = mixtral.new_cache(ops, config, params, B, max_length)
    ended = np.zeros(B, bool)
    decoding: Decoding | None = None
    ids: Int[Array, " B"] = np.empty(B, np.int64)
    for step in range(max_new_tokens):
        with explained(ops):
            if step == 0:
                logits = mixtral.forward(ops, config, params, inputs, cache=cache, last_only=True)[0][:, 0]
                uniform = ops.asarray(rng.random(B))
                ids = np.asarray(to_host(ops.sampling.forward(logits, temperature, top_p, uniform)))
            else:
                decoding = decoding or Decoding(ops, config, params, cache, temperature, top_p)
                ids = decoding(ids, rng.random(B))
        if config.eos_id is not None:
            ids = np.where(ended, config.eos_id, ids)
            ended |= ids == config.eos_id
        yield ids
        if ended.all():
            return


class Decoding:
    """The steps after the prompt, on arrays that stay where they are, so that a device can replay them as a graph."""

    def __init__(
        self, ops: Backend, config: ModelConfig, params: Params, cache: mixtral.KVCache,
        temperature: float = 0.0, top_p: float = 1.0,
    ) -> None:  # fmt: skip
        self._positions = ops.asarray(cache.lengths[:, None].copy())
        self._cache, self._tokens = cache, ops.xp.zeros_like(self._positions)
        self._greedy, self._uniform = temperature == 0, ops.xp.zeros(len(cache.lengths))
        self._drawn: Array | None = None
        self._known: Int[Array, " B"] | None = None  # what the last step drew, and left where the next reads it
        # No method of this object: a cycle of references would keep the cache until the garbage collector comes.
        arrays = self._tokens, self._positions, self._uniform
        step = partial(_step, ops, _decode(ops, config, params, cache), *arrays, temperature, top_p)
        self._replay = ops.captured(step, tokens=len(cache.lengths))

    def __call__(self, ids: Int[Array, " B"], uniform: Float[Array, " B"]) -> Int[Array, " B"]:
        """Return the tokens that `uniform` draws when each sequence goes on with `ids`."""
        if not self._greedy:
            overwrite(self._uniform, uniform)
        self.logits(ids)
        self._known = np.array(to_host(self._drawn))
        return self._known

    def logits(self, ids: Int[Array, " B"]) -> Float[Array, "B V"]:
        """Return the logits that follow when each sequence goes on with `ids`; nothing is read back."""
        if self._known is None or not np.array_equal(ids, self._known):
            overwrite(self._tokens, ids[:, None])
        self._known = None
        logits, self._drawn = self._replay()
        self._cache.lengths += 1
        return logits

    def go_back(self, length: int) -> None:
        """Forget all tokens but the first `length` of each sequence, which a cache that rolled does not allow."""
        self._cache.lengths[:] = length
        self._cache.positions[:, length:] = -1
        overwrite(self._positions, self._cache.lengths[:, None])


def _decode(ops: Backend, config: ModelConfig, params: Params, cache: mixtral.KVCache) -> mixtral.Step:
    """Return what makes logits (B, V) of tokens and positions (B, 1): on a CPU one compiled call, where that can be."""
    if ops.name == "numba":
        from minimoe import compiled_step  # Numba takes half a second to import

        if (step := compiled_step.prepared(ops, config, params, cache)) is not None:
            return step
    return partial(mixtral.decode, ops, config, params, cache)


def _step(
    ops: Backend, decode: mixtral.Step, tokens: Int[Array, "B 1"], positions: Int[Array, "B 1"],
    uniform: Float[Array, " B"], temperature: float, top_p: float,
) -> tuple[Float[Array, "B V"], Int[Array, " B"]]:  # fmt: skip
    """Draw the next tokens, and leave them where the next step reads them: the host has a look, and no part in it."""
    logits = decode(tokens, positions)
    ids = ops.sampling.forward(logits, temperature, top_p, uniform)
    tokens[...] = ids[:, None]
    positions += 1
    return logits, ids


def check_settings(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raise a ValueError that names the setting which is out of range."""
    mixtral.check_count("max_new_tokens", max_new_tokens, 0)
    if not _is_number(temperature) or not 0 <= temperature < np.inf:
        raise ValueError(f"temperature must be finite and at least 0, not {temperature!r}")
    if not _is_number(top_p) or not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {top_p!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
