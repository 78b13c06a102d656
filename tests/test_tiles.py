"""Products whose sums stay in registers, against NumPy's."""

import numpy as np
import pytest

from minimoe.tiles import FEWER, LINE, ROWS, multiply

HEIGHTS = [0, 1, FEWER, FEWER + 1, ROWS - 1, ROWS, ROWS + 1, ROWS + FEWER + 1, 3 * ROWS + 2]


def strided(x, form):
    """The same numbers in other memory."""
    if form == "columns":
        return np.asfortranarray(x)
    if form == "apart":
        return np.repeat(np.repeat(x, 2, 0), 3, 1)[::2, ::3]
    return x


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("form", ["rows", "columns", "apart"])
@pytest.mark.parametrize("M", HEIGHTS)
@pytest.mark.parametrize(("K", "lines"), [(0, 1), (1, 2), (7, 1), (64, 4)])
def test_a_product_touches_nothing_else(dtype, form, M, K, lines):
    rng = np.random.default_rng([M, K, lines])
    N = lines * LINE // np.dtype(dtype).itemsize
    left, right = rng.normal(size=(M, K)).astype(dtype), rng.normal(size=(K, N + 3)).astype(dtype)[:, 1 : N + 1]
    before = rng.normal(size=(M + 2, N + 5)).astype(dtype)
    sums = left.astype(np.float64) @ right.astype(np.float64)
    sizes = np.abs(left).astype(np.float64) @ np.abs(right).astype(np.float64)
    for begin in (True, False):
        whole = before.copy()
        multiply(strided(left, form), right, whole[1 : M + 1, 2 : N + 2], begin)
        expected = sums if begin else sums + before[1 : M + 1, 2 : N + 2]
        error = np.abs(whole[1 : M + 1, 2 : N + 2] - expected)
        assert (error <= (K + 2) * np.finfo(dtype).eps * (sizes + np.abs(expected))).all()
        whole[1 : M + 1, 2 : N + 2] = before[1 : M + 1, 2 : N + 2]
        np.testing.assert_array_equal(whole, before)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_sum_has_the_same_bits_wherever_it_stands(dtype):
    """In a large tile, in a small one, alone; in any line; beside any others."""
    rng = np.random.default_rng(0)
    M, K, N = 2 * ROWS + FEWER + 1, 100, 3 * LINE // np.dtype(dtype).itemsize
    left, right = rng.normal(size=(M, K)).astype(dtype), rng.normal(size=(K, N)).astype(dtype)
    whole, shifted, out = np.empty((M, N), dtype), np.empty((M, N), dtype), np.empty((1, N), dtype)
    multiply(left, right, whole, True)
    multiply(left, np.ascontiguousarray(np.roll(right, 5, 1)), shifted, True)
    np.testing.assert_array_equal(np.roll(shifted, -5, 1), whole)
    for m in range(M):
        multiply(left[m : m + 1], right, out, True)
        np.testing.assert_array_equal(out[0], whole[m])


def test_what_is_not_a_number_stays_in_its_own_sums():
    left, right = np.ones((ROWS + 1, 4), np.float32), np.ones((4, 32), np.float32)
    left[2, 1], right[3, 20], right[0, 7] = np.nan, np.inf, -np.inf
    out = np.empty((ROWS + 1, 32), np.float32)
    multiply(left, right, out, True)
    expected = np.full((ROWS + 1, 32), 4, np.float32)
    expected[:, 20], expected[:, 7], expected[2] = np.inf, -np.inf, np.nan
    np.testing.assert_array_equal(out, expected)
