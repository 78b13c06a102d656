"""Causal evidence: switch one expert of one layer off, and measure what that costs in each domain.

That an expert is chosen for C code does not yet say that C code needs it. Here the gate of one layer may not choose one
expert; every token that wanted it gets its next choice instead, all later layers see the consequences, and the loss of
every token is compared with the loss of the same token in the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from minimoe import mixtral
from minimoe.arrays import to_host
from minimoe.backends import Backend
from minimoe.config import ModelConfig
from minimoe.params import Params
from minimoe.shapes import Array

UNIT = 64  # tokens that keep together when the standard error is taken: neighbours are not independent
_LOGITS_AT_ONCE = 1 << 25  # numbers: 128 MiB in float32


@dataclass(frozen=True, eq=False)
class Ablation:
    """What it costs to switch each expert off.

    Attributes
    ----------
    names : the G domains
    losses : (G,) nats per token of the whole model, on the sample
    costs : (G, L, E) nats per token by which the loss rises without this expert; NaN where it was not tried
    errors : (G, L, E) standard errors of the costs, over units of 64 tokens; NaN for a single unit
    usage : (G, L, E) share of the domain's tokens that the expert serves, in any slot, when nothing is switched off
    """

    names: tuple[str, ...]
    losses: Float[Array, " G"]
    costs: Float[Array, "G L E"]
    errors: Float[Array, "G L E"]
    usage: Float[Array, "G L E"]

    @property
    def by_usage(self) -> Float[Array, "G L E"]:
        """The costs if every use of any expert of a layer were worth the same: what mere frequency explains."""
        usage = np.where(np.isnan(self.costs), np.nan, self.usage)
        total = np.nansum(usage, axis=-1, keepdims=True)
        each = np.divide(np.nansum(self.costs, -1, keepdims=True), total, out=np.zeros_like(total), where=total > 0)
        expected: Array = usage * each
        return expected


def switch_off(
    ops: Backend,
    config: ModelConfig,
    params: Params,
    texts: Mapping[str, Sequence[int]],
    *,
    experts: Sequence[tuple[int, int]] | None = None,
    window: int = 256,
    windows: int = 2,
    progress: Callable[[int], object] | None = None,
) -> Ablation:
    """Measure what each expert is worth to each domain.

    One pass over a sample of all domains with nothing switched off, and one for every (layer, expert): L · E + 1 whole
    forward passes over the same tokens. The sample of a domain is `windows` windows spread evenly over its text.

    Parameters
    ----------
    texts : domain -> token ids
    experts : the (layer, expert) pairs to try; None tries all
    window : tokens the model sees at once; the first of each window has no loss
    windows : of each domain, at most
    progress : called with 1 after every pass

    Raises
    ------
    ValueError
        If the model is dense, or has no expert to spare (k = E), or a text holds fewer than two tokens.
    """
    G, L, E, k = len(texts), config.num_layers, config.num_experts, config.num_experts_per_token
    if config.dense:
        raise ValueError("a dense model has no router: there is no expert to switch off")
    if k == E:
        raise ValueError(f"every token uses all {E} experts: none can be switched off")
    tokens, mask, domain = _sample(texts, window, windows)
    tried = [(layer, e) for layer in range(L) for e in range(E)] if experts is None else list(experts)

    def losses(disabled: Sequence[tuple[int, int]]) -> tuple[Array, Array]:
        found = _losses(ops, config, params, tokens, mask, disabled)
        if progress is not None:
            progress(1)
        return found

    whole, ids = losses([])
    costs, errors = np.full((G, L, E), np.nan), np.full((G, L, E), np.nan)
    for layer, e in tried:
        rise = losses([(layer, e)])[0] - whole  # (B, T)
        for g in range(G):
            costs[g, layer, e], errors[g, layer, e] = _mean_and_error(rise[domain == g])
    usage = np.array([_usage(ids[:, domain == g], mask[domain == g], E) for g in range(G)])
    mean = np.array([np.nanmean(whole[domain == g]) for g in range(G)])
    return Ablation(tuple(texts), mean, costs, errors, usage)


def _sample(
    texts: Mapping[str, Sequence[int]], window: int, windows: int
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"], Int[Array, " B"]]:
    """Cut windows out of every text, evenly spread; the last value is the domain of each."""
    if window < 2 or windows < 1:
        raise ValueError(f"window must be at least 2 and windows at least 1, not {window} and {windows}")
    rows, domain = [], []
    for g, (name, tokens) in enumerate(texts.items()):
        if len(tokens) < 2:
            raise ValueError(f"{name}: fewer than two tokens in this text")
        count = min(windows, max(len(tokens) // window, 1))
        starts = np.linspace(0, max(len(tokens) - window, 0), count).astype(int)
        rows += [np.asarray(tokens[start : start + window]) for start in starts]
        domain += [g] * count
    T = max(row.size for row in rows)
    chunk, mask = np.zeros((len(rows), T), np.int64), np.zeros((len(rows), T), bool)
    for b, row in enumerate(rows):
        chunk[b, : row.size], mask[b, : row.size] = row, True
    return chunk, mask, np.array(domain)


def _losses(
    ops: Backend,
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    disabled: Sequence[tuple[int, int]],
) -> tuple[Float[Array, "B T"], Int[Array, "L B T k"]]:
    """Return the loss of predicting each next token (NaN where there is none), and the experts of every token."""
    B, T = tokens.shape
    parts, routed_parts = [], []
    rows = max(1, _LOGITS_AT_ONCE // (T * config.vocab_size))
    for part in np.array_split(np.arange(B), math.ceil(B / rows)):
        inputs = mixtral.check_inputs(tokens[part], config.vocab_size, mask[part])
        choose = mixtral.choices(ops, config, inputs.tokens.size, None, disabled)
        logits, routed = mixtral.forward(ops, config, params, inputs, choose=choose)
        targets = mixtral.next_tokens(inputs)
        _, each, _ = ops.cross_entropy.forward(logits.reshape(targets.size, -1), ops.asarray(targets))
        parts.append(np.where(targets >= 0, np.asarray(to_host(each), np.float64), np.nan).reshape(len(part), T))
        routed_parts.append(np.stack([to_host(r.ids) for r in routed]).reshape(len(routed), len(part), T, -1))
    return np.concatenate(parts), np.concatenate(routed_parts, axis=1)


def _usage(ids: Int[Array, "L B T k"], mask: Bool[Array, "B T"], num_experts: int) -> Float[Array, "L E"]:
    chosen = ids[:, mask]  # (L, tokens, k)
    return np.array([[(layer == e).any(axis=-1).mean() for e in range(num_experts)] for layer in chosen])


def _mean_and_error(rise: Float[Array, "B T"]) -> tuple[float, float]:
    """Mean per token, and its standard error as a ratio of sums over units of `UNIT` tokens.

    Source: Cochran, Sampling Techniques, 3rd edition, section 6.3 (a ratio estimate of clusters).
    """
    units = [row[start : start + UNIT] for row in rise for start in range(0, rise.shape[1], UNIT)]
    sums = np.array([np.nansum(unit) for unit in units])
    counts = np.array([np.isfinite(unit).sum() for unit in units])
    sums, counts = sums[counts > 0], counts[counts > 0]
    U = len(counts)
    mean = sums.sum() / counts.sum() if U else math.nan
    if U < 2:
        return float(mean), math.nan
    return float(mean), float(np.sqrt(U / (U - 1) * ((sums - mean * counts) ** 2).sum()) / counts.sum())
