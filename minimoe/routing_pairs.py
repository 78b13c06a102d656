"""Experts in pairs: which work on the same token, which follow each other from layer to layer, and who gets what.

Every table of counts has beside it what independence would give for the same totals.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from minimoe.routing_statistics import routed_ids
from minimoe.shapes import Array

_ROUNDS, _CLOSE = 2000, 1e-10  # of the fit below


def coactivation(ids: Int[Array, "L N k"], num_experts: int) -> Int[Array, "L E E"]:
    """Count on how many tokens each pair of experts worked together: symmetric, zero on the diagonal."""
    ids = routed_ids(ids)
    chosen = np.zeros((*ids.shape[:2], num_experts + 1), np.int64)  # the last column takes the -1
    np.put_along_axis(chosen, ids, 1, axis=-1)
    chosen = chosen[..., :num_experts]
    pairs: Array = chosen.transpose(0, 2, 1) @ chosen  # (L, N, E) -> (L, E, E)
    pairs[:, np.arange(num_experts), np.arange(num_experts)] = 0
    return pairs


def independent_coactivation(pairs: Int[Array, "*L E E"]) -> Float[Array, "*L E E"]:
    """Return the counts of pairs that experts chosen this often would have if they did not care for each other.

    expected[i, j] = a[i] · a[j] for i ≠ j, 0 on the diagonal, with a such that every expert keeps its total. An expert
    cannot be chosen twice for a token, so the plain product of shares would be wrong: this is the model of
    quasi-independence (Goodman, Journal of the American Statistical Association 63, 1968), fitted by proportional
    scaling. With even use every pair gets 1 / C(E, 2) of the tokens if k = 2.
    """
    pairs = np.asarray(pairs, np.float64)
    return np.array([_fitted(layer) for layer in pairs]) if pairs.ndim == 3 else _fitted(pairs)


def _fitted(pairs: Float[Array, "E E"]) -> Float[Array, "E E"]:
    total = pairs.sum(axis=1)
    fit = np.outer(total > 0, total > 0) * (1.0 - np.eye(len(total)))
    for _ in range(_ROUNDS):
        rows = fit.sum(axis=1)
        scale = np.sqrt(np.divide(total, rows, out=np.zeros_like(total), where=rows > 0))
        fit = fit * scale[:, None] * scale[None, :]
        if np.abs(fit.sum(axis=1) - total).max() <= _CLOSE * max(total.max(), 1):
            break
    return fit


def transitions(
    ids: Int[Array, "L N k"], num_experts: int, layers: Sequence[int] | None = None
) -> Int[Array, "steps E E"]:
    """Count how many tokens go from each expert of one layer to each of the next, by their first choices.

    Parameters
    ----------
    ids : (L, N, k)
    num_experts : E
    layers : those to walk through, in this order; None is all. There is one step fewer
    """
    first = routed_ids(ids)[..., 0]
    first = first if layers is None else first[list(layers)]
    both = (first[:-1] >= 0) & (first[1:] >= 0)
    return np.array(
        [
            np.bincount(a[ok] * num_experts + b[ok], minlength=num_experts**2).reshape(num_experts, num_experts)
            for a, b, ok in zip(first[:-1], first[1:], both, strict=True)
        ]
    ).reshape(-1, num_experts, num_experts)


def specialisation(
    ids: Int[Array, "L N k"], labels: Int[Array, " N"], num_experts: int, num_labels: int
) -> Int[Array, "L Y E"]:
    """Count how many assignments each expert has from tokens of each kind.

    Parameters
    ----------
    ids : (L, N, k)
    labels : (N,) kind of each token, as `minimoe.token_types.token_types` gives it; -1 is left out
    num_experts, num_labels : E and Y
    """
    ids, labels = routed_ids(ids), np.asarray(labels)
    if labels.shape != ids.shape[1:2] or labels.max(initial=-1) >= num_labels:
        raise ValueError(f"labels must be {ids.shape[1]} numbers below {num_labels}, one a token, not {labels.shape}")
    kinds = np.broadcast_to(labels[:, None], ids.shape[1:])
    counts = []
    for layer in ids:
        counted = (layer >= 0) & (kinds >= 0)
        joint = kinds[counted] * num_experts + layer[counted]
        counts.append(np.bincount(joint, minlength=num_labels * num_experts).reshape(num_labels, num_experts))
    return np.array(counts)


def independent(counts: Int[Array, "*n A B"]) -> Float[Array, "*n A B"]:
    """Return the table with the same totals of rows and columns in which rows and columns are independent.

    >>> independent(np.array([[6, 0], [0, 2]])).tolist()
    [[4.5, 1.5], [1.5, 0.5]]
    """
    counts = np.asarray(counts, np.float64)
    rows, columns = counts.sum(axis=-1, keepdims=True), counts.sum(axis=-2, keepdims=True)
    total = counts.sum(axis=(-2, -1), keepdims=True)
    product = rows * columns
    return np.divide(product, total, out=np.zeros_like(product), where=total > 0)
