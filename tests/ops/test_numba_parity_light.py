"""The Numba loops of the eight light rooms against the reference: in float64 to 1e-13, in float32 no worse than it.

Sizes lie on both sides of the point where a loop starts threads, and are odd, so that vectors have remainders.
"""

import math

import ml_dtypes
import numpy as np
import pytest

import minimoe.ops.adamw.numba_cpu as adamw
import minimoe.ops.adamw.reference as adamw_reference
import minimoe.ops.balance_loss.numba_cpu as balance_loss
import minimoe.ops.balance_loss.reference as balance_loss_reference
import minimoe.ops.cross_entropy.numba_cpu as cross_entropy
import minimoe.ops.cross_entropy.reference as cross_entropy_reference
import minimoe.ops.embedding.numba_cpu as embedding
import minimoe.ops.embedding.reference as embedding_reference
import minimoe.ops.kv_cache.numba_cpu as kv_cache
import minimoe.ops.kv_cache.reference as kv_cache_reference
import minimoe.ops.rmsnorm.numba_cpu as rmsnorm
import minimoe.ops.rmsnorm.reference as rmsnorm_reference
import minimoe.ops.rope.numba_cpu as rope
import minimoe.ops.rope.reference as rope_reference
import minimoe.ops.sampling.numba_cpu as sampling
import minimoe.ops.sampling.reference as sampling_reference
from tests.measure import as_dtype, assert_as_good_as_reference, assert_close, with_one_thread

BFLOAT16 = ml_dtypes.bfloat16
FLOATS = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def draws_of(draw, shapes, count=24):
    """`count` seeded draws, the shapes taken in turn."""
    return [draw(np.random.default_rng(seed), *shapes[seed % len(shapes)]) for seed in range(count)]


def assert_parity(draws, call, reference, dialect, n):
    assert len(draws) >= 20
    assert_as_good_as_reference(draws, call, reference, dialect, n)
    for inputs in as_dtype(draws, np.float64):
        assert_close(call(dialect, *inputs), call(reference, *inputs), 1e-13)


def frozen(x):
    """A strided, read-only copy: what a view into a mapped file may look like."""
    x = np.repeat(x, 2, axis=-1)[..., ::2]
    x.flags.writeable = False
    assert x.size <= 1 or not x.flags.c_contiguous
    return x


def bits_with_threads(call):
    """The results of a call with one thread and with all of them, as bytes."""
    one = [np.asarray(a).tobytes() for a in with_one_thread(call)]
    return one, [np.asarray(a).tobytes() for a in call()]


# --- embedding ---------------------------------------------------------------------------------------------------


def draw_embedding(rng, N, V, D):
    return rng.integers(0, V, N), rng.normal(size=(V, D)), rng.normal(size=(N, D))


def call_embedding(module, tokens, table, dx):
    return module.forward(tokens, table), module.backward(dx, tokens, table.shape[0])


EMBEDDINGS = [(1, 1, 1), (1, 7, 130), (13, 3, 33), (515, 11, 67), (0, 3, 5)]


def test_embedding():
    draws = draws_of(draw_embedding, EMBEDDINGS)
    assert_parity(draws, call_embedding, embedding_reference, embedding, n=515)


@FLOATS
def test_embedding_adds_in_the_order_of_tokens_bit_for_bit(dtype):
    for inputs in as_dtype(draws_of(draw_embedding, EMBEDDINGS), dtype):
        for a, b in zip(call_embedding(embedding, *inputs), call_embedding(embedding_reference, *inputs), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("N", [3, 2000])
def test_embedding_takes_bfloat16_frozen_and_strided_tables(N):
    tokens, table, dx = draw_embedding(np.random.default_rng(N), N, 9, 33)
    table = table.astype(BFLOAT16)
    expected = embedding_reference.forward(tokens, table)
    for stored in (table, frozen(table)):
        found = embedding.forward(frozen(tokens.astype(np.int32)), stored)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
    dtable = embedding.backward(frozen(dx), frozen(tokens), 9)
    np.testing.assert_array_equal(dtable, embedding_reference.backward(dx, tokens, 9))


# --- rmsnorm -----------------------------------------------------------------------------------------------------


def draw_rmsnorm(rng, N, D, residual):
    x, weight, dy = rng.normal(size=(N, D)) * 10 ** rng.uniform(-2, 2), rng.normal(size=D), rng.normal(size=(N, D))
    return x, weight, rng.normal(size=(N, D)) if residual else None, dy


def call_rmsnorm(module, x, weight, residual, dy):
    y, h, r = module.forward(x, weight, 1e-5, residual)
    return y, h, r, *module.backward(dy, h, weight, r, residual)


RMSNORMS = [(N, D, residual) for N, D in [(1, 2), (1, 129), (5, 7), (65, 33), (131, 130)] for residual in (0, 1)]
# (The gradient of a row of one number, and that of k = E experts below, is zero but for rounding.)


def test_rmsnorm():
    assert_parity(draws_of(draw_rmsnorm, RMSNORMS), call_rmsnorm, rmsnorm_reference, rmsnorm, n=131)


@pytest.mark.parametrize("N", [3, 300])
def test_rmsnorm_takes_bfloat16_weights_and_frozen_strided_rows(N):
    x, weight, residual, dy = as_dtype(draw_rmsnorm(np.random.default_rng(N), N, 65, True), np.float32)
    weight = weight.astype(BFLOAT16)
    truth = call_rmsnorm(rmsnorm_reference, *as_dtype((x, weight, residual, dy), np.float64))
    found = call_rmsnorm(rmsnorm, frozen(x), frozen(weight), frozen(residual), frozen(dy))
    assert {a.dtype for a in found} == {np.dtype(np.float32)}
    assert_close(found, truth, 1e-5)


def test_rmsnorm_without_residual_returns_its_input():
    x = np.ones((2, 3), np.float32)
    assert rmsnorm.forward(x, x[0], 1e-5)[1] is x


def test_rmsnorm_does_not_depend_on_the_number_of_threads():
    inputs = as_dtype(draw_rmsnorm(np.random.default_rng(0), 700, 65, True), np.float32)
    one, all_of_them = bits_with_threads(lambda: call_rmsnorm(rmsnorm, *inputs))
    assert one == all_of_them


# --- rope --------------------------------------------------------------------------------------------------------


def draw_rope(rng, N, H, C):
    return rng.integers(0, 30000, N), rng.normal(size=(N, H, C))


def call_rope(module, positions, x):
    cos, sin = module.table(positions, x.shape[-1], 1e6, x.dtype)
    return cos, sin, module.forward(x, cos, sin), module.backward(x, cos, sin)


ROPES = [(1, 1, 2), (1, 3, 34), (7, 5, 6), (300, 3, 38)]


def test_rope():
    assert_parity(draws_of(draw_rope, ROPES), call_rope, rope_reference, rope, n=2)


@FLOATS
def test_rope_rounds_as_the_reference_does(dtype):
    for inputs in as_dtype(draws_of(draw_rope, ROPES), dtype):
        for a, b in zip(call_rope(rope, *inputs), call_rope(rope_reference, *inputs), strict=True):
            np.testing.assert_array_equal(a, b)


def test_rope_takes_frozen_strided_input():
    positions, x = as_dtype(draw_rope(np.random.default_rng(0), 300, 3, 38), np.float32)
    cos, sin = rope.table(positions, 38, 1e6, np.float32)
    for direction in ("forward", "backward"):
        expected = getattr(rope, direction)(x, cos, sin)
        np.testing.assert_array_equal(getattr(rope, direction)(frozen(x), frozen(cos), frozen(sin)), expected)


# --- kv_cache ----------------------------------------------------------------------------------------------------


def draw_kv_cache(rng, B, R, T, K, C):
    """Caches that are full already, and rows of rising positions behind 0 to T tokens of padding."""
    positions = np.full((B, T), -1)
    for b in range(B):
        padding = rng.integers(0, T + 1)
        positions[b, padding:] = rng.integers(0, 3 * R) + np.arange(T - padding)
    caches = rng.normal(size=(2, B, R, K, C))
    return rng.integers(-1, 50, (B, R)), *caches, *rng.normal(size=(2, B, T, K, C)), positions


def call_kv_cache(module, cache_positions, k_cache, v_cache, k, v, positions):
    cache_positions, k_cache, v_cache = cache_positions.copy(), k_cache.copy(), v_cache.copy()
    module.forward(k_cache, v_cache, k, v, positions)
    slots = module.write_positions(cache_positions, positions)
    results = [cache_positions, slots, k_cache.copy(), v_cache.copy()]
    if k_cache.dtype != BFLOAT16:  # gradients are never stored in it
        results += [*module.backward(k_cache, v_cache, positions), k_cache, v_cache]
    return results


CACHES = [(1, 1, 1, 1, 1), (1, 5, 1, 2, 3), (2, 5, 4, 2, 3), (3, 5, 5, 1, 7), (2, 5, 6, 2, 3), (2, 4, 11, 3, 5)]
CACHES += [(2, 70, 100, 4, 64), (2, 130, 100, 4, 64)]  # large enough for threads, rolled and not


@pytest.mark.parametrize("dtype", [np.float32, np.float64, BFLOAT16])
def test_kv_cache_is_the_same_bit_for_bit(dtype):
    for inputs in draws_of(draw_kv_cache, CACHES):
        positions, k_cache, v_cache, *new = as_dtype(inputs, np.float32 if dtype == BFLOAT16 else dtype)
        inputs = positions, k_cache.astype(dtype), v_cache.astype(dtype), *new
        expected, found = call_kv_cache(kv_cache_reference, *inputs), call_kv_cache(kv_cache, *inputs)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_kv_cache_writes_into_strided_views():
    positions, k_cache, v_cache, k, v, new = draw_kv_cache(np.random.default_rng(0), 2, 5, 7, 2, 3)
    expected, whole = [k_cache.copy(), v_cache.copy()], np.stack([k_cache, v_cache], axis=2)  # (B, R, 2, K, C)
    kv_cache_reference.forward(*expected, k, v, new)
    kv_cache.forward(whole[:, :, 0], whole[:, :, 1], frozen(k), frozen(v), frozen(new))
    np.testing.assert_array_equal(whole, np.stack(expected, axis=2))
    wide = np.repeat(positions.astype(np.int32), 2, axis=1)
    kv_cache_reference.write_positions(positions, new)
    kv_cache.write_positions(wide[:, ::2], new)
    np.testing.assert_array_equal(wide[:, ::2], positions)


# --- cross_entropy -----------------------------------------------------------------------------------------------


def draw_cross_entropy(rng, N, V):
    return rng.normal(size=(N, V)) * rng.choice([0.1, 3, 30]), rng.integers(-1, V, N)


def call_cross_entropy(module, logits, targets):
    loss, losses, lse = module.forward(logits, targets)
    assert type(loss) is float
    return losses, lse, module.backward(0.7, logits, targets, lse), np.asarray(loss, logits.dtype)


CROSS_ENTROPIES = [(1, 1), (1, 1031), (7, 5), (65, 33), (131, 130)]


def test_cross_entropy():
    draws = draws_of(draw_cross_entropy, CROSS_ENTROPIES)
    assert_parity(draws, call_cross_entropy, cross_entropy_reference, cross_entropy, n=1031)


@FLOATS
@pytest.mark.parametrize("N", [3, 300])
def test_cross_entropy_of_no_counted_token_is_zero(dtype, N):
    logits, targets = np.ones((N, 65), dtype), np.full(N, -1)
    loss, losses, lse = cross_entropy.forward(logits, targets)
    assert (loss, losses.any()) == (0.0, False)
    assert not cross_entropy.backward(1.0, logits, targets, lse).any()


@FLOATS
def test_cross_entropy_keeps_nan_and_infinity(dtype):
    logits, targets = np.zeros((3, 65), dtype), np.array([0, 1, 2])
    logits[0, 7], logits[1, 7], logits[2, 7] = np.nan, -np.inf, np.inf
    with np.errstate(invalid="ignore"):
        expected = cross_entropy_reference.forward(logits, targets)[2]
    lse = cross_entropy.forward(logits, targets)[2]
    assert np.isnan(lse[[0, 2]]).all() and np.isnan(expected[[0, 2]]).all()
    assert_close(lse[1], expected[1], 1e-6)


@FLOATS
@pytest.mark.parametrize("V", [1, 7, 8, 9, 23])
def test_cross_entropy_finds_the_largest_logit_wherever_it_stands(dtype, V):
    logits = np.where(np.eye(V), 1e4, 0).astype(dtype)  # shifted by anything else, exp would overflow
    lse = cross_entropy.forward(logits, np.zeros(V, int))[2]
    np.testing.assert_array_equal(lse, np.full(V, 1e4, dtype))


def test_cross_entropy_takes_frozen_strided_input():
    logits, targets = as_dtype(draw_cross_entropy(np.random.default_rng(0), 131, 130), np.float32)
    frozen_lse = cross_entropy.forward(frozen(logits), frozen(targets))[2]
    for a, b in zip(
        (frozen_lse, cross_entropy.backward(0.7, frozen(logits), frozen(targets), frozen(frozen_lse))),
        call_cross_entropy(cross_entropy, logits, targets)[1:3],
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_cross_entropy_does_not_depend_on_the_number_of_threads():
    inputs = as_dtype(draw_cross_entropy(np.random.default_rng(0), 301, 130), np.float32)
    one, all_of_them = bits_with_threads(lambda: call_cross_entropy(cross_entropy, *inputs))
    assert one == all_of_them


# --- balance_loss ------------------------------------------------------------------------------------------------


def draw_balance_loss(rng, L, N, E, k):
    logits = rng.normal(size=(L, N, E)) * 3
    active = rng.random(N) < 0.7 if rng.random() < 0.5 else None
    return logits, np.argsort(-logits, axis=-1)[..., :k], active


def call_balance_loss(module, logits, ids, active):
    results = []
    for form in ("concatenated", "per_layer", "switch"):
        loss = module.forward(logits, ids, active, form)
        assert type(loss) is float
        results += [module.backward(0.7, logits, ids, active, form), np.asarray(loss, logits.dtype)]
    return results


BALANCES = [(1, 1, 2, 1), (3, 1, 5, 2), (2, 300, 3, 2), (3, 601, 4, 2), (2, 257, 17, 3)]


def test_balance_loss():
    draws = draws_of(draw_balance_loss, BALANCES)
    assert_parity(draws, call_balance_loss, balance_loss_reference, balance_loss, n=601)


@FLOATS
def test_balance_loss_without_active_tokens_is_zero(dtype):
    logits, ids, _ = as_dtype(draw_balance_loss(np.random.default_rng(0), 2, 5, 4, 2), dtype)
    none = np.zeros(5, bool)
    assert balance_loss.forward(logits, ids, none, "per_layer") == 0.0
    assert not balance_loss.backward(1.0, logits, ids, none, "per_layer").any()


def test_balance_loss_skips_ids_of_tokens_that_are_not_routed():
    logits, ids, _ = draw_balance_loss(np.random.default_rng(0), 2, 50, 4, 2)
    active = np.arange(50) % 3 > 0
    expected = call_balance_loss(balance_loss_reference, logits, ids, active)
    ids = np.where(active[:, None], ids, -1)
    assert_close(call_balance_loss(balance_loss, frozen(logits), frozen(ids), frozen(active)), expected, 1e-13)
    expected = call_balance_loss(balance_loss_reference, logits, ids, None)
    assert_close(call_balance_loss(balance_loss, logits, ids, None), expected, 1e-13)


def test_balance_loss_does_not_depend_on_the_number_of_threads():
    inputs = as_dtype(draw_balance_loss(np.random.default_rng(0), 3, 1300, 8, 2), np.float32)
    one, all_of_them = bits_with_threads(lambda: call_balance_loss(balance_loss, *inputs))
    assert one == all_of_them


# --- adamw -------------------------------------------------------------------------------------------------------

HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "scale": 0.25}


def draw_adamw(rng, *shape):
    return rng.normal(size=shape), rng.normal(size=(4, *shape))


def call_adamw(module, w, gradients):
    w, m, v = w.copy(), np.zeros_like(w), np.zeros_like(w)
    for step, g in enumerate(gradients, start=1):
        module.forward(w, g, m, v, step=step, **HYPER)
    return w, m, v, np.asarray(module.squared_norm(gradients))


ADAMS = [(), (1,), (17, 3), (5, 7, 11), (130, 131)]


@FLOATS
def test_adamw_rounds_as_the_reference_does(dtype):
    for inputs in as_dtype(draws_of(draw_adamw, ADAMS), dtype):
        *expected, expected_norm = call_adamw(adamw_reference, *inputs)
        *found, norm = call_adamw(adamw, *inputs)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == dtype
            np.testing.assert_array_equal(a, b)
        assert_close(norm, expected_norm, 1e-13)


def test_adamw_follows_the_formula():
    w, gradients = draw_adamw(np.random.default_rng(1), 3)
    found = call_adamw(adamw, w, gradients)[0]
    for i in range(3):
        x, m, v = w[i], 0.0, 0.0
        for step, g in enumerate(gradients[:, i], start=1):
            m = 0.9 * m + 0.1 * 0.25 * g
            v = 0.95 * v + 0.05 * (0.25 * g) ** 2
            x = x - 3e-3 * 0.1 * x - 3e-3 * m / (1 - 0.9**step) / (math.sqrt(v / (1 - 0.95**step)) + 1e-8)
        assert abs(found[i] - x) <= 1e-14


def test_adamw_takes_frozen_strided_gradients_and_refuses_strided_parameters():
    w, gradients = draw_adamw(np.random.default_rng(2), 5, 7)
    expected = call_adamw(adamw, w, gradients)
    assert_close(call_adamw(adamw, w, frozen(gradients)), expected, 0)
    with pytest.raises(ValueError, match="contiguous"):
        adamw.forward(w.T, w.T, w.T, w.T, step=1, **HYPER)


def test_squared_norm_adds_in_float64_whatever_the_number_of_threads():
    g = np.random.default_rng(0).normal(size=(301, 303)).astype(np.float32)
    assert_close(adamw.squared_norm(g), math.fsum(float(x) ** 2 for x in g.flat), 1e-15 * math.sqrt(g.size))
    one, all_of_them = bits_with_threads(lambda: [adamw.squared_norm(g)])
    assert one == all_of_them


# --- sampling ----------------------------------------------------------------------------------------------------

TOP_PS = [1e-12, 0.1, 0.5, 0.9, 0.999, 1.0]


@FLOATS
@pytest.mark.parametrize(("B", "V"), [(1, 1), (1, 2), (3, 17), (1, 5000), (5, 1031)])
def test_sampling_draws_the_same_tokens(dtype, B, V):
    for seed in range(24):
        rng = np.random.default_rng(seed)
        logits = (rng.normal(size=(B, V)) * rng.choice([0.1, 3, 300])).astype(dtype)
        if seed % 3 == 0:
            logits = np.round(logits)  # many ties
        uniform = rng.random(B) if seed % 2 else rng.choice([0.0, 0.5, np.nextafter(1, 0)], B)
        for temperature, top_p in zip(rng.choice([0, 0.01, 0.7, 1, 5], 6), TOP_PS, strict=True):
            expected = sampling_reference.forward(logits, temperature, top_p, uniform)
            found = sampling.forward(frozen(logits), temperature, top_p, frozen(uniform))
            assert found.dtype == np.int64
            np.testing.assert_array_equal(found, expected)


def test_sampling_sorts_ties_by_id():
    logits = np.zeros((1, 3000), np.float32)
    for i in range(0, 3000, 7):
        assert sampling.forward(logits, 1.0, 1.0, np.array([(i + 0.5) / 3000])) == i
