"""N-grams: distributions, agreement with counting in dictionaries, and where documents begin."""

from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from minimoe.training import ngrams

V, BOS = 7, 1


def documents(seed: int, length: int = 300) -> NDArray[np.uint16]:
    """Random tokens with a skew, cut into documents; token 6 never occurs."""
    rng = np.random.default_rng(seed)
    tokens = rng.choice([0, 2, 3, 4, 5], p=[0.4, 0.3, 0.15, 0.1, 0.05], size=length)
    return np.concatenate([np.r_[BOS, part] for part in np.array_split(tokens, 12)]).astype(np.uint16)


def naive(tokens: list[int], order: int) -> dict[tuple[int, ...], list[float]]:
    """Kneser-Ney by the book: one dictionary per order; returns context -> distribution for every context seen."""
    sequences: Counter[tuple[int, ...]] = Counter()
    for i, token in enumerate(tokens):
        if token != BOS:
            history = tokens[:i]
            start = i - history[::-1].index(BOS) - 1
            padded = (BOS, BOS, *tokens[start:i])[-(order - 1) :] if order > 1 else ()
            sequences[(*padded, token)] += 1
    counts = {order: sequences}
    for n in range(order - 1, 0, -1):
        counts[n] = Counter(sequence[1:] for sequence in counts[n + 1])

    def chance(context: tuple[int, ...], token: int) -> float:
        table = counts[len(context) + 1]
        lower = chance(context[1:], token) if context else 1 / V
        ones, twos = list(table.values()).count(1), list(table.values()).count(2)
        discount = ones / (ones + 2 * twos) if ones else 0.5
        followers = {s: c for s, c in table.items() if s[:-1] == context}
        total = sum(followers.values())
        if not total:
            return lower
        kept = max(table[(*context, token)] - discount, 0) / total
        return kept + discount * len(followers) / total * lower

    contexts = {(a, b) for a in range(V) for b in range(V) if b != BOS or a == BOS}
    return {c: [chance(c[3 - order :] if order > 1 else (), w) for w in range(V)] for c in contexts}


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_are_those_of_dictionary_counting(order: int) -> None:
    tokens = documents(0)
    model = ngrams.fit([tokens], V, BOS)
    for context, distribution in naive(tokens.tolist(), order).items():
        np.testing.assert_allclose(model.probability(context, order), distribution, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_every_distribution_sums_to_one_and_is_positive(order: int) -> None:
    model = ngrams.fit([documents(0), documents(1)], V, BOS)
    for context in ([], [2], [0, 2], [6, 6], [5, 5], [BOS, 3]):
        distribution = model.probability(context, order)
        assert distribution.sum() == pytest.approx(1, abs=1e-12)
        assert distribution.min() > 0


@pytest.mark.parametrize("order", [1, 2, 3])
def test_loss_is_the_mean_over_all_tokens_but_bos(order: int) -> None:
    model, tokens = ngrams.fit([documents(0)], V, BOS), documents(2, 40)
    losses = []
    for i, token in enumerate(tokens.tolist()):
        if token != BOS:
            context = tokens[:i].tolist()
            since = context[len(context) - 1 - context[::-1].index(BOS) :]
            losses.append(-np.log(model.probability(since, order)[token]))
    assert model.loss(tokens, order) == pytest.approx(np.mean(losses), abs=1e-12)


def test_contexts_do_not_reach_into_the_document_before() -> None:
    context, targets = ngrams.windows(np.array([BOS, 2, 3, BOS, 4, 5]), BOS, V)
    assert targets.tolist() == [2, 3, 4, 5]
    pairs = [divmod(int(key), V) for key in context]
    assert pairs == [(BOS, BOS), (BOS, 2), (BOS, BOS), (BOS, 4)]


def test_fitting_two_arrays_is_fitting_their_concatenation() -> None:
    first, second, held_out = documents(0), documents(1), documents(2)
    apart = ngrams.fit([first, second], V, BOS).loss(held_out, 3)
    assert apart == ngrams.fit([np.concatenate([first, second])], V, BOS).loss(held_out, 3)


def test_a_longer_order_predicts_a_text_with_longer_structure_better() -> None:
    tokens = np.array(([BOS] + [2, 3, 2, 4] * 50) * 4)
    model = ngrams.fit([tokens], V, BOS)
    assert model.loss(tokens, 3) < 0.1 < model.loss(tokens, 2) < model.loss(tokens, 1)


@pytest.mark.parametrize(
    ("tokens", "complaint"),
    [([2, 3], "first token is 2, not BOS"), ([BOS, V], r"in \[0, 7\)"), ([[BOS, 2]], "shape")],
)
def test_unusable_tokens_are_refused(tokens: list[int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ngrams.fit([np.array(tokens)], V, BOS)


def test_an_order_that_was_not_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="order 4"):
        ngrams.fit([documents(0)], V, BOS).loss(documents(1), 4)
