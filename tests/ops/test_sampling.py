import math

import numpy as np
import pytest

from tests.measure import dialects


@pytest.fixture(params=dialects("sampling"), ids=lambda m: m.__name__.rpartition(".")[2])
def sampling(request):
    return request.param


def naive(logits, temperature, top_p, uniform):
    """One row."""
    ids = range(len(logits))
    if temperature == 0:
        return max(ids, key=lambda v: (logits[v], -v))
    top = max(logits)
    exps = [math.exp((z - top) / temperature) for z in logits]
    probs = [value / sum(exps) for value in exps]
    nucleus, mass = [], 0.0
    for v in sorted(ids, key=lambda v: (-probs[v], v)):
        nucleus.append(v)
        mass += probs[v]
        if mass >= top_p:
            break
    drawn, below = nucleus[-1], 0.0
    for v in nucleus:
        below += probs[v]
        if below > uniform * mass:
            drawn = v
            break
    return drawn


@pytest.mark.parametrize("temperature", [0, 0.1, 1, 3])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("V", [1, 2, 9, 50])
def test_equals_naive_loops(sampling, temperature, top_p, V):
    rng = np.random.default_rng(V)
    logits, uniform = 2 * rng.normal(size=(20, V)), rng.random(20)
    expected = [naive(row, temperature, top_p, u) for row, u in zip(logits, uniform, strict=True)]
    found = sampling.forward(logits, temperature, top_p, uniform)
    assert found.dtype == np.int64
    assert found.tolist() == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_temperature_zero_takes_the_lowest_of_equals(sampling, dtype):
    logits = np.array([[1, 5, 5, 2], [7, 7, 7, 7]], dtype)
    assert sampling.forward(logits, 0.0, 1.0, np.array([0.9, 0.9])).tolist() == [1, 0]


def nucleus(sampling, logits, top_p):
    """The tokens that any uniform number can draw."""
    uniform = np.append((np.arange(400) + 0.5) / 400, np.nextafter(1, 0))
    return set(sampling.forward(np.tile(logits, (401, 1)), 1.0, top_p, uniform).tolist())


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1e-9, {2}),
        (0.25, {2}),
        (0.26, {0, 2}),
        (0.5, {0, 2}),
        (0.51, {0, 2, 3}),
        (0.8, {0, 2, 3, 5}),
        (1.0, {0, 2, 3, 5}),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(sampling, top_p, expected):
    # ties to the lower id: 2 is the first of the four, and comes before 0 only because it is more probable by a hair
    logits = np.array([0, -np.inf, 1e-15, 0, -np.inf, 0])
    assert nucleus(sampling, logits, top_p) == expected


def test_the_nucleus_takes_the_lower_of_equals(sampling):
    assert nucleus(sampling, np.zeros(4), 0.5) == {0, 1}


def test_the_mass_of_the_nucleus_is_renormalised(sampling):
    # 1/2, 1/4, 1/8, 1/8: with top_p = 3/4 the first token has two thirds
    logits = np.log(np.array([1 / 2, 1 / 4, 1 / 8, 1 / 8]))
    uniform = np.arange(0, 1, 1 / 3000)
    drawn = sampling.forward(np.tile(logits, (3000, 1)), 1.0, 0.74, uniform)
    assert abs((drawn == 0).mean() - 2 / 3) < 1e-3
    assert abs((drawn == 1).mean() - 1 / 3) < 1e-3


def test_frequencies_are_the_probabilities(sampling):
    logits = np.random.default_rng(0).normal(size=7)
    drawn = sampling.forward(np.tile(logits, (5000, 1)), 2.0, 1.0, (np.arange(5000) + 0.5) / 5000)
    probs = np.exp(logits / 2) / np.exp(logits / 2).sum()
    assert np.abs(np.bincount(drawn, minlength=7) / 5000 - probs).max() < 1e-3


def test_a_low_temperature_is_nearly_greedy_and_does_not_overflow(sampling):
    logits = np.array([[1.0, 3.0, 2.0]], np.float32)
    assert sampling.forward(logits, 1e-6, 1.0, np.array([np.nextafter(1, 0)])) == 1


def test_excluded_tokens_are_never_drawn(sampling):
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0], np.float32)
    assert nucleus(sampling, logits, 1.0) == {1, 3}
