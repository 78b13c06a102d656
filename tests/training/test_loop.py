"""The training loop: schedule, batches, one step against AdamW by hand, evaluation in windows."""

import itertools
import math

import numpy as np
import pytest

from minimoe import mixtral
from minimoe.backends import make_backend
from minimoe.config import ModelConfig
from minimoe.evaluate import evaluate
from minimoe.params import leaves, map_leaves, random, stack_experts
from minimoe.training.loop import TrainConfig, batch, new_state, train_step

CONFIG = ModelConfig(
    vocab_size=40, hidden_size=16, intermediate_size=12, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6,
    num_experts=4, balance_form="per_layer", balance_coefficient=0.01,
)  # fmt: skip


def streams(seed: int = 0) -> dict[str, np.ndarray]:
    """Two domains that are easy to tell apart: one counts up, one repeats."""
    up = np.arange(400) % 20 + 3
    repeat = np.repeat(np.random.default_rng(seed).integers(23, 40, 100), 4)
    return {"up": up.astype(np.uint16), "repeat": repeat.astype(np.uint16)}


def test_learning_rate_warms_up_and_ends_at_its_floor() -> None:
    train = TrainConfig(steps=110, warmup=10, peak_lr=1.0, final_lr_share=0.1)
    assert train.learning_rate(1) == pytest.approx(0.1)
    assert train.learning_rate(10) == 1.0
    assert train.learning_rate(60) == pytest.approx(0.55)  # half-way down the cosine
    assert train.learning_rate(110) == pytest.approx(0.1)
    rates = [train.learning_rate(step) for step in range(10, 111)]
    assert all(a > b for a, b in itertools.pairwise(rates))


def test_batches_follow_from_seed_and_step_alone() -> None:
    train = TrainConfig(steps=10, batch_size=8, sequence_length=16)
    first = batch(streams(), train, 7)
    assert first.shape == (8, 16)
    np.testing.assert_array_equal(first, batch(streams(), train, 7))
    assert (first != batch(streams(), train, 8)).any()


def test_batches_follow_the_mixture() -> None:
    train = TrainConfig(steps=10, batch_size=400, sequence_length=4, mixture={"up": 3.0, "repeat": 1.0})
    rows = batch(streams(), train, 1)
    share = (rows[:, 0] < 23).mean()
    assert abs(share - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 400)
    none = TrainConfig(steps=10, batch_size=50, sequence_length=4, mixture={"up": 0.0, "repeat": 1.0})
    assert batch(streams(), none, 1).min() >= 23


def test_a_domain_shorter_than_a_sequence_is_named() -> None:
    with pytest.raises(ValueError, match="domain short has 3 tokens, fewer than sequence_length = 16"):
        batch({"short": np.arange(3)}, TrainConfig(steps=1, sequence_length=16), 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("batch_size", 0), ("warmup", 0), ("sequence_length", 1), ("clip", -1.0), ("peak_lr", math.nan)],
)
def test_settings_out_of_range_are_named(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=field):
        TrainConfig(**{"steps": 5, field: value})


@pytest.mark.parametrize("clip", [1e9, 0.05])
def test_one_step_is_adamw_with_clipping_by_the_global_norm(clip: float) -> None:
    ops = make_backend("numpy")
    train = TrainConfig(steps=50, warmup=5, batch_size=3, sequence_length=12, clip=clip, weight_decay=0.3)
    state = new_state(make_backend("numpy"), CONFIG, train)
    before = {name: leaf.copy() for name, leaf in leaves(state.params)}
    tokens = batch(streams(), train, 1)
    _, grads, _ = mixtral.loss_and_grads(ops, CONFIG, state.params, mixtral.check_inputs(tokens, 40))
    gradient = dict(leaves(grads))
    norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradient.values()))
    metrics = train_step(ops, CONFIG, train, state, tokens)
    assert metrics.gradient_norm == pytest.approx(norm, rel=1e-6)
    scale, lr = min(1.0, clip / norm), train.peak_lr / 5
    for name, w in leaves(state.params):
        g = gradient[name].astype(np.float64) * scale
        decay = 0.3 if w.ndim > 1 else 0.0
        # after one step m / (1 - β1) = g and v / (1 - β2) = g²
        expected = before[name] * (1 - lr * decay) - lr * g / (np.abs(g) + train.eps)
        # where g is about eps, its float32 error counts in full
        sure = np.abs(g) > 1e-5
        np.testing.assert_allclose(w[sure], expected[sure], rtol=0, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_training_learns_what_is_there_to_learn(backend: str) -> None:
    train = TrainConfig(steps=60, warmup=5, batch_size=8, sequence_length=24, peak_lr=1e-2)
    ops = make_backend(backend)
    state = new_state(ops, CONFIG, train)
    losses = [train_step(ops, CONFIG, train, state, batch(streams(), train, s)).loss for s in range(1, 61)]
    assert losses[0] > 3.5
    assert np.mean(losses[-5:]) < 1.2  # the counting domain is certain, the other 3/4 so


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    train = TrainConfig(steps=5, batch_size=2, sequence_length=8)
    state = new_state(make_backend("numpy"), CONFIG, train)
    state.params.norm[0] = np.nan
    with pytest.raises(FloatingPointError, match="step 1"):
        train_step(make_backend("numpy"), CONFIG, train, state, batch(streams(), train, 1))
    assert state.step == 0


def test_a_gradient_that_is_not_finite_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    train, ops = TrainConfig(steps=5, batch_size=2, sequence_length=8), make_backend("numpy")
    state = new_state(ops, CONFIG, train)
    before = {name: leaf.copy() for name, leaf in leaves(state.params)}
    whole = mixtral.loss_and_grads

    def overflowing(*args, **kwargs):
        losses, grads, routed = whole(*args, **kwargs)
        grads.norm[0] = np.inf
        return losses, grads, routed

    monkeypatch.setattr(mixtral, "loss_and_grads", overflowing)
    with pytest.raises(FloatingPointError, match="the gradient of step 1 has norm inf"):
        train_step(ops, CONFIG, train, state, batch(streams(), train, 1))
    for name, leaf in leaves(state.params):
        np.testing.assert_array_equal(leaf, before[name])


def test_a_mixture_names_every_domain() -> None:
    train = TrainConfig(steps=1, batch_size=2, sequence_length=4, mixture={"up": 1.0})
    with pytest.raises(ValueError, match="mixture must name the domains repeat, up, not up"):
        batch(streams(), train, 1)


@pytest.mark.parametrize("n", [2, 9, 16, 17, 24, 25, 61])
def test_evaluation_counts_every_token_once_with_enough_context(n: int) -> None:
    ops, window = make_backend("numpy"), 16
    params = map_leaves(stack_experts(random(CONFIG, 1)), lambda w: w.astype(np.float64))
    tokens = np.random.default_rng(n).integers(0, 40, n)
    losses = evaluate(ops, CONFIG, params, tokens, window=window, batch_size=3)
    assert losses.shape == (n - 1,)
    for target in range(1, n):
        # the window that counts token `target`: the first one whole, every other its second half
        start = 0 if target < window else (target - window // 2) // (window // 2) * (window // 2)
        assert target - start >= min(target, window // 2)
        inputs = mixtral.check_inputs(tokens[None, start:target], 40)
        logits = mixtral.forward(ops, CONFIG, params, inputs, last_only=True)[0][0, 0]
        expected = np.log(np.exp(logits).sum()) - logits[tokens[target]]
        assert losses[target - 1] == pytest.approx(expected, rel=1e-12), target
