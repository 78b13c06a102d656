"""The product of a few rows that every room of the CPU column shares, against NumPy's."""

import numpy as np
import pytest

from minimoe.arrays import BFLOAT16
from minimoe.loops import address, dots, storage


def draw(rng, stored, shape):
    if stored == "int8":
        return rng.integers(-127, 128, shape, np.int8)
    return rng.normal(size=shape).astype(BFLOAT16 if stored == "bfloat16" else stored)


@pytest.mark.parametrize("stored", ["float32", "float64", "bfloat16", "int8"])
@pytest.mark.parametrize("seed", range(25))
def test_dots_is_a_product_and_touches_no_other_rows(stored, seed):
    rng = np.random.default_rng(seed)
    N, rows, width = (int(rng.integers(1, most)) for most in (18, 90, 80))
    start, stop = sorted(rng.integers(0, rows + 1, 2).tolist())
    x = rng.normal(size=(N, width)).astype(np.float64 if stored == "float64" else np.float32)
    w = draw(rng, stored, (rows, width))
    scale = rng.uniform(0.5, 2, rows).astype(np.float32) if stored == "int8" else None
    out = np.full((N, rows), -7, x.dtype)
    dots(x, storage(w), address(scale), start, stop, out)
    wide = w.astype(np.float64) * (1 if scale is None else scale[:, None])
    products = x.astype(np.float64)[:, None] * wide
    error = np.abs(out - products.sum(2))[:, start:stop]
    assert (error <= 8 * np.finfo(x.dtype).eps * np.abs(products).sum(2)[:, start:stop]).all()
    assert (np.delete(out, np.s_[start:stop], axis=1) == -7).all()
