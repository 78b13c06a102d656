"""The kernels of cross-entropy, balance losses and AdamW against the reference."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from minimoe.arrays import numbers
from minimoe.backends import make_backend
from minimoe.config import ModelConfig
from minimoe.ops.adamw import cupy_gpu as adamw
from minimoe.ops.adamw import reference as adamw_reference
from minimoe.ops.balance_loss import cupy_gpu as balance_loss
from minimoe.ops.balance_loss import reference as balance_reference
from minimoe.ops.cross_entropy import cupy_gpu as cross_entropy
from minimoe.ops.cross_entropy import reference as cross_entropy_reference
from minimoe.training import loop
from tests.cuda_on_cpu.measuring import OnDevice, assert_same_bits_in_any_order
from tests.cuda_on_cpu.stand_in import STAND_IN, STATE
from tests.measure import as_dtype, assert_as_good_as_reference, assert_close

FORMS = ("concatenated", "per_layer", "switch")


# ---- cross-entropy

ROWS = [(1, 1, 0), (1, 5, 1), (7, 3, 3), (33, 9, 0), (3, 700, 1)]  # N, V, how many are not counted


def draw_rows(seed):
    rng = np.random.default_rng(seed)
    N, V, ignored = ROWS[seed % len(ROWS)]
    targets = rng.integers(0, V, N)
    targets[rng.permutation(N)[:ignored]] = -1
    return 10 ** rng.uniform(-1, 1.5) * rng.normal(size=(N, V)), targets


def cross_entropies(module, logits, targets):
    loss, losses, lse = module.forward(logits, targets)
    losses = losses + 1  # where V = 1 they are zero but for rounding
    return np.asarray(loss, np.float64) + 1, losses, lse, module.backward(0.7, logits, targets, lse)


def test_cross_entropy_errs_as_the_reference_does(cupy):
    dialect = OnDevice(cupy, cross_entropy)
    draws = [draw_rows(seed) for seed in range(20)]
    assert_as_good_as_reference(draws, cross_entropies, cross_entropy_reference, dialect, n=700)
    for inputs in draws[: len(ROWS)]:
        found = cross_entropies(dialect, *inputs)
        assert_close(found[:3], cross_entropies(cross_entropy_reference, *inputs)[:3], 1e-13)
        assert_close(found[3], cross_entropies(cross_entropy_reference, *inputs)[3], 1e-12)


def test_rows_that_are_not_counted_have_no_gradient_and_none_counted_is_zero(cupy):
    dialect, logits = OnDevice(cupy, cross_entropy), draw_rows(2)[0]
    targets = np.array([0, -1, 2, -1, -1, 1, -1])
    dlogits = dialect.backward(1.0, logits, targets, dialect.forward(logits, targets)[2])
    assert (dlogits.any(axis=1) == (targets >= 0)).all()
    loss, losses, lse = dialect.forward(logits, np.full(7, -1))
    assert loss == 0 and not losses.any()
    assert not dialect.backward(1.0, logits, np.full(7, -1), lse).any()


def test_large_logits_do_not_overflow(cupy):
    logits = np.array([[1e4, -1e4], [-1e4, -1e4]], np.float32)
    loss, _, lse = OnDevice(cupy, cross_entropy).forward(logits, np.array([1, 0]))
    assert_close(loss, (2e4 + np.log(2)) / 2, 1e-6)
    assert np.isfinite(OnDevice(cupy, cross_entropy).backward(1.0, logits, np.array([1, 0]), lse)).all()


# ---- balance losses

# L, N, E, k; with k = E the gradient would be zero but for rounding
TOKENS = [(1, 1, 2, 1), (1, 1, 4, 2), (3, 7, 4, 2), (2, 9, 5, 3), (2, 301, 5, 1)]


def draw_tokens(seed):
    rng = np.random.default_rng(seed)
    L, N, E, k = TOKENS[seed % len(TOKENS)]
    logits = 2 * rng.normal(size=(L, N, E))
    ids = np.argsort(-logits, axis=-1)[..., :k]
    active = rng.random(N) < 0.7 if seed % 2 else None
    if active is not None:
        ids[:, ~active] = -1
    return logits, ids, active, FORMS[seed % 3]


def balances(module, logits, ids, active, form):
    loss = np.asarray(module.forward(logits, ids, active, form), np.float64)
    return loss, module.backward(0.7, logits, ids, active, form)


def test_balance_losses_err_as_the_reference_does(cupy):
    dialect = OnDevice(cupy, balance_loss)
    draws = [draw_tokens(seed) for seed in range(30)]
    assert_as_good_as_reference(draws, balances, balance_reference, dialect, n=301)
    for inputs in draws:
        assert_close(balances(dialect, *inputs), balances(balance_reference, *inputs))


@pytest.mark.parametrize("form", FORMS)
def test_balance_of_no_active_token_is_zero(cupy, form):
    logits, ids, _, _ = draw_tokens(2)
    loss, dlogits = balances(OnDevice(cupy, balance_loss), logits, ids, np.zeros(7, bool), form)
    assert loss == 0 and not dlogits.any()


def test_balance_of_one_expert_is_one(cupy):
    loss, dlogits = balances(OnDevice(cupy, balance_loss), np.ones((2, 5, 1)), np.zeros((2, 5, 1), int), None, "switch")
    assert loss == 1 and not dlogits.any()


def test_an_unknown_form_is_refused(cupy):
    for function in (balance_loss.forward, lambda *a: balance_loss.backward(1.0, *a)):
        with pytest.raises(ValueError, match="'global'"):
            function(cupy.zeros((1, 1, 2)), cupy.zeros((1, 1, 1), cupy.int64), None, "global")


# ---- AdamW

HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def steps(module, w, gradients, scale):
    w, m, v = w.copy(), np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        assert module.forward(w, np.asarray(g), m, v, step=t, scale=scale, **HYPER) is None
    return w, m, v, np.asarray(module.squared_norm(gradients), np.float64)


def test_adamw_errs_as_the_reference_does(cupy):
    shapes = [(), (1,), (4, 3), (2, 3, 5), (1030,)]
    draws = [
        (rng.normal(size=shape), rng.normal(size=(3, *shape)) * 10 ** rng.uniform(-3, 3), [1.0, 0.25][seed % 2])
        for seed, rng, shape in ((s, np.random.default_rng(s), shapes[s % len(shapes)]) for s in range(20))
    ]
    dialect = OnDevice(cupy, adamw)
    assert_as_good_as_reference(draws, steps, adamw_reference, dialect, n=1)
    for inputs in draws[: len(shapes)]:
        assert_close(steps(dialect, *inputs), steps(adamw_reference, *inputs), 1e-13)


def test_adamw_changes_nothing_that_is_a_copy(cupy):
    w = cupy.zeros((4, 3)).T
    with pytest.raises(ValueError, match="must be contiguous"):
        adamw.forward(w, w, w, w, step=1, **HYPER)


# ---- all of them


def test_a_training_step_reads_back_once(cupy):
    """Losses, the gradient's norm and the least share together; experts of many tokens ask how many each got."""
    if cupy is not STAND_IN:
        pytest.skip("counted by the stand-in")
    config = ModelConfig(
        vocab_size=11, hidden_size=8, intermediate_size=4, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4,
        num_experts=3, num_experts_per_token=2, max_length=8, balance_form="per_layer", bos_id=None, eos_id=None,
    )  # fmt: skip
    ops, train, asked = make_backend("cuda"), loop.TrainConfig(steps=2, batch_size=2, sequence_length=4), 0

    def watched(function):
        def call(*args, **kwargs):
            nonlocal asked
            before = STATE.syncs
            result = function(*args, **kwargs)
            asked += STATE.syncs - before
            return result

        return call

    experts = SimpleNamespace(forward=watched(ops.experts.forward), backward=watched(ops.experts.backward))
    ops = dataclasses.replace(ops, experts=experts)
    state = loop.new_state(ops, config, train)
    before = STATE.syncs
    loop.train_step(ops, config, train, state, loop.batch({"a": np.arange(11)}, train, 1))
    assert STATE.syncs - before - asked == 1


def test_threads_do_not_race(cupy):
    rows, tokens = as_dtype(draw_rows(4), np.float32), as_dtype(draw_tokens(9), np.float32)

    def call():
        yield from cross_entropies(OnDevice(cupy, cross_entropy), *rows)
        yield from balances(OnDevice(cupy, balance_loss), *tokens)
        yield OnDevice(cupy, adamw).squared_norm(np.linspace(-1, 2, 3000))

    assert_same_bits_in_any_order(cupy, call)


def test_numbers_are_read_together(cupy):
    before = STATE.syncs
    there = [cupy.asarray(np.float32(1.5)), 2.0, cupy.asarray(np.float64(-3))]
    assert numbers(*there) == [1.5, 2.0, -3.0]
    assert STATE.syncs - before <= 1  # on a device, where nothing is counted, 0
    assert numbers(1.0, np.float32(2)) == [1.0, 2.0]
