"""Linear maps' kernels against the reference (on the processor; on a device where there is one)."""

import ml_dtypes
import numpy as np
import pytest

from minimoe.cuda import FEW, Captured
from minimoe.ops.linear import cupy_gpu, reference
from minimoe.quantized import quantize
from tests.cuda_on_cpu.measuring import OnDevice, assert_same_bits_in_any_order, to_device, to_host
from tests.cuda_on_cpu.stand_in import STAND_IN, STATE
from tests.measure import as_dtype, assert_as_good_as_reference, assert_close

BFLOAT16 = ml_dtypes.bfloat16
# Rows of x on both sides of every size a kernel is made for; widths that are whole loads of 16 bytes, and that are not;
# rows of weights that fill blocks of 16, and that do not.
SHAPES = [
    (1, 1, [1]), (1, 264, [17]), (2, 40, [16, 1, 3]), (3, 37, [5, 33]), (4, 136, [2, 2, 2, 40]), (5, 16, [31]),
    (8, 72, [9, 8]), (9, 8, [20]), (16, 291, [3]), (16, 48, [1, 17, 2]), (17, 24, [6, 1]), (33, 7, [4]),
]  # fmt: skip


def draw(rng, N, width, outputs):
    weights = [rng.normal(size=(o, width)) for o in outputs]
    return rng.normal(size=(N, width)) * 10 ** rng.uniform(-2, 2), weights, [rng.normal(size=(N, o)) for o in outputs]


def draws(count=12):
    return [draw(np.random.default_rng(seed), *SHAPES[seed % len(SHAPES)]) for seed in range(count)]


def call(module, x, weights, dys):
    dx, dws = module.backward(dys, x, weights)
    return [np.concatenate(module.forward(x, weights), axis=1), dx, np.concatenate(dws)]


def test_errors_are_those_of_the_reference(cupy):
    dialect = OnDevice(cupy, cupy_gpu)
    assert_as_good_as_reference(draws(24), call, reference, dialect, n=291)
    for inputs in draws():
        assert_close(call(dialect, *inputs), call(reference, *inputs), 1e-13)


def test_with_bfloat16_weights_both_operands_are_rounded_and_sums_are_float32(cupy):
    """The products of the rounded operands are exact in float32, so only the sums have errors."""
    dialect = OnDevice(cupy, cupy_gpu)
    for x, weights, dys in draws():
        x, dys = x.astype(np.float32), as_dtype(dys, np.float32)
        weights = [w.astype(BFLOAT16) for w in weights]
        found, wide = call(dialect, x, weights, dys), as_dtype((x, weights, dys), np.float64)
        rounded = wide[0].astype(BFLOAT16).astype(np.float64)
        y = np.concatenate(reference.forward(rounded, wide[1]), axis=1)
        assert {a.dtype for a in found} == {np.dtype(np.float32)}
        assert_close(found, [y, *call(reference, *wide)[1:]], 1e-6)
        assert_close(np.concatenate(dialect.forward(wide[0], weights), axis=1), y, 1e-6)  # from float64, too


@pytest.mark.parametrize("shape", [(1, 272, [17]), (3, 21, [5, 2]), (17, 24, [6])])
def test_weights_may_be_int8(cupy, shape):
    x, weights, _ = draw(np.random.default_rng(0), *shape)
    weights = [quantize(w) for w in weights]
    truth = reference.forward(x, [w.widened(np.float64) for w in weights])
    dialect = OnDevice(cupy, cupy_gpu)
    assert_close(dialect.forward(x.astype(np.float32), weights), truth, 2e-6)
    assert_close(dialect.forward(x, weights), truth, 1e-13)


def test_weights_may_be_of_several_types_strided_and_misaligned(cupy):
    x, weights, _ = as_dtype(draw(np.random.default_rng(0), 3, 40, [6, 7]), np.float32)
    mixed = [weights[0], weights[1].astype(BFLOAT16)]
    assert_close(OnDevice(cupy, cupy_gpu).forward(x, mixed), reference.forward(x, mixed), 1e-5)
    for dtype in (np.float32, BFLOAT16):
        w = weights[0].astype(dtype)
        [expected] = reference.forward(x, [w])
        turned, behind = cupy.asarray(np.ascontiguousarray(w.T)).T, cupy.empty(w.size + 1, w.dtype)
        behind[1:] = cupy.asarray(w.reshape(-1))
        x_behind = cupy.empty(x.size + 1, x.dtype)
        x_behind[1:] = cupy.asarray(x.reshape(-1))
        for there in (turned, behind[1:].reshape(w.shape)):
            assert_close(to_host(cupy_gpu.forward(cupy.asarray(x), [there]))[0], expected, 1e-5)
        assert_close(to_host(cupy_gpu.forward(x_behind[1:].reshape(x.shape), [there]))[0], expected, 1e-5)


def test_weights_that_read_the_same_x_are_one_launch(cupy):
    if cupy is not STAND_IN:
        pytest.skip("counted by the stand-in")
    x, weights, _ = to_device(cupy, as_dtype(draw(np.random.default_rng(0), 1, 16, [32, 8, 8]), np.float32))
    before = len(STATE.launches)
    cupy_gpu.forward(x, weights)
    assert len(STATE.launches) == before + 1


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
@pytest.mark.parametrize("shape", [(2, 300, [17]), (16, 40, [9, 20])])
def test_threads_do_not_race(cupy, shape, dtype):
    x, weights, _ = as_dtype(draw(np.random.default_rng(0), *shape), np.float32)
    weights = [w.astype(dtype) for w in weights]
    assert_same_bits_in_any_order(cupy, lambda: OnDevice(cupy, cupy_gpu).forward(x, weights))


@pytest.mark.parametrize("N", [1, FEW])
def test_few_rows_are_captured(cupy, N):
    x, weights, _ = to_device(cupy, as_dtype(draw(np.random.default_rng(0), N, 24, [5, 3]), np.float32))
    weights = [weights[0].astype(BFLOAT16), to_device(cupy, quantize(to_host(weights[1])))]
    replay = Captured(cupy, lambda: cupy.concatenate(cupy_gpu.forward(x, weights), axis=1))
    for seed in range(4):
        x.set(np.random.default_rng(seed).normal(size=x.shape).astype(np.float32))
        expected = cupy.concatenate(cupy_gpu.forward(x, weights), axis=1)
        np.testing.assert_array_equal(to_host(replay()), to_host(expected))
