"""Our training loss and its gradients against torch autograd through transformers in true float64."""

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from minimoe import mixtral  # noqa: E402
from minimoe.backends import make_backend  # noqa: E402
from minimoe.params import named  # noqa: E402
from tests.draws import SIDES, draw_config, draw_dense_config, draw_params, draw_tokens  # noqa: E402
from tests.measure import relative_error  # noqa: E402
from tests.peers import lifted  # noqa: E402

pytestmark = pytest.mark.peers

CASES = range(32)
TOLERANCE = 1e-9


@functools.cache
def case(seed):
    """A model, a batch, and their loss and gradients.

    With W = 1 the probabilities are constant, and the gradients of wq and wk rounding errors about zero: W is at least
    2 here, and some sequence has at least three tokens.
    """
    rng = np.random.default_rng([1701, seed])
    window = [None, int(rng.integers(2, 8))][seed % 2]
    draw = draw_dense_config if seed % 6 == 5 else draw_config
    config = draw(rng, sliding_window=window)
    params = draw_params(config, rng)
    while True:
        tokens, mask = draw_tokens(rng, config, T=int(rng.integers(3, 16)), side=SIDES[seed // 2 % 4])
        if mask is None or mask.sum(axis=1).max() >= 3:
            break
    with lifted.lifted():
        loss, grads = lifted.loss_and_grads(lifted.build(config, params), config, tokens, mask)
    return config, params, tokens, mask, loss, grads


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("seed", CASES)
def test_loss_and_gradients_equal_autograd(seed, backend, errors):
    config, params, tokens, mask, their_loss, their_grads = case(seed)
    inputs = mixtral.check_inputs(tokens, config.vocab_size, mask)
    losses, grads, _ = mixtral.loss_and_grads(make_backend(backend), config, params, inputs)
    assert relative_error(losses.total, their_loss) <= TOLERANCE
    ours = dict(named(grads))
    assert sorted(ours) == sorted(their_grads)
    by_name = {name: relative_error(ours[name], truth) for name, truth in their_grads.items()}
    worst = max(by_name, key=by_name.get)
    errors.append(by_name[worst])
    assert errors[-1] <= TOLERANCE, worst


def test_the_cases_cover_what_matters():
    drawn = [case(seed) for seed in CASES]
    configs, masks = [d[0] for d in drawn], [d[3] for d in drawn]
    assert any(c.dense for c in configs) and any(c.tie_embeddings for c in configs)
    assert any(c.num_experts == 1 and not c.dense for c in configs)
    assert any(c.num_experts_per_token == 1 < c.num_experts for c in configs)
    assert any(c.num_experts_per_token > 2 for c in configs)
    assert any(c.num_heads > c.num_kv_heads > 1 for c in configs)
    assert sum(mask is not None for mask in masks) >= 20
    experts = [name for d in drawn for name, g in d[5].items() if ".experts." in name and not g.any()]
    assert experts  # some expert has no token


def test_the_balance_loss_reaches_the_gate():
    """Where k = 1 the gate's weight is constant: its whole gradient is the balance loss's."""
    [config, *_, grads] = next(d for d in map(case, CASES) if d[0].num_experts_per_token == 1 < d[0].num_experts)
    assert config.balance_coefficient > 0 and np.abs(grads["layers.0.feed_forward.gate"]).max() > 1e-6
