"""The product of a few rows that every room of the CPU column shares, against NumPy's."""

import numpy as np
import pytest

from minimoe.arrays import BFLOAT16
from minimoe.few_rows import dots, factors_of, in_tiles
from minimoe.loops import address, jit, storage


@jit()
def multiplied(x, w, scale, start, stop, out):
    """As a room calls it."""
    dots(x, factors_of(x, w.dtype, len(x) > 1), w, scale, start, stop, out)


@jit()
def rows_in_tiles(x, w, out):
    return in_tiles(factors_of(x, w.dtype, len(x) > 1), w, 0, len(w), out)


def draw(rng, stored, shape):
    if stored == "int8":
        return rng.integers(-127, 128, shape, np.int8)
    return rng.normal(size=shape).astype(BFLOAT16 if stored == "bfloat16" else stored)


def draw_tokens(rng, stored, shape):
    x = rng.normal(size=shape)
    if stored == "bfloat16":
        x = x.astype(BFLOAT16)
    return x.astype(np.float64 if stored == "float64" else np.float32)


STORED = pytest.mark.parametrize("stored", ["float32", "float64", "bfloat16", "int8"])


@STORED
@pytest.mark.parametrize("seed", range(40))
def test_dots_is_a_product_and_touches_no_other_rows(stored, seed):
    rng = np.random.default_rng(seed)
    N, rows, width = (int(rng.integers(1, most)) for most in (18, 90, 80))
    width = width if seed % 2 else -(-width // 32) * 32  # whole registers: these are multiplied in tiles
    start, stop = sorted(rng.integers(0, rows + 1, 2).tolist())
    x, w = draw_tokens(rng, stored, (N, width)), draw(rng, stored, (rows, width))
    scale = rng.uniform(0.5, 2, rows).astype(np.float32) if stored == "int8" else None
    out = np.full((N, rows), -7, x.dtype)
    multiplied(x, storage(w), address(scale), start, stop, out)
    wide = w.astype(np.float64) * (1 if scale is None else scale[:, None])
    products = x.astype(np.float64)[:, None] * wide
    error = np.abs(out - products.sum(2))[:, start:stop]
    assert (error <= 8 * np.finfo(x.dtype).eps * np.abs(products).sum(2)[:, start:stop]).all()
    assert (np.delete(out, np.s_[start:stop], axis=1) == -7).all()


@STORED
@pytest.mark.parametrize("N", [2, 3, 4, 5, 11])
def test_a_sum_has_the_same_bits_whoever_reads_it_and_beside_any_tokens(stored, N):
    """Work is cut between fours of rows; what else is in the same tile makes no difference."""
    rng = np.random.default_rng(N)
    x, w, rows = draw_tokens(rng, stored, (N, 96)), draw(rng, stored, (43, 96)), 43
    whole, parts, few = (np.zeros((n, rows), x.dtype) for n in (N, N, 2))
    multiplied(x, storage(w), 0, 0, rows, whole)
    for start in range(0, rows, 4):
        multiplied(x, storage(w), 0, start, min(start + 4, rows), parts)
    np.testing.assert_array_equal(parts, whole)
    for n in range(N - 1):
        multiplied(np.ascontiguousarray(x[n : n + 2]), storage(w), 0, 0, rows, few)
        np.testing.assert_array_equal(few, whole[n : n + 2])


@STORED
def test_a_token_that_is_not_a_number_spoils_no_other(stored):
    rng = np.random.default_rng(0)
    x, w = draw_tokens(rng, stored, (7, 64)), draw(rng, stored, (10, 64))
    x[3, 17], x[5, 60] = np.nan, np.inf
    out = np.zeros((7, 10), x.dtype)
    multiplied(x, storage(w), 0, 0, 10, out)
    np.testing.assert_array_equal(np.isfinite(out).all(1), [True, True, True, False, True, False, True])
    assert np.isnan(out[3]).all()


@STORED
def test_tiles_take_whole_registers(stored):
    rng = np.random.default_rng(0)
    for width, rows in ((64, 8), (96, 8), (65, 0), (7, 0)):
        x, w = draw_tokens(rng, stored, (3, width)), draw(rng, stored, (8, width))
        assert rows_in_tiles(x, storage(w), np.empty((3, 8), x.dtype)) == rows


@pytest.mark.parametrize("stored", ["int8", "bfloat16"])
def test_float64_tokens_keep_their_bits_with_narrow_weights(stored):
    x, w = np.full((5, 32), 1 + 2.0**-40), np.ones((8, 32), BFLOAT16 if stored == "bfloat16" else np.int8)
    out = np.zeros((5, 8))
    multiplied(x, storage(w), 0, 0, 8, out)
    np.testing.assert_array_equal(out, np.full((5, 8), 32 * (1 + 2.0**-40)))
