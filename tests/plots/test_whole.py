"""Pictures of any model are whole: nothing clipped, nothing one over the other, no text too small."""

import numpy as np
import pytest

from minimoe import plots, repetition
from minimoe.ablation import Ablation
from minimoe.token_types import token_types
from tests.plots.pictures import PIECES, assert_whole, random_ids, random_routing

SIZES = [(1, 1, 2), (2, 1, 16), (6, 80, 8), (2, 300, 64), (32, 24, 16), (3, 40, 100)]


@pytest.mark.parametrize(("L", "N", "E"), SIZES)
def test_pictures_of_routing_are_whole(L, N, E):
    k = min(2, E - 1)
    routing = random_routing(L, N, E, k)
    pieces = (PIECES * (N // len(PIECES) + 1))[:N]
    assert_whole(plots.token_grid(pieces, routing))
    assert_whole(plots.token_paths(routing.ids, E))
    assert_whole(plots.router_distributions(routing))
    assert_whole(plots.routing_differences(routing, random_routing(L, N, E, k, seed=1)))
    assert_whole(plots.token_type_specialisation(routing.ids, token_types(pieces), E))
    if k > 1:
        assert_whole(plots.expert_pairs(routing.ids, E))


@pytest.mark.parametrize(("L", "k", "E"), [(1, 1, 2), (6, 2, 8), (32, 2, 64), (2, 8, 512)])
def test_pictures_of_domains_are_whole(L, k, E):
    names = ["python", "a rather long name of a text file.txt"]
    share = np.random.default_rng(0).dirichlet(np.ones(E), (2, L))
    assert_whole(plots.domain_shares(share, names))
    table = repetition.repeat_table({name: random_ids(L, 200, E, k) for name in names}, E)
    assert_whole(plots.repeated_assignments(table))
    assert_whole(plots.repeated_assignments(table, layers=list(range(L))[:8], beside=None))
    costs = np.random.default_rng(0).normal(size=(2, L, E))
    assert_whole(plots.switched_off(Ablation(tuple(names), np.ones(2), costs, np.abs(costs) / 2, share)))


@pytest.mark.parametrize(("E", "k"), [(2, 1), (8, 2), (16, 4), (64, 8)])
def test_one_gate_is_whole(E, k):
    routing = random_routing(1, 1, E, k)
    choice = routing.logits[0, 0], routing.ids[0, 0], routing.weights[0, 0]
    assert_whole(plots.gate_steps(*choice), inside=False)
    assert_whole(
        plots.gate_steps(*choice, np.ones((k, 16)), piece="a very long piece of text, \n", layer=31), inside=False
    )


@pytest.mark.parametrize(("H", "T", "S"), [(1, 1, 1), (4, 12, 12), (8, 30, 30), (5, 100, 100), (2, 1, 40)])
def test_attention_is_whole(H, T, S):
    probs = np.tri(T, S, S - T) / np.tri(T, S, S - T).sum(axis=1, keepdims=True)
    pieces = (PIECES * 10)[:S]
    assert_whole(plots.attention_maps(np.stack([probs] * H), pieces if T == S else None))


@pytest.mark.parametrize(("R", "next_position"), [(1, 0), (1, 5), (3, 2), (8, 13), (16, 40), (32, 32), (128, 300)])
def test_rings_are_whole(R, next_position):
    slots = np.full(R, -1)
    for position in range(next_position):
        slots[position % R] = position
    for window in (None, R, 2 * R):
        assert_whole(plots.cache_ring(slots, next_position, window=window))


def test_training_and_roofline_are_whole():
    steps, rng = np.arange(1, 400), np.random.default_rng(0)
    run = {"step": steps, "balance": 2 + rng.random(399), "least_share": rng.random(399), "loss": rng.random(399)}
    assert_whole(plots.balance_over_training({"one": run, "a long name of a run": run}))
    assert_whole(plots.balance_over_training({"one": {name: values[:1] for name, values in run.items()}}))
    for E in (2, 8, 64):
        assert_whole(plots.shares_over_training(steps, rng.dirichlet(np.ones(E), (399, 4))))
    labels = [f"an op with a long name, number {i}" for i in range(24)]
    backends = ["numpy", "numba", "cuda"] * 8
    limits = {"numpy": 3e10, "numba": 3e10, "cuda": 3e12}
    peaks = {"numpy": 3e11, "numba": 3e11, "cuda": 6e13}
    page = plots.roofline(
        10 ** rng.uniform(-1, 2, 24), 10 ** rng.uniform(9, 11, 24), labels, backends, bandwidth=limits, peak=peaks
    )
    assert_whole(page, inside=False)
