"""The cache's kernels against the reference: what they write, bit for bit."""

import ml_dtypes
import numpy as np
import pytest

from minimoe.backends import make_backend
from minimoe.ops.kv_cache import cupy_gpu, reference
from tests.cuda_on_cpu.measuring import OnDevice, assert_same_bits_in_any_order
from tests.ops.test_kv_cache import CASES, rows

BFLOAT16 = ml_dtypes.bfloat16
LONG = rows(300, 0, 70, padding=5)  # more tokens than a block has


def draw(R, positions, new=np.float64, stored=np.float64, K=2, C=3):
    rng = np.random.default_rng(R)
    B, T = positions.shape
    caches = rng.normal(size=(2, B, R, K, C)).astype(stored)
    return *caches, *rng.normal(size=(2, B, T, K, C)).astype(new), rng.integers(-1, 9, (B, R))


def call(module, positions, k_cache, v_cache, k, v, held):
    k_cache, v_cache, held = k_cache.copy(), v_cache.copy(), held.copy()
    module.forward(k_cache, v_cache, k, v, positions)
    slots = module.write_positions(held, positions)
    left = k_cache.astype(k.dtype), v_cache.astype(k.dtype)
    return k_cache, v_cache, held, slots, *module.backward(*left, positions), *left


@CASES
def test_equals_the_reference(cupy, R, positions):
    inputs = draw(R, positions)
    for found, expected in zip(
        call(OnDevice(cupy, cupy_gpu), positions, *inputs), call(reference, positions, *inputs), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("new", "stored"), [(np.float32, np.float32), (np.float32, BFLOAT16), (BFLOAT16, BFLOAT16), (BFLOAT16, np.float32)]
)
@pytest.mark.parametrize("R", [7, 400])
def test_numbers_are_rounded_to_the_type_of_the_cache(cupy, new, stored, R):
    k_cache, v_cache, k, v, _ = draw(R, LONG, new, stored, K=3, C=12)
    k[0, 10, 0, :4] = [np.nan, np.inf, -0.0, 1 + 2**-8]
    there, here = (k_cache.copy(), v_cache.copy()), (k_cache.copy(), v_cache.copy())
    OnDevice(cupy, cupy_gpu).forward(*there, k, v, LONG)
    reference.forward(*here, k, v, LONG)
    for found, expected in zip(there, here, strict=True):
        np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))


def test_keys_and_values_may_be_stored_in_two_types(cupy):
    k_cache, v_cache, k, v, _ = draw(5, LONG, np.float32, np.float32)
    there, here = (k_cache.astype(BFLOAT16), v_cache.copy()), (k_cache.astype(BFLOAT16), v_cache.copy())
    OnDevice(cupy, cupy_gpu).forward(*there, k, v, LONG)
    reference.forward(*here, k, v, LONG)
    for found, expected in zip(there, here, strict=True):
        np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))


def test_a_captured_write_goes_where_the_positions_say(cupy):
    """A graph replays the same launches: the slot must come from the device."""
    ops = make_backend("cuda")
    caches, held = [cupy.asarray(np.zeros((2, 4, 2, 3))) for _ in range(2)], cupy.asarray(np.full((2, 4), -1))
    new, position = cupy.asarray(np.ones((2, 1, 2, 3))), cupy.asarray(np.array([[2], [5]]))

    def step():
        ops.kv_cache.forward(*caches, new, new, position)
        ops.kv_cache.write_positions(held, position)
        position.__iadd__(1)
        return held

    replay = ops.captured(step, tokens=2)
    for _ in range(3):
        replay()
    np.testing.assert_array_equal(held.get(), [[4, -1, 2, 3], [-1, 5, 6, 7]])
    np.testing.assert_array_equal(caches[0].get()[:, :, 0, 0], [[1, 0, 1, 1], [0, 1, 1, 1]])


def test_threads_do_not_race(cupy):
    inputs = draw(7, LONG, np.float32, np.float32)
    assert_same_bits_in_any_order(cupy, lambda: call(OnDevice(cupy, cupy_gpu), LONG, *inputs))
