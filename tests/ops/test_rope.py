import math
from decimal import Decimal, localcontext

import ml_dtypes
import numpy as np
import pytest

from tests.measure import assert_close, assert_slopes, dialects

THETA = 1e6


@pytest.fixture(params=dialects("rope"), ids=lambda m: m.__name__.rpartition(".")[2])
def rope(request):
    return request.param


def naive(x, positions):
    N, H, C = x.shape
    y = np.zeros(x.shape)
    for n in range(N):
        for h in range(H):
            for i in range(C // 2):
                angle = positions[n] * THETA ** (-2 * i / C)
                first, second = x[n, h, i], x[n, h, i + C // 2]
                y[n, h, i] = first * math.cos(angle) - second * math.sin(angle)
                y[n, h, i + C // 2] = second * math.cos(angle) + first * math.sin(angle)
    return y


def rotated(rope, x, positions):
    return rope.forward(x, *rope.table(np.asarray(positions), x.shape[-1], THETA, x.dtype))


@pytest.mark.parametrize(("N", "H", "C"), [(1, 1, 2), (1, 3, 6), (5, 2, 8), (40, 4, 2)])
def test_equals_naive_loops_and_backward_is_the_slope(rope, N, H, C):
    rng = np.random.default_rng(N)
    x, c, positions = rng.normal(size=(N, H, C)), rng.normal(size=(N, H, C)), rng.integers(0, 1000, N)
    assert_close(rotated(rope, x, positions), naive(x, positions))
    dx = rope.backward(c, *rope.table(positions, C, THETA, np.float64))
    assert_slopes(lambda x: (c * rotated(rope, x, positions)).sum(), [x], [dx])


def test_halves_are_paired_not_neighbours(rope):
    y = rotated(rope, np.array([[[1.0, 0, 0, 0]]]), [1])
    assert_close(y, [[[math.cos(1), 0, math.sin(1), 0]]])


def test_position_zero_changes_nothing(rope):
    x = np.random.default_rng(0).normal(size=(1, 2, 6))
    np.testing.assert_array_equal(rotated(rope, x, [0]), x)


def test_scores_depend_on_the_distance_only(rope):
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 8))
    near = (rotated(rope, q, [7]) * rotated(rope, k, [3])).sum()
    far = (rotated(rope, q, [1007]) * rotated(rope, k, [1003])).sum()
    assert_close(far, near)


def test_backward_undoes_forward(rope):
    x = np.random.default_rng(0).normal(size=(3, 2, 6))
    table = rope.table(np.array([0, 5, 70]), 6, THETA, np.float64)
    assert_close(rope.backward(rope.forward(x, *table), *table), x)


PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


def exact_angles(position, C):
    """position · theta^(-2i / C) modulo 2π, computed with fifty digits."""
    with localcontext() as context:
        context.prec = 50
        angles = [position * (Decimal(THETA).ln() * Decimal(-2 * i) / C).exp() for i in range(C // 2)]
        return np.array([float(angle % (2 * PI)) for angle in angles])


@pytest.mark.parametrize("position", [30_000, 999_999, 1_000_000])
def test_float32_tables_are_right_to_the_last_bit_but_one_far_out(rope, position):
    cos, sin = rope.table(np.array([position]), 128, THETA, np.float32)
    angles = exact_angles(position, 128)
    assert cos.dtype == sin.dtype == np.float32
    # half a unit in the last place of numbers below 1, and 1e-9 for float64 angles near a million
    assert np.abs(cos[0] - np.cos(angles)).max() <= 2**-25 + 1e-9
    assert np.abs(sin[0] - np.sin(angles)).max() <= 2**-25 + 1e-9
    # the same table made from float32 angles, the common shortcut, is not
    i = np.arange(64, dtype=np.float32)
    shortcut = np.float32(position) * (np.float32(1) / np.float32(THETA) ** (2 * i / np.float32(128)))
    assert shortcut.dtype == np.float32
    assert np.abs(np.cos(shortcut) - np.cos(angles)).max() > 5e-4


def into_cache(seed, stored, B, T, R, H, K, C, dtype):
    """Inputs of `forward_into_cache`: full caches, and slots, none twice in a row of the batch, some of them -1."""
    rng = np.random.default_rng(seed)
    slots = np.stack([rng.permutation(R)[:T] for _ in range(B)])
    slots[rng.random((B, T)) < 0.2] = -1
    angles = rng.normal(size=(B * T, C // 2)).astype(dtype)
    q, k, v = (rng.normal(size=(B * T, heads, C)).astype(dtype) for heads in (H, K, K))
    caches = (rng.normal(size=(B, R, K, C)).astype(kind) for kind in stored)
    return q, k, v, np.cos(angles), np.sin(angles), *caches, slots


BOTH = [(np.float64, np.float64), (np.float32, np.float32), (ml_dtypes.bfloat16, ml_dtypes.bfloat16),
        (ml_dtypes.bfloat16, np.float32)]  # fmt: skip
INTO = [(1, 1, 1, 1, 1, 2), (1, 1, 5, 3, 1, 6), (4, 1, 7, 4, 2, 10), (2, 3, 5, 2, 2, 4)]


@pytest.mark.parametrize("stored", BOTH, ids=lambda both: "-".join(np.dtype(kind).name for kind in both))
@pytest.mark.parametrize("sizes", INTO, ids=str)
def test_into_the_cache_is_rotation_and_writing(rope, stored, sizes):
    """Bit for bit what `forward` of q and of k gives, and one assignment after the other writes."""
    inputs = into_cache(sum(sizes), stored, *sizes, np.float64 if stored[0] == np.float64 else np.float32)
    q, k, v, cos, sin, k_cache, v_cache, slots = inputs
    expected = k_cache.copy(), v_cache.copy()
    for n, new in enumerate(zip(rope.forward(k, cos, sin), v, strict=True)):
        b, t = divmod(n, slots.shape[1])
        for cache, x in zip(expected, new, strict=True):
            if slots[b, t] >= 0:
                cache[b, slots[b, t]] = x.astype(cache.dtype)
    y = rope.forward_into_cache(q, k, v, cos, sin, k_cache, v_cache, slots)
    np.testing.assert_array_equal(y, rope.forward(q, cos, sin))
    for found, wanted in zip((k_cache, v_cache), expected, strict=True):
        np.testing.assert_array_equal(found.astype(np.float64), wanted.astype(np.float64))
