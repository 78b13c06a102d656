import math

import numpy as np
import pytest

from tests.measure import assert_close, assert_slopes, dialects


@pytest.fixture(params=dialects("cross_entropy"), ids=lambda m: m.__name__.rpartition(".")[2])
def cross_entropy(request):
    return request.param


def naive(logits, targets):
    N, V = logits.shape
    losses, lse = np.zeros(N), np.zeros(N)
    total, counted = 0.0, 0
    for n in range(N):
        lse[n] = math.log(sum(math.exp(logits[n, v]) for v in range(V)))
        if targets[n] >= 0:
            losses[n] = lse[n] - logits[n, targets[n]]
            total += losses[n]
            counted += 1
    return total / max(counted, 1), losses, lse


CASES = pytest.mark.parametrize(
    ("N", "V", "ignored"), [(1, 1, 0), (1, 5, 0), (1, 5, 1), (7, 3, 3), (40, 9, 0), (7, 3, 7)]
)


def draw(N, V, ignored):
    rng = np.random.default_rng(N)
    targets = rng.integers(0, V, N)
    targets[rng.permutation(N)[:ignored]] = -1
    return 3 * rng.normal(size=(N, V)), targets


@CASES
def test_equals_naive_loops(cross_entropy, N, V, ignored):
    logits, targets = draw(N, V, ignored)
    loss, losses, lse = cross_entropy.forward(logits, targets)
    expected, expected_losses, expected_lse = naive(logits, targets)
    assert isinstance(loss, float)
    # with V = 1 the loss is zero but for rounding: so against 1 + loss
    assert_close((1 + loss, 1 + losses, lse), (1 + expected, 1 + expected_losses, expected_lse))


@CASES
def test_backward_is_the_slope(cross_entropy, N, V, ignored):
    logits, targets = draw(N, V, ignored)
    lse = cross_entropy.forward(logits, targets)[2]
    dlogits = cross_entropy.backward(0.7, logits, targets, lse)
    assert_slopes(lambda x: 0.7 * cross_entropy.forward(x, targets)[0], [logits], [dlogits])


def test_nothing_counted_is_zero(cross_entropy):
    logits, targets = draw(5, 3, 5)
    loss, losses, lse = cross_entropy.forward(logits, targets)
    assert loss == 0.0
    assert not losses.any()
    assert not cross_entropy.backward(1.0, logits, targets, lse).any()


def test_rows_that_are_not_counted_have_no_gradient(cross_entropy):
    logits, targets = draw(7, 3, 3)
    dlogits = cross_entropy.backward(1.0, logits, targets, cross_entropy.forward(logits, targets)[2])
    assert (dlogits.any(axis=1) == (targets >= 0)).all()


@pytest.mark.parametrize("V", [2, 1000])
def test_equal_logits_cost_the_logarithm_of_V(cross_entropy, V):
    assert_close(cross_entropy.forward(np.full((3, V), 7.0), np.array([0, 1, -1]))[0], math.log(V))


def test_large_logits_do_not_overflow(cross_entropy):
    logits = np.array([[1e4, -1e4], [-1e4, -1e4]], np.float32)
    loss, losses, lse = cross_entropy.forward(logits, np.array([1, 0]))
    assert_close(losses, np.array([2e4, math.log(2)]), 1e-6)
    assert np.isfinite(cross_entropy.backward(1.0, logits, np.array([1, 0]), lse)).all()
    assert_close(loss, (2e4 + math.log(2)) / 2, 1e-6)
