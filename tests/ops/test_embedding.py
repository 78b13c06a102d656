import ml_dtypes
import numpy as np
import pytest

from tests.measure import assert_close, assert_slopes, dialects


@pytest.fixture(params=dialects("embedding"), ids=lambda m: m.__name__.rpartition(".")[2])
def embedding(request):
    return request.param


def naive(tokens, table):
    N, D = len(tokens), table.shape[1]
    x = np.zeros((N, D))
    for n in range(N):
        for d in range(D):
            x[n, d] = table[tokens[n], d]
    return x


def naive_backward(dx, tokens, V):
    dtable = np.zeros((V, dx.shape[1]))
    for n in range(len(tokens)):
        for d in range(dx.shape[1]):
            dtable[tokens[n], d] += dx[n, d]
    return dtable


@pytest.mark.parametrize(("N", "V", "D"), [(1, 1, 1), (1, 5, 3), (7, 5, 4), (40, 3, 2)])
def test_equals_naive_loops(embedding, N, V, D):
    rng = np.random.default_rng(N)
    tokens, table, dx = rng.integers(0, V, N), rng.normal(size=(V, D)), rng.normal(size=(N, D))
    np.testing.assert_array_equal(embedding.forward(tokens, table), naive(tokens, table))
    assert_close(embedding.backward(dx, tokens, V), naive_backward(dx, tokens, V))


def test_backward_is_the_slope(embedding):
    rng = np.random.default_rng(0)
    tokens, table, c = np.array([2, 0, 2, 2]), rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
    assert_slopes(
        lambda t: (c * embedding.forward(tokens, t) ** 2).sum(),
        [table],
        [embedding.backward(2 * c * table[tokens], tokens, 4)],
    )


def test_a_repeated_token_adds_up_and_an_absent_one_stays_zero(embedding):
    dtable = embedding.backward(np.array([[1.0], [2.0], [4.0]]), np.array([3, 0, 3]), 5)
    assert dtable[:, 0].tolist() == [2, 0, 0, 5, 0]


def test_a_bfloat16_table_gives_float32_rows(embedding):
    table = np.array([[1.5], [-3.0]]).astype(ml_dtypes.bfloat16)
    x = embedding.forward(np.array([1, 0]), table)
    assert x.dtype == np.float32
    assert x[:, 0].tolist() == [-3.0, 1.5]
