"""A scaled-down Grok-1 on the CUDA backend against the reference: logits, a cache in chunks and tokens, gradients."""

import numpy as np
import pytest

from minimoe import mixtral
from minimoe.backends import make_backend
from minimoe.params import leaves, map_leaves
from tests.cuda_on_cpu.measuring import to_host
from tests.draws import draw_params, draw_tokens, forward, scaled
from tests.measure import assert_close

NUMPY = make_backend("numpy")


@pytest.mark.parametrize("name", ["grok-1"])
def test_logits_cache_and_gradients_are_those_of_the_reference(cupy, name):
    config, rng = scaled(name), np.random.default_rng(0)
    params = draw_params(config, rng)
    tokens, _ = draw_tokens(rng, config, B=2, T=9)
    ops, there = make_backend("cuda"), map_leaves(params, cupy.asarray)
    expected, _ = forward(NUMPY, config, params, tokens)
    assert_close(to_host(forward(ops, config, there, tokens)[0]), expected)
    cache = mixtral.new_cache(ops, config, there, 2, 9)
    cuts = [slice(0, 4), slice(4, 7), slice(7, 8), slice(8, 9)]
    parts = [to_host(forward(ops, config, there, tokens[:, cut], cache=cache)[0]) for cut in cuts]
    assert_close(np.concatenate(parts, axis=1), expected)
    inputs = mixtral.check_inputs(tokens, config.vocab_size)
    _, grads, _ = mixtral.loss_and_grads(NUMPY, config, params, inputs)
    _, found, _ = mixtral.loss_and_grads(ops, config, there, inputs)
    for (leaf, gradient), (_, on_gpu) in zip(leaves(grads), leaves(found), strict=True):
        assert np.abs(to_host(on_gpu) - gradient).max() <= 1e-11 * np.abs(gradient).max(), leaf
