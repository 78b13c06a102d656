"""Matrix products: what they equal, how they are shared out, and what they leave as it was."""

import os
import threading
import time

import numba
import numpy as np
import pytest
from threadpoolctl import ThreadpoolController, threadpool_limits

import minimoe
from minimoe import mixtral, products
from minimoe.arrays import BFLOAT16
from minimoe.backends import make_backend
from minimoe.config import PRESETS
from minimoe.loops import jit
from minimoe.ops.linear import numba_cpu as linear
from minimoe.params import leaves
from minimoe.products import GRAIN, Product, compute, cut, multiply, operand
from tests.measure import assert_close
from tests.small import SPARSE

CORES = numba.config.NUMBA_NUM_THREADS
BLAS = [library for library in ThreadpoolController().lib_controllers if library.user_api == "blas"]
SHAPES = [(1, 1, 1), (7, 5, 3), (0, 5, 3), (7, 0, 3), (7, 5, 0), (0, 0, 0), (1, 300, 2000), (3000, 300, 1)]
LARGE = [(513, 257, 1025), (2049, 129, 67), (65, 1031, 1999), (128, 4097, 128)]  # (M, K, N)


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    """Numbers of threads that any machine can try: more than it has cores, too."""
    monkeypatch.setattr(numba, "get_num_threads", lambda: request.param)
    return request.param


@pytest.fixture
def many(monkeypatch):
    """Many blocks of any product, and three threads for them; yields the names of those that took part."""
    monkeypatch.setattr(products, "GRAIN", 1)
    monkeypatch.setattr(products, "LEAST_SIDE", 1)
    monkeypatch.setattr(numba, "get_num_threads", lambda: 3)
    fill, names = products._fill, set()

    def named(*block):
        names.add(threading.current_thread().name)
        time.sleep(0.001)
        fill(*block)

    monkeypatch.setattr(products, "_fill", named)
    return names


def draw(M, K, N, dtype=np.float64, seed=0):
    rng = np.random.default_rng([M, K, N, seed])
    return rng.normal(size=(M, K)).astype(dtype), rng.normal(size=(K, N)).astype(dtype)


def limits():
    return [library.get_num_threads() for library in BLAS]


@pytest.mark.parametrize("shape", SHAPES + LARGE)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_numpy(threads, shape, dtype):
    left, right = draw(*shape, dtype)
    out = multiply(left, right)
    assert out.dtype == dtype
    assert_close(out, left.astype(np.float64) @ right.astype(np.float64), 1e-5 if dtype == np.float32 else 1e-13)


@pytest.mark.parametrize("shape", SHAPES + LARGE)
def test_pairs_are_added_up(threads, shape):
    M, K, N = shape
    pairs = [draw(M, k, N, seed=k) for k in (K, 2 * K, 1)]
    out = np.full((M, N), np.nan)
    compute([Product(pairs, out)])
    assert_close(out, sum(left @ right for left, right in pairs), 1e-13)


@pytest.mark.parametrize("shape", SHAPES + LARGE)
@pytest.mark.parametrize("transposed", [False, True])
def test_bfloat16_weights_are_widened(threads, shape, transposed, monkeypatch):
    monkeypatch.setattr(products, "BLOCK_OF_WEIGHTS", 1 << 16)
    left, right = draw(*shape, np.float32)
    right = np.ascontiguousarray(right.T).astype(BFLOAT16).T if transposed else right.astype(BFLOAT16)
    left = operand(left, right)
    assert np.array_equal(left, left.astype(BFLOAT16).astype(np.float32)), "the left factor is rounded"
    out = multiply(left, right)
    assert out.dtype == np.float32
    assert_close(out, left.astype(np.float64) @ right.astype(np.float64), 1e-5)


def test_outs_may_have_any_strides(threads):
    M, K, N = 700, 300, 500
    left, right = draw(M, K, N)
    whole = np.zeros((2 * M, 3 * N))
    outs = [whole[::2, 1::3], whole[1::2, :N], np.zeros((N, M)).T, whole[::2, ::3]]
    for out in outs[:3]:
        compute([Product([(left, right)], out)])
        assert_close(out, left @ right, 1e-13)
    assert not outs[3][:, ::3].any()  # what lies between was not touched


@pytest.mark.parametrize("shape", SHAPES + LARGE)
def test_blocks_hold_every_number_once(shape):
    left, right = draw(*shape)
    counts = np.zeros((shape[0], shape[2]))
    for _, rows, columns in cut(Product([(left, right)], counts)):
        assert counts[rows, columns].size
        counts[rows, columns] += 1
    assert (counts == 1).all()


def test_few_rows_read_every_weight_once():
    left, right = draw(5, 1000, 30_000, np.float32)
    blocks = cut(Product([(left, right)], np.empty((5, 30_000), np.float32)))
    assert len(blocks) > 16 and all(rows == slice(0, 5) for _, rows, _ in blocks)


def test_small_work_wakes_no_thread(monkeypatch):
    monkeypatch.setattr(products, "_pool", lambda: pytest.fail("a thread was woken"))
    monkeypatch.setattr(numba, "get_num_threads", lambda: pytest.fail("a thread was asked for"))
    compute([Product([draw(64, 64, 64)], np.empty((64, 64))) for _ in range(GRAIN // 64**3)])


def test_threads_share_the_work(many):
    left, right = draw(60, 20, 30)
    assert_close(multiply(left, right), left @ right, 1e-13)
    assert 2 <= len(many) <= 3


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


@pytest.mark.skipif(not BLAS, reason="NumPy's BLAS cannot be controlled here")
@pytest.mark.parametrize("before", [1, 2])
def test_blas_has_one_thread_inside_and_the_users_number_outside(before, many, monkeypatch):
    fill, seen = products._fill, []

    def watching(*block):
        seen.extend(limits())
        fill(*block)

    monkeypatch.setattr(products, "_fill", watching)
    with threadpool_limits(before, user_api="blas"):
        outside = limits()
        multiply(*draw(60, 20, 30))
        assert limits() == outside
    assert set(seen) == {1}


@pytest.mark.skipif(not BLAS, reason="NumPy's BLAS cannot be controlled here")
def test_callers_in_several_threads_share_the_limit_and_give_it_back(many, monkeypatch):
    """The first caller leaves before the last one: BLAS stays at one thread until then."""
    left, right = draw(90, 20, 30)
    fill, failures = products._fill, []

    def watching(*block):
        failures.extend(number for number in limits() if number != 1)
        fill(*block)

    def call(rows):
        for _ in range(3):
            if not np.allclose(multiply(left[:rows], right), truth[:rows], rtol=0, atol=1e-12):
                failures.append(rows)

    monkeypatch.setattr(products, "_fill", watching)
    with threadpool_limits(2, user_api="blas"):
        outside, truth = limits(), left @ right
        callers = [threading.Thread(target=call, args=(rows,)) for rows in (5, 30, 60, 90, 45)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert limits() == outside
    assert not failures


@pytest.mark.skipif(not BLAS, reason="NumPy's BLAS cannot be controlled here")
def test_a_thread_that_has_multiplied_keeps_no_other_from_setting_blas(many):
    multiplied, over = threading.Event(), threading.Event()

    def call():
        multiply(*draw(60, 20, 30))
        multiplied.set()
        over.wait()

    if max(limits()) == 1:
        pytest.skip("BLAS has one thread here, so nothing is set")
    caller = threading.Thread(target=call)
    caller.start()
    try:
        assert multiplied.wait(10)
        with threadpool_limits(1, user_api="blas"):
            assert limits() == [1] * len(BLAS)
    finally:
        over.set()
        caller.join()


class Broken(Exception):
    pass


@pytest.mark.parametrize("where", ["caller", "helper"])
@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt, IndexError])
def test_what_a_block_raises_surfaces_when_none_is_written_any_more(where, error, many, monkeypatch):
    fill, caller, running, began = products._fill, threading.current_thread(), [], []
    lock = threading.Lock()

    def breaking(*block):
        with lock:
            began.append(block)
            running.append(block)
        try:
            if (threading.current_thread() is caller) == (where == "caller"):
                time.sleep(0.02)
                raise error
            time.sleep(0.05)
            fill(*block)
        finally:
            with lock:
                running.pop()

    monkeypatch.setattr(products, "_fill", breaking)
    left, right = draw(60, 20, 30)
    with threadpool_limits(2, user_api="blas"):
        outside = limits()
        with pytest.raises(error):
            multiply(left, right)
        assert not running
        assert limits() == outside
    count = len(began)
    assert count < 10, "the others went on to the end"
    time.sleep(0.1)
    assert len(began) == count
    monkeypatch.setattr(products, "_fill", fill)
    assert_close(multiply(left, right), left @ right, 1e-13)


def test_ctrl_c_while_waiting_for_the_others_is_raised_when_they_are_done(many, monkeypatch):
    fill, caller, running = products._fill, threading.current_thread(), []

    def slow(*block):
        if threading.current_thread() is not caller:
            running.append(block)
            time.sleep(0.3)
            running.pop()
        fill(*block)

    monkeypatch.setattr(products, "_fill", slow)
    timer = threading.Timer(0.15, os.kill, (os.getpid(), 2))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        multiply(*draw(20, 20, 3))
    assert not running


def test_numpys_error_state_holds_in_every_thread(many):
    left, right = draw(60, 20, 30, np.float32)
    left[:] = 3e38
    with np.errstate(over="ignore", invalid="ignore"):
        multiply(left, right)
    assert len(many) > 1
    with np.errstate(over="raise", invalid="raise"), pytest.raises(FloatingPointError):
        multiply(left, right)


def test_a_forked_child_has_threads_of_its_own(many):
    left, right = draw(60, 20, 30)
    right_answer = multiply(left, right)
    pid = os.fork()
    if pid == 0:
        many.clear()
        same = np.array_equal(multiply(left, right), right_answer)
        os._exit(0 if same and len(many) > 1 else 1)
    for _ in range(100):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    assert done and status == 0


def test_without_a_blas_that_can_be_controlled_products_are_the_same(many, monkeypatch):
    class Nothing:
        lib_controllers = ()

    left, right = draw(60, 20, 30)
    monkeypatch.setattr(products, "ThreadpoolController", Nothing)
    blas = products._Blas()
    monkeypatch.setattr(products, "_blas", lambda: blas)
    assert_close(multiply(left, right), left @ right, 1e-13)


def test_where_no_thread_can_be_started_the_caller_does_all(many, monkeypatch):
    class Closed:
        def submit(self, *task):
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(products, "_pool", Closed)
    left, right = draw(60, 20, 30)
    assert_close(multiply(left, right), left @ right, 1e-13)
    assert many == {threading.current_thread().name}


def test_gradients_of_several_outputs_add_up_over_threads(threads):
    x, _ = draw(3000, 64, 1)
    weights = [draw(n, 64, 1)[0] for n in (96, 64, 32)]
    dys = [draw(3000, n, 1)[0] for n in (96, 64, 32)]
    dx, dws = linear.backward(dys, x, weights)
    assert_close(dx, sum(dy @ w for dy, w in zip(dys, weights, strict=True)), 1e-13)
    assert_close(dws, [dy.T @ x for dy in dys], 1e-13)


def test_compiled_loops_run_beside_products(threads):
    """Numba's threads and ours take turns: neither waits for the other for ever."""

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
