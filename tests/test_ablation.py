"""Switching experts off: the costs are differences of losses that can be computed otherwise."""

import dataclasses

import numpy as np
import pytest

import minimoe
from minimoe.ablation import Ablation, switch_off
from minimoe.params import map_leaves
from tests.small import DENSE, SPARSE

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model():
    return minimoe.random(SPARSE.replace(num_layers=2, num_experts=4), backend="numpy", dtype="float64")


def text(n):
    return RNG.integers(3, 1024, n).tolist()


def loss(model, tokens, disabled):
    """Mean loss of the next token, by hand."""
    logits = model.forward(tokens, disabled_experts=disabled)
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -np.mean([logs[t, tokens[t + 1]] for t in range(len(tokens) - 1)])


def test_costs_are_differences_of_losses(model):
    texts = {"a": text(40), "b": text(25)}
    found = switch_off(model.ops, model.config, model.params, texts, window=64)
    for g, tokens in enumerate(texts.values()):
        whole = loss(model, tokens, [])
        assert found.losses[g] == pytest.approx(whole)
        for layer in range(2):
            for e in range(4):
                assert found.costs[g, layer, e] == pytest.approx(loss(model, tokens, [(layer, e)]) - whole, abs=1e-12)
    assert found.names == ("a", "b") and np.isnan(found.errors).all()  # a single unit each


def test_windows_are_spread_over_the_text_and_count_alike(model):
    tokens = text(100)
    found = switch_off(model.ops, model.config, model.params, {"a": tokens}, experts=[(1, 2)], window=30, windows=2)
    parts = [tokens[:30], tokens[70:]]
    expected = np.mean([loss(model, part, [(1, 2)]) - loss(model, part, []) for part in parts])
    assert found.costs[0, 1, 2] == pytest.approx(expected, abs=1e-12)
    assert np.isnan(found.costs).sum() == 7


def test_an_expert_that_nobody_chooses_costs_nothing(model):
    gates = [np.vstack([layer.feed_forward.gate[:3], 1e3 * np.ones(16)]) for layer in model.params.layers]
    params = map_leaves(model.params, np.array)
    for layer, gate in zip(params.layers, gates, strict=True):
        layer.feed_forward.gate[...] = gate
        layer.feed_forward.gate[3] = 0
        layer.feed_forward.gate[2] = layer.feed_forward.gate[1]  # ties with expert 1: the lower one is chosen first
    found = switch_off(model.ops, model.config, params, {"a": text(60)})
    for layer in range(2):
        for e in range(4):
            if found.usage[0, layer, e] == 0:
                assert found.costs[0, layer, e] == 0
            elif found.usage[0, layer, e] > 0.2:
                assert found.costs[0, layer, e] != 0
    np.testing.assert_allclose(found.usage.sum(axis=-1), 2)  # two experts a token


def test_standard_errors_are_those_of_the_mean_over_units():
    """Units of 64: with equal sizes, std / sqrt(units)."""
    from minimoe.ablation import _mean_and_error

    rise = RNG.normal(size=(3, 128))
    means = rise.reshape(6, 64).mean(axis=1)
    mean, error = _mean_and_error(rise)
    assert mean == pytest.approx(means.mean()) and error == pytest.approx(means.std(ddof=1) / np.sqrt(6))
    assert np.isnan(_mean_and_error(np.full((1, 4), np.nan))[0])


def test_frequency_alone_would_share_the_costs_by_usage():
    usage = np.array([[[0.5, 0.5, 1.0, 0.0]]])
    costs = np.array([[[0.4, 0.0, 0.0, 0.0]]])
    ablation = Ablation(("a",), np.ones(1), costs, np.zeros_like(costs), usage)
    np.testing.assert_allclose(ablation.by_usage, [[[0.1, 0.1, 0.2, 0.0]]])
    tried = dataclasses.replace(ablation, costs=np.array([[[0.4, np.nan, 0.2, 0.0]]]))
    np.testing.assert_allclose(tried.by_usage, [[[0.2, np.nan, 0.4, 0.0]]])


def test_backends_agree(model):
    texts = {"a": text(50)}
    one, other = (switch_off(m.ops, m.config, m.params, texts) for m in (model, model.to("numba")))
    np.testing.assert_allclose(one.costs, other.costs, atol=1e-12)
    np.testing.assert_array_equal(one.usage, other.usage)


def test_progress_counts_every_pass(model):
    passes = []
    switch_off(model.ops, model.config, model.params, {"a": text(9)}, progress=passes.append)
    assert sum(passes) == 1 + 2 * 4


def test_models_without_experts_to_spare_are_refused(model):
    for config, message in ((DENSE, "a dense model has no router"), (SPARSE.replace(num_experts=2), "all 2 experts")):
        other = minimoe.random(config, backend="numpy")
        with pytest.raises(ValueError, match=message):
            switch_off(other.ops, other.config, other.params, {"a": text(9)})
    with pytest.raises(ValueError, match="a: fewer than two tokens"):
        switch_off(model.ops, model.config, model.params, {"a": [1]})
    with pytest.raises(ValueError, match="window must be at least 2"):
        switch_off(model.ops, model.config, model.params, {"a": text(9)}, window=1)
