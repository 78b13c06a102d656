import ml_dtypes
import numpy as np
import pytest

from tests.measure import assert_close, assert_slopes, dialects


@pytest.fixture(params=dialects("kv_cache"), ids=lambda m: m.__name__.rpartition(".")[2])
def kv_cache(request):
    return request.param


def naive_write(cache, new, positions):
    """One after the other: later tokens overwrite earlier ones."""
    for b in range(positions.shape[0]):
        for t in range(positions.shape[1]):
            if positions[b, t] >= 0:
                cache[b, positions[b, t] % cache.shape[1]] = new[b, t]


def rows(T, *starts, padding=0):
    """Positions of sequences that go on from `starts`; the first is padded on the left."""
    positions = np.array([np.arange(start, start + T) for start in starts])
    positions[0] = np.concatenate([np.full(padding, -1), positions[0, : T - padding]])
    return positions


CASES = pytest.mark.parametrize(
    ("R", "positions"),
    [
        (1, rows(1, 0)),
        (1, rows(4, 5)),
        (4, rows(1, 7)),
        (4, rows(3, 0, 2)),
        (4, rows(4, 0, 3)),
        (4, rows(5, 0, 3)),  # a chunk longer than the capacity
        (4, rows(11, 6, 0, padding=2)),
        (4, rows(3, 9, 0, padding=3)),  # nothing but padding in row 0
        (4, np.array([[5, 6, 7, -1, -1]])),  # padding on the right
    ],
    ids=str,
)


@CASES
def test_equals_naive_loops(kv_cache, R, positions):
    rng = np.random.default_rng(R)
    B, T = positions.shape
    caches, new = rng.normal(size=(2, B, R, 2, 3)), rng.normal(size=(2, B, T, 2, 3))
    held = rng.integers(-1, 9, (B, R))
    expected, expected_held = caches.copy(), held.copy()
    naive_write(expected[0], new[0], positions)
    naive_write(expected[1], new[1], positions)
    naive_write(expected_held, positions, positions)
    kv_cache.forward(caches[0], caches[1], new[0], new[1], positions)
    slots = kv_cache.write_positions(held, positions)
    np.testing.assert_array_equal(caches, expected)
    np.testing.assert_array_equal(held, expected_held)
    kept = (positions >= 0) & (positions > positions.max(axis=1, keepdims=True) - R)
    np.testing.assert_array_equal(slots, np.where(kept, positions % R, -1))


@CASES
def test_backward_is_the_slope(kv_cache, R, positions):
    rng = np.random.default_rng(R)
    B, T = positions.shape
    caches, new = rng.normal(size=(2, B, R, 2, 3)), rng.normal(size=(2, B, T, 2, 3))
    c = rng.normal(size=caches.shape)

    def loss(k_cache, v_cache, k, v):
        written = k_cache.copy(), v_cache.copy()
        kv_cache.forward(*written, k, v, positions)
        return (c[0] * written[0]).sum() + (c[1] * written[1]).sum()

    left = c.copy()  # becomes the gradient of the old caches
    gradients = kv_cache.backward(left[0], left[1], positions)
    assert_slopes(loss, [*caches, *new], [*left, *gradients])


@pytest.mark.parametrize("tokens", [3, 4, 5])
def test_the_cache_wraps_after_exactly_W_tokens(kv_cache, tokens):
    W = 4
    k_cache, v_cache, held = np.zeros((1, W, 1, 1)), np.zeros((1, W, 1, 1)), np.full((1, W), -1)
    for p in range(tokens):
        new = np.full((1, 1, 1, 1), 10.0 + p)
        kv_cache.forward(k_cache, v_cache, new, -new, np.array([[p]]))
        kv_cache.write_positions(held, np.array([[p]]))
    expected = {3: [0, 1, 2, -1], 4: [0, 1, 2, 3], 5: [4, 1, 2, 3]}[tokens]
    assert held[0].tolist() == expected
    assert k_cache[0, :, 0, 0].tolist() == [0 if p < 0 else 10 + p for p in expected]
    np.testing.assert_array_equal(v_cache, -k_cache)


@pytest.mark.parametrize("T", [3, 4, 5, 9])
def test_a_chunk_leaves_what_single_tokens_leave(kv_cache, T):
    new = np.random.default_rng(T).normal(size=(2, 1, T, 2, 3))
    chunk, single = np.zeros((2, 1, 4, 2, 3)), np.zeros((2, 1, 4, 2, 3))
    positions = rows(T, 2)
    kv_cache.forward(chunk[0], chunk[1], new[0], new[1], positions)
    for t in range(T):
        kv_cache.forward(single[0], single[1], new[0, :, t : t + 1], new[1, :, t : t + 1], positions[:, t : t + 1])
    np.testing.assert_array_equal(chunk, single)


def test_a_bfloat16_cache_rounds_to_nearest_even(kv_cache):
    numbers = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, np.inf, -np.inf, np.nan, -0.0, 3e38]
    new = np.array(numbers, np.float32)[None, None, None]
    k_cache, v_cache = np.zeros((2, 1, 1, 1, 8), ml_dtypes.bfloat16)
    kv_cache.forward(k_cache, v_cache, new, new, np.array([[0]]))
    assert_close(k_cache[0, 0, 0, :3], [1, 1 + 2**-6, 1 + 2**-7], 0)
    np.testing.assert_array_equal(k_cache.view(np.uint16), new.astype(ml_dtypes.bfloat16).view(np.uint16))
    np.testing.assert_array_equal(v_cache.view(np.uint16), k_cache.view(np.uint16))


def test_caches_may_be_strided_views(kv_cache):
    both, plain = np.zeros((2, 5, 2, 2, 3)), np.zeros((2, 2, 5, 2, 3))  # (B, R, 2, K, C), (2, B, R, K, C)
    new, positions = np.random.default_rng(0).normal(size=(2, 2, 4, 2, 3)), rows(4, 0, 3)
    kv_cache.forward(both[:, :, 0], both[:, :, 1], new[0], new[1], positions)
    kv_cache.forward(plain[0], plain[1], new[0], new[1], positions)
    assert plain.any()
    np.testing.assert_array_equal(both, np.moveaxis(plain, 0, 2))
