"""What goes wrong around a device: too little memory, another thread or process, Ctrl-C; afterwards all is usable."""

import contextlib
import gc
import itertools
import signal
import threading
import weakref

import numpy as np
import pytest

import minimoe
from minimoe import cli, cuda, generate
from minimoe.backends import make_backend
from minimoe.checkpoint import load_params
from minimoe.generate import generate_ids
from minimoe.placement import DeviceMemoryError
from minimoe.training import loop
from tests import small
from tests.checkpoint import folders
from tests.cuda.test_model import SMALL
from tests.cuda_on_cpu.measuring import to_host
from tests.cuda_on_cpu.stand_in import STAND_IN, STATE
from tests.measure import assert_close

TOKENS = np.arange(6)


@pytest.fixture
def model(cupy):
    return minimoe.random(SMALL, seed=1, backend="cuda")


@contextlib.contextmanager
def free(cupy, size):
    """Let the device have `size` bytes free, and no more."""
    gc.collect()
    if cupy is STAND_IN:
        before, STATE.total = STATE.total, STATE.used + size
        try:
            yield
        finally:
            STATE.total = before
        return
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    pool.set_limit(size=pool.total_bytes() + size)
    try:
        yield
    finally:
        pool.set_limit(size=0)


# ---- memory

WORK = {
    "forward": lambda model: model.forward(np.arange(36)),
    "generation": lambda model: model.generate_ids(np.arange(36), max_new_tokens=3),
    "gradients": lambda model: model.loss_and_grads(np.arange(36)),
    "a trace": lambda model: model.trace(np.arange(36)),
}


@pytest.mark.parametrize("work", WORK)
def test_out_of_memory_says_what_was_needed_and_is_free_and_leaves_all_usable(cupy, model, work):
    expected = model.forward(TOKENS)
    with free(cupy, 30_000):
        with pytest.raises(DeviceMemoryError, match=r"allocating [\d,]+ bytes .*; [\d.]+ GB of its [\d.]+ GB are free"):
            WORK[work](model)
        assert_close(model.forward(TOKENS[:1]), expected[:1], 1e-5)  # a smaller task still fits
    np.testing.assert_array_equal(model.forward(TOKENS), expected)


def test_an_error_of_memory_does_not_hold_the_memory(cupy, model):
    """A notebook keeps the last error, and an error the frames it passed, and these their arrays."""
    model.forward(TOKENS)
    gc.collect()
    used = cupy.get_default_memory_pool().used_bytes()
    with free(cupy, 30_000), pytest.raises(DeviceMemoryError) as kept:
        model.forward(np.arange(36))
    assert cupy.get_default_memory_pool().used_bytes() <= used
    assert kept.value.__traceback__ is not None


def test_training_out_of_memory_leaves_the_state_as_it_was(cupy):
    ops, train = make_backend("cuda"), loop.TrainConfig(steps=3, batch_size=2, sequence_length=16, warmup=1)
    state = loop.new_state(ops, SMALL, train)
    before = to_host(state.params.tok_embeddings)
    tokens = np.random.default_rng(0).integers(0, 37, (2, 16))
    with free(cupy, 30_000), pytest.raises(DeviceMemoryError, match="allocating"):
        loop.train_step(ops, SMALL, train, state, tokens)
    np.testing.assert_array_equal(to_host(state.params.tok_embeddings), before)
    assert state.step == 0 and loop.train_step(ops, SMALL, train, state, tokens).step == 1


def test_a_new_training_state_larger_than_the_device_is_refused(cupy):
    with free(cupy, 20_000), pytest.raises(DeviceMemoryError, match=r"need|allocating"):
        loop.new_state(make_backend("cuda"), SMALL, loop.TrainConfig(steps=3))


def test_a_checkpoint_larger_than_the_device_is_one_line_and_nothing_is_copied(cupy, tmp_path, monkeypatch, capsys):
    small.save(tmp_path / "model")
    monkeypatch.setattr(cupy.cuda.runtime, "memGetInfo", lambda: (10_000, 80_000_000_000))
    used = cupy.get_default_memory_pool().used_bytes()
    assert cli.main(["generate", "--model", str(tmp_path / "model"), "--backend", "cuda", "x"]) == 2
    error = capsys.readouterr().err
    assert "the weights need 0.0 GB on the device; 0.0 GB of its 80.0 GB are free" in error and error.count("\n") == 1
    assert cupy.get_default_memory_pool().used_bytes() == used


def test_memory_that_another_process_takes_in_between_is_said(cupy, model, monkeypatch):
    """What was free when it was asked for is gone when it is taken."""
    host = minimoe.random(SMALL, seed=1, backend="numpy")
    with free(cupy, 20_000):
        monkeypatch.setattr(cupy.cuda.runtime, "memGetInfo", lambda: (10**12, 10**12))
        for work in (lambda: host.to("cuda"), lambda: model.new_cache(8, 10_000)):
            with pytest.raises(DeviceMemoryError, match=r"too little memory: Out of memory allocating [\d,]+ bytes"):
                work()
    assert_close(model.forward(TOKENS), host.forward(TOKENS), 1e-4)


def test_memory_that_is_wanting_inside_a_capture_is_said_and_the_next_call_captures(cupy):
    ops, calls = make_backend("cuda"), []

    def run():
        calls.append(None)
        return cupy.ones(100_000 if len(calls) == 2 else 10) * 2

    replay = ops.captured(run, tokens=1)
    with free(cupy, 60_000):
        replay()
        with pytest.raises(MemoryError, match="Out of memory"):
            replay()
        for _ in range(3):
            assert to_host(replay()).tolist() == [2] * 10
    assert len(calls) == 3


def test_memory_of_a_graph_is_given_to_nobody_else(cupy):
    x = cupy.zeros(1000)

    def run():
        nonlocal x
        x += 1
        return (x * 2 + 1) * (x - 1)  # temporaries, whose memory is free again when the capture ends

    replay = make_backend("cuda").captured(run, tokens=1)
    for n in range(1, 9):
        found = to_host(replay())
        others = [cupy.full(1000, -7.0) for _ in range(20)]
        assert (found == (2 * n + 1) * (n - 1)).all()
        assert all((to_host(other) == -7).all() for other in others)


def test_a_generation_that_has_ended_holds_no_memory(cupy, model):
    """Nor until the garbage collector comes."""
    gc.collect()
    gc.disable()
    try:
        cache = model.new_cache(1, 40)
        seen = weakref.ref(cache)
        steps = generate_ids(model.ops, SMALL, model.params, TOKENS[None], max_new_tokens=9, cache=cache)
        list(steps)
        del cache, steps
        assert seen() is None
    finally:
        gc.enable()


def test_more_shared_memory_is_asked_for_once_and_never_taken_back(cupy):
    class Kernel:
        shared_size_bytes, max_dynamic_shared_size_bytes = 1000, 48 * 1024

        def __call__(self, grid, block, arguments, *, shared_mem):
            assert shared_mem <= self.max_dynamic_shared_size_bytes

    kernel = Kernel()
    most = cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "compiled", lambda *_: kernel)
        for shared in (100, 60_000, 90_000, 60_000, 100):
            cuda.launch(__file__, "kernel", 1, 32, [], shared)
    assert kernel.max_dynamic_shared_size_bytes == most - 1000


# ---- numbers


def test_weights_in_float16_are_widened_before_anything_can_overflow(cupy, tmp_path):
    """Their largest product is beyond float16's 65,504, their sum of squares beyond it by far."""
    tree = folders.model(dtype=np.float16)
    for layer in tree.layers:
        layer.feed_forward.w1[0] *= np.float16(300)
        layer.feed_forward.w3[0] *= np.float16(300)
    tree.tok_embeddings[...] *= np.float16(500)
    minimoe.checkpoint.save(tmp_path / "model", folders.MOE, tree)
    there = minimoe.load(tmp_path / "model", backend="cuda")
    _, stored = load_params(tmp_path / "model")
    assert there.params.dtype == np.float32 and stored.dtype == np.float32
    logits = there.forward(TOKENS)
    assert np.isfinite(logits).all()
    assert_close(logits, minimoe.load(tmp_path / "model", backend="numpy").forward(TOKENS), 1e-4)


# ---- threads


@pytest.mark.parametrize("models", [1, 2])
def test_threads_that_generate_at_once_get_their_own_texts(cupy, models):
    made = [minimoe.random(SMALL, seed=seed, backend="cuda") for seed in range(models)]
    jobs = [(made[i % models], np.arange(3 + i), 8 + i) for i in range(4)]
    expected = [model.generate_ids(tokens, max_new_tokens=n) for model, tokens, n in jobs]
    found, start = [None] * len(jobs), threading.Barrier(len(jobs))

    def work(i, model, tokens, n):
        start.wait()
        found[i] = model.generate_ids(tokens, max_new_tokens=n)

    threads = [threading.Thread(target=work, args=(i, *job)) for i, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, alone in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, alone)


def test_work_of_another_thread_does_not_get_into_a_graph(cupy):
    inside, outside = threading.Event(), threading.Event()
    x, calls, others = cupy.zeros(3), [], []

    def run():
        nonlocal x
        calls.append(None)
        if len(calls) == 2:  # is being captured
            inside.set()
            assert outside.wait(60)
        x += 1
        return x * 1

    def other():
        inside.wait(60)
        others.append(to_host(cupy.ones(3) * 5))  # reads back, which the capturing thread could not
        outside.set()

    thread = threading.Thread(target=other)
    thread.start()
    replay = make_backend("cuda").captured(run, tokens=1)
    found = [to_host(replay()).tolist() for _ in range(4)]
    thread.join()
    assert found == [[n] * 3 for n in (1, 2, 3, 4)] and others[0].tolist() == [5, 5, 5]


# ---- Ctrl-C


def interrupted(function, call):
    """The function, whose call of that number Ctrl-C ends before it begins."""
    calls = itertools.count(1)

    def wrapped(*given):
        if next(calls) == call:
            raise KeyboardInterrupt
        return function(*given)

    return wrapped


@pytest.mark.parametrize("at", range(5))
def test_ctrl_c_at_any_step_leaves_the_model_usable(model, monkeypatch, at):
    """While the ids of a step are waited for: of the prompt, of the step that runs as it stands, of replayed ones."""
    expected = model.generate_ids(TOKENS, max_new_tokens=9)
    with monkeypatch.context() as patch:
        patch.setattr(generate, "to_host", interrupted(generate.to_host, at + 1))
        with pytest.raises(KeyboardInterrupt):
            model.generate_ids(TOKENS, max_new_tokens=9)
    np.testing.assert_array_equal(model.generate_ids(TOKENS, max_new_tokens=9), expected)


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
def test_ctrl_c_inside_a_step_leaves_the_model_usable(model, monkeypatch, call):
    """Each layer asks the gate once a pass: the calls are in the prompt, in the first step, and in the capture."""
    expected = model.generate_ids(TOKENS, max_new_tokens=9)
    with monkeypatch.context() as patch:
        patch.setattr(model.ops.gating, "forward", interrupted(model.ops.gating.forward, call))
        with pytest.raises(KeyboardInterrupt):
            model.generate_ids(TOKENS, max_new_tokens=9)
    np.testing.assert_array_equal(model.generate_ids(TOKENS, max_new_tokens=9), expected)


@pytest.mark.parametrize("delay", [0.02, 0.2])
def test_a_signal_ends_a_long_generation_and_leaves_the_model_usable(model, delay):
    expected = model.generate_ids(TOKENS, max_new_tokens=9)
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        with pytest.raises(KeyboardInterrupt):
            model.generate_ids(TOKENS, max_new_tokens=1_000_000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    np.testing.assert_array_equal(model.generate_ids(TOKENS, max_new_tokens=9), expected)


def test_a_conversation_goes_on_after_ctrl_c(cupy, monkeypatch):
    model = minimoe.load("tiny", backend="cuda")
    questions = [{"role": "user", "content": "a"}]
    expected = model.conversation().chat(questions, max_new_tokens=3)
    talk = model.conversation()
    with monkeypatch.context() as patch:
        patch.setattr(generate, "to_host", interrupted(generate.to_host, 2))
        with pytest.raises(KeyboardInterrupt):
            talk.chat(questions, max_new_tokens=5)
    assert talk.chat(questions, max_new_tokens=3) == expected
