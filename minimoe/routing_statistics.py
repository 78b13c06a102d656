"""How a router distributes tokens: shares, entropy, information about the domain, repetition.

Everything here is counted on expert ids (L, N, k), first choice in slot 0, -1 where a token was not routed. Every
statistic has beside it what chance alone would give. Source: Jiang et al., Mixtral of Experts, arXiv 2401.04088,
section 5.
"""

from __future__ import annotations

from math import comb
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from minimoe.shapes import Array


def routed_ids(ids: Any) -> Int[Array, "L N k"]:
    """Return expert ids as an array; refuse what holds no routing: None (a dense model), or nothing that was routed."""
    if ids is None:
        raise ValueError("a dense model has no router: there is nothing to route")
    array = np.asarray(ids)
    if array.ndim != 3 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"ids must be integers of shape (L, N, k), not {array.dtype} {array.shape}")
    if not (array >= 0).any():
        raise ValueError(f"none of the {array.shape[1]} tokens was routed: there is nothing to count or draw")
    return array


def shares(ids: Int[Array, "L N k"], num_experts: int) -> Float[Array, "L E"]:
    """Return the share of assignments that each expert gets in each layer (figure 7 of the paper).

    A token counts once for every slot; `ids[..., :1]` gives the shares of first choices. A layer that routed nothing
    has NaN.
    """
    counts = np.array([np.bincount(layer[layer >= 0], minlength=num_experts) for layer in ids], np.float64)
    total = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)


def entropy(probabilities: Float[Array, "*n E"]) -> Float[Array, "*n"]:
    """Return -Σ p log2 p in bits along the last axis: log2(E) where all experts are used alike, 0 where one is.

    >>> entropy(np.array([[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0]])).tolist()
    [2.0, 0.0]
    """
    p = np.asarray(probabilities, np.float64)
    logs = np.log2(p, out=np.zeros_like(p), where=p != 0)
    result: Array = 0.0 - (p * logs).sum(axis=-1)
    return result


def mutual_information(a: Int[Array, " N"], b: Int[Array, " N"]) -> float:
    """Return I(a; b) = H(a) + H(b) - H(a, b) in bits, of two labellings of the same things.

    Negative labels are left out. It is the plug-in estimate, which is too large for small samples: compare it with
    `shuffled_information`. Source: Cover and Thomas, Elements of Information Theory, equation 2.45.
    """
    counted = (a >= 0) & (b >= 0)
    a, b = a[counted], b[counted]
    if not a.size:
        return 0.0
    rows, columns = int(a.max()) + 1, int(b.max()) + 1
    joint = np.bincount(a * columns + b, minlength=rows * columns).reshape(rows, columns) / a.size
    information = entropy(joint.sum(axis=1)) + entropy(joint.sum(axis=0)) - entropy(joint.reshape(-1))
    return max(float(information), 0.0)  # rounding may leave it at -1e-16


def domain_information(ids: Int[Array, "L N k"], domains: Int[Array, " N"]) -> Float[Array, " L"]:
    """Return how many bits the first choice of each layer tells about the domain of its token."""
    return np.array([mutual_information(layer[:, 0], domains) for layer in ids])


def shuffled_information(
    ids: Int[Array, "L N k"],
    domains: Int[Array, " N"],
    units: Int[Array, " N"] | None = None,
    *,
    shuffles: int = 100,
    seed: int = 0,
) -> Float[Array, "shuffles L"]:
    """Return `domain_information` after the domains were dealt out anew, at random: what chance would give.

    Parameters
    ----------
    ids, domains : as measured
    units : (N,) the unit that each token belongs to; the tokens of a unit have one domain and keep together. Tokens
        of one text resemble each other whatever its domain, so whole documents (or pieces of them) are the fair
        units. None deals every token by itself, the most lenient baseline.
    """
    units = np.arange(domains.size) if units is None else np.unique(units, return_inverse=True)[1]
    domain_of_unit = np.empty(int(units.max(initial=-1)) + 1, domains.dtype)
    domain_of_unit[units] = domains
    if (domain_of_unit[units] != domains).any():
        raise ValueError("units must not span domains: the tokens of one unit have different domains")
    rng = np.random.default_rng(seed)
    return np.array([domain_information(ids, rng.permutation(domain_of_unit)[units]) for _ in range(shuffles)])


def repeats(
    ids: Int[Array, "L N k"], documents: Int[Array, " N"] | None = None
) -> tuple[Float[Array, " L"], Float[Array, " L"]]:
    """Return how often consecutive tokens share an expert (table 5 of the paper).

    Parameters
    ----------
    ids : (L, N, k) of tokens in reading order
    documents : (N,) the document of each token: pairs across two documents do not count. None is one document.

    Returns
    -------
    first : (L,) share of pairs with the same first choice
    any_choice : (L,) share of pairs with an expert in common, in whatever slots

    Both are NaN where there is no pair. Chance: `chance_of_repeats`.
    """
    pairs, first, common = consecutive_pairs(ids, documents)
    count = pairs.sum(axis=1).astype(np.float64)
    return _per_pair(first, count), _per_pair(common, count)


def consecutive_pairs(
    ids: Int[Array, "L N k"], documents: Int[Array, " N"] | None = None
) -> tuple[Bool[Array, "L N-1"], Bool[Array, "L N-1"], Bool[Array, "L N-1"]]:
    """Return for each token and the next: whether the pair counts, has one first choice, has any expert in common."""
    before, after = ids[:, :-1], ids[:, 1:]  # (L, N-1, k)
    pairs = (before >= 0).all(axis=-1) & (after >= 0).all(axis=-1)  # (L, N-1)
    if documents is not None:
        pairs &= documents[:-1] == documents[1:]
    first = before[..., 0] == after[..., 0]
    common = (before[..., :, None] == after[..., None, :]).any(axis=(-2, -1))
    return pairs, first & pairs, common & pairs


def _per_pair(same: Array, count: Float[Array, " L"]) -> Float[Array, " L"]:
    return np.divide(same.sum(axis=1), count, out=np.full(len(count), np.nan), where=count > 0)


def chance_of_repeats(num_experts: int, k: int) -> tuple[float, float]:
    """Return what `repeats` gives for routers that choose evenly and independently.

    >>> first, any_choice = chance_of_repeats(8, 2)
    >>> round(100 * first, 1), round(100 * any_choice, 1)
    (12.5, 46.4)
    """
    return 1 / num_experts, 1 - comb(num_experts - k, k) / comb(num_experts, k)


def shuffled_repeats(
    ids: Int[Array, "L N k"], documents: Int[Array, " N"] | None = None, *, shuffles: int = 20, seed: int = 0
) -> tuple[Float[Array, "shuffles L"], Float[Array, "shuffles L"]]:
    """Return `repeats` after shuffling the tokens of each document: the chance of these experts, used this unevenly."""
    rng = np.random.default_rng(seed)
    documents = np.zeros(ids.shape[1], np.int64) if documents is None else documents
    results = []
    for _ in range(shuffles):
        order = np.lexsort((rng.random(documents.size), documents))
        results.append(repeats(ids[:, order], documents[order]))
    first, any_choice = zip(*results, strict=True)
    return np.array(first), np.array(any_choice)


def router_entropy(logits: Float[Array, "L N E"]) -> Float[Array, "L N"]:
    """Return the entropy in bits of softmax(logits) over all E experts: how undecided each token's router was."""
    logits = np.asarray(logits, np.float64)
    exps = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return entropy(exps / exps.sum(axis=-1, keepdims=True))


def shuffled_logits(logits: Float[Array, "L N E"], *, seed: int = 0) -> Float[Array, "L N E"]:
    """Deal each expert's logits out anew among the tokens of a layer, independently of the other experts'.

    What remains is how large the logits of each expert are; what is lost is that they belong to one token. Margins and
    entropies of the result are what chance gives with logits of this size.
    """
    return np.random.default_rng(seed).permuted(np.asarray(logits, np.float64), axis=1)


def choice_differences(a: Int[Array, "L N k"], b: Int[Array, "L N k"]) -> Bool[Array, "L N"]:
    """Return for which tokens two routings chose different sets of experts; the order of the slots does not count."""
    a, b = routed_ids(a), routed_ids(b)
    if a.shape != b.shape:
        raise ValueError(f"two routings can be compared token by token only: {a.shape} and {b.shape} differ")
    different: Array = (np.sort(a, axis=-1) != np.sort(b, axis=-1)).any(axis=-1)
    return different


def chance_of_difference(num_experts: int, k: int) -> float:
    """Return how often two routers that choose evenly and independently choose different sets.

    >>> round(100 * chance_of_difference(8, 2), 1)
    96.4
    """
    return 1 - 1 / comb(num_experts, k)
