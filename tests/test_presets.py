"""Scaled-down models of every preset, in all backends; Grok-1 also against plain loops."""

import numpy as np
import pytest

from minimoe import mixtral
from minimoe.backends import make_backend
from minimoe.config import PRESETS
from minimoe.params import leaves, map_leaves, named, random
from minimoe.shapes import Routing
from minimoe.trace import record
from tests import naive_grok
from tests.draws import draw_params, draw_tokens, forward, regroup, scaled
from tests.measure import assert_close, assert_slopes

NAMES = [name for name in PRESETS if name != "tiny"]


@pytest.mark.parametrize("name", NAMES)
def test_every_way_to_the_logits_is_the_same_in_every_backend(name):
    config, rng = scaled(name), np.random.default_rng(0)
    params = draw_params(config, rng)
    tokens, _ = draw_tokens(rng, config, B=2, T=9)
    expected, _ = forward(make_backend("numpy"), config, params, tokens)
    for backend in ("numpy", "numba"):
        ops = make_backend(backend)
        assert_close(forward(ops, config, params, tokens)[0], expected)
        cache = mixtral.new_cache(ops, config, params, 2, 9)
        cuts = [slice(0, 4), slice(4, 6), *(slice(t, t + 1) for t in range(6, 9))]
        parts = [forward(ops, config, params, tokens[:, cut], cache=cache)[0] for cut in cuts]
        assert_close(np.concatenate(parts, axis=1), expected)


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_as_close_in_numba_as_in_numpy(name):
    config, rng = scaled(name), np.random.default_rng(1)
    params = draw_params(config, rng)
    tokens, _ = draw_tokens(rng, config, B=3, T=12)
    expected, routing = forward(make_backend("numpy"), config, params, tokens)
    forced = None if routing is None else Routing(routing.ids)
    single = map_leaves(params, lambda w: w.astype(np.float32))
    for backend in ("numpy", "numba"):
        found, _ = forward(make_backend(backend), config, single, tokens, routing=forced)
        assert found.dtype == np.float32
        assert_close(found, expected, 5e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_gradients_are_slopes_along_every_leaf(name, backend):
    config, rng, ops = scaled(name), np.random.default_rng(2), make_backend(backend)
    params = draw_params(config, rng)
    tokens, mask = draw_tokens(rng, config, B=2, T=6, side="left")
    inputs = mixtral.check_inputs(tokens, config.vocab_size, mask)
    _, routing = forward(ops, config, params, tokens, mask=mask)
    choose = mixtral.choices(ops, config, tokens.size, None if routing is None else Routing(routing.ids), ())
    keys, arrays = zip(*leaves(params), strict=True)

    def loss(*arrays):
        tree = regroup(config, dict(zip(keys, arrays, strict=True)))
        return mixtral.loss_and_grads(ops, config, tree, inputs, choose=choose)[0].total

    _, grads, _ = mixtral.loss_and_grads(ops, config, params, inputs, choose=choose)
    assert [key for key, _ in leaves(grads)] == list(keys)
    assert_slopes(loss, list(arrays), [grad for _, grad in leaves(grads)], step=1e-4)


def plain_loops(config, params, tokens):
    return naive_grok.forward(
        tokens, dict(named(params)), heads=config.num_heads, kv_heads=config.num_kv_heads,
        k=config.num_experts_per_token, eps=1e-5, theta=1e4, scale=0.08838834764831845, cap=30.0,
        embedding_multiplier=78.38367176906169, output_multiplier=0.5773502691896257,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_grok_equals_plain_loops(backend):
    config, rng = scaled("grok-1"), np.random.default_rng(3)
    params = draw_params(config, rng)
    for layer in params.layers:  # scores of several hundred, so that the cap bends them
        layer.attention.wq *= 40
    tokens, _ = draw_tokens(rng, config, B=1, T=8)
    logits, streams = plain_loops(config, params, tokens[0])
    assert_close(forward(make_backend(backend), config, params, tokens)[0][0], np.array(logits))
    assert len(streams) == config.num_layers


def test_groks_trace_holds_the_stream_of_plain_loops_and_capped_scores():
    config, rng = scaled("grok-1"), np.random.default_rng(4)
    params = draw_params(config, rng)
    for layer in params.layers:
        layer.attention.wq *= 400
    tokens, _ = draw_tokens(rng, config, B=1, T=8)
    logits, streams = plain_loops(config, params, tokens[0])
    ops = make_backend("numpy")
    trace = record(ops, config, params, mixtral.check_inputs(tokens, config.vocab_size))
    assert_close(trace["logits"][0], np.array(logits))
    for i, stream in enumerate(streams):
        assert_close(trace[f"layers.{i}.out"], np.array(stream))
        written = trace[f"layers.{i}.ffn_post_norm"]
        assert_close(trace[f"layers.{i}.out"], trace[f"layers.{i}.attention_residual"] + written)
        scores = trace[f"layers.{i}.attention.scores"]
        assert 25 < scores.max() <= 30
        assert (trace[f"layers.{i}.gating.weights"].sum(axis=1) < 1).all()
    assert_close(trace["tok_embeddings"], 78.38367176906169 * params.tok_embeddings[tokens[0]])


def test_fresh_weights_of_a_scaled_grok_make_finite_logits():
    config = scaled("grok-1")
    logits, _ = forward(make_backend("numba"), config, random(config, 0), np.arange(20)[None])
    assert np.isfinite(logits).all() and logits.std() > 0.01
