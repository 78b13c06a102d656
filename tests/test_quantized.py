"""int8 storage: what it means, that both dialects compute it, and where it may be used."""

import json
import math

import numpy as np
import pytest

import minimoe
from minimoe import schedule
from minimoe.arrays import BFLOAT16
from minimoe.backends import make_backend
from minimoe.cli import main
from minimoe.config import ConfigError
from minimoe.ops.experts import numba_cpu as experts_numba
from minimoe.ops.experts import reference as experts
from minimoe.ops.linear import numba_cpu as linear_numba
from minimoe.ops.linear import reference as linear
from minimoe.params import leaves, named, quantized, stack_experts
from minimoe.params import random as random_params
from minimoe.quantized import Int8, parts, quantize
from tests import small
from tests.measure import relative_error

RNG = np.random.default_rng(8)


def draw(*shape, dtype=np.float32):
    return RNG.standard_normal(shape).astype(dtype)


# ---- the format


def test_no_weight_is_off_by_more_than_half_a_step():
    w = draw(40, 30) * np.exp(draw(40, 1))
    q = quantize(w)
    assert q.values.dtype == np.int8 and q.scale.dtype == np.float32
    np.testing.assert_allclose(q.scale, np.abs(w).max(axis=1) / 127, rtol=1e-6)
    assert (np.abs(q.widened(np.float64) - w) <= q.scale[:, None] * (0.5 + 1e-4)).all()
    assert np.abs(q.values).max(axis=1).min() == 127


def test_halves_go_to_even_and_zero_rows_stay_zero():
    q = quantize(np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [0.0] * 6], np.float32))
    assert q.values.tolist() == [[127, 0, 2, 2, 0, -2], [0] * 6]
    assert q.scale.tolist() == [1, 1] and (q.widened()[1] == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, BFLOAT16])
def test_it_remembers_what_it_was_made_from(dtype):
    q = quantize(draw(4, 6).astype(dtype))
    assert q.source == dtype and q.scale.dtype == np.float32 and q.dtype == np.int8
    assert (q.shape, q.T.shape, len(q), q.size, q.ndim, q.nbytes) == ((4, 6), (6, 4), 4, 24, 2, 24 + 16)


def test_views_are_views_of_the_same_matrix():
    q = quantize(draw(5, 7))
    wide = q.widened()
    np.testing.assert_array_equal(q.T.widened(), wide.T)
    np.testing.assert_array_equal(q[1:3, 2:].widened(), wide[1:3, 2:])
    np.testing.assert_array_equal(q.T[2:, 1:3].widened(), wide.T[2:, 1:3])
    np.testing.assert_array_equal(q.T.T.widened(), wide)
    stack = quantize(draw(3, 5, 7))
    np.testing.assert_array_equal(stack[1].widened(), stack.widened()[1])
    assert np.shares_memory(stack[1].values, stack.values)


def test_a_product_is_the_sum_over_integers_times_the_scale():
    x, q = draw(3, 11, dtype=np.float64), quantize(draw(6, 11))
    found = x @ q.T
    for n in range(3):
        for o in range(6):
            total = sum(float(q.values[o, i]) * x[n, i] for i in range(11))
            assert math.isclose(found[n, o], total * float(q.scale[o]), rel_tol=1e-13)
    np.testing.assert_allclose(found @ q, found @ q.widened(np.float64), rtol=1e-12)


# ---- the dialects


@pytest.mark.parametrize("N", [1, 2, 4, 5, 70])
@pytest.mark.parametrize("widths", [(1,), (7,), (64, 16, 17), (4096,)])
def test_linear_is_the_same_in_both_dialects(N, widths):
    worst = expected = 0.0
    for _ in range(8):
        weights, x = [quantize(draw(width, 96)) for width in widths], draw(N, 96)
        truth = linear.forward(x.astype(np.float64), weights)
        for t, e, f in zip(truth, linear.forward(x, weights), linear_numba.forward(x, weights), strict=True):
            assert f.dtype == e.dtype == np.float32 and f.shape == e.shape == (N, t.shape[1])
            worst, expected = max(worst, relative_error(f, t)), max(expected, relative_error(e, t))
    assert worst <= 2 * expected + 8 * 2**-24 * math.sqrt(96)


@pytest.mark.parametrize("N", [1, 3, 4, 5, 130])
@pytest.mark.parametrize("stacked", [True, False])
def test_experts_are_the_same_in_both_dialects(N, stacked):
    D, F, E, k = 24, 37, 5, 2
    worst = expected = 0.0
    for _ in range(8):
        w1, w2, w3 = (quantize(draw(E, *shape)) for shape in ((F, D), (D, F), (F, D)))
        if not stacked:
            w1, w2, w3 = ([w[e] for e in range(E)] for w in (w1, w2, w3))
        ids = np.argsort(draw(N, E), axis=1)[:, :k]
        ids[0, 1] = -1
        given = draw(N, D), ids, np.where(ids >= 0, np.float32(0.4), 0).astype(np.float32)
        truth, _ = experts.forward(given[0].astype(np.float64), w1, w2, w3, ids, given[2].astype(np.float64))
        e, _ = experts.forward(given[0], w1, w2, w3, *given[1:])
        f, _ = experts_numba.forward(given[0], w1, w2, w3, *given[1:])
        worst, expected = max(worst, relative_error(f, truth)), max(expected, relative_error(e, truth))
    assert worst <= 2 * expected + 8 * 2**-24 * math.sqrt(F)


def test_float64_states_are_computed_in_float64():
    x, q = draw(2, 64, dtype=np.float64), quantize(draw(200, 64))
    for rows in (x, np.concatenate([x] * 40)):
        np.testing.assert_allclose(linear_numba.forward(rows, [q])[0], rows @ q.T, rtol=0, atol=1e-12)


def test_what_a_loop_reads_is_contiguous():
    values, scale = parts(quantize(draw(6, 8))[1:4, 2:7])
    assert values.flags.c_contiguous and scale.flags.c_contiguous
    assert parts(scale) == (scale, None) or parts(scale)[1] is None
    x, q = draw(1, 5), quantize(draw(600, 8))[:, 2:7]
    np.testing.assert_allclose(linear_numba.forward(x, [q])[0], x @ q.T, rtol=1e-5, atol=1e-5)


# ---- models


def configs():
    yield small.SPARSE
    yield small.SPARSE.replace(tie_embeddings=True)
    yield small.SPARSE.replace(sliding_window=3)
    yield small.SPARSE.replace(num_experts=1, num_experts_per_token=1, dense=True)


@pytest.mark.parametrize("config", configs())
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_both_backends_agree_and_a_cache_changes_nothing(config, dtype):
    params = quantized(random_params(config, 3, dtype))
    tokens = RNG.integers(0, config.vocab_size, (2, 9))
    models = [minimoe.Model(config, params, make_backend(name)) for name in ("numpy", "numba")]
    whole = [model.forward(tokens) for model in models]
    limit = 1e-5 if dtype == np.float32 else 2e-2
    assert relative_error(whole[1], whole[0]) < limit
    for model, expected in zip(models, whole, strict=True):
        cache = model.new_cache(2, 9)
        assert cache.layers[0].k.dtype == dtype
        steps = [model.forward(tokens[:, :5], cache=cache)]
        steps += [model.forward(tokens[:, t : t + 1], cache=cache) for t in range(5, 9)]
        assert relative_error(np.concatenate(steps, axis=1), expected) < limit


def test_only_matrices_of_linear_maps_and_experts_are_int8():
    tree = quantized(random_params(small.SPARSE, 0))
    narrow = {
        name for name, w in leaves(tree) if isinstance(w, Int8) or (isinstance(w, list) and isinstance(w[0], Int8))
    }
    kinds = {name.split(".", 2)[2] if name.startswith("layers.") else name for name in narrow}
    assert kinds == {
        "attention.wq", "attention.wk", "attention.wv", "attention.wo", "output",
        *(f"feed_forward.experts.w{i}" for i in (1, 2, 3)),
    }  # fmt: skip
    assert tree.storage == "int8" and tree.dtype == np.float32


def test_fresh_weights_are_those_of_float32_narrowed():
    config = small.SPARSE
    one, other = random_params(config, 5, "int8"), quantized(random_params(config, 5))
    for (name, a), (same, b) in zip(named(one), named(other), strict=True):
        assert name == same and type(a) is type(b)
        for x, y in zip(parts(a), parts(b), strict=True):
            assert (x is None and y is None) or np.array_equal(x, y), name
    assert minimoe.random(config, 5, dtype="int8").params.storage == "int8"


def test_the_bundled_model_in_int8_is_near_itself():
    """It is off by 2% of its largest logit, and chooses the same next token at 29 of 30 places."""
    model, narrow = minimoe.load("tiny", dtype="float32"), minimoe.load("tiny", dtype="int8")
    ids = np.array(model.tokenizer.encode("def add(a, b):\n    return a + b\n\n\ndef main(argv):\n"))
    right, found = model.forward(ids), narrow.forward(ids)
    assert 1e-3 < relative_error(found, right) < 0.05
    assert (right.argmax(-1) == found.argmax(-1)).mean() > 0.9
    assert narrow.params.dtype == BFLOAT16  # what is not narrowed stays as it is stored
    assert "int8" in repr(narrow)


def test_it_can_be_traced_and_its_bytes_are_counted():
    config = small.SPARSE
    model = minimoe.random(config, 1, dtype="int8")
    tokens = np.arange(6)
    trace = model.trace(tokens)
    np.testing.assert_array_equal(trace["logits"][0], model.forward(tokens))
    [qkv] = [step for step in schedule.schedule(config) if step.name == "layers.0.attention.qkv"]
    wide = minimoe.random(config, 1).trace(tokens)
    rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    saved = wide.cost(qkv).bytes - trace.cost(qkv).bytes
    assert saved == rows * config.hidden_size * 3 - 4 * rows
    norm = next(step for step in schedule.schedule(config) if step.room == "rmsnorm")
    assert wide.cost(norm) == trace.cost(norm)


def test_a_trace_of_it_can_be_saved(tmp_path):
    trace = minimoe.random(small.SPARSE, 1, dtype="int8").trace(np.arange(3))
    trace.save(tmp_path / "t.safetensors")
    assert type(trace).load(tmp_path / "t.safetensors").stored == "int8"


def test_moving_it_to_a_backend_keeps_every_bit():
    model = minimoe.random(small.SPARSE, 2, dtype="int8", backend="numba")
    moved = model.to("numpy")
    assert all(
        np.array_equal(x, y)
        for (_, a), (_, b) in zip(named(model.params), named(moved.params), strict=True)
        for x, y in zip(parts(a), parts(b), strict=True)
        if x is not None
    )


# ---- what cannot be done


def test_it_can_be_neither_trained_nor_saved(tmp_path):
    model = minimoe.random(small.SPARSE, dtype="int8")
    with pytest.raises(ConfigError, match="int8 cannot be trained: load them in float32 or bfloat16"):
        model.loss_and_grads(np.arange(4))
    with pytest.raises(ConfigError, match="int8 cannot be saved"):
        model.save(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_command_line_takes_it(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("def add(a, b):\n    return a + b\n" * 8)
    losses = []
    for dtype in ("float32", "int8"):
        assert main(["eval", "--dtype", dtype, "--json", str(tmp_path / "a.txt")]) == 0
        losses.append(json.loads(capsys.readouterr().out)["texts"][0]["loss"])
    assert 0 < abs(losses[0] - losses[1]) < 0.1
    assert main(["generate", "--dtype", "int4", "a"]) == 2
    assert "dtype must be one of float32, float64, bfloat16, int8, not 'int4'" in capsys.readouterr().err


def test_a_stack_of_int8_is_made_of_its_parts():
    tree = stack_experts(quantized(random_params(small.SPARSE, 0)))
    w1 = tree.layers[0].feed_forward.w1
    assert isinstance(w1, Int8) and w1.ndim == 3
    assert w1[0].ndim == 2
