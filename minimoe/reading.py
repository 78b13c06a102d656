"""A model reads a text: the loss of every token, and the experts it was sent to.

Texts longer than the window are read in windows that overlap by half, as `evaluate` does it; routing is
watched by a wrapper around the backend's gate, so that one pass gives both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from minimoe.arrays import to_host
from minimoe.backends import Backend
from minimoe.config import ModelConfig
from minimoe.evaluate import evaluate
from minimoe.params import Params
from minimoe.shapes import Array
from minimoe.tokenizer import Tokenizer

WINDOW = 256
_LOGITS_AT_ONCE = 1 << 25  # numbers: 128 MiB in float32


class TextError(ValueError):
    """A file that holds no text to read."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What became of one text of n tokens, the BOS token before it not counted.

    Attributes
    ----------
    name : of the text
    tokens : (n,) their ids
    losses : (n,) nats per token
    ids : (L, n, k) experts of each token, None in a dense model
    num_bytes : of the text in UTF-8
    window : tokens that the model saw at once
    """

    name: str
    tokens: Int[Array, " n"]
    losses: Float[Array, " n"]
    ids: Int[Array, "L n k"] | None
    num_bytes: int
    window: int

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return float(self.losses.mean())

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return float(np.exp(np.minimum(self.loss, 700.0)))  # beyond, a float would overflow

    @property
    def bits_per_byte(self) -> float:
        """The loss of the whole text in bits, per byte of UTF-8: comparable between tokenizers."""
        return float(self.losses.sum()) / math.log(2) / self.num_bytes

    @property
    def in_windows(self) -> bool:
        """Whether the text, with its BOS token, was longer than the window."""
        return len(self.tokens) + 1 > self.window


def read(
    ops: Backend,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    text: str,
    *,
    name: str = "text",
    window: int = WINDOW,
    progress: Callable[[int], object] | None = None,
) -> Reading:
    """Read one text.

    Parameters
    ----------
    window : tokens the model sees at once, 2 or more; longer texts are read in windows overlapping by half
    progress : called with the number of windows each time some have been read

    Raises
    ------
    TextError
        If the text has no tokens.
    """
    tokens = np.array(tokenizer.encode(text))
    if tokens.size < 2:
        raise TextError(f"{name}: no tokens in this text")
    return read_tokens(
        ops, config, params, tokens, name=name, num_bytes=len(text.encode()), window=window, progress=progress
    )


def read_tokens(
    ops: Backend,
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, " n+1"],
    *,
    name: str = "tokens",
    num_bytes: int = 0,
    window: int = WINDOW,
    progress: Callable[[int], object] | None = None,
) -> Reading:
    """Read a text that is tokens already, the first of them BOS; `num_bytes` is what it takes as UTF-8."""
    if window < 2:
        raise ValueError(f"window must be at least 2 (a token and its target), not {window}")
    window = _fitting(window, tokens.size)
    seen: list[Array] = []
    batch_size = max(1, min(32, _LOGITS_AT_ONCE // (window * config.vocab_size)))
    watched = _watched(ops, window, seen, progress)
    losses = evaluate(watched, config, params, tokens, window=window, batch_size=batch_size)
    ids = None if config.dense else in_text_order(seen, config.num_layers, tokens.size, window)[:, 1:]
    return Reading(name, tokens[1:], losses, ids, num_bytes, window)


def join(readings: Sequence[Reading], name: str = "all") -> Reading:
    """Return several texts as one, one after the other."""
    ids = [reading.ids for reading in readings if reading.ids is not None]
    return Reading(
        name,
        np.concatenate([reading.tokens for reading in readings]),
        np.concatenate([reading.losses for reading in readings]),
        np.concatenate(ids, axis=1) if ids else None,
        sum(reading.num_bytes for reading in readings),
        max(reading.window for reading in readings),
    )


def count_windows(num_tokens: int, window: int) -> int:
    """Return in how many windows `read` takes a text of so many tokens, BOS included."""
    half = _fitting(window, num_tokens) // 2
    return len(range(0, max(num_tokens - half, 1), half))


def _fitting(window: int, num_tokens: int) -> int:
    """Shrink the window to a text that is shorter; even, so that its half is, and one window holds the whole."""
    return window if num_tokens > window else num_tokens + num_tokens % 2


def _watched(ops: Backend, window: int, seen: list[Array], progress: Callable[[int], object] | None) -> Backend:
    """Return `ops` with a gate that notes the ids it chose, and a cross-entropy that reports progress."""

    def gate(*args: Any, **kwargs: Any) -> Any:
        logits, ids, weights = ops.gating.forward(*args, **kwargs)
        seen.append(to_host(ids))
        return logits, ids, weights

    def cross_entropy(logits: Array, targets: Array) -> Any:
        if progress is not None:
            progress(targets.size // window)
        return ops.cross_entropy.forward(logits, targets)

    changed: dict[str, Any] = {
        room: SimpleNamespace(**{**vars(getattr(ops, room)), "forward": forward})
        for room, forward in (("gating", gate), ("cross_entropy", cross_entropy))
    }
    return dataclasses.replace(ops, **changed)


def in_text_order(seen: list[Array], num_layers: int, n: int, window: int) -> Int[Array, "L n k"]:
    """Put the ids of all calls into the order of the text: of two windows, the one that saw more before a token.

    The calls of one batch come layer by layer; a batch holds whole windows, each starting half a window later.
    """
    batches = [np.stack(seen[i : i + num_layers]) for i in range(0, len(seen), num_layers)]
    windows = np.concatenate(batches, axis=1)  # (L, windows · window, k)
    half, token = window // 2, np.arange(n)
    last = windows.shape[1] // window - 1
    which = np.clip(token // half - 1, 0, last)
    found: Array = windows[:, which * window + token - which * half]
    return found
