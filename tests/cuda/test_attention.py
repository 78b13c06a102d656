"""Attention's kernels against the reference (on the processor; on a device where there is one)."""

import numpy as np
import pytest

from minimoe.arrays import BFLOAT16
from minimoe.backends import make_backend
from minimoe.ops.attention import cupy_gpu, reference
from tests.cuda_on_cpu.measuring import OnDevice, assert_same_bits_in_any_order
from tests.cuda_on_cpu.stand_in import STAND_IN, STATE
from tests.measure import as_dtype, assert_as_good_as_reference, assert_close, relative_error

# B, T, S, H, K, C, padding on the left, window. Somebody sees two keys: with one, dq and dk are zero but for rounding
SHAPES = [
    (1, 1, 2, 1, 1, 1, 0, None),
    (2, 1, 150, 4, 2, 6, 0, None),  # decoding: keys are dealt to several blocks
    (2, 1, 70, 3, 1, 4, 9, 40),
    (1, 4, 90, 8, 2, 2, 3, None),  # a few queries
    (2, 6, 6, 6, 2, 4, 3, None),
    (1, 5, 5, 3, 3, 2, 0, 2),  # K = H
    (2, 9, 50, 4, 2, 10, 2, 30),  # a chunk behind a cache
    (1, 70, 70, 2, 1, 5, 0, 33),
    (1, 23, 23, 4, 1, 34, 4, None),  # more rows than a block has
    (0, 3, 3, 2, 1, 4, 0, None),
]
ORDERS = ("rising", "rolled", "shuffled")


def draw(seed, B, T, S, H, K, C, padding, window):
    """Queries are the last T of S positions; row 0 is padded on the left; keys stand in order, rolled, or anyhow."""
    rng, order = np.random.default_rng(seed), ORDERS[seed % 3]
    k_pos = np.tile(np.arange(S), (B, 1))
    k_pos[:1] = np.maximum(k_pos[:1] - padding, -1)
    q_pos = k_pos[:, S - T :].copy()
    k_pos = np.roll(k_pos, S // 3, axis=1) if order == "rolled" else k_pos
    k_pos = rng.permuted(k_pos, axis=1) if order == "shuffled" else k_pos
    return rng.normal(size=(B, T, H, C)) * 3, *rng.normal(size=(2, B, S, K, C)), q_pos, k_pos, window


SCORES = [{}, {"cap": 1.5}, {"scale": 0.3}, {"scale": 0.9, "cap": 0.7}]


def draws(count=20, shapes=SHAPES):
    return [draw(seed, *shapes[seed % len(shapes)]) for seed in range(count)]


def call(module, *inputs, **scores):
    out, lse = module.forward(*inputs, **scores)
    dout = np.cos(np.arange(out.size)).reshape(out.shape).astype(out.dtype)
    return out, lse, *module.backward(dout, *inputs, out, lse, **scores)


# Keys are dealt to so many blocks as fill a device: here, one tile to each. With one block it goes through all tiles.
BLOCKS = pytest.mark.parametrize("blocks", [1, cupy_gpu.BLOCKS])


@BLOCKS
def test_errors_are_those_of_the_reference(cupy, monkeypatch, blocks):
    monkeypatch.setattr(cupy_gpu, "BLOCKS", blocks)
    dialect = OnDevice(cupy, cupy_gpu)
    assert_as_good_as_reference(draws(), call, reference, dialect, n=100)
    for inputs in draws(len(SHAPES)):
        for scores in SCORES:
            assert_close(call(dialect, *inputs, **scores), call(reference, *inputs, **scores), 1e-12)


# T·G above 16 goes to tensor cores, in blocks of 64 rows and tiles of 64 keys
BFLOAT16_SHAPES = [
    (2, 1, 150, 4, 2, 8, 0, None),
    (1, 2, 130, 4, 2, 6, 5, 90),
    (1, 17, 17, 1, 1, 2, 0, None),
    (1, 40, 200, 2, 1, 6, 30, None),
    (2, 20, 70, 4, 2, 32, 3, 50),
    (1, 33, 90, 3, 1, 40, 0, None),
    (1, 9, 40, 2, 1, 136, 0, 20),
    (1, 20, 330, 1, 1, 2, 0, None),  # more parts than there are lanes to join them
]
# No tensor cores, however many rows there are; the first has 38 parts
WIDE_SHAPES = [(1, 1, 150, 2, 1, 2048, 0, None), (1, 9, 20, 4, 2, 264, 0, None), (2, 1, 70, 18, 1, 260, 3, 50)]


@BLOCKS
def test_errors_in_bfloat16_are_those_of_the_reference(cupy, monkeypatch, blocks):
    """The truth has no rounded probability; both round them, relatively by 2**-9."""
    monkeypatch.setattr(cupy_gpu, "BLOCKS", blocks)
    dialect, found, expected = OnDevice(cupy, cupy_gpu), [0.0] * 5, [0.0] * 5
    for i, (q, k, v, *rest) in enumerate(draws(24, BFLOAT16_SHAPES)):
        q, k, v = q.astype(BFLOAT16).astype(np.float32), k.astype(BFLOAT16), v.astype(BFLOAT16)
        scores = SCORES[i % 4]
        truth = call(reference, *as_dtype((q, k, v), np.float64), *rest, **scores)
        for errors, module in ((found, dialect), (expected, reference)):
            result = call(module, q, k, v, *rest, **scores)
            assert {a.dtype for a in result} == {np.dtype(np.float32)}
            errors[:] = [max(e, relative_error(a, t)) for e, a, t in zip(errors, result, truth, strict=True)]
    for error, reference_error in zip(found, expected, strict=True):
        assert error <= 2 * reference_error + 8 * 2**-24 * np.sqrt(330)
    assert expected[0] > 1e-4  # the rounding is there


def rounded_profile(q, k, v, q_pos, k_pos, window, **scores):
    """The output in float64 but for what is pinned to be rounded: q, k and v, given so, and each probability."""
    probs = reference.explain(*as_dtype((q, k), np.float64), q_pos, k_pos, window, **scores)["probs"]
    values = np.repeat(v.astype(np.float64), q.shape[2] // v.shape[2], axis=2)
    return np.einsum("bhts,bshc->bthc", probs.astype(BFLOAT16).astype(np.float64), values)


@BLOCKS
def test_the_probability_that_is_rounded_is_divided_by_the_sum_already(cupy, monkeypatch, blocks):
    """On average a draw's outputs are those of the rounded profile, to the accuracy of float32, as the reference's are.

    A few of either are not: where a probability lies so near the middle of two numbers of bfloat16 that this accuracy
    does not tell on which side. Rounded before the division, probabilities leave nearly all outputs off by some 5e-4.
    """
    monkeypatch.setattr(cupy_gpu, "BLOCKS", blocks)
    dialect, found, expected = OnDevice(cupy, cupy_gpu), [], []
    for i, (q, k, v, *rest) in enumerate([*draws(24, BFLOAT16_SHAPES), *draws(3, WIDE_SHAPES)]):
        q, k, v = q.astype(BFLOAT16).astype(np.float32), k.astype(BFLOAT16), v.astype(BFLOAT16)
        truth = rounded_profile(q, k, v, *rest, **SCORES[i % 4])
        for errors, module in ((found, dialect), (expected, reference)):
            out, _ = module.forward(q, k, v, *rest, **SCORES[i % 4])
            errors.append(np.abs(out - truth).mean() / np.abs(truth).max())
    assert max(found) <= 2 * max(expected) + 8 * 2**-24 * np.sqrt(330)


@pytest.mark.parametrize(("stored", "T"), [(np.float64, 4), (BFLOAT16, 4), (BFLOAT16, 20)])
def test_the_window_counts_the_query_itself(cupy, stored, T):
    q, k, v, q_pos, *_ = draw(0, 2, T, T, 2, 2, 6, 0, None)
    q, k, v = q.astype(np.float64 if stored == np.float64 else np.float32), k.astype(stored), v.astype(stored)
    attention = OnDevice(cupy, cupy_gpu)
    out, lse = attention.forward(q, k, v, q_pos, q_pos, 1)  # W = 1: itself and nothing else
    assert_close(out, v, 1e-15)
    dq, dk, dv = attention.backward(q, q, k, v, q_pos, q_pos, 1, out, lse)
    assert max(np.abs(dq).max(), np.abs(dk).max()) < 1e-4  # of a softmax that is always 1
    assert_close(dv, q, 1e-6)


@pytest.mark.parametrize("T", [1, 20])
def test_queries_are_rounded_where_the_cache_is_bfloat16(cupy, T):
    # 1 + 2**-8 rounds to 1 (ties to even): the score is 64, not 64.25
    q, k = np.full((1, T, 1, 1), 1 + 2**-8, np.float32), np.full((1, 1, 1, 1), 64).astype(BFLOAT16)
    positions = np.zeros((1, T), int), np.zeros((1, 1), int)
    out, lse = OnDevice(cupy, cupy_gpu).forward(q, k, k, *positions, None)
    assert_close((out, lse), (np.full((1, T, 1, 1), 64), np.full((1, T, 1), 64)), 1e-6)


@pytest.mark.parametrize(("stored", "C"), [(np.float32, 300), (np.float64, 257), (BFLOAT16, 300)])
def test_wide_heads(cupy, stored, C):
    q, k, v, *rest = draw(0, 1, 9, 20, 2, 1, C, 0, None)
    q, k, v = q.astype(np.float64 if stored == np.float64 else np.float32), k.astype(stored), v.astype(stored)
    tolerance = {np.float64: 1e-12, np.float32: 1e-5}.get(stored, 1e-2)
    assert_close(call(OnDevice(cupy, cupy_gpu), q, k, v, *rest), call(reference, q, k, v, *rest), tolerance)


@pytest.mark.parametrize("keys_rounded", [True, False])
def test_keys_and_values_may_be_stored_in_two_types(cupy, keys_rounded):
    q, k, v, *rest = as_dtype(draw(0, 1, 19, 20, 2, 1, 6, 0, None), np.float32)
    k, v = (k.astype(BFLOAT16), v) if keys_rounded else (k, v.astype(BFLOAT16))
    found, expected = (m.forward(q, k, v, *rest) for m in (OnDevice(cupy, cupy_gpu), reference))
    assert_close(found[1], expected[1], 1e-6)
    assert np.median(np.abs(found[0] - expected[0])) < 1e-6  # one probability may be rounded to the other side


@pytest.mark.parametrize(("stored", "T"), [(np.float64, 1), (np.float64, 3), (BFLOAT16, 1), (BFLOAT16, 20)])
def test_a_query_that_sees_no_key_gives_zeros_and_no_gradient(cupy, stored, T):
    attention = OnDevice(cupy, cupy_gpu)
    q, k, v, *_ = draw(0, 1, T, 300, 2, 1, 4, 0, None)
    q, k, v = q.astype(np.float64 if stored == np.float64 else np.float32), k.astype(stored), v.astype(stored)
    k_pos = np.where(np.arange(300) % 2, -1, np.arange(300))  # empty, out of the window, in the future
    for q_pos in (np.full((1, T), 9), np.full((1, T), -1)):
        held = np.where((k_pos > 5) & (k_pos <= 9), -1, k_pos)[None]
        out, lse = attention.forward(q, k, v, q_pos, held, 4)
        assert not out.any()
        assert np.isneginf(lse).all()
        for gradient in attention.backward(np.ones_like(q), q, k, v, q_pos, held, 4, out, lse):
            assert not gradient.any()
    q_pos = np.full((1, T), 8)
    q_pos[0, 0] = -1  # padding beside queries that see something
    out, lse = attention.forward(q, k, v, q_pos, k_pos[None], 4)
    assert not out[0, 0].any()
    assert np.isneginf(lse[0, 0]).all()
    assert np.isfinite(lse[0, 1:]).all()


@pytest.mark.parametrize(("stored", "T"), [(np.float32, 3), (BFLOAT16, 3), (BFLOAT16, 20)])
def test_large_scores_do_not_overflow(cupy, stored, T):
    q, k, v, *rest = as_dtype(draw(0, 1, T, 80, 1, 1, 4, 0, None), np.float32)
    q, k, v = 100 * q, (100 * k).astype(stored), v.astype(stored)
    found, expected = (m.forward(q, k, v, *rest) for m in (OnDevice(cupy, cupy_gpu), reference))
    assert np.abs(expected[1]).max() > 10_000
    assert_close(found, expected, 1e-2 if stored == BFLOAT16 else 1e-5)


@pytest.mark.parametrize(("stored", "T"), [(np.float64, 1), (np.float64, 9), (BFLOAT16, 1), (BFLOAT16, 20)])
def test_tiles_that_no_query_sees_are_not_read(cupy, stored, T):
    """A cache is mostly empty at first, and half of a causal prefill lies in the future."""
    q, k, v, q_pos, _, _ = draw(0, 1, T, 400, 2, 1, 4, 0, None)
    q, k, v = q.astype(np.float64 if stored == np.float64 else np.float32), k.astype(stored), v.astype(stored)
    q_pos, k_pos = q_pos - 150, np.arange(400)[None]  # they see 50 .. 249 at most, with the window; the rest is NaN
    expected = reference.forward(q, k, v, q_pos, k_pos, 100)
    unseen = (k_pos[0] > q_pos.max() + 64) | (k_pos[0] < q_pos.min() - 100 - 64)
    k[:, unseen], v[:, unseen] = np.nan, np.nan
    found = OnDevice(cupy, cupy_gpu).forward(q, k, v, q_pos, k_pos, 100)
    assert unseen.sum() > 90
    assert_close(found, expected, 1e-2 if stored == BFLOAT16 else 1e-12)


def test_memory_does_not_grow_with_the_square_of_the_length(cupy):
    if cupy is not STAND_IN:
        pytest.skip("counted by the stand-in")
    inputs = [cupy.asarray(x) for x in draw(0, 1, 160, 160, 4, 1, 2, 0, None)[:5]]
    before = STATE.used
    cupy_gpu.backward(inputs[0], *inputs, None, *cupy_gpu.forward(*inputs, None))
    assert STATE.used - before < 0.25 * 4 * 160 * 160 * 8  # of the scores


@pytest.mark.parametrize("stored", [np.float32, BFLOAT16])
def test_a_captured_step_sees_what_the_positions_say(cupy, stored):
    """A graph replays the same launches: which slots are seen, and in how many parts, must not depend on the host."""
    q, k, v, q_pos, k_pos, _ = draw(0, 2, 1, 150, 4, 2, 8, 0, None)
    q, k, v = q.astype(np.float32), k.astype(stored), v.astype(stored)
    q_pos[:] = [[40], [100]]
    ops, there = make_backend("cuda"), [cupy.asarray(x) for x in (q, k, v, q_pos, k_pos)]

    def step():
        out, _ = ops.attention.forward(*there, 64)
        there[3].__iadd__(1)
        return out

    replay = ops.captured(step, tokens=2)
    for i in range(4):
        assert_close(replay().get(), reference.forward(q, k, v, q_pos + i, k_pos, 64)[0], 1e-2)


RACES = [(2, 1, 150, 4, 2, 6, 0, None), (1, 23, 40, 4, 1, 34, 4, 20)]


@pytest.mark.parametrize("stored", [np.float32, BFLOAT16])
@pytest.mark.parametrize("shape", RACES, ids=str)
def test_threads_do_not_race(cupy, stored, shape):
    q, k, v, *rest = as_dtype(draw(1, *shape), np.float32)
    inputs = q, k.astype(stored), v.astype(stored), *rest
    assert_same_bits_in_any_order(cupy, lambda: call(OnDevice(cupy, cupy_gpu), *inputs))


def test_heads_that_are_too_wide_are_refused(cupy):
    q, k, v, *rest = (cupy.asarray(x) for x in draw(0, 1, 1, 1, 1, 1, 2050, 0, None)[:5])
    with pytest.raises(ValueError, match="heads of 2050 numbers are wider than the 2048 that kernels are made for"):
        cupy_gpu.forward(q, k, v, *rest, None)
