"""Matrix products: what they equal, whatever form the factors have, and how they are shared out."""

import threading

import numba
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import minimoe
from minimoe import mixtral, products
from minimoe.arrays import BFLOAT16
from minimoe.backends import make_backend
from minimoe.config import PRESETS
from minimoe.loops import jit
from minimoe.ops.linear import numba_cpu as linear
from minimoe.params import leaves
from minimoe.products import DEPTH, GRAIN, HEIGHT, WIDTH, Product, compute, cut, multiply, operand
from minimoe.quantized import quantize
from minimoe.tiles import FEWER, MULTIPLIES_PAIRS, ROWS
from tests.measure import assert_close
from tests.small import SPARSE

numba.get_num_threads()  # loads Numba's threads, whatever a test puts in its place (see `stages.threads_if`)
CORES = numba.config.NUMBA_NUM_THREADS
SHAPES = [(1, 1, 1), (7, 5, 3), (0, 5, 3), (7, 0, 3), (7, 5, 0), (0, 0, 0), (1, 300, 2000), (3000, 300, 1)]
LARGE = [(513, 257, 1025), (2049, 129, 67), (65, 1031, 1999), (128, 4097, 128)]  # (M, K, N)


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    """Numbers of threads that any machine can try: more than it has cores, too."""
    monkeypatch.setattr(numba, "get_num_threads", lambda: request.param)
    return request.param


@pytest.fixture(params=["widened", "in pairs"])
def way(request, monkeypatch):
    """The two ways to multiply bfloat16."""
    if request.param == "in pairs" and not MULTIPLIES_PAIRS:
        pytest.skip("this processor does not multiply pairs of bfloat16")
    monkeypatch.setattr(products, "MULTIPLIES_PAIRS", request.param == "in pairs")
    return request.param


def draw(M, K, N, dtype=np.float64, seed=0):
    rng = np.random.default_rng([M, K, N, seed])
    return rng.normal(size=(M, K)).astype(dtype), rng.normal(size=(K, N)).astype(dtype)


def lying(x, form):
    """The same matrix in other memory."""
    if form == "columns":
        return np.asfortranarray(x)
    if form == "apart":
        return np.repeat(np.repeat(x, 2, 0), 3, 1)[::2, ::3]
    if form == "backwards":
        return np.ascontiguousarray(x[::-1])[::-1]
    return np.ascontiguousarray(x)


FORMS = ["rows", "columns", "apart", "backwards"]


@pytest.mark.parametrize("shape", SHAPES + LARGE)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_numpy(threads, shape, dtype):
    left, right = draw(*shape, dtype)
    out = multiply(left, right)
    assert out.dtype == dtype
    assert_close(out, left.astype(np.float64) @ right.astype(np.float64), 1e-5 if dtype == np.float32 else 1e-13)


@pytest.mark.parametrize("stored", ["float32", "float64", "bfloat16", "int8"])
@pytest.mark.parametrize("seed", range(40))
def test_whole_numbers_are_multiplied_exactly(way, stored, seed):
    """Any sizes around those of tiles and of what is copied at once, any memory; nothing else is written to."""
    rng = np.random.default_rng(seed)
    edges = [1, 2, FEWER, ROWS - 1, ROWS + 1, 16, 33, HEIGHT - 1, HEIGHT + 5, WIDTH, WIDTH + 17, DEPTH, DEPTH + 3, 700]
    M, K, N = (int(rng.choice(edges)) for _ in range(3))
    dtype = np.dtype(stored) if stored.startswith("float") else np.dtype(np.float32)
    left, exact = rng.integers(-8, 9, (M, K)).astype(dtype), rng.integers(-8, 9, (K, N))
    if stored == "int8":
        turned = rng.random() < 0.5
        right = quantize((exact.T if turned else exact).astype(np.float32))
        right = right.T if turned else right
        exact = right.widened(np.float64)
    else:
        right = lying(exact.astype(BFLOAT16 if stored == "bfloat16" else dtype), rng.choice(FORMS))
    whole = np.full((2 * M + 3, 2 * N + 3), 7, dtype)
    out = whole[1 : M + 1, 2 : N + 2] if rng.random() < 0.5 else whole[1 : 2 * M + 1 : 2, 2 : 2 * N + 2 : 2]
    compute([Product([(lying(left, rng.choice(FORMS)), right)], out, rounded=stored == "bfloat16")])
    truth = left.astype(np.float64) @ exact
    if stored == "int8":  # scales are no whole numbers
        assert np.abs(out - truth).max() <= 1e-5 * (np.abs(left).astype(np.float64) @ np.abs(exact)).max()
    else:
        np.testing.assert_array_equal(out, truth)
    out[...] = 7
    assert (whole == 7).all()


@pytest.mark.parametrize("shape", SHAPES + LARGE)
def test_pairs_are_added_up(threads, shape):
    M, K, N = shape
    pairs = [draw(M, k, N, seed=k) for k in (K, 2 * K, 1)]
    out = np.full((M, N), np.nan)
    compute([Product(pairs, out)])
    assert_close(out, sum(left @ right for left, right in pairs), 1e-13)


@pytest.mark.parametrize("shape", [*SHAPES, *LARGE, (150, 512, 200)])
@pytest.mark.parametrize("transposed", [False, True])
def test_bfloat16_weights(threads, way, shape, transposed):
    left, right = draw(*shape, np.float32)
    right = np.ascontiguousarray(right.T).astype(BFLOAT16).T if transposed else right.astype(BFLOAT16)
    left = operand(left, right)
    assert np.array_equal(left, left.astype(BFLOAT16).astype(np.float32)), "the left factor is rounded"
    out = multiply(left, right)
    assert out.dtype == np.float32
    assert_close(out, left.astype(np.float64) @ right.astype(np.float64), 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_left_factor_that_is_not_rounded_keeps_all_its_bits(way, form):
    """As gradients do: products of pairs would drop half of each."""
    left, right = draw(70, 64, 48, np.float32)
    right, out = lying(right.astype(BFLOAT16), form), np.empty((70, 48), np.float32)
    compute([Product([(left, right)], out)])
    assert_close(out, left.astype(np.float64) @ right.astype(np.float64), 1e-5)


def test_a_product_of_pairs_rounds_by_itself(way):
    left, right = draw(70, 64, 48, np.float32)
    right = np.asfortranarray(right.astype(BFLOAT16))
    assert np.array_equal(multiply(left, right), multiply(operand(left, right), right))


def test_weights_of_several_types_in_one_sum(way):
    x, w = draw(30, 64, 40, np.float32)
    x = operand(x, w.astype(BFLOAT16))
    int8 = quantize(np.ascontiguousarray(w.T)).T
    out, wide = np.empty((30, 40), np.float32), np.empty((30, 40))
    compute([Product([(x, w), (x, w.astype(BFLOAT16)), (x, int8)], out), Product([(x, w), (x, int8)], wide)])
    exact = [x.astype(np.float64) @ factor for factor in (w, w.astype(BFLOAT16).astype(np.float64), int8.widened())]
    assert_close(out, sum(exact), 1e-5)
    assert_close(wide, exact[0] + exact[2], 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_not_a_number_stays_in_its_own_sums(way, dtype, transposed):
    """Zeros that fill a tile or a line up are multiplied with it, too, and must reach no result."""
    M, K, N = ROWS + 1, 6, 21
    left, right = np.ones((M, K), np.float64 if dtype == "float64" else np.float32), np.ones((K, N), np.float32)
    left[2, 1], left[M - 1, 0], right[3, N - 1], right[0, 7] = np.nan, -np.inf, np.inf, -np.inf
    right = right.astype(BFLOAT16 if dtype == "bfloat16" else dtype)
    with np.errstate(invalid="ignore"):
        expected = left @ right.astype(left.dtype)
    out = multiply(left, lying(right, "columns" if transposed else "rows"))
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("shapes", [((3, 4), (5, 6), (3, 6)), ((3, 4), (4, 6), (3, 5)), ((3, 4), (4, 6), (2, 6))])
def test_shapes_that_do_not_match_are_named(shapes):
    left, right, out = (np.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"cannot multiply .* by .* into"):
        compute([Product([(left, right)], out)])


@pytest.mark.parametrize("pieces", [0, 1, 3, 1000])
@pytest.mark.parametrize("shape", SHAPES + LARGE)
def test_blocks_hold_every_number_once(shape, pieces):
    left, right = draw(*shape)
    counts = np.zeros((shape[0], shape[2]))
    blocks = cut(Product([(left, right)], counts), pieces)
    assert len(blocks) <= max(1, pieces)
    for rows, columns in blocks:
        assert counts[rows, columns].size
        counts[rows, columns] += 1
    assert (counts == 1).all()


def test_few_rows_read_every_weight_once():
    left, right = draw(5, 1000, 30_000, np.float32)
    blocks = cut(Product([(left, right)], np.empty((5, 30_000), np.float32)), 64)
    assert len(blocks) > 16 and all(rows == slice(0, 5) for rows, _ in blocks)


def test_small_work_wakes_no_thread(monkeypatch):
    fill, asked = products._fill, []
    monkeypatch.setattr(numba, "get_num_threads", lambda: 3)
    monkeypatch.setattr(products, "_fill", lambda *given: (asked.append(given[-1]), fill(*given)))
    compute([Product([draw(64, 64, 64)], np.empty((64, 64))) for _ in range(GRAIN // 64**3)])
    compute([Product([draw(64, 64, 64)], np.empty((64, 64))) for _ in range(2 * GRAIN // 64**3)])
    assert asked == [1, 3]


def model_bits(config, tokens):
    """Logits, loss and every gradient, as bytes."""
    model = minimoe.random(config, seed=1, backend="numba")
    inputs = mixtral.check_inputs(tokens, config.vocab_size)
    logits = model.forward(tokens)
    losses, grads, _ = mixtral.loss_and_grads(make_backend("numba"), config, model.params, inputs)
    return {"logits": logits.tobytes(), "loss": losses} | {name: g.tobytes() for name, g in leaves(grads)}


@pytest.mark.parametrize(("config", "shape"), [(SPARSE, (2, 9)), (PRESETS["tiny"], (8, 200))])
def test_bits_do_not_depend_on_the_number_of_threads(config, shape):
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, shape)
    bits = {}
    for ours in sorted({1, CORES}):
        for theirs in (1, 2):
            numba.set_num_threads(ours)
            try:
                with threadpool_limits(theirs, user_api="blas"):
                    bits[ours, theirs] = model_bits(config, tokens)
            finally:
                numba.set_num_threads(CORES)
    first = bits[1, 1]
    assert len(first) > 10
    for case, other in bits.items():
        assert [name for name in first if first[name] != other[name]] == [], case


@pytest.mark.parametrize("shape", LARGE)
def test_bits_of_a_product_do_not_depend_on_the_number_of_threads(shape, monkeypatch):
    left, right = draw(*shape, np.float32)
    results = []
    for count in (1, 2, 5):
        monkeypatch.setattr(numba, "get_num_threads", lambda count=count: count)
        results.append(multiply(left, right).tobytes())
    assert len(set(results)) == 1


def test_callers_in_several_threads_do_not_disturb_each_other():
    if numba.threading_layer() == "workqueue":
        pytest.skip("two threads must not enter Numba's workqueue at once")
    left, right = draw(900, 200, 300)
    truth, failures = left @ right, []

    def call(rows):
        for _ in range(10):
            if not np.allclose(multiply(left[:rows], right), truth[:rows], rtol=0, atol=1e-10):
                failures.append(rows)

    callers = [threading.Thread(target=call, args=(rows,)) for rows in (5, 300, 600, 900, 450)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


def test_gradients_of_several_outputs_add_up_over_threads(threads):
    x, _ = draw(3000, 64, 1)
    weights = [draw(n, 64, 1)[0] for n in (96, 64, 32)]
    dys = [draw(3000, n, 1)[0] for n in (96, 64, 32)]
    dx, dws = linear.backward(dys, x, weights)
    assert_close(dx, sum(dy @ w for dy, w in zip(dys, weights, strict=True)), 1e-13)
    assert_close(dws, [dy.T @ x for dy in dys], 1e-13)


def test_compiled_loops_run_beside_products(threads):
    """Loops of the caller's own and products take turns: neither waits for the other for ever."""

    @jit(parallel=True)
    def add_one(x):
        for i in numba.prange(len(x)):
            x[i] += 1

    left, right = draw(2049, 129, 67)
    counts = np.zeros(1000)
    for _ in range(20):
        multiply(left, right)
        add_one(counts)
    assert (counts == 20).all()
