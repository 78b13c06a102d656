"""The loss of every token of a long text, read in overlapping windows."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int

from minimoe import mixtral
from minimoe.arrays import to_host
from minimoe.backends import Backend
from minimoe.config import ModelConfig
from minimoe.params import Params
from minimoe.shapes import Array


def evaluate(
    ops: Backend,
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, " n"],
    *,
    window: int = 256,
    batch_size: int = 32,
) -> Float[Array, " n-1"]:
    """Return the loss in nats of every token but the first, each predicted from at least window/2 tokens before it.

    Windows of `window` tokens overlap by half, and count their second half only (the first window counts whole).
    """
    n, half = tokens.size, window // 2
    losses = np.full(n - 1, np.nan)
    starts = np.arange(0, max(n - half, 1), half)
    for group in np.array_split(starts, math.ceil(len(starts) / batch_size)):
        chunk, mask = np.zeros((len(group), window), np.int64), np.zeros((len(group), window), bool)
        for row, start in enumerate(group):
            piece = tokens[start : start + window]
            chunk[row, : piece.size], mask[row, : piece.size] = piece, True
        inputs = mixtral.check_inputs(chunk, config.vocab_size, mask)
        logits, _ = mixtral.forward(ops, config, params, inputs)
        targets = ops.asarray(mixtral.next_tokens(inputs))
        _, each, _ = ops.cross_entropy.forward(logits.reshape(targets.size, -1), targets)
        each = to_host(each).reshape(len(group), window)
        for row, start in enumerate(group):
            skip = 0 if start == 0 else half - 1  # token start + i + 1 is predicted at i
            stop = int(mask[row].sum()) - 1
            losses[start + skip : start + stop] = each[row, skip:stop]
    return losses
