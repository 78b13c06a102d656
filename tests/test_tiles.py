"""Products whose sums stay in registers, against NumPy's."""

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numba.core.codegen import get_host_cpu_features

from minimoe.tiles import FEWER, LINE, MULTIPLIES_PAIRS, PAIR, ROWS, multiply, stream, stream_turned

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
@pytest.mark.parametrize(("K", "lines"), [(0, 1), (1, 2), (7, 3), (64, 4)])
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


# --- few rows, with what is stored anywhere --------------------------------------------------------------------------

KINDS = [
    np.float32,
    np.float64,
    np.uint16,
    pytest.param(PAIR, marks=pytest.mark.skipif(not MULTIPLIES_PAIRS, reason="this processor does not multiply pairs")),
]
STORED = pytest.mark.parametrize("stored", KINDS, ids=lambda kind: np.dtype(kind).name)
STORED_IN_ROWS = pytest.mark.parametrize("stored", [*KINDS, np.int8], ids=lambda kind: np.dtype(kind).name)


def draw_stored(stored, shape, seed):
    """Numbers of a type, as they are stored and as float64."""
    x = np.random.default_rng(seed).normal(size=shape)
    if stored == np.int8:
        x = np.clip(50 * x, -127, 127).round()
    if np.dtype(stored).kind == "f" or stored == np.int8:
        return x.astype(stored), x.astype(stored).astype(np.float64)
    x = x.astype(ml_dtypes.bfloat16)
    return x.view(stored), x.astype(np.float64)


def paired(x):
    """Rows of bfloat16, held as float64, as PAIR."""
    return np.ascontiguousarray(x, np.float32).astype(ml_dtypes.bfloat16).view(PAIR)


def few_rows(stored, shape, seed):
    """Left factors for what is stored so, as tiles take them and as float64."""
    kind = {np.float64: np.float64, np.float32: np.float32, np.int8: np.float32}.get(stored, ml_dtypes.bfloat16)
    x = np.random.default_rng(seed).normal(size=shape).astype(kind).astype(np.float64)
    if stored == PAIR:
        return paired(x), x
    return x.astype(np.float64 if stored == np.float64 else np.float32), x


@STORED
@pytest.mark.parametrize("M", [1, FEWER, 2 * FEWER])
@pytest.mark.parametrize(("H", "K", "lines"), [(1, 2, 1), (3, 8, 2), (2, 34, 3), (1, 6, 5)])
def test_a_stream_of_rows_touches_nothing_else(stored, M, H, K, lines):
    number = np.float64 if stored == np.float64 else np.float32
    N = lines * LINE // np.dtype(number).itemsize * (2 if stored == PAIR else 1)
    left, a = few_rows(stored, (H, M, K), [K, 1])
    right, b = draw_stored(stored, (K, H, N), [K, 2])
    before = np.random.default_rng(3).normal(size=(H, M + 2, N + 3)).astype(number)
    sums, sizes = np.einsum("hmk,khn->hmn", a, b), np.einsum("hmk,khn->hmn", abs(a), abs(b))
    for begin in (True, False):
        whole = before.copy()
        stream(left, right, whole[:, 1 : M + 1, 2 : N + 2], begin)
        expected = sums if begin else sums + before[:, 1 : M + 1, 2 : N + 2]
        error = np.abs(whole[:, 1 : M + 1, 2 : N + 2] - expected)
        assert (error <= (K + 2) * np.finfo(number).eps * (sizes + np.abs(expected))).all()
        whole[:, 1 : M + 1, 2 : N + 2] = before[:, 1 : M + 1, 2 : N + 2]
        np.testing.assert_array_equal(whole, before)


@STORED_IN_ROWS
@pytest.mark.parametrize("M", [1, 2, 3, FEWER, FEWER + 1, 2 * FEWER, 2 * FEWER + 3])
@pytest.mark.parametrize(("H", "N", "lines"), [(1, 4, 1), (3, 8, 2), (2, 12, 3)])
def test_a_stream_of_columns_touches_nothing_else(stored, M, H, N, lines):
    number = np.float64 if stored == np.float64 else np.float32
    K = lines * LINE // {np.float64: 8, np.float32: 4, np.int8: 4}.get(stored, 2)
    left, a = few_rows(stored, (H, M, K), [N, 1])
    right, b = draw_stored(stored, (N, H, K), [N, 2])
    before = np.random.default_rng(3).normal(size=(H, M + 2, N + 3)).astype(number)
    whole = before.copy()
    stream_turned(left, right, whole[:, 1 : M + 1, 2 : N + 2])
    error = np.abs(whole[:, 1 : M + 1, 2 : N + 2] - np.einsum("hmk,nhk->hmn", a, b))
    assert (error <= K * np.finfo(number).eps * np.einsum("hmk,nhk->hmn", abs(a), abs(b))).all()
    whole[:, 1 : M + 1, 2 : N + 2] = before[:, 1 : M + 1, 2 : N + 2]
    np.testing.assert_array_equal(whole, before)


@STORED
def test_what_is_not_a_number_stays_in_its_own_sums_of_a_stream(stored):
    K = 2 * LINE // (np.dtype(stored).itemsize if stored != PAIR else 2)
    left, _ = few_rows(stored, (2, FEWER, K), 0)
    _, b = draw_stored(stored, (8, 2, K), 1)
    b[5, 1, 3] = np.nan
    if stored == np.float64:
        right = b
    else:
        b = np.ascontiguousarray(b, np.float32)
        right = b if stored == np.float32 else b.astype(ml_dtypes.bfloat16).view(stored)
    out = np.zeros((2, FEWER, 8), left.dtype if stored != PAIR else np.float32)
    stream_turned(left, right, out)
    bad = np.isnan(out)
    assert bad[1, :, 5].all() and bad.sum() == FEWER
    out = np.zeros((2, FEWER, K), out.dtype)
    stream(np.ascontiguousarray(left[:, :, : 8 if stored != PAIR else 4]), right, out, True)
    bad = np.isnan(out)
    assert bad[1, :, 3].all() and bad.sum() == FEWER


@pytest.mark.slow
def test_the_tiles_of_a_processor_without_avx512(tmp_path):
    """These tests once more, where half as wide and half as many registers are compiled for."""
    features = get_host_cpu_features().split(",")
    others = [name for name in features if not name.startswith("+avx512")]
    if "NUMBA_CPU_FEATURES" in os.environ or others == features:
        pytest.skip("compiled without AVX-512 already")
    env = {**os.environ, "NUMBA_CPU_FEATURES": ",".join(others), "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-o",
        "addopts=",
        __file__,
        str(Path(__file__).parent / "test_few_rows.py"),
    ]
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert " passed" in found.stdout
