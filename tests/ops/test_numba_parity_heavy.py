"""The Numba loops of the four heavy rooms against the reference: float64 to 1e-13, float32 and bfloat16 no worse.

Sizes are odd, so that vectors and blocks have remainders, and lie on both sides of every change of algorithm: few
tokens or many, one thread or several, one block of queries or more.
"""

import math

import ml_dtypes
import numpy as np
import pytest

import minimoe.ops.attention.numba_cpu as attention
import minimoe.ops.attention.reference as attention_reference
import minimoe.ops.experts.numba_cpu as experts
import minimoe.ops.experts.reference as experts_reference
import minimoe.ops.gating.numba_cpu as gating
import minimoe.ops.gating.reference as gating_reference
import minimoe.ops.linear.numba_cpu as linear
import minimoe.ops.linear.reference as linear_reference
from tests.measure import as_dtype, assert_as_good_as_reference, assert_close, relative_error, with_one_thread

BFLOAT16 = ml_dtypes.bfloat16


def assert_parity(draws, call, reference, dialect, n, stored):
    """Hold a dialect to the reference in float64, float32 and bfloat16; `stored`: the inputs that bfloat16 stores."""
    assert len(draws) >= 20
    for inputs in as_dtype(draws, np.float64):
        assert_close(call(dialect, *inputs), call(reference, *inputs), 1e-13)
    assert_as_good_as_reference(draws, call, reference, dialect, n)
    assert_bfloat16_parity(draws, call, reference, dialect, n, stored)


def assert_bfloat16_parity(draws, call, reference, dialect, n, stored):
    """The error is that of the reference, and for the same reason: both round the same operands.

    A number that lies on a rounding boundary may fall on either side, so results differ in few places; where an
    operand is not rounded they differ everywhere. Hence the root mean square: near zero in one case, not in the other.
    """
    errors, references, differences = {}, {}, {}
    for inputs in draws:
        inputs = [as_dtype(x, BFLOAT16 if i in stored else np.float32) for i, x in enumerate(inputs)]
        truth = call(reference, *as_dtype(inputs, np.float64))
        expected, found = call(reference, *inputs), call(dialect, *inputs)
        for i, (t, e, f) in enumerate(zip(truth, expected, found, strict=True)):
            assert f.dtype == e.dtype
            finite = np.isfinite(t)
            size = np.abs(t[finite]).max(initial=0)
            if size == 0:
                assert relative_error(f, e) == 0
                continue
            errors[i] = max(errors.get(i, 0.0), relative_error(f, t))
            references.setdefault(i, []).append((e[finite] - t[finite]) / size)
            differences.setdefault(i, []).append((f[finite] - e[finite]) / size)
    for i, error in errors.items():
        noise = 8 * np.finfo(np.float32).eps / 2 * math.sqrt(n)
        expected, difference = np.concatenate(references[i]), np.concatenate(differences[i])
        assert error <= 2 * np.abs(expected).max() + noise, f"output {i}: {error:.2e}"
        assert rms(difference) <= 0.2 * rms(expected) + noise, f"output {i}: {rms(difference):.2e}, {rms(expected):.2e}"


def rms(x):
    return float(np.sqrt(np.mean(x * x)))


def strided(x):
    """The same numbers, read-only and not contiguous: what a view into a mapped file may look like."""
    x = np.repeat(x, 2, axis=-1)[..., ::2]
    x.flags.writeable = False
    return x


def assert_same_bits(one, other):
    for a, b in zip(one, other, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# --- linear --------------------------------------------------------------------------------------------------------


def draw_linear(seed):
    """Some input, one to three weights and gradients; the last sizes fill all threads."""
    rng = np.random.default_rng(seed)
    N, width = int(rng.choice([1, 1, 2, 3, 4, 5, 70])), int(rng.integers(1, 90))
    rows = [int(rng.integers(1, 70)) for _ in range(rng.integers(1, 4))]
    if seed % 8 == 7:
        N, width, rows = 1, 611, [517, 3]
    weights = [rng.normal(size=(o, width)) for o in rows]
    return rng.normal(size=(N, width)), weights, [rng.normal(size=(N, o)) for o in rows]


def call_linear(module, x, weights, dys):
    dx, dws = module.backward(dys, x, weights)
    return [*module.forward(x, weights), dx, *dws]


def test_linear():
    draws = [draw_linear(seed) for seed in range(32)]
    by_outputs = [[d for d in draws if len(d[1]) == outputs] for outputs in (1, 2, 3)]
    for some in by_outputs:
        many = some * math.ceil(20 / len(some))
        assert_parity(many, call_linear, linear_reference, linear, 611, stored={1})


@pytest.mark.parametrize("stored", [np.float32, BFLOAT16])
def test_linear_reads_strided_and_mapped_weights(stored, tmp_path):
    x, weights, _ = as_dtype(draw_linear(7), np.float32)
    weights = [w.astype(stored) for w in weights]
    expected = linear.forward(x, weights)
    assert_same_bits(linear.forward(strided(x), [strided(w) for w in weights]), expected)
    mapped = np.memmap(tmp_path / "w", np.uint8, "w+", shape=weights[0].nbytes).view(stored).reshape(weights[0].shape)
    mapped[:] = weights[0]
    mapped.flags.writeable = False
    assert_same_bits(linear.forward(x, [mapped, weights[1]]), expected)
    assert_same_bits(with_one_thread(lambda: linear.forward(x, weights)), expected)


def test_linear_takes_weights_of_different_types():
    x, weights, _ = as_dtype(draw_linear(7), np.float32)
    mixed = [weights[0], weights[1].astype(BFLOAT16)]
    assert_close(linear.forward(x, mixed), linear_reference.forward(x, mixed), 1e-5)


# --- gating --------------------------------------------------------------------------------------------------------


def draw_gating(seed):
    """Some tokens padded, some experts switched off, in every other draw the choice forced."""
    rng = np.random.default_rng(seed)
    N, D, E = int(rng.choice([1, 2, 4, 5, 31, 300])), int(rng.integers(1, 70)), int(rng.integers(1, 17))
    k = int(rng.choice([1, E, rng.integers(1, E + 1)]))
    active = rng.random(N) < 0.8 if rng.random() < 0.5 else None
    allowed = None
    if rng.random() < 0.5:
        allowed = np.ones(E, bool)
        allowed[rng.permutation(E)[: E - k]] = False
    choice = np.argsort(rng.random((N, E)), axis=1)[:, :k]
    choice[rng.random(N) < 0.1] = -1
    weights = np.where(choice >= 0, rng.dirichlet(np.ones(k), N), 0)
    dlogits = rng.normal(size=(N, E)) if rng.random() < 0.5 else None
    x, gate = rng.normal(size=(N, D)), rng.normal(size=(E, D)) / math.sqrt(D)
    return x, gate, k, active, allowed, choice, weights, rng.normal(size=(N, k)), dlogits


def call_gating(module, x, gate, k, active, allowed, choice, weights, dweights, dlogits):
    forced = module.forward(x, gate, k, active, allowed, choice)
    return [*forced, *module.backward(dweights, dlogits, x, gate, choice, weights)]


def call_gating_over_all(module, x, gate, k, active, allowed, choice, weights, dweights, dlogits):
    logits, ids, shares = module.forward(x, gate, k, active, allowed, choice, False)
    return [logits, ids, shares, *module.backward(dweights, dlogits, x, gate, ids, shares, logits)]


def call_free_gating(module, x, gate, k, active, allowed, *_):
    return module.forward(x, gate, k, active, allowed)


def test_gating():
    draws = [draw_gating(seed) for seed in range(48)]
    for call in (call_gating, call_gating_over_all):
        assert_parity(draws, call, gating_reference, gating, 300, stored={1})
    for inputs in as_dtype(draws, np.float64):
        assert_close(call_free_gating(gating, *inputs), call_free_gating(gating_reference, *inputs), 1e-13)
    assert_as_good_as_reference(draws, call_free_gating, gating_reference, gating, 70)


@pytest.mark.parametrize("N", [3, 400])
def test_ties_and_nan_are_ordered_as_in_the_reference(N):
    """Whole numbers tie often; NaN stands behind everything, behind an expert that is switched off too."""
    rng = np.random.default_rng(0)
    for broken in [None] * 10 + [0, 3, 6]:
        x, gate = rng.integers(-1, 2, (N, 7)).astype(np.float64), np.eye(7)
        if broken is not None:
            gate[broken] = np.nan
        allowed = rng.permutation(7) < 6
        for k in (1, 2, 5, 6):
            with np.errstate(invalid="ignore"):
                expected = gating_reference.forward(x, gate, k, allowed=allowed)
            found = gating.forward(x, gate, k, allowed=allowed)
            np.testing.assert_array_equal(found[1], expected[1])
            np.testing.assert_allclose(found[2], expected[2], rtol=1e-14)


# --- experts -------------------------------------------------------------------------------------------------------


def draw_experts(seed):
    """Tokens that are not routed, experts that nobody chose; the last sizes fill all threads."""
    rng = np.random.default_rng(seed)
    N, D, F, E = (
        int(rng.choice([1, 1, 2, 4, 5, 9, 70])),
        *(int(n) for n in rng.integers(1, 50, 2)),
        int(rng.integers(1, 9)),
    )
    if seed % 8 == 7:
        N, D, F, E = [(1, 251, 403, 3), (3, 203, 301, 4), (300, 17, 130, 5)][seed // 8 % 3]
    k = int(rng.choice([1, E, rng.integers(1, E + 1)]))
    ids = np.argsort(rng.random((N, E)) + np.linspace(0, rng.choice([0, 3]), E), axis=1)[:, :k]
    ids[rng.random(N) < rng.choice([0, 0.2, 1], p=[0.5, 0.4, 0.1])] = -1
    weights = np.where(ids >= 0, rng.dirichlet(np.ones(k), N), 0)
    w1, w3 = rng.normal(size=(2, E, F, D)) / math.sqrt(D)
    w2, x, dout = rng.normal(size=(E, D, F)) / math.sqrt(F), rng.normal(size=(N, D)), rng.normal(size=(N, D))
    return x, w1, w2, w3, ids, weights, dout


def call_experts(module, x, w1, w2, w3, ids, weights, dout, activation="silu"):
    out, saved = module.forward(x, w1, w2, w3, ids, weights, True, activation)
    alone, nothing = module.forward(x, w1, w2, w3, ids, weights, activation=activation)
    assert nothing is None
    most = np.bincount(ids[ids >= 0]).max(initial=0)
    if module is experts_reference or most <= experts.FEW_ROWS:  # both are computed in the same way
        np.testing.assert_array_equal(alone, out)
    kept = [saved.gate_in, saved.up, saved.slots]
    return [out, alone, *kept, *module.backward(dout, x, w1, w2, w3, weights, saved, activation)]


def call_gelu_experts(*inputs):
    return call_experts(*inputs, "gelu_tanh")


@pytest.mark.parametrize("call", [call_experts, call_gelu_experts])
def test_experts(call):
    draws = [draw_experts(seed) for seed in range(48)]
    assert_parity(draws, call, experts_reference, experts, 403, stored={1, 2, 3})


def test_dispatch_equals_the_reference():
    for seed in range(20):
        *inputs, _ = draw_experts(seed)
        expected = experts_reference.forward(*inputs, keep=True)[1]
        found = experts.forward(*inputs, keep=True)[1]
        np.testing.assert_array_equal(found.pairs, expected.pairs)
        np.testing.assert_array_equal(found.offsets, expected.offsets)


@pytest.mark.parametrize("stored", [np.float32, BFLOAT16])
@pytest.mark.parametrize("seed", [7, 15, 23])
def test_experts_read_lists_strided_and_mapped_weights(stored, seed, tmp_path):
    x, *stacks, ids, weights, dout = as_dtype(draw_experts(seed), np.float32)
    stacks = [w.astype(stored) for w in stacks]
    expected = call_experts(experts, x, *stacks, ids, weights, dout)
    assert_same_bits(call_experts(experts, x, *map(list, stacks), ids, weights, dout), expected)
    mapped = []
    for i, w in enumerate(stacks):
        file = np.memmap(tmp_path / str(i), np.uint8, "w+", shape=w.nbytes).view(stored).reshape(w.shape)
        file[:] = w
        file.flags.writeable = False
        mapped.append([file[e] for e in range(len(file))])
    assert_same_bits(call_experts(experts, strided(x), *mapped, ids, strided(weights), strided(dout)), expected)
    assert_close(call_experts(experts, x, *map(strided, stacks), ids, weights, dout), expected, 1e-2)


@pytest.mark.parametrize("seed", [7, 15])
def test_few_tokens_give_the_same_bits_with_one_thread(seed):
    *inputs, _ = as_dtype(draw_experts(seed), np.float32)
    assert_same_bits([with_one_thread(lambda: experts.forward(*inputs))[0]], [experts.forward(*inputs)[0]])


# --- attention -----------------------------------------------------------------------------------------------------


def draw_attention(seed):
    """Chunks behind a cache, windows, padding, rolled slots, empty slots, queries that see nothing; often T = 1."""
    rng = np.random.default_rng(seed)
    B, K, C = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.integers(1, 41))
    H = K * int(rng.choice([1, 1, 2, 3, 8]))
    T = int(rng.choice([1, rng.integers(2, 9), rng.integers(9, 90)]))
    S = T + int(rng.choice([0, rng.integers(0, 60)]))
    window = None if rng.random() < 0.5 else int(rng.integers(1, S + 2))
    if seed % 8 == 7:
        B, T, S, H, K, C, window = [
            (1, 1, 700, 6, 2, 80, None),
            (2, 150, 150, 3, 1, 33, None),
            (1, 70, 300, 2, 2, 64, 90),
        ][seed // 8 % 3]
    k_pos = np.tile(np.arange(S), (B, 1))
    q_pos = k_pos[:, S - T :].copy()
    if rng.random() < 0.5:
        k_pos[rng.random((B, S)) < 0.2] = -1
    if rng.random() < 0.3:
        q_pos[rng.random((B, T)) < 0.3] = -1
    q, dout = rng.normal(size=(2, B, T, H, C)) * rng.choice([0.5, 2])
    k, v = rng.normal(size=(2, B, S, K, C))
    if rng.random() < 0.5:  # a rolled cache: any order of slots, with its positions
        order = np.roll(np.arange(S), int(rng.integers(S)))
        k, v, k_pos = k[:, order], v[:, order], k_pos[:, order]
    seen = attention_reference.visible(q_pos, k_pos, window).sum(axis=-1).max()
    # Where every query sees one key only, dq and dk are zero but for rounding, and have no relative error.
    return (q, k, v, q_pos, k_pos, window, dout) if seen > 1 else draw_attention(seed + 1000)


def call_attention(module, q, k, v, q_pos, k_pos, window, dout, scale=None, cap=None):
    out, lse = module.forward(q, k, v, q_pos, k_pos, window, scale, cap)
    return [out, lse, *module.backward(dout, q, k, v, q_pos, k_pos, window, out, lse, scale, cap)]


def call_capped_attention(*inputs):
    return call_attention(*inputs, 0.4, 3.0)


@pytest.mark.parametrize("call", [call_attention, call_capped_attention])
def test_attention(call):
    draws = [draw_attention(seed) for seed in range(48)]
    assert_parity(draws, call, attention_reference, attention, 700, stored={1, 2})


@pytest.mark.parametrize("stored", [np.float32, BFLOAT16])
@pytest.mark.parametrize("seed", [7, 15, 23])
def test_attention_reads_strided_arrays_and_is_the_same_with_one_thread(stored, seed):
    q, k, v, q_pos, k_pos, window, dout = as_dtype(draw_attention(seed), np.float32)
    inputs = q, k.astype(stored), v.astype(stored), q_pos, k_pos, window, dout
    expected = call_attention(attention, *inputs)
    views = [strided(x) if isinstance(x, np.ndarray) else x for x in inputs]
    assert_same_bits(call_attention(attention, *views), expected)
    assert_same_bits(with_one_thread(lambda: call_attention(attention, *inputs)), expected)
    assert_same_bits(call_attention(attention, *inputs[:3], q_pos.astype(np.int32), *inputs[4:]), expected)


@pytest.mark.parametrize("T", [1, 70])
def test_a_query_that_sees_one_key_returns_its_value(T):
    rng = np.random.default_rng(T)
    q, k, v, dout = rng.normal(size=(4, 2, T, 2, 5))
    positions = np.tile(np.arange(T), (2, 1))
    out, lse, dq, dk, dv = call_attention(attention, q, k, v, positions, positions, 1, dout)
    assert_close([out, dv], [v, dout], 1e-15)
    assert_close(lse, (q * k).sum(axis=-1) / math.sqrt(5), 1e-14)
    assert max(np.abs(dq).max(), np.abs(dk).max()) < 1e-14


@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_queries_that_see_nothing_give_zeros_and_no_gradient(T, dtype):
    rng = np.random.default_rng(T)
    q, k, v, dout = rng.normal(size=(4, 2, T, 2, 5)).astype(dtype)
    positions = np.tile(np.arange(T), (2, 1))
    positions[1] = -1  # the whole second sequence is padding
    out, lse, dq, dk, dv = call_attention(attention, q, k, v, positions, positions, None, dout)
    assert (lse[1] == -np.inf).all() and np.isfinite(lse[0]).all()
    for x in (out, dq, dk, dv):
        assert (x[1] == 0).all() and np.isfinite(x).all()


def test_large_scores_neither_overflow_nor_vanish():
    rng = np.random.default_rng(0)
    positions = np.arange(80)[None]
    q, k, v, dout = (rng.normal(size=(1, 80, 2, 8)).astype(np.float32) for _ in range(4))
    inputs = 100 * q, 100 * k, v, positions, positions, None, dout
    truth = call_attention(attention_reference, *as_dtype(inputs, np.float64))
    expected = call_attention(attention_reference, *inputs)
    for f, e, t in zip(call_attention(attention, *inputs), expected, truth, strict=True):
        assert relative_error(f, t) <= 2 * relative_error(e, t) + 1e-5
