"""Top-k softmax gating on the CPU: logits as any product or, of few tokens, by a loop, the choice by insertion.

k is small, so a token keeps its best k in order while it walks over the E logits once. A candidate moves up only past
a strictly smaller one: of equal logits the lower expert id, which came first, stays ahead.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from minimoe.arrays import is_bfloat16
from minimoe.few_rows import dots, factors_of
from minimoe.loops import exp, jit, weight_view
from minimoe.products import Product, compute, multiply, operand
from minimoe.shapes import Array
from minimoe.stages import share, threads_if

FEW_ROWS = 48  # tokens up to which `products` take longer, measured with 8 and with 64 experts
MANY_TOKENS = 1024  # below, one core chooses before others have woken up


def forward(
    x: Float[Array, "N D"],
    gate: Float[Array, "E D"],
    k: int,
    active: Bool[Array, " N"] | None = None,
    allowed: Bool[Array, " E"] | None = None,
    ids: Int[Array, "N k"] | None = None,
    renormalise: bool = True,
) -> tuple[Float[Array, "N E"], Int[Array, "N k"], Float[Array, "N k"]]:
    N, E = len(x), len(gate)
    if N <= FEW_ROWS and (gate.dtype == x.dtype or is_bfloat16(gate)):
        x = operand(x, gate)
        logits = np.empty((N, E), x.dtype)
        few_logits(x, weight_view(gate), logits)
    else:
        logits = multiply(x, gate.T)  # (N, D) -> (N, E)
    forced = ids is not None
    ids = np.array(ids, np.int64, order="C") if forced else np.empty((N, k), np.int64)
    weights = np.empty(ids.shape, logits.dtype)
    active = np.ones(N, np.bool_) if active is None else np.ascontiguousarray(active, np.bool_)
    allowed = np.ones(E, np.bool_) if allowed is None else np.ascontiguousarray(allowed, np.bool_)
    _choose_all(logits, allowed, active, forced, renormalise, threads_if(N >= MANY_TOKENS), ids, weights)
    return logits, ids, weights


def backward(
    dweights: Float[Array, "N k"],
    dlogits: Float[Array, "N E"] | None,
    x: Float[Array, "N D"],
    gate: Float[Array, "E D"],
    ids: Int[Array, "N k"],
    weights: Float[Array, "N k"],
    logits: Float[Array, "N E"] | None = None,
) -> tuple[Float[Array, "N D"], Float[Array, "E D"]]:
    total = np.zeros((len(x), len(gate)), x.dtype) if dlogits is None else np.array(dlogits, order="C")
    # forward: weights = softmax(logits[ids]), or softmax(logits)[ids]
    dweights, ids, weights = (np.ascontiguousarray(array) for array in (dweights, ids, weights))
    competing = np.empty((0, len(gate)), x.dtype) if logits is None else np.ascontiguousarray(logits)
    _add_softmax_gradient(dweights, ids, weights, competing, total)
    # forward: logits = x · gateᵀ
    dx, dgate = np.empty_like(x), np.empty(gate.shape, x.dtype)
    compute([Product([(total, gate)], dx), Product([(total.T, x)], dgate)])
    return dx, dgate


@jit()
def few_logits(x, gate, logits):
    nothing = np.int64(0)  # for a literal 0 `dots` would be compiled once more
    factors = factors_of(x, gate.dtype, len(x) > 1)
    dots(x, factors, gate, nothing, nothing, len(gate), logits)


@jit()
def _choose_all(logits, allowed, active, forced, renormalise, threads, ids, weights):
    share(_choose_rows, len(logits), (logits, allowed, active, forced, renormalise, ids, weights), threads)


@jit()
def _choose_rows(start, stop, logits, allowed, active, forced, renormalise, ids, weights):
    for n in range(start, stop):
        choose(logits[n], allowed, active[n], forced, renormalise, ids[n], weights[n])


@jit()
def choose(logits, allowed, active, forced, renormalise, ids, weights):
    """One token: fill `ids` with its top k unless the choice is `forced`, then `weights` with their softmax.

    Not renormalised, it is that over all logits.
    """
    k = len(ids)
    if not forced:
        _top(logits, allowed, ids, weights)
    top = logits[max(ids[0], 0)]
    for slot in range(1, k):
        top = max(top, logits[max(ids[slot], 0)])
    if not renormalise:
        top = _largest(logits)
    total = top - top
    for slot in range(k):
        weights[slot] = exp(logits[max(ids[slot], 0)] - top)
        total += weights[slot]
    if not renormalise:
        total = _sum_of_exps(logits, top)
    for slot in range(k):
        if not active:
            ids[slot] = -1
        weights[slot] = weights[slot] / total if ids[slot] >= 0 else 0


@jit(inline="always")
def _top(logits, allowed, ids, values):
    """The k largest logits in descending order; `values` is scratch. NaN counts as the smallest number of all."""
    k = len(ids)
    for e in range(len(logits)):
        value = logits[e] if allowed[e] else logits.dtype.type(-np.inf)
        # Find the place from below: everything strictly smaller moves down one slot, equals stay ahead.
        slot = min(e, k)
        while slot > 0 and (value > values[slot - 1] or (values[slot - 1] != values[slot - 1] and value == value)):
            if slot < k:
                ids[slot], values[slot] = ids[slot - 1], values[slot - 1]
            slot -= 1
        if slot < k:
            ids[slot], values[slot] = e, value


@jit()
def _largest(logits):
    """The largest logit, NaN if any is: logits.max(), which takes longer to compile than all else here."""
    top = logits[0]
    for e in range(1, len(logits)):
        top = logits[e] if logits[e] > top or logits[e] != logits[e] else top
    return top


@jit()
def _sum_of_exps(logits, top):
    total = top - top
    for e in range(len(logits)):
        total += exp(logits[e] - top)
    return total


@jit()
def _add_softmax_gradient(dweights, ids, weights, logits, dlogits):
    """dlogits[n, ids] += weights · (dweights - Σ weights · dweights).

    Where there are `logits`, of a softmax over all E, every other expert gets -probability · Σ weights · dweights.
    """
    N, k = ids.shape
    for n in range(N):
        mean = weights.dtype.type(0)
        for slot in range(k):
            mean += weights[n, slot] * dweights[n, slot]
        for slot in range(k):
            if ids[n, slot] >= 0:
                dlogits[n, ids[n, slot]] += weights[n, slot] * (dweights[n, slot] - mean)
        if len(logits) > 0:
            top = _largest(logits[n])
            total = _sum_of_exps(logits[n], top)
            for e in range(logits.shape[1]):
                if not _holds(ids[n], e):
                    dlogits[n, e] -= exp(logits[n, e] - top) / total * mean


@jit(inline="always")
def _holds(ids, e):
    found = False
    for slot in range(len(ids)):
        found |= ids[slot] == e
    return found
