import math

import ml_dtypes
import numpy as np
import pytest

from tests.measure import assert_close, assert_slopes, dialects

EPS = 1e-5


@pytest.fixture(params=dialects("rmsnorm"), ids=lambda m: m.__name__.rpartition(".")[2])
def rmsnorm(request):
    return request.param


def naive(x, weight, eps, residual=None):
    N, D = x.shape
    y, h, r = np.zeros((N, D)), np.zeros((N, D)), np.zeros(N)
    for n in range(N):
        square = 0.0
        for d in range(D):
            h[n, d] = x[n, d] + (0 if residual is None else residual[n, d])
            square += h[n, d] ** 2
        r[n] = 1 / math.sqrt(square / D + eps)
        for d in range(D):
            y[n, d] = h[n, d] * r[n] * weight[d]
    return y, h, r


SHAPES = pytest.mark.parametrize(("N", "D"), [(1, 1), (1, 6), (5, 7), (130, 3)])


@SHAPES
@pytest.mark.parametrize("with_residual", [False, True])
def test_equals_naive_loops(rmsnorm, N, D, with_residual):
    rng = np.random.default_rng(N)
    x, weight = rng.normal(size=(N, D)), rng.normal(size=D)
    residual = rng.normal(size=(N, D)) if with_residual else None
    assert_close(rmsnorm.forward(x, weight, EPS, residual), naive(x, weight, EPS, residual))


@SHAPES
def test_backward_is_the_slope(rmsnorm, N, D):
    rng = np.random.default_rng(N)
    x, residual, weight = rng.normal(size=(N, D)), rng.normal(size=(N, D)), rng.normal(size=D)
    cy, ch = rng.normal(size=(N, D)), rng.normal(size=(N, D))

    def loss(x, residual, weight):
        y, h, _ = rmsnorm.forward(x, weight, EPS, residual)
        return (cy * y).sum() + (ch * h).sum()

    _, h, r = rmsnorm.forward(x, weight, EPS, residual)
    dx, dweight = rmsnorm.backward(cy, h, weight, r, ch)
    assert_slopes(loss, [x, residual, weight], [dx, dx, dweight])
    ch[:] = 0
    dx, dweight = rmsnorm.backward(cy, h, weight, r)
    assert_slopes(loss, [x, residual, weight], [dx, dx, dweight])


def test_eps_stands_inside_the_root(rmsnorm):
    # mean square 1e-6: inside, r = 1 / sqrt(1e-6 + 1e-5); outside it would be 1 / (1e-3 + 1e-5), three times as much
    y, _, r = rmsnorm.forward(np.full((1, 4), 1e-3), np.ones(4), EPS)
    assert_close(r, [1 / math.sqrt(1.1e-5)])
    assert_close(y, np.full((1, 4), 1e-3 / math.sqrt(1.1e-5)))


def test_a_row_of_zeros_stays_zero(rmsnorm):
    y, _, r = rmsnorm.forward(np.zeros((2, 4), np.float32), np.ones(4, np.float32), EPS)
    assert not y.any()
    assert np.isfinite(r).all()


def test_without_residual_h_is_x(rmsnorm):
    x = np.ones((2, 3))
    assert rmsnorm.forward(x, np.ones(3), EPS)[1] is x


def test_a_bfloat16_weight_leaves_the_rest_in_float32(rmsnorm):
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    weight = np.linspace(-1, 1, 5).astype(ml_dtypes.bfloat16)
    found = rmsnorm.forward(x, weight, EPS, x)
    assert {a.dtype for a in found} == {np.dtype(np.float32)}
    assert_close(found, naive(x.astype(np.float64), weight.astype(np.float64), EPS, x), 1e-6)
