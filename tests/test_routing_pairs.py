"""Pairs of experts, steps between layers and kinds of tokens, on routings whose tables are known."""

import itertools

import numpy as np
import pytest

from minimoe import routing_pairs as rp

RNG = np.random.default_rng(0)


def random_ids(L, N, E, k):
    return np.argsort(RNG.random((L, N, E)), axis=-1)[..., :k]


def test_pairs_by_hand():
    ids = np.array([[[0, 1], [1, 0], [2, 1], [-1, -1]], [[3, 2], [3, 2], [3, 2], [0, 3]]])
    pairs = rp.coactivation(ids, 4)
    assert pairs[0].tolist() == [[0, 2, 0, 0], [2, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert pairs[1].tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 3], [1, 0, 3, 0]]


def test_three_experts_a_token_are_three_pairs():
    ids = random_ids(2, 50, 6, 3)
    pairs = rp.coactivation(ids, 6)
    by_hand = np.zeros((2, 6, 6), int)
    for layer, tokens in enumerate(ids.tolist()):
        for token in tokens:
            for a, b in itertools.permutations(token, 2):
                by_hand[layer, a, b] += 1
    np.testing.assert_array_equal(pairs, by_hand)
    assert pairs.sum() == 2 * 50 * 6


def test_independent_pairs_keep_every_experts_total_and_are_products():
    pairs = rp.coactivation(random_ids(1, 300, 6, 2) ** 2 // 6, 6)[0]  # uneven use; equal ids count once or twice
    pairs[np.arange(6), np.arange(6)] = 0
    expected = rp.independent_coactivation(pairs)
    np.testing.assert_allclose(expected.sum(axis=1), pairs.sum(axis=1), rtol=1e-8)
    assert (np.diag(expected) == 0).all()
    for a, b, c, d in itertools.permutations(np.flatnonzero(pairs.sum(axis=1)), 4):  # odds ratios are 1
        assert expected[a, b] * expected[c, d] == pytest.approx(expected[a, d] * expected[c, b])


def test_pairs_drawn_by_products_are_found_again():
    a = np.array([5.0, 3, 2, 1, 1])
    pairs = np.outer(a, a) * (1 - np.eye(5))
    np.testing.assert_allclose(rp.independent_coactivation(pairs), pairs, rtol=1e-8)
    np.testing.assert_allclose(rp.independent_coactivation(np.stack([pairs, 2 * pairs]))[1], 2 * pairs, rtol=1e-8)


def test_even_use_gives_every_pair_the_same():
    expected = rp.independent_coactivation(np.full((4, 4), 10) - 10 * np.eye(4))
    np.testing.assert_allclose(expected[~np.eye(4, dtype=bool)], 10)


def test_an_expert_in_every_pair_and_one_that_is_never_used():
    pairs = np.array([[0, 3, 5, 0], [3, 0, 0, 0], [5, 0, 0, 0], [0, 0, 0, 0]])
    expected = rp.independent_coactivation(pairs)
    assert np.isfinite(expected).all() and (expected[3] == 0).all()
    np.testing.assert_allclose(expected[0], [0, 3, 5, 0], rtol=0.01)


def test_transitions_by_hand():
    ids = np.array([[0, 0, 1, -1], [1, 0, 1, 1], [1, 1, 1, 0]])[..., None]
    assert rp.transitions(ids, 2).tolist() == [[[1, 1], [0, 1]], [[0, 1], [1, 2]]]
    assert rp.transitions(ids, 2, layers=[0, 2]).tolist() == [[[0, 2], [0, 1]]]
    assert rp.transitions(ids[:1], 2).shape == (0, 2, 2)


def test_specialisation_by_hand():
    ids = np.array([[[0, 1], [0, 2], [1, 2], [-1, -1]]])
    counts = rp.specialisation(ids, np.array([0, 1, 1, 0]), 3, 2)
    assert counts.tolist() == [[[1, 1, 0], [1, 1, 2]]]
    assert rp.specialisation(ids, np.array([0, -1, 1, 0]), 3, 2).tolist() == [[[1, 1, 0], [0, 1, 1]]]
    with pytest.raises(ValueError, match="4 numbers below 2"):
        rp.specialisation(ids, np.array([0, 1]), 3, 2)
    with pytest.raises(ValueError, match="below 2"):
        rp.specialisation(ids, np.array([0, 1, 2, 0]), 3, 2)


def test_labels_dealt_at_random_agree_with_independence():
    ids, labels = random_ids(2, 40000, 4, 2), RNG.integers(0, 3, 40000)
    counts = rp.specialisation(ids, labels, 4, 3)
    np.testing.assert_allclose(counts / rp.independent(counts), 1, atol=0.05)
    first = rp.transitions(ids, 4)
    np.testing.assert_allclose(first / rp.independent(first), 1, atol=0.1)


def test_independence_keeps_both_totals():
    counts = RNG.integers(0, 20, (3, 4, 5))
    expected = rp.independent(counts)
    np.testing.assert_allclose(expected.sum(axis=1), counts.sum(axis=1))
    np.testing.assert_allclose(expected.sum(axis=2), counts.sum(axis=2))
    assert (rp.independent(np.zeros((2, 2))) == 0).all()
