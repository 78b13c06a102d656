import ml_dtypes
import numpy as np
import pytest

from tests.measure import assert_close, assert_slopes, dialects

BFLOAT16 = ml_dtypes.bfloat16


@pytest.fixture(params=dialects("linear"), ids=lambda m: m.__name__.rpartition(".")[2])
def linear(request):
    return request.param


def naive(x, weights):
    ys = [np.zeros((len(x), len(w))) for w in weights]
    for y, w in zip(ys, weights, strict=True):
        for n in range(len(x)):
            for o in range(len(w)):
                for i in range(x.shape[1]):
                    y[n, o] += float(x[n, i]) * float(w[o, i])
    return ys


SHAPES = pytest.mark.parametrize(
    ("N", "width", "outputs"), [(1, 1, [1]), (1, 7, [5]), (1, 6, [4, 3, 2]), (9, 5, [3, 7]), (33, 4, [1])]
)


def draw(N, width, outputs):
    rng = np.random.default_rng(N + width)
    return (
        rng.normal(size=(N, width)),
        [rng.normal(size=(o, width)) for o in outputs],
        [rng.normal(size=(N, o)) for o in outputs],
    )


@SHAPES
def test_equals_naive_loops(linear, N, width, outputs):
    x, weights, _ = draw(N, width, outputs)
    assert_close(linear.forward(x, weights), naive(x, weights))


@SHAPES
def test_backward_is_the_slope(linear, N, width, outputs):
    x, weights, cs = draw(N, width, outputs)

    def loss(x, *weights):
        return sum((c * y).sum() for c, y in zip(cs, linear.forward(x, list(weights)), strict=True))

    dx, dws = linear.backward(cs, x, weights)
    assert_slopes(loss, [x, *weights], [dx, *dws])


@pytest.mark.parametrize("N", [1, 3, 40])
def test_both_operands_are_rounded_where_the_weight_is_bfloat16(linear, N):
    rng = np.random.default_rng(N)
    x, w = rng.normal(size=(N, 37)).astype(np.float32), rng.normal(size=(5, 37)).astype(BFLOAT16)
    [y] = linear.forward(x, [w])
    assert y.dtype == np.float32
    assert_close(y, naive(x.astype(BFLOAT16), [w])[0], 1e-6)  # without rounding x it is off by 1e-3


def test_gradients_of_bfloat16_weights_are_float32_and_do_not_round_x(linear):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(3, 37)).astype(np.float32), rng.normal(size=(3, 5)).astype(np.float32)
    w = rng.normal(size=(5, 37)).astype(BFLOAT16)
    dx, [dw] = linear.backward([dy], x, [w])
    assert dx.dtype == dw.dtype == np.float32
    assert_close(dx, dy.astype(np.float64) @ w.astype(np.float64), 1e-6)
    assert_close(dw, dy.T.astype(np.float64) @ x, 1e-6)
