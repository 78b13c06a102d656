"""The whole model on the CUDA backend against the reference: prefill, chunks, decoding as a graph, training, moving."""

import numpy as np
import pytest

import minimoe
from minimoe import mixtral, placement
from minimoe.arrays import BFLOAT16, numbers
from minimoe.backends import Backend, make_backend
from minimoe.checkpoint.mapped import _mapping_of
from minimoe.config import ModelConfig
from minimoe.params import leaves, map_leaves, named
from minimoe.placement import DeviceMemoryError
from minimoe.training import loop
from tests.cuda_on_cpu.measuring import to_host
from tests.cuda_on_cpu.stand_in import STAND_IN, STATE
from tests.draws import draw_config, draw_params, draw_tokens, forward, split
from tests.measure import assert_close

NUMPY = make_backend("numpy")
SMALL = ModelConfig(
    vocab_size=37, hidden_size=24, intermediate_size=20, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    num_experts=4, max_length=64, balance_form="per_layer", bos_id=None, eos_id=None,
)  # fmt: skip


def drawn(seed, side="none", dtype=np.float64, **fixed):
    rng = np.random.default_rng(seed)
    config = draw_config(rng, **fixed)
    params = draw_params(config, rng, dtype)
    return config, params, *draw_tokens(rng, config, side=side)


def on_device(params, xp):
    return map_leaves(params, xp.asarray)


@pytest.mark.parametrize("seed", range(6))
def test_float64_logits_are_those_of_the_reference(cupy, seed):
    config, params, tokens, mask = drawn(seed, ["none", "left", "right"][seed % 3])
    expected, routing = forward(NUMPY, config, params, tokens, mask=mask)
    found, on_gpu = forward(make_backend("cuda"), config, on_device(params, cupy), tokens, mask=mask)
    seen = slice(None) if mask is None else mask
    assert_close(to_host(found)[seen], expected[seen], 1e-12)
    np.testing.assert_array_equal(to_host(on_gpu.ids), routing.ids)


@pytest.mark.parametrize("seed", range(6))
def test_chunks_through_a_rolling_cache_are_the_whole(cupy, seed):
    rng = np.random.default_rng(seed)
    config, params, tokens, _ = drawn(seed, sliding_window=[None, 1, 4][seed % 3])
    expected, _ = forward(NUMPY, config, params, tokens)
    ops, params = make_backend("cuda"), on_device(params, cupy)
    cache = mixtral.new_cache(ops, config, params, *tokens.shape)
    for part in split(rng, tokens.shape[1]):
        found, _ = forward(ops, config, params, tokens[:, part], cache=cache)
        assert_close(to_host(found), expected[:, part], 1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_those_of_the_reference(cupy, seed):
    config, params, tokens, mask = drawn(seed, ["none", "left", "both"][seed % 3], num_experts_per_token=1 + seed % 2,
                                         num_experts=3)  # fmt: skip
    inputs = mixtral.check_inputs(tokens, config.vocab_size, mask)
    losses, grads, _ = mixtral.loss_and_grads(NUMPY, config, params, inputs)
    found, on_gpu, _ = mixtral.loss_and_grads(make_backend("cuda"), config, on_device(params, cupy), inputs)
    assert_close(
        numbers(found.total, found.cross_entropy, found.balance), [losses.total, losses.cross_entropy, losses.balance]
    )
    largest = max(np.abs(g).max() for _, g in leaves(grads))
    for (name, expected), (_, gradient) in zip(leaves(grads), leaves(on_gpu), strict=True):
        error = np.abs(to_host(gradient) - expected).max()  # some are zero but for rounding
        assert error <= 1e-11 * max(np.abs(expected).max(), 1e-4 * largest), name


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=["float32", "bfloat16"])
def test_decoding_replays_one_graph_that_gives_what_eager_steps_give(cupy, dtype):
    config, params, tokens, _ = drawn(3, dtype=dtype, sliding_window=5, num_experts=4, num_experts_per_token=2)
    ops, params = make_backend("cuda"), on_device(params, cupy)
    B, steps = len(tokens), 9
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (steps, B))

    def run(captured):
        cache = mixtral.new_cache(ops, config, params, B, 64)
        forward(ops, config, params, tokens, cache=cache)
        positions, new = cupy.asarray(cache.lengths[:, None].copy()), cupy.asarray(ids[0][:, None].copy())

        def step():
            nonlocal positions
            logits = mixtral.decode(ops, config, params, cache, new, positions)
            positions += 1
            return logits

        replay = ops.captured(step, tokens=B) if captured else step
        found = []
        for row in ids:
            new.set(row[:, None].copy())
            found.append(to_host(replay()))
        return np.stack(found)

    np.testing.assert_array_equal(run(captured=True), run(captured=False))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_chooses_the_tokens_of_the_numba_backend(cupy, temperature):
    host = minimoe.random(SMALL, seed=1, backend="numba")
    tokens = np.random.default_rng(0).integers(0, 37, (2, 7))
    settings = {"max_new_tokens": 12, "temperature": temperature, "seed": 4}
    expected = host.generate_ids(tokens, **settings)
    np.testing.assert_array_equal(host.to("cuda").generate_ids(tokens, **settings), expected)


def test_a_step_of_decoding_reads_only_its_tokens_back(cupy):
    """Reading back waits for the device: once per step, for the ids, and nothing inside the step."""
    if cupy is not STAND_IN:
        pytest.skip("counted by the stand-in")
    model = minimoe.random(SMALL, seed=1, backend="cuda")
    counts = []
    for new in (4, 9):
        before = STATE.syncs
        model.generate_ids(np.arange(5), max_new_tokens=new)
        counts.append(STATE.syncs - before)
    assert counts[1] - counts[0] == 5


def test_to_the_device_and_back_gives_the_same_weights_bit_for_bit(cupy):
    for dtype in ("float32", "bfloat16", "float64", "int8"):
        host = minimoe.random(SMALL, seed=1, backend="numpy", dtype=dtype)
        there = host.to("cuda")
        assert there.ops.name == "cuda"
        back = there.to("numba")
        for (name, w), (_, v) in zip(named(host.params), named(back.params), strict=True):
            w, v = (x if isinstance(x, np.ndarray) else x.values for x in (w, v))
            assert w.dtype == v.dtype and w.tobytes() == v.tobytes(), name
        logits = there.forward(np.arange(6))
        assert_close(logits, host.forward(np.arange(6)), {"float64": 1e-12, "bfloat16": 2e-2}.get(dtype, 1e-4))


def test_experts_of_a_checkpoint_are_stacked_on_the_device(cupy, tmp_path):
    minimoe.random(SMALL, seed=1, backend="numpy").save(tmp_path / "model")
    host = minimoe.load(tmp_path / "model", backend="numpy")
    there = minimoe.load(tmp_path / "model", backend="cuda")
    w1 = there.params.layers[0].feed_forward.w1
    assert isinstance(w1, cupy.ndarray) and w1.shape == (4, 20, 24)
    np.testing.assert_array_equal(w1[2].get(), host.params.layers[0].feed_forward.w1[2])
    assert_close(there.forward(np.arange(6)), host.forward(np.arange(6)), 1e-5)


@pytest.mark.parametrize("large", [False, True])
def test_weights_go_from_the_mapped_file_to_the_device_tensor_by_tensor_under_a_bar(cupy, tmp_path, monkeypatch, large):
    """The host keeps no copy of what it hands over; memory is asked for first; the bar ends at what was asked for."""
    host = minimoe.random(SMALL, seed=1, backend="numpy", dtype="bfloat16")
    host.save(tmp_path / "model")
    size, events = sum(w.nbytes for _, w in named(host.params)), []

    class Bar(placement.tqdm):
        def __init__(self, **settings):
            events.append(("shown in a terminal", settings["disable"] is None))
            super().__init__(**settings | {"disable": True})
            assert self.total is None or self.total == size

        def update(self, n):
            events.append(("copied", n))

    def asarray(ops, x):
        assert _mapping_of(x) is not None
        return ops.xp.asarray(x)

    monkeypatch.setattr(placement, "_LARGE", size if large else size + 1)
    monkeypatch.setattr(placement, "tqdm", Bar)
    monkeypatch.setattr(placement, "require", lambda _, asked, what: events.append((what, asked)))
    monkeypatch.setattr(Backend, "asarray", asarray)
    there = minimoe.load(tmp_path / "model", backend="cuda")
    assert events[:2] == [("the weights", size), ("shown in a terminal", large)]
    assert sorted(n for _, n in events[2:]) == sorted(w.nbytes for _, w in named(there.params))


def test_weights_larger_than_the_device_are_refused_before_anything_is_copied(cupy, monkeypatch):
    host = minimoe.random(SMALL, seed=1, backend="numpy")
    monkeypatch.setattr(cupy.cuda.runtime, "memGetInfo", lambda: (20_000, 80_000_000_000))
    with pytest.raises(
        DeviceMemoryError, match=r"the weights need 0.0 GB on the device; 0.0 GB of its 80.0 GB are free"
    ):
        host.to("cuda")


def test_a_cache_larger_than_the_device_is_refused(cupy):
    model = minimoe.random(SMALL, seed=1, backend="cuda")
    with pytest.raises(DeviceMemoryError, match=r"keys and values of 8 × 1,000,000,000 tokens need 2,048.0 GB on"):
        model.new_cache(8, 1_000_000_000)


def test_running_out_of_memory_says_how_much_is_free_and_leaves_the_model_usable(cupy, monkeypatch):
    model = minimoe.random(SMALL, seed=1, backend="cuda")
    expected = model.forward(np.arange(6))

    def fail(*_, **__):
        raise MemoryError("Out of memory allocating 1,024 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(model.ops.gating, "forward", fail)
        with pytest.raises(DeviceMemoryError, match=r"allocating 1,024 bytes; [\d.]+ GB of its [\d.]+ GB are free"):
            model.forward(np.arange(6))
    np.testing.assert_array_equal(model.forward(np.arange(6)), expected)


def test_an_interrupted_capture_leaves_the_stream_usable(cupy):
    ops, calls = make_backend("cuda"), []

    def run():
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return cupy.ones(3) * 2

    replay = ops.captured(run, tokens=1)
    replay()
    with pytest.raises(KeyboardInterrupt):
        replay()
    for _ in range(3):
        np.testing.assert_array_equal(to_host(replay()), [2, 2, 2])
    assert len(calls) == 3  # run, interrupted, captured; then replayed


def test_large_batches_and_watched_ops_are_not_captured(cupy):
    import dataclasses

    ops = make_backend("cuda")
    run = lambda: None  # noqa: E731
    assert ops.captured(run, tokens=17) is run
    assert dataclasses.replace(ops, graphs=False).captured(run, tokens=1) is run
    assert make_backend("numpy").captured(run, tokens=1) is run
    assert ops.captured(run, tokens=16) is not run


def test_training_follows_the_reference(cupy):
    train = loop.TrainConfig(steps=3, batch_size=2, sequence_length=16, warmup=1)
    streams = {"a": np.random.default_rng(0).integers(0, 37, 200)}
    found = {}
    for name in ("numpy", "cuda"):
        ops = make_backend(name)
        state = loop.new_state(ops, SMALL, train)
        found[name] = [loop.train_step(ops, SMALL, train, state, loop.batch(streams, train, i)) for i in range(3)]
    for expected, metrics in zip(found["numpy"], found["cuda"], strict=True):
        assert_close([metrics.loss, metrics.balance, metrics.gradient_norm],
                     [expected.loss, expected.balance, expected.gradient_norm], 1e-4)  # fmt: skip


def test_a_trace_names_what_the_reference_names(cupy):
    host = minimoe.random(SMALL, seed=1, backend="numpy", dtype="float64")
    tokens = np.random.default_rng(0).integers(0, 37, 9)
    expected, found = host.trace(tokens), host.to("cuda").trace(tokens)
    assert list(found) == list(expected)
    for name in expected:
        assert isinstance(found[name], np.ndarray), name
        assert_close(found[name], expected[name], 1e-11)


def test_a_model_on_the_device_saves_what_it_was_loaded_from(cupy, tmp_path):
    host = minimoe.random(SMALL, seed=1, backend="numpy", dtype="bfloat16")
    host.save(tmp_path / "host")
    host.to("cuda").save(tmp_path / "device")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "host" / name).read_bytes() == (tmp_path / "device" / name).read_bytes()
