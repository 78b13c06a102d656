"""RMSNorm's kernels against the reference (on the processor; on a device where there is one)."""

import ml_dtypes
import numpy as np
import pytest

from minimoe.ops.rmsnorm import cupy_gpu, reference
from tests.cuda_on_cpu.measuring import OnDevice, assert_same_bits_in_any_order
from tests.measure import as_dtype, assert_as_good_as_reference, assert_close

SHAPES = [(N, D, residual) for N, D in [(1, 2), (1, 129), (5, 7), (65, 33), (3, 1030)] for residual in (False, True)]


def draw(rng, N, D, residual):
    x, weight, dy = rng.normal(size=(N, D)) * 10 ** rng.uniform(-2, 2), rng.normal(size=D), rng.normal(size=(N, D))
    return x, weight, rng.normal(size=(N, D)) if residual else None, dy


def call(module, x, weight, residual, dy):
    y, h, r = module.forward(x, weight, 1e-5, residual)
    return y, h, r, *module.backward(dy, h, weight, r, residual)


def draws(count=20):
    return [draw(np.random.default_rng(seed), *SHAPES[seed % len(SHAPES)]) for seed in range(count)]


def test_errors_are_those_of_the_reference(cupy):
    dialect = OnDevice(cupy, cupy_gpu)
    assert_as_good_as_reference(draws(), call, reference, dialect, n=1030)
    for inputs in draws(len(SHAPES)):
        assert_close(call(dialect, *inputs), call(reference, *inputs), 1e-13)


def test_weights_may_be_bfloat16(cupy):
    x, weight, residual, dy = as_dtype(draw(np.random.default_rng(0), 3, 65, True), np.float32)
    weight = weight.astype(ml_dtypes.bfloat16)
    found = call(OnDevice(cupy, cupy_gpu), x, weight, residual, dy)
    assert {a.dtype for a in found} == {np.dtype(np.float32)}
    assert_close(found, call(reference, *as_dtype((x, weight, residual, dy), np.float64)), 1e-5)


@pytest.mark.parametrize("shape", [(2, 300, True), (70, 40, False)])
def test_threads_do_not_race(cupy, shape):
    inputs = as_dtype(draw(np.random.default_rng(0), *shape), np.float32)
    assert_same_bits_in_any_order(cupy, lambda: call(OnDevice(cupy, cupy_gpu), *inputs))
