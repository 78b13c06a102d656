import math

import numpy as np
import pytest

from tests.measure import assert_close, dialects

HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(params=dialects("adamw"), ids=lambda m: m.__name__.rpartition(".")[2])
def adamw(request):
    return request.param


def naive(w, gradients, scale):
    w, m, v = w.copy(), np.zeros(w.shape), np.zeros(w.shape)
    b1, b2, lr = HYPER["beta1"], HYPER["beta2"], HYPER["lr"]
    for t, g in enumerate(gradients, start=1):
        for i in np.ndindex(w.shape):
            m[i] = b1 * m[i] + (1 - b1) * scale * g[i]
            v[i] = b2 * v[i] + (1 - b2) * (scale * g[i]) ** 2
            w[i] -= lr * HYPER["weight_decay"] * w[i]
            w[i] -= lr * (m[i] / (1 - b1**t)) / (math.sqrt(v[i] / (1 - b2**t)) + HYPER["eps"])
    return w, m, v


def run(adamw, w, gradients, **hyper):
    w, m, v = w.copy(), np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        assert adamw.forward(w, g, m, v, step=t, **{**HYPER, **hyper}) is None
    return w, m, v


def draw(*shape):
    rng = np.random.default_rng(len(shape))
    return rng.normal(size=shape), rng.normal(size=(5, *shape))


@pytest.mark.parametrize("shape", [(), (1,), (4, 3), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_equals_naive_loops_over_several_steps(adamw, shape, scale):
    w, gradients = draw(*shape)
    assert_close(run(adamw, w, gradients, scale=scale), naive(w, gradients, scale))


def test_scaling_stands_for_a_scaled_gradient(adamw):
    w, gradients = draw(4, 3)
    assert_close(run(adamw, w, gradients, scale=0.25), run(adamw, w, 0.25 * gradients))


def test_the_first_step_has_the_size_of_the_learning_rate(adamw):
    w = np.zeros(2)
    assert_close(run(adamw, w, [np.array([1e-3, -50.0])])[0], [-3e-3, 3e-3], 1e-4)


def test_weights_without_gradient_decay_by_lr_times_weight_decay(adamw):
    assert_close(run(adamw, np.array([2.0]), [np.zeros(1)] * 3)[0], [2 * (1 - 3e-4) ** 3])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_squared_norm_adds_in_float64(adamw, dtype):
    g = np.random.default_rng(0).normal(size=(301, 7)).astype(dtype)
    assert_close(adamw.squared_norm(g), math.fsum(float(x) ** 2 for x in g.flat), 1e-14)
    assert adamw.squared_norm(np.full((2, 2), 1e30, dtype)) > 3.9e60  # would overflow in float32


@pytest.mark.peers
def test_equals_torch(adamw):
    torch = pytest.importorskip("torch")
    w, gradients = draw(4, 3)
    theirs = torch.nn.Parameter(torch.tensor(w))
    optimizer = torch.optim.AdamW([theirs], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for g in gradients:
        theirs.grad = torch.tensor(g)
        optimizer.step()
    assert_close(run(adamw, w, gradients)[0], theirs.detach().numpy())
