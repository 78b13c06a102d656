"""Sampling's kernels choose the tokens of the reference, given the same numbers."""

import numpy as np
import pytest

from minimoe.cuda import Captured
from minimoe.ops.sampling import cupy_gpu, reference
from tests.cuda_on_cpu.measuring import OnDevice, assert_same_bits_in_any_order


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_temperature_zero_takes_the_lowest_of_equals(cupy, dtype):
    rng, dialect = np.random.default_rng(0), OnDevice(cupy, cupy_gpu)
    for V in (1, 5, 700):
        logits = rng.integers(0, 4, (3, V)).astype(dtype)  # many are equal
        found = dialect.forward(logits, 0.0, 1.0, np.zeros(3))
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, logits.argmax(axis=1))
    logits[1, [3, 9]] = np.nan
    assert dialect.forward(logits, 0.0, 1.0, np.zeros(3))[1] == 3


# The chunks are one, two and three to a row; logits on a grid make many tokens equally probable, across chunks too.
@pytest.mark.parametrize(("V", "B"), [(1, 2), (2, 2), (37, 8), (400, 8)])
@pytest.mark.parametrize("temperature", [0.1, 1, 3])
def test_tokens_are_those_of_the_reference(cupy, monkeypatch, V, B, temperature):
    monkeypatch.setattr(cupy_gpu, "LARGEST", 128)
    rng, dialect = np.random.default_rng(V), OnDevice(cupy, cupy_gpu)
    for top_p in (0.01, 0.5, 0.9, 1.0):
        for grid in (1e-6, 1):
            logits = (grid * np.rint(2 * rng.normal(size=(B, V)) / grid)).astype(np.float32)
            uniform = rng.random(B)
            expected = reference.forward(logits, temperature, top_p, uniform)
            np.testing.assert_array_equal(dialect.forward(logits, temperature, top_p, uniform), expected)


def test_every_part_of_a_long_row_is_drawn_as_the_reference_draws_it(cupy):
    logits = np.random.default_rng(0).normal(size=5000).astype(np.float32)  # three chunks, the last not full
    uniform = np.array([0.0, 1e-9, 0.25, 0.5, 0.9, 0.999, 1 - 1e-9])
    rows = np.tile(logits, (7, 1))
    for top_p in (0.7, 1.0):
        expected = reference.forward(rows, 1.0, top_p, uniform)
        np.testing.assert_array_equal(OnDevice(cupy, cupy_gpu).forward(rows, 1.0, top_p, uniform), expected)


def nucleus(cupy, logits, top_p):
    """The tokens that any number can draw."""
    uniform = np.append((np.arange(60) + 0.5) / 60, np.nextafter(1, 0))
    return set(OnDevice(cupy, cupy_gpu).forward(np.tile(logits, (61, 1)), 1.0, top_p, uniform).tolist())


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1e-9, {2}),
        (0.25, {2}),
        (0.26, {0, 2}),
        (0.5, {0, 2}),
        (0.51, {0, 2, 3}),
        (0.8, {0, 2, 3, 5}),
        (1.0, {0, 2, 3, 5}),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(cupy, top_p, expected):
    assert nucleus(cupy, np.array([0, -np.inf, 1e-15, 0, -np.inf, 0]), top_p) == expected


def test_the_nucleus_takes_the_lower_of_equals_and_its_mass_is_all(cupy):
    uniform = (np.arange(20) + 0.5) / 20
    found = OnDevice(cupy, cupy_gpu).forward(np.zeros((20, 4)), 1.0, 0.5, uniform)  # two of four reach a half exactly
    assert found.tolist() == [0] * 10 + [1] * 10


def test_a_chunk_without_any_chance_does_no_harm(cupy, monkeypatch):
    monkeypatch.setattr(cupy_gpu, "LARGEST", 64)
    logits = np.full(150, -np.inf, np.float32)
    logits[[70, 80]] = 0, 1
    assert nucleus(cupy, logits, 1.0) == {70, 80}


def test_the_largest_number_below_one_draws_no_token_without_a_chance(cupy):
    logits = np.array([[1.0, 3.0, 2.0, -np.inf]], np.float32)
    dialect = OnDevice(cupy, cupy_gpu)
    assert dialect.forward(logits, 1e-6, 1.0, np.array([np.nextafter(1, 0)])) == 1
    assert dialect.forward(logits, 1.0, 1.0, np.array([np.nextafter(1, 0)])) == 0


def test_a_row_of_nan_still_gives_a_token(cupy):
    assert OnDevice(cupy, cupy_gpu).forward(np.full((1, 5), np.nan), 1.0, 0.9, np.array([0.5])) == 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_it_can_be_captured_and_threads_do_not_race(cupy, monkeypatch, temperature):
    monkeypatch.setattr(cupy_gpu, "LARGEST", 64)
    rng = np.random.default_rng(0)
    logits, uniform = rng.normal(size=(2, 150)).astype(np.float32), cupy.asarray(rng.random(2))
    there = cupy.asarray(logits)
    replay = Captured(cupy, lambda: cupy_gpu.forward(there, temperature, 0.9, uniform))
    for seed in range(4):
        numbers = np.random.default_rng(seed).random(2)
        uniform.set(numbers)  # copied in before the replay
        np.testing.assert_array_equal(replay().get(), reference.forward(logits, temperature, 0.9, numbers))
    call = lambda: [OnDevice(cupy, cupy_gpu).forward(logits, temperature, 0.9, uniform.get())]  # noqa: E731
    assert_same_bits_in_any_order(cupy, call)
