import inspect
import math

import ml_dtypes
import numpy as np
import pytest

from minimoe.ops.experts import numba_cpu, reference
from minimoe.quantized import quantize
from tests.measure import assert_close, assert_slopes, dialects, with_one_thread

BFLOAT16 = ml_dtypes.bfloat16


@pytest.fixture(params=dialects("experts"), ids=lambda m: m.__name__.rpartition(".")[2])
def experts(request):
    return request.param


ACTIVATIONS = pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])


def naive_activation(z, activation):
    if activation == "silu":
        return z / (1 + math.exp(-z))
    return 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def naive_expert(x, w1, w2, w3, activation):
    (F, D), y = w1.shape, np.zeros(len(w2))
    for f in range(F):
        gate_in = sum(w1[f, d] * x[d] for d in range(D))
        up = sum(w3[f, d] * x[d] for d in range(D))
        for d in range(D):
            y[d] += w2[d, f] * naive_activation(gate_in, activation) * up
    return y


def naive(x, w1, w2, w3, ids, weights, activation="silu"):
    (N, D), k = x.shape, ids.shape[1]
    out, slots = np.zeros((N, D)), np.zeros((N, k, D))
    for n in range(N):
        for slot in range(k):
            if (e := ids[n, slot]) >= 0:
                slots[n, slot] = naive_expert(x[n], w1[e], w2[e], w3[e], activation)
                out[n] += weights[n, slot] * slots[n, slot]
    return out, slots


def draw(N, D, F, E, k, unused=None, padding=0):
    """Inputs, with one expert that no token goes to and some tokens that are not routed."""
    rng = np.random.default_rng(N + E)
    w1, w3 = rng.normal(size=(2, E, F, D)) / math.sqrt(D)
    w2, x, weights = rng.normal(size=(E, D, F)), rng.normal(size=(N, D)), rng.random((N, k))
    usable = [e for e in range(E) if e != unused]
    ids = np.array([rng.permutation(usable)[:k] for _ in range(N)])
    ids[:padding], weights[:padding] = -1, 0
    return x, w1, w2, w3, ids, weights


CASES = pytest.mark.parametrize(
    "sizes",
    [
        {"N": 1, "D": 1, "F": 1, "E": 1, "k": 1},
        {"N": 1, "D": 5, "F": 7, "E": 4, "k": 2},
        {"N": 1, "D": 5, "F": 7, "E": 4, "k": 2, "padding": 1},
        {"N": 6, "D": 4, "F": 3, "E": 3, "k": 3},
        {"N": 9, "D": 5, "F": 3, "E": 5, "k": 1, "unused": 0},
        {"N": 9, "D": 3, "F": 6, "E": 4, "k": 2, "unused": 3, "padding": 2},
        {"N": 16, "D": 9, "F": 70, "E": 3, "k": 2, "padding": 1},
        {"N": 90, "D": 3, "F": 6, "E": 4, "k": 2, "unused": 3, "padding": 2},
        {"N": 70, "D": 3, "F": 2, "E": 3, "k": 2, "unused": 1},
    ],
    ids=str,
)


@CASES
@ACTIVATIONS
@pytest.mark.parametrize("keep", [False, True])
def test_equals_naive_loops(experts, sizes, activation, keep):
    inputs = draw(**sizes)
    expected, slots = naive(*inputs, activation)
    out, saved = experts.forward(*inputs, keep=keep, activation=activation)
    assert_close(out, expected)
    assert (saved is not None) == keep
    if keep:
        assert_close(saved.slots, slots)


@CASES
@ACTIVATIONS
def test_backward_is_the_slope(experts, sizes, activation):
    x, w1, w2, w3, ids, weights = draw(**sizes)
    c = np.random.default_rng(0).normal(size=x.shape)
    _, saved = experts.forward(x, w1, w2, w3, ids, weights, True, activation)
    gradients = experts.backward(c, x, w1, w2, w3, weights, saved, activation)

    def loss(x, w1, w2, w3, weights):
        return (c * experts.forward(x, w1, w2, w3, ids, weights, activation=activation)[0]).sum()

    assert_slopes(loss, [x, w1, w2, w3, weights], gradients)
    for e in range(len(w1)):
        if e not in ids:
            assert not any(dw[e].any() for dw in gradients[1:4])


def test_what_is_saved_is_sorted_by_expert_and_within_one_by_pair(experts):
    x, w1, w2, w3, ids, weights = draw(9, 3, 6, 4, 2, unused=3, padding=2)
    _, saved = experts.forward(x, w1, w2, w3, ids, weights, keep=True)
    flat = ids.reshape(-1)
    routed = np.flatnonzero(flat >= 0)
    expected = routed[np.argsort(flat[routed], kind="stable")]
    np.testing.assert_array_equal(saved.pairs, expected)
    np.testing.assert_array_equal(np.diff(saved.offsets), np.bincount(flat[routed], minlength=4))
    assert saved.offsets[0] == 0
    for row, pair in enumerate(saved.pairs):
        assert_close(saved.gate_in[row], w1[flat[pair]] @ x[pair // 2])
        assert_close(saved.up[row], w3[flat[pair]] @ x[pair // 2])


def test_weights_may_be_stacked_or_listed_or_read_only(experts):
    x, w1, w2, w3, ids, weights = draw(9, 5, 3, 5, 2)
    expected, _ = experts.forward(x, w1, w2, w3, ids, weights)
    listed = [[w.copy() for w in stack] for stack in (w1, w2, w3)]
    for w in (*listed[0], *listed[1], *listed[2]):
        w.flags.writeable = False
    np.testing.assert_array_equal(experts.forward(x, *listed, ids, weights)[0], expected)


@pytest.mark.parametrize("N", [1, 5, 70])
@pytest.mark.parametrize(
    ("values", "total"),
    [([2.0**30, -(2.0**30), 1.0], 1.0), ([1.0, 2.0**30, -(2.0**30)], 0.0)],
    ids=["kept", "absorbed"],
)
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]], ids=str)
def test_slots_are_added_in_their_order(experts, N, values, total, order):
    # float32: 1 + 2^30 = 2^30. Which expert stands in which slot must not matter, only the order of the slots.
    # silu(32) = 32 in float32, so an expert whose w1 is 32 and w3 is 1/32 puts out its w2.
    w1, w3, w2 = (
        np.full((3, 1, 1), 32, np.float32),
        np.full((3, 1, 1), 1 / 32, np.float32),
        np.empty((3, 1, 1), np.float32),
    )
    w2[order, 0, 0] = values
    ids, weights = np.tile(order, (N, 1)), np.ones((N, 3), np.float32)
    out, _ = experts.forward(np.ones((N, 1), np.float32), w1, w2, w3, ids, weights)
    assert out.tolist() == [[total]] * N


@pytest.mark.parametrize("N", [1, 5, 70])
@ACTIVATIONS
def test_a_saturated_activation_does_not_overflow(experts, N, activation):
    one, ids, weights = np.ones((1, 1, 1), np.float32), np.zeros((N, 1), int), np.ones((N, 1), np.float32)
    for z, expected in ((200, 40000), (-200, 0)):
        x = np.full((N, 1), z, np.float32)
        out, saved = experts.forward(x, one, one, one, ids, weights, True, activation)
        assert np.abs(out - expected).max() <= 1e-6 * expected + 1e-30
        dx = experts.backward(np.ones_like(x), x, one, one, one, weights, saved, activation)[0]
        assert np.abs(dx - (400 if z > 0 else 0)).max() <= 1e-4


def test_an_unknown_activation_is_refused(experts):
    with pytest.raises(ValueError, match="activation must be one of silu, gelu_tanh, not 'gelu'"):
        experts.forward(*draw(1, 5, 7, 4, 2), activation="gelu")


@pytest.mark.parametrize("N", [1, 90])
@pytest.mark.parametrize("keep", [False, True])
def test_ids_and_shapes_that_do_not_fit_are_refused(N, keep):
    forward = inspect.unwrap(numba_cpu.forward)  # without the checks of these tests
    x, w1, w2, w3, ids, weights = draw(N, 5, 7, 4, 2)
    with pytest.raises(IndexError, match="expert 4 is chosen, and there are 4"):
        forward(x, w1, w2, w3, np.where(ids == ids[0, 0], 4, ids), weights, keep)
    for shapes in ((w1, w2[:, :4], w3), (w1, w2[:, :, :6], w3), (w1, w2, w3[:, :6]), (w1, w2, w3[:, :, :4])):
        with pytest.raises(ValueError, match=r"must be|cannot multiply"):
            forward(x, *shapes, ids, weights, keep)


@pytest.mark.parametrize("order", ["C", "F"])
def test_gradients_of_bfloat16_weights_do_not_round(experts, order):
    x, w1, w2, w3, ids, weights = draw(90, 6, 8, 4, 2)
    x, weights = x.astype(np.float32), weights.astype(np.float32)
    stored = [[np.array(w[e].astype(BFLOAT16), order=order) for e in range(4)] for w in (w1, w2, w3)]
    wide = [np.array(w, np.float64) for w in stored]
    dout = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    _, saved = experts.forward(x, *stored, ids, weights, True)
    found = experts.backward(dout, x, *stored, weights, saved)
    exact = type(saved)(
        saved.pairs, saved.offsets, *(s.astype(np.float64) for s in (saved.gate_in, saved.up, saved.slots))
    )
    assert_close(
        found,
        reference.backward(*(a.astype(np.float64) for a in (dout, x)), *wide, weights.astype(np.float64), exact),
        1e-5,
    )


@pytest.mark.parametrize("N", [1, 9, 90])
def test_operands_and_hidden_are_rounded_where_the_weights_are_bfloat16(experts, N):
    x, w1, w2, w3, ids, weights = draw(N, 24, 20, 4, 2)
    x, weights = x.astype(np.float32), weights.astype(np.float32)
    w1, w2, w3 = (w.astype(BFLOAT16) for w in (w1, w2, w3))
    out, _ = experts.forward(x, w1, w2, w3, ids, weights)
    assert out.dtype == np.float32
    expected = np.zeros((N, 24))
    wide = [w.astype(np.float64) for w in (w1, w2, w3)]
    for n in range(N):
        xn = x[n].astype(BFLOAT16).astype(np.float64)
        for slot, e in enumerate(ids[n]):
            gate_in = wide[0][e] @ xn
            hidden = (gate_in / (1 + np.exp(-gate_in)) * (wide[2][e] @ xn)).astype(np.float32).astype(BFLOAT16)
            expected[n] += weights[n, slot] * (wide[1][e] @ hidden.astype(np.float64))
    assert_close(out, expected, 2e-3)  # a hidden number on the edge may round the other way


@pytest.mark.parametrize("N", [1, 9, 90])
def test_bfloat16_rounding_of_x_and_of_the_hidden_state_shows(experts, N):
    # x = 1 + 2**-8 rounds to 1. silu(33) = 33 in float32; hidden = 33 · 33/32 = 34.03125 rounds to 34
    x, w1, w3 = np.full((N, 1), 1 + 2**-8, np.float32), np.full((1, 1, 1), 33), np.full((1, 1, 1), 33 / 32)
    w1, w2, w3 = (w.astype(BFLOAT16) for w in (w1, np.ones((1, 1, 1)), w3))
    out, _ = experts.forward(x, w1, w2, w3, np.zeros((N, 1), int), np.ones((N, 1), np.float32))
    assert_close(out, np.full((N, 1), 34.0), 1e-6)


@ACTIVATIONS
def test_explain_names_what_forward_computes(activation):
    x, w1, w2, w3, ids, weights = draw(9, 3, 6, 4, 2, unused=3, padding=2)
    inner = reference.explain(x, w1, w2, w3, ids, weights, activation)
    _, slots = naive(x, w1, w2, w3, ids, weights, activation)
    assert_close(inner["slots"], slots)
    for n in range(9):
        for slot in range(2):
            e = ids[n, slot]
            expected = w2[e] @ inner["hidden"][n, slot] if e >= 0 else np.zeros(3)
            assert_close(slots[n, slot], expected)


# More than one stretch of a row, and a last block that no tile fits; odd sizes cannot be multiplied in pairs.
SIZES = pytest.mark.parametrize("sizes", [(1031, 101), (2062, 102)], ids=str)


@pytest.fixture(params=["widened", "in pairs"])
def way(request, monkeypatch):
    """The two ways to multiply bfloat16."""
    if request.param == "in pairs" and not numba_cpu.MULTIPLIES_PAIRS:
        pytest.skip("this processor does not multiply pairs of bfloat16")
    monkeypatch.setattr(numba_cpu, "MULTIPLIES_PAIRS", request.param == "in pairs")


def many_tokens(dtype, stored, sizes, N=450, E=5):
    """Inputs for experts of very different numbers of tokens, with weights that are no multiple of any block."""
    rng = np.random.default_rng(7)
    D, F = sizes
    w1, w3 = rng.normal(size=(2, E, F, D)) / math.sqrt(D)
    w2, x, weights = rng.normal(size=(E, D, F)) / math.sqrt(F), rng.normal(size=(N, D)), rng.random((N, 2))
    popular = np.where(rng.random(N) < 0.8, 0, 3)  # 0 has more than a group of panels, 4 none, the others some
    ids = np.stack([popular, rng.choice([1, 2], N, p=[0.9, 0.1])], 1)
    ids[:7], weights[:7] = -1, 0
    w1, w2, w3 = (quantize(w) if stored == "int8" else w.astype(stored) for w in (w1, w2, w3))
    return x.astype(dtype), w1, w2, w3, ids, weights.astype(dtype)


@pytest.mark.parametrize("stored", ["float32", "float64", BFLOAT16, "int8"], ids=str)
@ACTIVATIONS
@SIZES
def test_many_tokens(experts, stored, activation, sizes, way):
    dtype = np.float64 if stored == "float64" else np.float32
    x, w1, w2, w3, ids, weights = many_tokens(dtype, stored, sizes)
    out, _ = experts.forward(x, w1, w2, w3, ids, weights, activation=activation)
    wide = [w.widened(np.float64) if stored == "int8" else w.astype(np.float64) for w in (w1, w2, w3)]
    round_x = x.astype(BFLOAT16) if stored == BFLOAT16 else x
    act = np.vectorize(lambda z: naive_activation(z, activation))
    expected = np.zeros(x.shape)
    for e in range(5):
        rows, slots = np.nonzero(ids == e)
        xe = round_x[rows].astype(np.float64)
        hidden = act(xe @ wide[0][e].T) * (xe @ wide[2][e].T) if len(rows) else np.zeros((0, sizes[1]))
        if stored == BFLOAT16:
            hidden = hidden.astype(np.float32).astype(BFLOAT16).astype(np.float64)
        expected[rows] += weights[rows, slots][:, None] * (hidden @ wide[1][e].T)
    assert not expected[:7].any() and min(np.bincount(ids[7:].reshape(-1))) > numba_cpu.FEW_ROWS
    assert_close(out, expected, {np.float64: 1e-13}.get(dtype, 2e-3 if stored == BFLOAT16 else 5e-6))


@pytest.mark.parametrize("stored", ["float32", BFLOAT16, "int8"], ids=str)
@SIZES
def test_many_tokens_have_the_same_bits_for_one_thread_and_beside_any_others(stored, sizes, way):
    """Whatever else is in the batch: a token's sums do not depend on its lane, its panel or their number."""
    x, w1, w2, w3, ids, weights = many_tokens(np.float32, stored, sizes)
    out, _ = numba_cpu.forward(x, w1, w2, w3, ids, weights)
    alone, _ = with_one_thread(lambda: numba_cpu.forward(x, w1, w2, w3, ids, weights))
    np.testing.assert_array_equal(alone, out)
    some = np.sort(np.random.default_rng(1).permutation(len(x))[:320])
    fewer, _ = numba_cpu.forward(x[some], w1, w2, w3, ids[some], weights[some])
    np.testing.assert_array_equal(fewer, out[some])


@pytest.mark.parametrize("N", [23, 90])
def test_weights_that_lie_apart_give_the_same(experts, N):
    """Not contiguous: neither loops nor tiles read them."""
    x, w1, w2, w3, ids, weights = draw(N, 8, 6, 2, 2)
    apart = [np.repeat(w, 2, 2)[..., ::2] for w in (w1, w2, w3)]
    assert_close(experts.forward(x, *apart, ids, weights)[0], experts.forward(x, w1, w2, w3, ids, weights)[0])
