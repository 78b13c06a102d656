import inspect

import ml_dtypes
import numpy as np
import pytest

from minimoe.ops.linear import numba_cpu
from minimoe.quantized import quantize
from tests.measure import assert_close, assert_slopes, dialects, with_one_thread

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
    ("N", "width", "outputs"),
    [(1, 1, [1]), (1, 7, [5]), (1, 6, [4, 3, 2]), (9, 5, [3, 7]), (16, 6, [67]), (70, 4, [1])],
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


@pytest.mark.parametrize("N", [1, 3, 70])
def test_both_operands_are_rounded_where_the_weight_is_bfloat16(linear, N):
    rng = np.random.default_rng(N)
    x, w = rng.normal(size=(N, 37)).astype(np.float32), rng.normal(size=(5, 37)).astype(BFLOAT16)
    [y] = linear.forward(x, [w])
    assert y.dtype == np.float32
    assert_close(y, naive(x.astype(BFLOAT16), [w])[0], 1e-6)  # without rounding x it is off by 1e-3


@pytest.mark.parametrize("order", ["C", "F"])
def test_gradients_of_bfloat16_weights_are_float32_and_do_not_round_x(linear, order):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(3, 37)).astype(np.float32), rng.normal(size=(3, 6)).astype(np.float32)
    w = np.array(rng.normal(size=(6, 37)).astype(BFLOAT16), order=order)
    dx, [dw] = linear.backward([dy], x, [w])
    assert dx.dtype == dw.dtype == np.float32
    assert_close(dx, dy.astype(np.float64) @ w.astype(np.float64), 1e-6)
    assert_close(dw, dy.T.astype(np.float64) @ x, 1e-6)


@pytest.mark.parametrize("N", [1, 70])
def test_every_nan_stays_one_where_the_weight_is_bfloat16(linear, N):
    for bits in (0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0x7F800001):
        x = np.ones((N, 16), np.float32)
        x[0, 3] = np.array(bits, np.uint32).view(np.float32)
        with np.errstate(invalid="ignore"):
            [y] = linear.forward(x, [np.ones((5, 16), BFLOAT16)])
        assert np.isnan(y[0]).all(), hex(bits)
        assert (y[1:] == 16).all()


@pytest.mark.parametrize("N", [1, 70])
def test_weights_of_another_width_are_refused(N):
    forward = inspect.unwrap(numba_cpu.forward)  # without the checks of these tests
    with pytest.raises(ValueError, match="cannot multiply"):
        forward(np.ones((N, 64), np.float32), [np.ones((2**14, 32), np.float32)])


@pytest.mark.parametrize("kind", ["float32", "float64", "bfloat16", "int8"])
@pytest.mark.parametrize("N", [1, 2, 3, 6, 15, 16, 17, numba_cpu.FEW_ROWS])
@pytest.mark.parametrize("width", [608, 611])  # tiles take whole registers
def test_few_tokens_and_large_weights(kind, N, width):
    """Blocks of rows on all threads, of weights that end inside a block: the same bits on one."""
    rng = np.random.default_rng(N)
    x = rng.normal(size=(N, width)).astype("float64" if kind == "float64" else "float32")
    weights = [rng.normal(size=(rows, width)) for rows in (517, 66, 3)]
    if kind == "int8":
        weights = [quantize(w.astype(np.float32)) for w in weights]
        wide, seen = [w.widened(np.float64) for w in weights], x
    else:
        weights = [w.astype(BFLOAT16 if kind == "bfloat16" else kind) for w in weights]
        wide = [w.astype(np.float64) for w in weights]
        seen = x.astype(BFLOAT16) if kind == "bfloat16" else x
    found = numba_cpu.forward(x, weights)
    assert_close(found, [seen.astype(np.float64) @ w.T for w in wide], 1e-12 if kind == "float64" else 2e-6)
    alone = with_one_thread(lambda: numba_cpu.forward(x, weights))
    for one, all_threads in zip(alone, found, strict=True):
        np.testing.assert_array_equal(one, all_threads)
