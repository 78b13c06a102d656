"""Unigram, bigram and trigram models with interpolated Kneser-Ney smoothing: what a trained network has to beat.

With u the context and c(u w) a count,

    P(w | u) = max(c(u w) - d, 0) / c(u) + d · N(u ·) / c(u) · P(w | u without its first token)

where N(u ·) is the number of different tokens seen after u. The longest order counts occurrences; each shorter one
counts in how many different left contexts its sequence was seen (Kneser & Ney 1995); the unigram is mixed with the
uniform distribution. One absolute discount per order, d = n1 / (n1 + 2 n2), where n1 and n2 sequences have count one
and two (Chen & Goodman 1999, section 3.4, and Ney, Essen & Kneser 1994).

A context never reaches back over a BOS: the first token of a document is predicted from BOS BOS. BOS itself opens each
document and is never predicted, so it has no count as a continuation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_ORDER = 3
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Table:
    """The counts of one order: sequences and their contexts as sorted integer keys."""

    keys: Ints  # (sequences,) context · V + token
    counts: Ints  # (sequences,)
    contexts: Ints  # (contexts,)
    totals: Ints  # (contexts,) sum of counts over tokens
    kinds: Ints  # (contexts,) number of different tokens
    discount: float


@dataclass(frozen=True)
class NGrams:
    """Fitted models of orders 1 to 3; make one with `fit`."""

    vocab_size: int
    bos_id: int
    chains: tuple[tuple[_Table, ...], ...]  # chains[n - 1]: the tables of orders 1..n that make up the model of order n

    def loss(self, tokens: NDArray[np.integer], order: int) -> float:
        """Mean negative log-likelihood, in nats, of every token but the documents' BOS.

        Parameters
        ----------
        tokens
            (tokens,) documents one after another, each starting with BOS.
        order
            1, 2 or 3.
        """
        context, targets = windows(tokens, self.bos_id, self.vocab_size)
        if not len(targets):
            raise ValueError("no token to predict: the text holds nothing but BOS")
        return float(-np.log(self._chance(context, targets, order)).mean())

    def probability(self, context: Sequence[int], order: int) -> Floats:
        """The distribution (V,) of the next token; a context shorter than `order - 1` is padded with BOS."""
        padded = [self.bos_id] * (MAX_ORDER - 1) + [int(token) for token in context]
        key = padded[-2] * self.vocab_size + padded[-1]
        if padded[-1] == self.bos_id:  # a document starts here
            key = self.bos_id * self.vocab_size + self.bos_id
        return self._chance(np.full(self.vocab_size, key), np.arange(self.vocab_size), order)

    def _chance(self, context: Ints, targets: Ints, order: int) -> Floats:
        if not 1 <= order <= MAX_ORDER:
            raise ValueError(f"order {order} is not 1, 2 or 3")
        V = self.vocab_size
        chance = np.full(len(targets), 1 / V)
        for n, table in enumerate(self.chains[order - 1], start=1):
            short = context % V ** (n - 1)
            counts = _look_up(table.keys, table.counts, short * V + targets)
            totals = _look_up(table.contexts, table.totals, short)
            kinds = _look_up(table.contexts, table.kinds, short)
            seen = np.maximum(totals, 1)
            mixed = np.maximum(counts - table.discount, 0) / seen + table.discount * kinds / seen * chance
            chance = np.where(totals > 0, mixed, chance)
        return chance


def fit(tokens_list: Sequence[NDArray[np.integer]], vocab_size: int, bos_id: int = 1) -> NGrams:
    """Count and smooth.

    Parameters
    ----------
    tokens_list
        Arrays (tokens,) of documents one after another, each starting with BOS.
    vocab_size
        V; every token lies in [0, V).
    bos_id
        What a document starts with.
    """
    parts = [windows(tokens, bos_id, vocab_size) for tokens in tokens_list]
    V = vocab_size
    sequences = np.concatenate([context * V + targets for context, targets in parts])
    chains = []
    for order in range(1, MAX_ORDER + 1):
        keys, counts = np.unique(sequences % V**order, return_counts=True)
        tables = [_table(keys, counts.astype(np.int64), V)]
        for shorter in range(order - 1, 0, -1):
            # Kneser-Ney: count left contexts, which are the different sequences one longer that end in this one.
            keys, counts = np.unique(keys % V**shorter, return_counts=True)
            tables.append(_table(keys, counts.astype(np.int64), V))
        chains.append(tuple(reversed(tables)))
    return NGrams(vocab_size, bos_id, tuple(chains))


def windows(tokens: NDArray[np.integer], bos_id: int, vocab_size: int) -> tuple[Ints, Ints]:
    """Pair every token to be predicted with its two predecessors, packed as first · V + second.

    Returns
    -------
    context, targets
        (predictions,) each; predictions are all tokens but BOS.
    """
    array = np.asarray(tokens, dtype=np.int64)
    if array.ndim != 1 or (len(array) and (array.min() < 0 or array.max() >= vocab_size)):
        raise ValueError(f"expected one dimension of token ids in [0, {vocab_size}), got shape {array.shape}")
    if len(array) and array[0] != bos_id:
        raise ValueError(f"the first token is {array[0]}, not BOS ({bos_id}): documents start with BOS")
    previous = np.concatenate([[bos_id], array[:-1]])
    before = np.concatenate([[bos_id, bos_id], array[:-2]])[: len(array)]
    before = np.where(previous == bos_id, bos_id, before)  # no looking back into the document before
    wanted = array != bos_id
    return (before * vocab_size + previous)[wanted], array[wanted]


def _table(keys: Ints, counts: Ints, vocab_size: int) -> _Table:
    contexts, first = np.unique(keys // vocab_size, return_index=True)  # keys are sorted, so contexts are in runs
    totals = np.add.reduceat(counts, first) if len(keys) else counts
    kinds = np.diff(np.append(first, len(keys)))
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    # Without a single count of one nothing is held back for the unseen; a half keeps every probability positive.
    discount = once / (once + 2 * twice) if once else 0.5
    return _Table(keys, counts, contexts, totals, kinds, discount)


def _look_up(keys: Ints, values: Ints, wanted: Ints) -> Ints:
    """Values at the wanted keys, 0 where a key is missing; `keys` are sorted."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
