"""The router's kernels against the reference."""

import ml_dtypes
import numpy as np
import pytest

from minimoe.ops.gating import cupy_gpu, reference
from tests.cuda_on_cpu.measuring import OnDevice, assert_same_bits_in_any_order
from tests.measure import as_dtype, assert_as_good_as_reference, assert_close

# N, D, E, k: one token and several to a block; columns in parts, with a tail, and not in whole loads of 16 bytes
SHAPES = [(1, 1, 1, 1), (3, 7, 5, 2), (1, 1030, 8, 2), (2, 520, 3, 3), (18, 40, 33, 5), (2, 12, 70, 40)]
CHOICES = ("free", "padded", "switched off", "forced")


def draw(seed):
    rng = np.random.default_rng(seed)
    (N, D, E, k), choice = SHAPES[seed % len(SHAPES)], CHOICES[seed % 4]
    x, gate = rng.normal(size=(N, D)), rng.normal(size=(E, D))
    active = rng.random(N) < 0.6 if choice == "padded" else None
    allowed = rng.permutation(E) < (k + E) // 2 if choice == "switched off" else None
    ids = rng.permuted(np.tile(np.arange(E), (N, 1)), axis=1)[:, :k] if choice == "forced" else None
    return (
        x,
        gate,
        k,
        active,
        allowed,
        ids,
        seed % 5 > 1,
        rng.normal(size=(N, k)),
        rng.normal(size=(N, E)) if seed % 3 else None,
    )


def call(module, x, gate, k, active, allowed, ids, renormalise, dweights, dlogits):
    logits, ids, weights = module.forward(x, gate, k, active, allowed, ids, renormalise)
    over_all = None if renormalise else logits
    return ids, logits, weights, *module.backward(dweights, dlogits, x, gate, ids, weights, over_all)


def test_errors_are_those_of_the_reference(cupy):
    draws, dialect = [draw(seed) for seed in range(24)], OnDevice(cupy, cupy_gpu)
    assert_as_good_as_reference(draws, call, reference, dialect, n=1030)
    for inputs in draws[:12]:
        found, expected = call(dialect, *inputs), call(reference, *inputs)
        np.testing.assert_array_equal(found[0], expected[0])
        assert found[0].dtype == np.int64
        size = max(np.abs(expected[3]).max(), 1)  # where k = 1 and nothing else arrives the gradient is zero
        assert_close(found[1:3], expected[1:3], 1e-13)
        assert np.abs(found[3] - expected[3]).max() <= 1e-12 * size


def test_both_operands_are_rounded_where_the_gate_is_bfloat16(cupy):
    def rounded(module, x, gate, *rest):  # the truth: both rounded beforehand, and multiplied in float64
        x = x.astype(ml_dtypes.bfloat16).astype(x.dtype) if x.dtype == np.float64 else x
        gate = gate.astype(ml_dtypes.bfloat16)
        return module.forward(x, gate.astype(np.float64) if x.dtype == np.float64 else gate, *rest)

    draws = [draw(seed)[:7] for seed in range(24)]
    assert_as_good_as_reference(draws, rounded, reference, OnDevice(cupy, cupy_gpu), n=1030)


@pytest.mark.parametrize("N", [1, 17])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ties_go_to_the_lower_expert(cupy, dtype, N):
    dialect, x = OnDevice(cupy, cupy_gpu), np.ones((N, 1), dtype)
    gate = np.array([[1], [3], [2], [3], [3], [2]], dtype)
    assert dialect.forward(x, gate, 4)[1].tolist() == [[1, 3, 4, 2]] * N
    assert dialect.forward(0 * x, np.tile(gate, (12, 1)), 70)[1].tolist() == [list(range(70))] * N


def test_a_logit_gap_of_200_keeps_the_second_choice(cupy):
    gate = np.array([[0], [-220], [-210], [-200]], np.float32)
    _, ids, weights = OnDevice(cupy, cupy_gpu).forward(np.ones((1, 1), np.float32), gate, 2)
    assert ids.tolist() == [[0, 3]]
    assert weights.tolist() == [[1, 0]]


def test_not_a_number_is_chosen_last(cupy):
    gate = np.array([[np.nan], [1], [-np.inf], [np.nan], [2]], np.float32)
    x = np.ones((1, 1), np.float32)
    expected = reference.forward(x, gate, 5)[1].tolist()
    assert OnDevice(cupy, cupy_gpu).forward(x, gate, 5)[1].tolist() == expected == [[4, 1, 2, 0, 3]]


def test_padding_is_not_routed_and_has_no_gradient(cupy):
    dialect, forced = OnDevice(cupy, cupy_gpu), np.array([[4, 0], [1, 2], [-1, -1]])
    x, gate = np.random.default_rng(0).normal(size=(3, 4)), np.random.default_rng(1).normal(size=(5, 4))
    _, ids, weights = dialect.forward(x, gate, 2, np.array([False, True, True]), None, forced)
    assert ids.tolist() == [[-1, -1], [1, 2], [-1, -1]]
    assert not weights[[0, 2]].any() and weights[1].all()
    dx, _ = dialect.backward(np.ones((3, 2)) * [3.0, 5], None, x, gate, ids, weights)
    assert dx.any(axis=1).tolist() == [False, True, False]


def test_a_token_has_the_same_bits_in_every_batch(cupy):
    rng, dialect = np.random.default_rng(0), OnDevice(cupy, cupy_gpu)
    x, gate = rng.normal(size=(18, 520)).astype(np.float32), rng.normal(size=(4, 520)).astype(np.float32)
    whole = dialect.forward(x, gate, 2)
    for n in (0, 17):
        for one, all_of_them in zip(dialect.forward(x[n : n + 1], gate, 2), whole, strict=True):
            np.testing.assert_array_equal(one[0], all_of_them[n])


def test_it_can_be_captured_and_threads_do_not_race(cupy):
    from minimoe.cuda import Captured

    x, gate, *_ = as_dtype(draw(2), np.float32)
    there = cupy.asarray(x), cupy.asarray(gate)
    replay = Captured(cupy, lambda: cupy_gpu.forward(*there, 2))
    for _ in range(3):
        for found, expected in zip(replay(), cupy_gpu.forward(*there, 2), strict=True):
            np.testing.assert_array_equal(found.get(), expected.get())
    inputs = as_dtype(draw(5), np.float32)
    assert_same_bits_in_any_order(cupy, lambda: call(OnDevice(cupy, cupy_gpu), *inputs))
