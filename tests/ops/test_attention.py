import inspect
import math

import ml_dtypes
import numpy as np
import pytest

from minimoe.ops.attention import numba_cpu, reference
from tests.measure import assert_close, assert_slopes, dialects, with_one_thread

BFLOAT16 = ml_dtypes.bfloat16


@pytest.fixture(params=dialects("attention"), ids=lambda m: m.__name__.rpartition(".")[2])
def attention(request):
    return request.param


def naive(q, k, v, q_pos, k_pos, window, scale=None, cap=None):
    (B, T, H, C), (_, S, K, _) = q.shape, k.shape
    out, lse = np.zeros((B, T, H, C)), np.full((B, T, H), -np.inf)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                kv = h // (H // K)
                weights = {}
                for s in range(S):
                    distance = q_pos[b, t] - k_pos[b, s]
                    if k_pos[b, s] >= 0 and distance >= 0 and (window is None or distance < window):
                        score = sum(q[b, t, h, c] * k[b, s, kv, c] for c in range(C))
                        score = score / math.sqrt(C) if scale is None else scale * score
                        weights[s] = math.exp(score if cap is None else cap * math.tanh(score / cap))
                if weights:
                    total = sum(weights.values())
                    lse[b, t, h] = math.log(total)
                    for s, weight in weights.items():
                        for c in range(C):
                            out[b, t, h, c] += weight / total * v[b, s, kv, c]
    return out, lse


# B, T, S, H, K, C, padding on the left, window
CASES = pytest.mark.parametrize(
    ("B", "T", "S", "H", "K", "C", "padding", "window"),
    [
        (1, 1, 1, 1, 1, 1, 0, None),
        (2, 1, 7, 4, 2, 3, 0, None),  # decode
        (2, 1, 7, 4, 1, 3, 2, 3),
        (1, 5, 5, 3, 3, 2, 0, 1),  # K = H
        (2, 6, 6, 6, 2, 4, 3, None),
        (2, 6, 9, 4, 2, 4, 2, 4),  # a chunk behind a cache
        (2, 17, 19, 4, 2, 3, 2, 6),  # blocks of queries
        (1, 70, 70, 2, 1, 5, 0, 33),
    ],
)


def draw(B, T, S, H, K, C, padding, seed=0):
    """Queries are the last T of S positions; row 0 is padded on the left, and key slots stand in random order."""
    rng = np.random.default_rng(seed)
    k_pos = np.tile(np.arange(S), (B, 1))
    k_pos[0] = np.maximum(k_pos[0] - padding, -1)
    q_pos = k_pos[:, S - T :].copy()
    for row in k_pos:
        rng.shuffle(row)
    return rng.normal(size=(B, T, H, C)), *rng.normal(size=(2, B, S, K, C)), q_pos, k_pos


SCORES = pytest.mark.parametrize(
    "scores", [{}, {"cap": 1.5}, {"scale": 0.3}, {"scale": 0.9, "cap": 0.7}], ids=["plain", "cap", "scale", "both"]
)


@CASES
@SCORES
def test_equals_naive_loops(attention, B, T, S, H, K, C, padding, window, scores):
    inputs = draw(B, T, S, H, K, C, padding)
    assert_close(attention.forward(*inputs, window, **scores), naive(*inputs, window, **scores))


@CASES
@SCORES
def test_backward_is_the_slope(attention, B, T, S, H, K, C, padding, window, scores):
    q, k, v, q_pos, k_pos = draw(B, T, S, H, K, C, padding)
    c = np.random.default_rng(1).normal(size=q.shape)
    out, lse = attention.forward(q, k, v, q_pos, k_pos, window, **scores)
    gradients = attention.backward(c, q, k, v, q_pos, k_pos, window, out, lse, **scores)

    def loss(q, k, v):
        return (c * attention.forward(q, k, v, q_pos, k_pos, window, **scores)[0]).sum()

    assert_slopes(loss, [q, k, v], gradients)


@pytest.mark.parametrize(("H", "K"), [(4, 1), (4, 2), (4, 4), (6, 2)])
def test_query_head_h_reads_key_value_head_h_over_G(attention, H, K):
    q, k, _, q_pos, k_pos = draw(1, 3, 3, H, K, 2, 0)
    v = np.broadcast_to(np.arange(float(K))[:, None], k.shape)
    out, _ = attention.forward(q, k, v, q_pos, k_pos, None)
    for h in range(H):
        assert_close(out[:, :, h], np.full((1, 3, 2), float(h // (H // K))))


def test_the_window_counts_the_query_itself(attention):
    q, k, v, pos, _ = draw(1, 5, 5, 1, 1, 2, 0)
    assert_close(attention.forward(q, k, v, pos, pos, 1)[0], v)  # W = 1: itself and nothing else
    v = np.eye(5)[None, :, None, :]
    q, k = np.zeros((1, 5, 1, 5)), np.zeros((1, 5, 1, 5))
    assert_close(attention.forward(q, k, v, pos, pos, 3)[0][0, 4, 0], [0, 0, 1 / 3, 1 / 3, 1 / 3])


def test_the_future_is_not_seen(attention):
    q, k, v, pos, _ = draw(1, 4, 4, 2, 1, 3, 0)
    expected = attention.forward(q, k, v, pos, pos, None)[0]
    k[:, 3], v[:, 3] = 100, 100
    assert_close(attention.forward(q, k, v, pos, pos, None)[0][:, :3], expected[:, :3], 0)


@pytest.mark.parametrize("T", [1, 3, 20])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_a_query_that_sees_no_key_gives_zeros_and_no_gradient(attention, T, cap):
    q, k, v, _, _ = draw(1, T, 5, 2, 1, 3, 0)
    q_pos, k_pos = np.full((1, T), 9), np.array([[-1, 5, 10, -1, 11]])  # empty, out of the window, in the future
    out, lse = attention.forward(q, k, v, q_pos, k_pos, 4, cap=cap)
    assert not out.any()
    assert np.isneginf(lse).all()
    for gradient in attention.backward(np.ones_like(q), q, k, v, q_pos, k_pos, 4, out, lse, cap=cap):
        assert not gradient.any()
    out, _ = attention.forward(q, k, v, np.full((1, T), -1), k_pos, None)  # a padding query, empty slots
    assert not out.any()


def test_the_order_of_the_slots_does_not_matter(attention):
    q, k, v, q_pos, k_pos = draw(2, 3, 6, 4, 2, 3, 2)
    expected = attention.forward(q, k, v, q_pos, k_pos, 4)
    rolled = attention.forward(q, np.roll(k, 2, 1), np.roll(v, 2, 1), q_pos, np.roll(k_pos, 2, 1), 4)
    assert_close(rolled, expected)


def test_large_scores_do_not_overflow(attention):
    q, k, v, q_pos, k_pos = draw(1, 3, 3, 1, 1, 4, 0)
    out, lse = attention.forward((300 * q).astype(np.float32), (300 * k).astype(np.float32), v.astype(np.float32),
                                 q_pos, k_pos, None)  # fmt: skip
    assert np.isfinite(out).all()
    assert np.abs(lse).max() > 1000


@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_cap_bounds_scores_of_any_size(attention, T, dtype):
    # scores of ±1e6 become ±30: the softmax of the capped scores, and gradients that vanish instead of NaN
    q, k, v, q_pos, k_pos = (x.astype(dtype) if x.dtype == np.float64 else x for x in draw(1, T, T + 4, 4, 2, 4, 0))
    q, k = 1000 * np.sign(q), 1000 * np.sign(k)
    out, lse = attention.forward(q, k, v, q_pos, k_pos, None, cap=30.0)
    assert_close((out, lse), naive(*(x.astype(float) for x in (q, k, v)), q_pos, k_pos, None, cap=30.0),
                 8 * np.finfo(dtype).eps)  # fmt: skip
    dq, dk, _ = attention.backward(v[:, :T].repeat(2, 2), q, k, v, q_pos, k_pos, None, out, lse, cap=30.0)
    assert np.isfinite(dq).all() and np.isfinite(dk).all()


@pytest.mark.parametrize("T", [1, 12, 40])
def test_a_cap_bounds_a_score_that_overflows(attention, T):
    """-inf is a score here, not the mark of a key that is not seen: capped, it is -cap."""
    q, k = np.full((1, T, 1, 4), 3e19, np.float32), np.full((1, T, 1, 4), -3e19, np.float32)
    v, pos = np.ones_like(k), np.arange(T)[None]
    with np.errstate(over="ignore"):
        out, lse = attention.forward(q, k, v, pos, pos, None, cap=30.0)
        gradients = attention.backward(v, q, k, v, pos, pos, None, out, lse, cap=30.0)
    assert_close((out, lse[0, :, 0]), (v, np.log(np.arange(1, T + 1)) - 30), 1e-6)
    assert_close(gradients[2][0, :, 0, 0], [sum(1 / (t + 1) for t in range(s, T)) for s in range(T)], 1e-5)


def test_shapes_that_do_not_belong_together_are_refused():
    forward = inspect.unwrap(numba_cpu.forward)  # without the checks of these tests
    q, k, v, q_pos, k_pos = draw(2, 3, 3, 4, 2, 4, 0)
    for bad in ((q[:, :, :3], k, v), (q, k, v[:, :2]), (q[..., :3], k, v), (q[:1], k, v)):
        with pytest.raises(ValueError, match="H a multiple of K"):
            forward(*bad, q_pos, k_pos, None)


def test_a_cap_far_above_the_scores_changes_nothing(attention):
    for T in (1, 40):
        inputs = draw(2, T, T + 4, 4, 2, 3, 2)
        assert_close(attention.forward(*inputs, None, cap=1e9), attention.forward(*inputs, None))


@pytest.mark.parametrize("T", [1, 3])
def test_probabilities_are_rounded_where_the_cache_is_bfloat16(attention, T):
    # three keys alike: each probability is 1/3, in bfloat16 0.333984375, and the sum shows it
    k = np.zeros((1, 3, 1, 2), BFLOAT16)
    pos = np.full((1, T), 3)
    out, _ = attention.forward(np.ones((1, T, 1, 2), np.float32), k, k + BFLOAT16(1), pos, np.arange(3)[None], None)
    assert out.dtype == np.float32
    assert_close(out, np.full((1, T, 1, 2), 1.001953125), 1e-6)


@pytest.mark.parametrize("T", [1, 3])
def test_queries_are_rounded_where_the_cache_is_bfloat16(attention, T):
    # 1 + 2**-8 rounds to 1 (ties to even): the score is 64, not 64.25
    q, k = np.full((1, T, 1, 1), 1 + 2**-8, np.float32), np.full((1, 1, 1, 1), 64).astype(BFLOAT16)
    out, lse = attention.forward(q, k, k, np.zeros((1, T), int), np.zeros((1, 1), int), None)
    assert_close((out, lse), (np.full((1, T, 1, 1), 64), np.full((1, T, 1), 64)), 1e-6)


@SCORES
def test_explain_names_what_forward_computes(scores):
    q, k, v, q_pos, k_pos = draw(2, 3, 6, 4, 2, 3, 2)
    out, lse = reference.forward(q, k, v, q_pos, k_pos, 4, **scores)
    inner = reference.explain(q, k, q_pos, k_pos, 4, **scores)
    seen = reference.visible(q_pos, k_pos, 4)[:, None]
    assert inner["scores"].shape == inner["probs"].shape == (2, 4, 3, 6)
    assert (np.isneginf(inner["scores"]) == ~np.broadcast_to(seen, (2, 4, 3, 6))).all()
    assert_close(np.einsum("bhts,bshc->bthc", inner["probs"], v.repeat(2, axis=2)), out)
    with np.errstate(divide="ignore"):
        assert_close(np.log(np.exp(inner["scores"]).sum(-1)).swapaxes(1, 2), lse)


KINDS = pytest.mark.parametrize("kind", ["float64", "float32", "bfloat16"])


@pytest.fixture(params=[True, False], ids=["pairs", "widened"])
def bfloat16_products(request, monkeypatch):
    """Keys and values in bfloat16 are multiplied in pairs, where the processor does it, or widened."""
    monkeypatch.setattr(numba_cpu, "MULTIPLIES_PAIRS", request.param and numba_cpu.MULTIPLIES_PAIRS)


def stored(kind, q, k, v):
    """The inputs in the types that a model of this storage type has, and the error that its sums may make."""
    held = BFLOAT16 if kind == "bfloat16" else kind
    return q.astype("float64" if kind == "float64" else "float32"), k.astype(held), v.astype(held)


@KINDS
@pytest.mark.parametrize(("C", "threads"), [(5, False), (6, False), (100, True), (128, True)])
@pytest.mark.parametrize("window", [None, 3 * numba_cpu.KEYS + 7])
@pytest.mark.parametrize(("T", "H", "K"), [(1, 6, 2), (1, 4, 1), (2, 8, 4), (1, 3, 3)])
@pytest.mark.usefixtures("bfloat16_products")
def test_blocks_of_keys_add_up(kind, C, threads, window, T, H, K):
    """Few queries, more keys than a block holds; the sequences of the batch see different numbers of them."""
    S, hidden = 5 * numba_cpu.KEYS + 81, 2 * numba_cpu.KEYS + 50
    pos = np.tile(np.arange(S), (2, 1))
    pos[0] = np.maximum(pos[0] - hidden, -1)  # in order: what is hidden lies in front
    rng = np.random.default_rng(0)
    q, k, v = stored(kind, rng.normal(size=(2, T, H, C)), *rng.normal(size=(2, 2, S, K, C)))
    assert (q.size * min(S, window or S) >= numba_cpu.FEW_PRODUCTS) is threads
    assert T * (H // K) <= numba_cpu.FEW_QUERIES
    found, truth = (module.forward(q, k, v, pos[:, -T:], pos, window) for module in (numba_cpu, reference))
    tolerance = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 5e-4}[kind]  # a probability may round the other way
    assert_close(found[0], truth[0], tolerance)
    assert_close(found[1], truth[1], min(tolerance, 1e-5))
    alone = with_one_thread(lambda: numba_cpu.forward(q, k, v, pos[:, -T:], pos, window))
    np.testing.assert_array_equal(alone[0], found[0])


@pytest.mark.parametrize("T", [1, 20])
def test_a_probability_is_rounded_once_it_is_normalised(attention, T):
    """All of S keys seen alike: each has the probability 1 / S, which is rounded; not 1, which would need none."""
    S = 3 * numba_cpu.KEYS
    q, ones = np.zeros((1, T, 4, 2), np.float32), np.ones((1, S, 2, 2), BFLOAT16)
    out, _ = attention.forward(q, ones, ones, np.full((1, T), S), np.arange(S)[None], None)
    assert_close(out, np.full(q.shape, S * float(np.float32(1 / S).astype(BFLOAT16))), 1e-6)


@pytest.mark.parametrize(("T", "H", "K"), [(1, 4, 2), (1, 3, 3), (1, 5, 1), (2, 6, 2), (4, 8, 1)])
@pytest.mark.parametrize("C", [5, 16])
@pytest.mark.parametrize("S", [*range(1, 35), *(numba_cpu.KEYS + more for more in (-9, -1, 0, 1, 2, 3, 7, 8, 9))])
def test_any_number_of_keys_fills_blocks(T, H, K, C, S):
    """Few queries, any end of a block; the slots of the keys are in no order."""
    q, k, v, q_pos, k_pos = draw(2, T, max(S, T), H, K, C, 3)
    assert T * (H // K) <= numba_cpu.FEW_QUERIES
    found, truth = (module.forward(q, k, v, q_pos, k_pos, None) for module in (numba_cpu, reference))
    assert_close(found, truth)


@pytest.mark.parametrize("T", [2, 20])
def test_types_may_be_mixed(T):
    """The result is that of the reference, and of the type of q; each product rounds for its own stored factor."""
    inputs = draw(2, T, T + 7, 4, 2, 4, 2)
    halves = [("float32", "float32", BFLOAT16), ("float32", BFLOAT16, "float32")]
    for kinds in [("float64", "float32", "float32"), ("float32", "float64", "float64"), *halves]:
        q, k, v = (x.astype(kind) for x, kind in zip(inputs[:3], kinds, strict=True))
        found, truth = (module.forward(q, k, v, *inputs[3:], None) for module in (numba_cpu, reference))
        assert found[0].dtype == q.dtype
        assert_close(found, truth, 1e-6)


@KINDS
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("place", [3, numba_cpu.KEYS + 1])
@pytest.mark.parametrize("C", [3, 4, 32])
def test_a_key_that_is_not_a_number_shows_in_the_heads_that_read_it(kind, cap, place, C):
    S = numba_cpu.KEYS + 7
    q, k, v, _, _ = draw(2, 1, S, 4, 2, C, 0)
    k[1, place, 0] = np.nan
    k[0, 5] = np.nan  # in an empty slot
    pos = np.tile(np.arange(S), (2, 1))
    pos[0, 5] = -1
    out, lse = numba_cpu.forward(*stored(kind, q, k, v), pos[:, -1:], pos, None, cap=cap)
    assert np.isnan(out[1, 0, :2]).all() and np.isnan(lse[1, 0, :2]).all()
    assert np.isfinite(out[0]).all() and np.isfinite(out[1, 0, 2:]).all() and np.isfinite(lse[0]).all()
