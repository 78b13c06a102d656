"""RoPE's kernels against the reference."""

import numpy as np
import pytest

from minimoe.ops.rope import cupy_gpu, reference
from tests.cuda_on_cpu.measuring import OnDevice
from tests.measure import assert_as_good_as_reference, assert_close

SHAPES = [(1, 1, 2), (1, 3, 6), (5, 2, 8), (40, 4, 2), (3, 9, 66), (0, 2, 4)]  # (3, 9, 66) has more pairs than a block


def draw(rng, N, H, C):
    positions = rng.integers(-1, 40_000, N)
    return rng.normal(size=(N, H, C)), rng.normal(size=(N, H, C)), positions, float(10 ** rng.uniform(1, 6))


def call(module, x, dy, positions, theta):
    cos, sin = module.table(positions, x.shape[2], theta, x.dtype)
    return cos, sin, module.forward(x, cos, sin), module.backward(dy, cos, sin)


def draws(count=20):
    return [draw(np.random.default_rng(seed), *SHAPES[seed % len(SHAPES)]) for seed in range(count)]


def test_errors_are_those_of_the_reference(cupy):
    dialect = OnDevice(cupy, cupy_gpu)
    assert_as_good_as_reference(draws(), call, reference, dialect, n=2)
    for inputs in draws(len(SHAPES)):
        # an angle near 40,000 is itself off by a few units of 2**-53 · 40,000
        assert_close(call(dialect, *inputs), call(reference, *inputs), 2e-11)


@pytest.mark.parametrize("position", [30_000, 999_999, 1_000_000])
def test_angles_are_made_in_float64(cupy, position):
    """The common shortcut through float32 is off by 1e-3 here; half a unit in the last place is 2**-25."""
    positions = np.array([position])
    found = OnDevice(cupy, cupy_gpu).table(positions, 128, 1e6, np.float32)
    for there, exact in zip(found, reference.table(positions, 128, 1e6, np.float64), strict=True):
        assert there.dtype == np.float32
        assert np.abs(there - exact).max() <= 2**-25 + 1e-9


def test_views_are_turned_too(cupy):
    """q, k and v may be slices of one product."""
    x, _, positions, theta = draw(np.random.default_rng(0), 3, 4, 6)
    cos, sin = reference.table(positions, 6, theta, np.float64)
    found = cupy_gpu.forward(cupy.asarray(x)[:, 1:3], cupy.asarray(cos), cupy.asarray(sin))
    assert_close(found.get(), reference.forward(x[:, 1:3], cos, sin))
