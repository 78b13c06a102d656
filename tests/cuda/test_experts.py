"""The experts' kernels against the reference (on the processor; on a device where there is one)."""

import math

import ml_dtypes
import numpy as np
import pytest

from minimoe.cuda import FEW, Captured
from minimoe.ops.experts import cupy_gpu, reference
from minimoe.quantized import quantize
from tests.cuda_on_cpu.measuring import OnDevice, assert_same_bits_in_any_order, to_device, to_host
from tests.cuda_on_cpu.stand_in import STAND_IN, STATE
from tests.measure import as_dtype, assert_as_good_as_reference, assert_close

BFLOAT16 = ml_dtypes.bfloat16
# N, D, F, E, k: few tokens and many; widths that are whole loads of 16 bytes, and that are not; rows that fill blocks
# of 16, and that do not; every expert chosen, and one among many.
SHAPES = [
    (1, 2, 1, 1, 1), (1, 40, 24, 8, 2), (2, 33, 17, 3, 3), (4, 16, 48, 5, 2), (9, 24, 40, 4, 1), (16, 8, 16, 3, 2),
    (16, 19, 8, 40, 2), (1, 272, 288, 4, 2), (17, 16, 24, 4, 2), (40, 7, 5, 3, 3), (33, 8, 32, 6, 1), (300, 3, 4, 9, 4),
]  # fmt: skip
FEW_SHAPES = [shape for shape in SHAPES if shape[0] <= FEW]


def draw(rng, N, D, F, E, k):
    """In one draw of three some tokens are not routed, in another the lower experts get most."""
    kind = rng.integers(3)
    ids = np.argsort(rng.random((N, E)) + np.linspace(0, 3 * (kind == 1), E), axis=1)[:, :k]
    if kind == 2:
        ids[rng.random(N) < 0.4] = -1
    weights = np.where(ids >= 0, rng.dirichlet(np.ones(k), N), 0)
    w1, w3 = rng.normal(size=(2, E, F, D)) / math.sqrt(D)
    w2, x, dout = rng.normal(size=(E, D, F)) / math.sqrt(F), rng.normal(size=(N, D)), rng.normal(size=(N, D))
    return x, w1, w2, w3, ids, weights, dout


def draws(shapes, count):
    return [draw(np.random.default_rng(seed), *shapes[seed % len(shapes)]) for seed in range(count)]


def call(module, x, w1, w2, w3, ids, weights, dout):
    """Forward for generation, and for training with its backward; the activations take turns by the size of x."""
    activation = ("silu", "gelu_tanh")[x.shape[1] % 16 == 0]
    alone, nothing = module.forward(x, w1, w2, w3, ids, weights, activation=activation)
    assert nothing is None
    out, saved = module.forward(x, w1, w2, w3, ids, weights, True, activation)
    gradients = module.backward(dout, x, w1, w2, w3, weights, saved, activation)
    return [alone, out, saved.gate_in, saved.up, saved.slots, saved.pairs, saved.offsets, *gradients]


def test_errors_are_those_of_the_reference(cupy):
    dialect = OnDevice(cupy, cupy_gpu)
    assert_as_good_as_reference(draws(SHAPES, 24), call, reference, dialect, n=288)
    for inputs in draws(SHAPES, 24):
        assert_close(call(dialect, *inputs), call(reference, *inputs), 1e-13)


def in_bfloat16(inputs):
    """x, weights of the combine and dout in float32; the experts in bfloat16."""
    return [as_dtype(a, BFLOAT16 if 1 <= i <= 3 else np.float32) for i, a in enumerate(inputs)]


def test_with_bfloat16_weights_operands_and_hidden_states_are_rounded(cupy):
    """A hidden state on the edge between two numbers may fall to either side, so results differ from the reference in
    few places; where an operand is not rounded they differ everywhere."""
    dialect, differences, errors = OnDevice(cupy, cupy_gpu), [], []
    for inputs in map(in_bfloat16, draws(SHAPES, 24)):
        truth = call(reference, *as_dtype(inputs, np.float64))
        expected, found = call(reference, *inputs), call(dialect, *inputs)
        for i, (t, e, f) in enumerate(zip(truth, expected, found, strict=True)):
            assert f.dtype == e.dtype
            if i < 2 and (size := np.abs(t).max()):
                errors.append(np.ravel(e - t) / size)
                differences.append(np.ravel(f - e) / size)
            elif i >= 2 and i != 4:
                assert_close(f, e, 1e-5)  # nothing rounded stands before these but x
    rms = [float(np.sqrt(np.mean(np.concatenate(x) ** 2))) for x in (differences, errors)]
    assert rms[1] > 1e-4 and rms[0] < 0.2 * rms[1]


@pytest.mark.parametrize("shape", [(1, 32, 48, 4, 2), (3, 5, 7, 3, 2), (17, 8, 6, 3, 2)])
def test_weights_may_be_int8(cupy, shape):
    x, w1, w2, w3, ids, weights, _ = draw(np.random.default_rng(1), *shape)
    stored = [quantize(w) for w in (w1, w2, w3)]
    truth, _ = reference.forward(x, *(w.widened(np.float64) for w in stored), ids, weights)
    dialect = OnDevice(cupy, cupy_gpu)
    assert_close(dialect.forward(x.astype(np.float32), *stored, ids, weights)[0], truth, 5e-6)
    assert_close(dialect.forward(x, *stored, ids, weights)[0], truth, 1e-13)


def test_weights_may_be_listed_strided_and_misaligned(cupy):
    inputs = draw(np.random.default_rng(0), 3, 16, 24, 3, 2)[:6]
    for x, *stacks, ids, weights in (as_dtype(inputs, np.float32), in_bfloat16(inputs)):
        expected, _ = reference.forward(x, *stacks, ids, weights)
        there = [cupy.asarray(w) for w in stacks]
        behind = [cupy.empty(w.size + 1, w.dtype) for w in stacks]
        for whole, w in zip(behind, there, strict=True):
            whole[1:] = w.reshape(-1)
        x, ids, weights = (cupy.asarray(a) for a in (x, ids, weights))
        for some in (
            [[w[e] for e in range(len(w))] for w in there],
            [cupy.ascontiguousarray(w.swapaxes(1, 2)).swapaxes(1, 2) for w in there],
            [whole[1:].reshape(w.shape) for whole, w in zip(behind, there, strict=True)],
        ):
            assert_close(to_host(cupy_gpu.forward(x, *some, ids, weights)[0]), expected, 1e-2)


def test_a_dense_model_is_one_expert(cupy):
    x, w1, w2, w3, ids, weights, _ = draw(np.random.default_rng(0), 5, 16, 24, 1, 1)
    expected, _ = reference.forward(x, w1, w2, w3, ids, weights)
    found, _ = OnDevice(cupy, cupy_gpu).forward(x, [w1[0]], [w2[0]], [w3[0]], ids, weights)
    assert_close(found, expected, 1e-13)


def test_an_expert_may_be_forced_more_often_than_there_are_tokens(cupy):
    x, w1, w2, w3, ids, weights, _ = draw(np.random.default_rng(3), 16, 8, 8, 3, 3)
    ids = np.where(ids == 1, 2, ids)
    ids[:, 1] = 2
    expected, _ = reference.forward(x, w1, w2, w3, ids, weights)
    assert_close(OnDevice(cupy, cupy_gpu).forward(x, w1, w2, w3, ids, weights)[0], expected, 1e-13)
    x, w1, w2, w3, ids, weights = in_bfloat16([x, w1, w2, w3, ids, weights])
    expected, _ = reference.forward(x, w1, w2, w3, ids, weights)
    assert_close(OnDevice(cupy, cupy_gpu).forward(x, w1, w2, w3, ids, weights)[0], expected, 1e-2)


@pytest.mark.parametrize(("N", "k", "E"), [(1, 1, 1), (1, 2, 8), (50, 2, 8), (341, 3, 5), (1100, 1, 3), (20, 2, 70)])
def test_the_sort_on_the_device_is_the_dispatch_of_the_reference(cupy, N, k, E):
    rng = np.random.default_rng(N)
    for ids in (rng.integers(-1, E, (N, k)), np.full((N, k), -1), np.full((N, k), E - 1)):
        pairs, offsets, place = to_host(cupy_gpu.dispatch(cupy.asarray(ids), E))
        expected = reference.dispatch(ids, E)
        np.testing.assert_array_equal(pairs, expected[0])
        np.testing.assert_array_equal(offsets, expected[1])
        inverse = np.full(N * k, -1)
        inverse[pairs] = np.arange(len(pairs))
        np.testing.assert_array_equal(place, inverse)


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_experts_that_nobody_chose_are_not_read(cupy, dtype):
    for shape in ((1, 16, 16, 5, 2), (16, 16, 16, 9, 1)):
        x, w1, w2, w3, ids, weights, _ = as_dtype(draw(np.random.default_rng(0), *shape), np.float32)
        w1, w2, w3 = (w.astype(dtype) for w in (w1, w2, w3))
        expected = OnDevice(cupy, cupy_gpu).forward(x, w1, w2, w3, ids, weights)[0]
        unused = np.setdiff1d(np.arange(shape[3]), ids)
        assert len(unused)
        for w in (w1, w2, w3):
            w[unused] = np.nan
        np.testing.assert_array_equal(OnDevice(cupy, cupy_gpu).forward(x, w1, w2, w3, ids, weights)[0], expected)


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
@pytest.mark.parametrize("shape", [(2, 40, 24, 4, 2), (16, 16, 24, 5, 3), (40, 7, 5, 3, 2)])
def test_threads_do_not_race(cupy, shape, dtype):
    inputs = as_dtype(draw(np.random.default_rng(0), *shape), np.float32)
    inputs = [a.astype(dtype) if 1 <= i <= 3 else a for i, a in enumerate(inputs)]
    assert_same_bits_in_any_order(cupy, lambda: call(OnDevice(cupy, cupy_gpu), *inputs))


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("N", [1, FEW])
def test_few_tokens_are_captured_and_their_experts_may_change(cupy, N, stored):
    x, w1, w2, w3, ids, weights, _ = as_dtype(draw(np.random.default_rng(0), N, 16, 24, 6, 2), np.float32)
    change = {"float32": np.asarray, "bfloat16": lambda w: w.astype(BFLOAT16), "int8": quantize}[stored]
    w1, w2, w3 = to_device(cupy, [change(w) for w in (w1, w2, w3)])
    x, ids, weights = to_device(cupy, [x, ids, weights])
    replay = Captured(cupy, lambda: cupy_gpu.forward(x, w1, w2, w3, ids, weights)[0])
    for seed in range(4):
        rng = np.random.default_rng(seed)
        x.set(rng.normal(size=x.shape).astype(np.float32))
        ids.set(np.argsort(rng.random((N, 6)), axis=1)[:, :2])
        expected = to_host(cupy_gpu.forward(x, w1, w2, w3, ids, weights)[0])
        np.testing.assert_array_equal(to_host(replay()), expected)


def test_few_tokens_are_two_launches_and_many_ask_the_host_once(cupy):
    if cupy is not STAND_IN:
        pytest.skip("counted by the stand-in")
    for N, launches, syncs in ((FEW, 2, 0), (FEW + 1, None, 1)):
        inputs = to_device(cupy, as_dtype(draw(np.random.default_rng(0), N, 16, 24, 3, 2), np.float32)[:6])
        before = len(STATE.launches), STATE.syncs
        cupy_gpu.forward(*inputs)
        assert STATE.syncs - before[1] == syncs
        assert launches is None or len(STATE.launches) - before[0] == launches


def test_no_tokens_are_no_work(cupy):
    x, w1, w2, w3, ids, weights, _ = draw(np.random.default_rng(0), 1, 4, 3, 2, 1)
    out, _ = OnDevice(cupy, cupy_gpu).forward(x[:0], w1, w2, w3, ids[:0], weights[:0])
    assert out.shape == (0, 4)
