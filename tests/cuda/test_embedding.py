"""Embedding's kernels against the reference."""

import ml_dtypes
import numpy as np
import pytest

from minimoe.ops.embedding import cupy_gpu, reference
from tests.cuda_on_cpu.measuring import OnDevice, assert_same_bits_in_any_order


def draw(seed, N, V, D, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return rng.integers(0, V, N), rng.normal(size=(V, D)).astype(dtype), rng.normal(size=(N, D)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("N", "V", "D"), [(1, 1, 1), (7, 5, 2), (40, 3, 131), (9, 200, 33), (0, 3, 4)])
def test_rows_are_gathered_to_the_bit(cupy, N, V, D, dtype):
    tokens, table, _ = draw(N, N, V, D, dtype)
    x = OnDevice(cupy, cupy_gpu).forward(tokens, table)
    assert x.dtype == (np.float32 if dtype == ml_dtypes.bfloat16 else dtype)
    np.testing.assert_array_equal(x, reference.forward(tokens, table))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("N", "V", "D"), [(1, 1, 1), (7, 5, 2), (130, 3, 131), (9, 200, 33), (0, 3, 4)])
def test_gradients_are_added_in_the_order_of_n_to_the_bit(cupy, N, V, D, dtype):
    tokens, _, dx = draw(N, N, V, D, dtype)
    found = OnDevice(cupy, cupy_gpu).backward(dx, tokens, V)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, reference.backward(dx, tokens, V))


def test_threads_do_not_race(cupy):
    tokens, _, dx = draw(0, 40, 3, 300)
    assert_same_bits_in_any_order(cupy, lambda: [OnDevice(cupy, cupy_gpu).backward(dx, tokens, 3)])
