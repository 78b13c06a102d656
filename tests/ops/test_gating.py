import math

import ml_dtypes
import numpy as np
import pytest

from tests.measure import assert_close, assert_slopes, dialects


@pytest.fixture(params=dialects("gating"), ids=lambda m: m.__name__.rpartition(".")[2])
def gating(request):
    return request.param


def naive(x, gate, k, active=None, allowed=None, renormalise=True):
    (N, D), E = x.shape, len(gate)
    logits, ids, weights = np.zeros((N, E)), np.full((N, k), -1), np.zeros((N, k))
    for n in range(N):
        for e in range(E):
            logits[n, e] = sum(x[n, d] * gate[e, d] for d in range(D))
        if active is not None and not active[n]:
            continue
        candidates = [e for e in range(E) if allowed is None or allowed[e]]
        ids[n] = sorted(candidates, key=lambda e: (-logits[n, e], e))[:k]
        exps = [math.exp(value) for value in logits[n]]
        weights[n] = [exps[e] / sum(exps[i] for i in (ids[n] if renormalise else range(E))) for e in ids[n]]
    return logits, ids, weights


SHAPES = pytest.mark.parametrize(
    ("N", "D", "E", "k"), [(1, 1, 1, 1), (1, 3, 4, 2), (7, 5, 8, 2), (7, 5, 3, 1), (70, 2, 5, 5)]
)


def draw(N, D, E):
    rng = np.random.default_rng(N + E)
    return rng.normal(size=(N, D)), rng.normal(size=(E, D))


def assert_same(found, expected, tolerance=1e-12):
    np.testing.assert_array_equal(found[1], expected[1])
    assert found[1].dtype == np.int64
    assert_close((found[0], found[2]), (expected[0], expected[2]), tolerance)


@SHAPES
@pytest.mark.parametrize("renormalise", [True, False])
def test_equals_naive_loops(gating, N, D, E, k, renormalise):
    x, gate = draw(N, D, E)
    some = {"active": np.arange(N) % 3 != 1, "allowed": np.arange(E) != 0 if k < E else None}
    for given in ({}, {"active": some["active"]}, {"allowed": some["allowed"]}, some):
        given["renormalise"] = renormalise
        assert_same(gating.forward(x, gate, k, **given), naive(x, gate, k, **given))


@SHAPES
@pytest.mark.parametrize("renormalise", [True, False])
def test_backward_is_the_slope(gating, N, D, E, k, renormalise):
    x, gate = draw(N, D, E)
    rng = np.random.default_rng(0)
    cw, cl = rng.normal(size=(N, k)), rng.normal(size=(N, E))
    active = np.arange(N) % 3 != 1
    logits, ids, weights = gating.forward(x, gate, k, active, renormalise=renormalise)

    def loss(x, gate):  # the choice is held fixed: it has no gradient
        logits, _, weights = gating.forward(x, gate, k, active, None, ids, renormalise)
        return (cw * weights).sum() + (cl * logits).sum()

    over_all = None if renormalise else logits
    assert_slopes(loss, [x, gate], gating.backward(cw, cl, x, gate, ids, weights, over_all))
    cl[:] = 0
    assert_slopes(loss, [x, gate], gating.backward(cw, None, x, gate, ids, weights, over_all))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("N", [1, 3, 70])
def test_ties_go_to_the_lower_expert(gating, dtype, N):
    x = np.ones((N, 1), dtype)
    gate = np.array([[1], [3], [2], [3], [3], [2]], dtype)
    assert gating.forward(x, gate, 4)[1].tolist() == [[1, 3, 4, 2]] * N
    assert gating.forward(0 * x, gate, 3)[1].tolist() == [[0, 1, 2]] * N


@pytest.mark.parametrize("N", [1, 3, 70])
def test_a_logit_gap_of_200_keeps_the_second_choice(gating, N):
    # float32 softmax over all experts: every loser underflows to 0, and the tie would go to expert 1
    gate = np.array([[0], [-220], [-210], [-200]], np.float32)
    _, ids, weights = gating.forward(np.ones((N, 1), np.float32), gate, 2)
    assert ids.tolist() == [[0, 3]] * N
    assert weights.tolist() == [[1, 0]] * N


def test_equals_softmax_then_top_k_then_renormalise(gating):
    x, gate = draw(20, 5, 6)
    logits, ids, weights = gating.forward(x, gate, 3)
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    order = np.argsort(-probs, axis=1, kind="stable")[:, :3]
    chosen = np.take_along_axis(probs, order, 1)
    np.testing.assert_array_equal(ids, order)
    assert_close(weights, chosen / chosen.sum(axis=1, keepdims=True))
    assert (np.diff(weights) <= 0).all()  # slot 0 is the first choice


def test_one_expert_per_token_has_weight_one(gating):
    assert (gating.forward(*draw(7, 5, 8), 1)[2] == 1).all()


def test_the_same_experts_are_chosen_without_renormalising(gating):
    x, gate = draw(20, 5, 6)
    expected, found = (gating.forward(x, gate, 3, renormalise=renormalise) for renormalise in (True, False))
    np.testing.assert_array_equal(found[1], expected[1])
    assert (found[2].sum(axis=1) < 1).all()
    assert_close(found[2] / found[2].sum(axis=1, keepdims=True), expected[2])


@pytest.mark.parametrize("N", [1, 3, 70])
def test_an_expert_that_is_switched_off_keeps_its_share_without_renormalising(gating, N):
    # its logit is far the largest: float32 must not overflow, and the others get next to nothing
    gate = np.array([[0], [200], [1]], np.float32)
    allowed = np.array([True, False, True])
    _, ids, weights = gating.forward(np.ones((N, 1), np.float32), gate, 2, None, allowed, renormalise=False)
    assert ids.tolist() == [[2, 0]] * N
    assert weights.tolist() == [[0, 0]] * N


def test_a_forced_choice_is_taken_as_it_is(gating):
    x, gate = draw(3, 4, 5)
    forced = np.array([[4, 0], [1, 2], [-1, -1]])
    logits, ids, weights = gating.forward(x, gate, 2, ids=forced)
    np.testing.assert_array_equal(ids, forced)
    for n in range(2):
        exps = np.exp(logits[n, forced[n]])
        assert_close(weights[n], exps / exps.sum())
    assert weights[2].tolist() == [0, 0]
    _, ids, weights = gating.forward(x, gate, 2, active=np.array([False, True, True]), ids=forced)
    assert ids.tolist() == [[-1, -1], [1, 2], [-1, -1]]
    assert weights[0].tolist() == [0, 0]


@pytest.mark.parametrize("renormalise", [True, False])
def test_a_token_that_is_not_routed_has_no_gradient(gating, renormalise):
    x, gate = draw(2, 4, 5)
    logits, ids, weights = gating.forward(x, gate, 2, active=np.array([False, True]), renormalise=renormalise)
    over_all = None if renormalise else logits
    dx, dgate = gating.backward(np.array([[3.0, 5], [0, 0]]), None, x, gate, ids, weights, over_all)
    assert not dx.any()
    assert not dgate.any()


@pytest.mark.parametrize("N", [1, 9, 70])
def test_both_operands_are_rounded_where_the_gate_is_bfloat16(gating, N):
    rng = np.random.default_rng(0)
    x, gate = rng.normal(size=(N, 37)).astype(np.float32), rng.normal(size=(5, 37)).astype(ml_dtypes.bfloat16)
    logits, ids, weights = gating.forward(x, gate, 2)
    assert logits.dtype == weights.dtype == np.float32
    wide = [a.astype(ml_dtypes.bfloat16).astype(np.float64) for a in (x, gate)]
    assert_same((logits, ids, weights), naive(*wide, 2), 1e-5)
