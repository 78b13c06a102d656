"""RoPE's kernels against the reference."""

import ml_dtypes
import numpy as np
import pytest

from minimoe.arrays import BFLOAT16
from minimoe.backends import make_backend
from minimoe.ops.rope import cupy_gpu, reference
from tests.cuda_on_cpu.measuring import OnDevice, assert_same_bits_in_any_order
from tests.measure import assert_as_good_as_reference, assert_close
from tests.ops.test_rope import BOTH, INTO, into_cache

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


@pytest.mark.parametrize("stored", BOTH, ids=lambda both: "-".join(np.dtype(kind).name for kind in both))
def test_into_the_cache_is_what_the_reference_writes(cupy, stored):
    real = np.float64 if stored[0] == np.float64 else np.float32
    for sizes in [*INTO, (2, 1, 9, 7, 3, 130)]:  # the last has more pairs than a block
        there, here, before = (into_cache(1, stored, *sizes, real) for _ in range(3))
        found = OnDevice(cupy, cupy_gpu).forward_into_cache(*there)
        assert_close(found, reference.forward_into_cache(*here), 4 * np.finfo(real).eps)
        slots, R = there[7], sizes[2]
        untouched = ~(slots[:, :, None] == np.arange(R)).any(axis=1)  # (B, R)
        for written, expected, old in zip(there[5:7], here[5:7], before[5:7], strict=True):
            assert_close(written, expected, 4 * float(ml_dtypes.finfo(written.dtype).eps))
            np.testing.assert_array_equal(written[untouched], old[untouched])
    assert_same_bits_in_any_order(cupy, lambda: [OnDevice(cupy, cupy_gpu).forward_into_cache(*here)])


def test_a_captured_step_writes_where_the_slots_say(cupy):
    ops = make_backend("cuda")
    q, k, v, cos, sin, k_cache, v_cache, slots = map(cupy.asarray, into_cache(0, (BFLOAT16,) * 2, *INTO[2], np.float32))
    slots[...] = cupy.asarray(np.array([[1], [-1], [5], [0]]))

    def step():
        y = ops.rope.forward_into_cache(q, k, v, cos, sin, k_cache, v_cache, slots)
        slots.__iadd__(1)
        return y

    k_cache.fill(0)
    replay = ops.captured(step, tokens=4)
    for _ in range(2):
        replay()
    written = k_cache.get().astype(np.float32).any(axis=(2, 3))
    assert [np.flatnonzero(row).tolist() for row in written] == [[1, 2], [0], [5, 6], [0, 1]]
