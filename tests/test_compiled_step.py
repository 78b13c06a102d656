"""A step of decoding as one compiled call: held to the same step op by op."""

import dataclasses
import gc
import os
import subprocess
import sys
import weakref
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

import minimoe
from minimoe import compiled_step, mixtral
from minimoe.arrays import BFLOAT16
from minimoe.backends import make_backend
from minimoe.generate import generate_ids
from minimoe.params import from_named, map_leaves, named, quantized, random
from minimoe.quantized import Int8, quantize
from tests import small
from tests.draws import draw_any_config, draw_dense_config, draw_params
from tests.measure import relative_error

STEPS = 5


@pytest.fixture(scope="module")
def ops():
    return make_backend("numba")


def after(ops, config, params, tokens, max_length=None):
    """A cache that holds the tokens, but for the last STEPS of each row."""
    B, T = tokens.shape
    cache = mixtral.new_cache(ops, config, params, B, max_length or T)
    inputs = mixtral.check_inputs(tokens[:, : T - STEPS], config.vocab_size, cache=cache)
    mixtral.forward(ops, config, params, inputs, cache=cache)
    return cache


def follow(step, cache, tokens):
    """(STEPS, B, V) logits of the last STEPS tokens, and what the cache then holds."""
    T, found = tokens.shape[1], []
    for t in range(T - STEPS, T):
        found.append(step(tokens[:, t : t + 1].copy(), cache.lengths[:, None].copy()))
        cache.lengths += 1
    return np.stack(found), [cache.positions, *(held for layer in cache.layers for held in (layer.k, layer.v))]


def both(ops, config, params, tokens):
    """The compiled step's result, and that of the ops one by one."""
    cache = after(ops, config, params, tokens)
    step = compiled_step.prepared(ops, config, params, cache)
    assert step is not None
    compiled = follow(step, cache, tokens)
    cache = after(ops, config, params, tokens)
    return compiled, follow(partial(mixtral.decode, ops, config, params, cache), cache, tokens)


def draws(seed, draw=draw_any_config):
    rng = np.random.default_rng(seed)
    config = draw(rng)
    B, T = int(rng.integers(1, compiled_step.MOST_TOKENS + 1)), int(rng.integers(STEPS + 1, 20))
    params = draw_params(config, rng, np.float32)
    return config, params, rng.integers(0, config.vocab_size, (B, T))


def stored_as(kind, params):
    """Float32 parameters as they are; in bfloat16; or in bfloat16 with matrices in int8."""
    if kind == "float32":
        return params
    narrow = map_leaves(params, lambda w: w.astype(BFLOAT16))
    return quantized(narrow) if kind == "int8" else narrow


@pytest.mark.parametrize("threads", ["one", "all"])
@pytest.mark.parametrize("seed", range(30))
def test_float32_is_what_the_ops_give_one_by_one(seed, threads, monkeypatch, ops):
    if threads == "all":  # a model so small would have one only
        monkeypatch.setattr(compiled_step, "FEW_PRODUCTS", 1)
    (logits, held), (expected, expected_held) = both(ops, *draws(seed))
    assert relative_error(logits, expected) <= 1e-5
    np.testing.assert_array_equal(held[0], expected_held[0])  # positions
    for cache, wanted in zip(held[1:], expected_held[1:], strict=True):
        assert relative_error(cache, wanted) <= 1e-5


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_the_number_of_threads_makes_no_difference(kind, monkeypatch, ops):
    for seed in range(10):
        config, params, tokens = draws(seed)
        params, found = stored_as(kind, params), []
        for few in (1 << 62, 1):
            monkeypatch.setattr(compiled_step, "FEW_PRODUCTS", few)
            cache = after(ops, config, params, tokens)
            logits, held = follow(compiled_step.prepared(ops, config, params, cache), cache, tokens)
            found.append([logits, *held])
        for alone, together in zip(*found, strict=True):
            np.testing.assert_array_equal(alone, together)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("B", [2, 3, 11])
def test_widths_that_tiles_take(kind, B, monkeypatch, ops):
    """Random ones are seldom whole registers."""
    config = small.SPARSE.replace(hidden_size=64, intermediate_size=96)
    tokens = np.random.default_rng(B).integers(0, config.vocab_size, (B, STEPS + 4))
    params, found = stored_as(kind, random(config, 0)), []
    for few in (1 << 62, 1):
        monkeypatch.setattr(compiled_step, "FEW_PRODUCTS", few)
        compiled, one_by_one = both(ops, config, params, tokens)
        found.append(compiled[0])
        if kind == "float32":
            assert relative_error(compiled[0], one_by_one[0]) <= 1e-5
    np.testing.assert_array_equal(*found)


MANY_THREADS = """
import numba
import numpy as np
from minimoe import compiled_step
from minimoe.backends import make_backend
from tests.test_compiled_step import after, draws, follow
compiled_step.FEW_PRODUCTS = 1
ops, found = make_backend("numba"), []
for threads in (1, 2, 3, 5):
    numba.set_num_threads(threads)
    for seed in range(4):
        config, params, tokens = draws(seed)
        cache = after(ops, config, params, tokens)
        found.append(follow(compiled_step.prepared(ops, config, params, cache), cache, tokens)[0])
for i, logits in enumerate(found):
    np.testing.assert_array_equal(logits, found[i % 4])
"""


def test_more_threads_than_cores_make_no_difference():
    subprocess.run([sys.executable, "-c", MANY_THREADS], check=True, env=os.environ | {"NUMBA_NUM_THREADS": "5"})


def test_a_step_that_does_not_come_to_its_end_says_so(ops, monkeypatch):
    config, params, tokens = draws(6)
    cache = after(ops, config, params, tokens)
    step, before = compiled_step.prepared(ops, config, params, cache), cache.positions.copy()
    monkeypatch.setattr(compiled_step, "_run", lambda *given: None)
    with pytest.raises(RuntimeError, match="did not come to its end"):
        step(tokens[:, -STEPS : tokens.shape[1] - STEPS + 1].copy(), cache.lengths[:, None].copy())
    np.testing.assert_array_equal(cache.positions, before)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_narrow_weights_are_as_good_as_op_by_op(kind, ops):
    """The same loops: seldom does a sum in another order let a rounding to bfloat16 go the other way."""
    apart, errors, expected_errors = [], [], []
    for seed in range(20):
        config, params, tokens = draws(seed)
        params = stored_as(kind, params)
        (logits, _), (expected, _) = both(ops, config, params, tokens)
        truth = exact(config, params, tokens)
        apart.append(relative_error(logits, expected))
        errors.append(relative_error(logits, truth))
        expected_errors.append(relative_error(expected, truth))
    assert np.median(apart) <= 1e-5
    assert max(errors) <= 2 * max(expected_errors)


def exact(config, params, tokens):
    """(STEPS, B, V) logits in float64, which rounds no operand."""
    wide = from_named(config, {name: widened(w) for name, w in named(params)})
    inputs = mixtral.check_inputs(tokens, config.vocab_size)
    return mixtral.forward(make_backend("numpy"), config, wide, inputs)[0][:, -STEPS:].swapaxes(0, 1)


def widened(w):
    return w.widened(np.float64) if isinstance(w, Int8) else w.astype(np.float64)


def test_a_dense_model(ops):
    (logits, _), (expected, _) = both(ops, *draws(0, draw_dense_config))
    assert relative_error(logits, expected) <= 1e-5


def test_a_mapped_checkpoint_is_read_where_it_lies(tmp_path, ops):
    model = minimoe.load(small.save(tmp_path / "m"), backend="numba")
    assert isinstance(model.params.layers[0].feed_forward.w1, list)
    tokens = np.arange(7, 19)[None]
    (logits, _), (expected, _) = both(ops, model.config, model.params, tokens)
    assert relative_error(logits, expected) <= 1e-5


def test_generation_takes_it(ops, monkeypatch):
    config, params, tokens = draws(3)
    expected = list(generate_ids(make_backend("numpy"), config, params, tokens, max_new_tokens=6))
    monkeypatch.setattr(mixtral, "decode", None)  # op by op it would be called
    np.testing.assert_array_equal(list(generate_ids(ops, config, params, tokens, max_new_tokens=6)), expected)


def wrapped(ops, room, name):
    copy, function = SimpleNamespace(**vars(getattr(ops, room))), getattr(getattr(ops, room), name)
    setattr(copy, name, lambda *given: function(*given))
    return dataclasses.replace(ops, **{room: copy})


CHANGES = {
    "another backend": lambda ops, config, params: (make_backend("numpy"), config, params),
    "a wrapped op": lambda ops, config, params: (wrapped(ops, "linear", "forward"), config, params),
    "a wrapped table": lambda ops, config, params: (wrapped(ops, "rope", "table"), config, params),
    "wrapped positions": lambda ops, config, params: (wrapped(ops, "kv_cache", "write_positions"), config, params),
    "no graphs": lambda ops, config, params: (dataclasses.replace(ops, graphs=False), config, params),
    "float64": lambda ops, config, params: (ops, config, map_leaves(params, lambda w: w.astype(np.float64))),
    "one float64 matrix": lambda ops, config, params: (ops, config, with_wq(params, lambda w: w.astype(np.float64))),
    "a transposed matrix": lambda ops, config, params: (ops, config, with_wq(params, lambda w: np.asfortranarray(w))),
    "int8, transposed": lambda ops, config, params: (ops, config, turned_int8(params)),
    "one int8 matrix": lambda ops, config, params: (ops, config, with_wq(params, quantize)),
}


def turned_int8(params):
    """int8 throughout, one matrix with its columns side by side."""
    return with_wq(quantized(params), lambda w: Int8(np.asfortranarray(w.values), w.scale, w.source))


def with_wq(params, change):
    first = params.layers[0]
    attention = dataclasses.replace(first.attention, wq=change(first.attention.wq))
    return dataclasses.replace(params, layers=[dataclasses.replace(first, attention=attention), *params.layers[1:]])


@pytest.mark.parametrize("change", CHANGES)
def test_what_it_does_not_cover_is_done_op_by_op(change, ops):
    config, params, tokens = draws(1)
    assert compiled_step.prepared(ops, config, params, after(ops, config, params, tokens)) is not None
    other, config, params = CHANGES[change](ops, config, params)
    assert compiled_step.prepared(other, config, params, mixtral.new_cache(other, config, params, 1, 8)) is None


@pytest.mark.parametrize(
    ("B", "heads", "fits"),
    [(compiled_step.MOST_TOKENS, 8, True), (compiled_step.MOST_TOKENS + 1, 8, False), (1, 32, True), (1, 33, False)],
)
def test_sizes_of_which_the_loops_are_not_made_are_done_op_by_op(B, heads, fits, ops):
    config = small.SPARSE.replace(num_heads=heads, num_kv_heads=1)
    params = random(config, 0)
    step = compiled_step.prepared(ops, config, params, mixtral.new_cache(ops, config, params, B, 8))
    assert (step is not None) is fits


def test_an_interrupted_step_leaves_the_cache_as_it_was(ops, monkeypatch):
    config, params, tokens = draws(6)
    cache = after(ops, config, params, tokens)
    step, before = compiled_step.prepared(ops, config, params, cache), cache.positions.copy()
    whole = compiled_step._run

    def interrupted(*given):
        whole(*given)
        raise KeyboardInterrupt

    now = tokens[:, -STEPS : tokens.shape[1] - STEPS + 1].copy(), cache.lengths[:, None].copy()
    with monkeypatch.context() as patch:
        patch.setattr(compiled_step, "_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            step(*now)
    np.testing.assert_array_equal(cache.positions, before)
    expected = mixtral.decode(ops, config, params, after(ops, config, params, tokens), *now)
    assert relative_error(step(*now), expected) <= 1e-5


def test_weights_and_cache_live_as_long_as_the_step(ops):
    config, params, tokens = draws(5)
    cache = after(ops, config, params, tokens)
    step = compiled_step.prepared(ops, config, params, cache)
    held = [weakref.ref(params.layers[0].attention.wq), weakref.ref(cache.layers[0].k)]
    del params, cache
    gc.collect()
    assert all(ref() is not None for ref in held)
    del step
    gc.collect()
    assert not any(ref() is not None for ref in held)
