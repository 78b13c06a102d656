"""Routing statistics on synthetic routings whose answers are known."""

import math

import numpy as np
import pytest

import minimoe
from minimoe import repetition, routing_pairs, texts
from minimoe import routing_statistics as rs
from minimoe.reading import read
from minimoe.token_types import TYPES, token_types

RNG = np.random.default_rng(0)


def random_ids(L, N, E, k):
    """Even and independent choices of k different experts."""
    return np.argsort(RNG.random((L, N, E)), axis=-1)[..., :k]


def test_shares_count_every_slot_and_leave_out_unrouted_tokens():
    ids = np.array([[[0, 1], [0, 2], [-1, -1]], [[3, 0], [3, 1], [3, 2]]])
    np.testing.assert_allclose(rs.shares(ids, 4), [[2 / 4, 1 / 4, 1 / 4, 0], [1 / 6, 1 / 6, 1 / 6, 3 / 6]])
    np.testing.assert_allclose(rs.shares(ids[..., :1], 4), [[1, 0, 0, 0], [0, 0, 0, 1]])


def test_shares_of_nothing_are_nan():
    assert np.isnan(rs.shares(np.full((2, 3, 2), -1), 4)).all()
    assert np.isnan(rs.shares(np.zeros((2, 0, 2), int), 4)).all()


def test_entropy_in_bits():
    np.testing.assert_allclose(rs.entropy(np.array([0.5, 0.25, 0.125, 0.125])), 1.75)
    np.testing.assert_allclose(rs.entropy(np.full((3, 8), 1 / 8)), [3, 3, 3])


def test_information_is_the_entropy_where_one_label_decides_the_other_and_zero_where_they_are_independent():
    a = np.repeat([0, 1, 2, 3], 6)
    assert rs.mutual_information(a, a // 2) == pytest.approx(1.0)
    assert rs.mutual_information(a, 3 - a) == pytest.approx(2.0)
    assert rs.mutual_information(a, np.tile([0, 1, 2], 8)) == pytest.approx(0.0, abs=1e-12)
    assert rs.mutual_information(a, np.zeros_like(a)) == 0.0


def test_information_of_a_noisy_channel():
    """A binary symmetric channel with error 1/4 carries 1 - H(1/4) bits."""
    sent = np.repeat([0, 1], 400)
    received = np.where(np.arange(800) % 4 == 0, 1 - sent, sent)
    expected = 1 + 0.25 * math.log2(0.25) + 0.75 * math.log2(0.75)
    assert rs.mutual_information(sent, received) == pytest.approx(expected)


def test_information_leaves_out_negative_labels():
    a, b = np.array([0, 1, 0, 1, -1, 0]), np.array([0, 1, 0, 1, 0, -1])
    assert rs.mutual_information(a, b) == pytest.approx(1.0)
    assert rs.mutual_information(np.array([-1]), np.array([0])) == 0.0


def test_domain_information_is_per_layer_and_of_the_first_choice():
    domains = np.repeat([0, 1], 4)
    constant, split = np.zeros((8, 1), int), domains[:, None]
    first = np.stack([constant, split])  # layer 0 ignores the domain, layer 1 is the domain
    second = 2 + np.stack([split, constant])
    np.testing.assert_allclose(rs.domain_information(np.concatenate([first, second], axis=-1), domains), [0, 1])


def test_shuffling_tokens_leaves_only_the_bias_of_small_samples():
    """The plug-in estimate of independent labels exceeds 0 by about (E-1)(G-1) / (2 N ln 2) bits (Miller, 1955)."""
    N, E, G = 3000, 8, 6
    domains = np.arange(N) % G
    ids = (domains % E)[None, :, None]  # fully informative as measured
    assert rs.domain_information(ids, domains)[0] == pytest.approx(math.log2(G))
    shuffled = rs.shuffled_information(ids, domains, shuffles=30)
    assert shuffled.shape == (30, 1)
    assert shuffled.mean() == pytest.approx((G - 1) * (G - 1) / (2 * N * math.log(2)), rel=0.25)


def test_shuffling_documents_keeps_what_documents_share():
    """Every document sticks to one expert: 60 documents say much about a domain by chance, 6000 free tokens do not."""
    documents = np.repeat(np.arange(60), 100)
    domains = documents % 6
    ids = RNG.integers(0, 8, 60)[documents][None, :, None]
    by_document = rs.shuffled_information(ids, domains, documents, shuffles=20).mean()
    by_token = rs.shuffled_information(ids, domains, shuffles=20).mean()
    assert by_document > 0.2 > 0.01 > by_token
    assert rs.domain_information(ids, domains)[0] < 3 * by_document


def test_a_seed_fixes_the_shuffles():
    domains, ids = np.arange(50) % 3, random_ids(2, 50, 4, 2)
    one, same, other = (rs.shuffled_information(ids, domains, shuffles=5, seed=s) for s in (1, 1, 2))
    assert (one == same).all() and (one != other).any()


def test_units_that_span_domains_are_refused():
    with pytest.raises(ValueError, match="must not span domains"):
        rs.shuffled_information(random_ids(1, 4, 4, 2), np.array([0, 0, 1, 1]), np.array([7, 7, 7, 8]))


def test_repeats_by_hand():
    ids = np.array([[[0, 1], [0, 2], [2, 3], [1, 0], [1, 0]]])  # pairs: first yes, no, no, yes; any yes, yes, no, yes
    first, any_choice = rs.repeats(ids)
    assert (first[0], any_choice[0]) == (2 / 4, 3 / 4)


def test_pairs_across_documents_and_with_padding_do_not_count():
    ids = np.array([[[0, 1], [0, 1], [0, 1], [-1, -1], [-1, -1]]])
    first, any_choice = rs.repeats(ids, np.array([0, 1, 1, 1, 1]))
    assert (first[0], any_choice[0]) == (1.0, 1.0)
    first, any_choice = rs.repeats(ids[:, :2], np.array([0, 1]))
    assert np.isnan(first).all() and np.isnan(any_choice).all()
    assert np.isnan(rs.repeats(ids[:, :1])[0]).all()


@pytest.mark.parametrize(("E", "k"), [(8, 2), (4, 1), (5, 3), (3, 3)])
def test_independent_even_choices_repeat_as_often_as_chance_says(E, k):
    first, any_choice = rs.repeats(random_ids(1, 20000, E, k))
    chance = rs.chance_of_repeats(E, k)
    assert first[0] == pytest.approx(chance[0], abs=0.015)
    assert any_choice[0] == pytest.approx(chance[1], abs=0.015)


def test_shuffled_order_keeps_uneven_use_and_loses_order():
    ids = np.where(np.arange(4000) < 3000, 0, 1)[None, :, None]  # 0 three times as often, in one long run
    assert rs.repeats(ids)[0][0] > 0.999
    first, any_choice = rs.shuffled_repeats(ids, shuffles=5)
    assert first.mean() == pytest.approx(0.75**2 + 0.25**2, abs=0.02)
    np.testing.assert_array_equal(first, any_choice)


def test_shuffled_order_stays_inside_documents():
    documents = np.repeat([0, 1], 50)
    ids = documents[None, :, None]  # one expert per document
    np.testing.assert_array_equal(rs.shuffled_repeats(ids, documents, shuffles=3)[0], np.ones((3, 1)))


def test_what_holds_no_routing_is_refused():
    with pytest.raises(ValueError, match="a dense model has no router: there is nothing to route"):
        rs.routed_ids(None)
    with pytest.raises(ValueError, match="none of the 5 tokens was routed"):
        rs.routed_ids(np.full((2, 5, 2), -1))
    with pytest.raises(ValueError, match="must be integers of shape"):
        rs.routed_ids(np.zeros((2, 5)))


def test_consecutive_pairs_by_hand():
    ids = np.array([[[0, 1], [1, 0], [1, 2], [3, 0], [-1, -1]]])
    pairs, first, common = rs.consecutive_pairs(ids, np.array([7, 7, 7, 8, 8]))
    assert pairs.tolist() == [[True, True, False, False]]
    assert first.tolist() == [[False, True, False, False]]
    assert common.tolist() == [[True, True, False, False]]


def test_the_entropy_of_a_router_by_hand():
    logits = np.log(np.array([[[1.0, 1, 1, 1], [1, 1, 1e-300, 1e-300]]])) + 700
    np.testing.assert_allclose(rs.router_entropy(logits), [[2.0, 1.0]])


def test_shuffled_logits_keep_what_each_expert_has_and_lose_what_belongs_together():
    logits = np.repeat(RNG.normal(size=(2, 500, 1)), 4, axis=2) + np.arange(4)  # all experts alike for a token
    shuffled = rs.shuffled_logits(logits)
    np.testing.assert_array_equal(np.sort(shuffled, axis=1), np.sort(logits, axis=1))
    assert np.corrcoef(logits[0].T)[0, 1] == pytest.approx(1) and abs(np.corrcoef(shuffled[0].T)[0, 1]) < 0.15


def test_sets_of_experts_differ_whatever_their_order():
    a = np.array([[[0, 1], [2, 3], [1, 0]]])
    assert rs.choice_differences(a, np.array([[[1, 0], [2, 4], [1, 0]]])).tolist() == [[False, True, False]]
    with pytest.raises(ValueError, match="token by token only"):
        rs.choice_differences(a, a[:, :2])


@pytest.mark.parametrize(("E", "k"), [(8, 2), (4, 1), (5, 3)])
def test_independent_even_choices_differ_as_often_as_chance_says(E, k):
    found = rs.choice_differences(random_ids(1, 20000, E, k), random_ids(1, 20000, E, k)).mean()
    assert found == pytest.approx(rs.chance_of_difference(E, k), abs=0.012)


def test_backends_give_the_same_statistics():
    """In float64 both backends choose the same experts, and what is counted on them is the same to the last bit."""
    found = []
    for backend in ("numpy", "numba"):
        model = minimoe.load("tiny", backend=backend, dtype="float64")
        routings, kinds = {}, {}
        for name, text in texts.load().items():
            reading = read(model.ops, model.config, model.params, model.tokenizer, text[:700], name=name)
            routings[name], kinds[name] = reading.ids, token_types(model.tokenizer.pieces(reading.tokens.tolist()))
        ids = np.concatenate(list(routings.values()), axis=1)
        labels = np.concatenate(list(kinds.values()))
        found.append(
            {
                "ids": ids,
                "shares": rs.shares(ids, 8),
                "pairs": routing_pairs.independent_coactivation(routing_pairs.coactivation(ids, 8)),
                "paths": routing_pairs.transitions(ids, 8),
                "kinds": routing_pairs.specialisation(ids, labels, 8, len(TYPES)),
                "table": repetition.repeat_table(routings, 8).to_csv(),
            }
        )
    for name, one in found[0].items():
        assert np.array_equal(one, found[1][name]), name
