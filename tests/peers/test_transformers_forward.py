"""Our logits against transformers evaluated in true float64, over random models and batches."""

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from minimoe import mixtral  # noqa: E402
from minimoe.backends import make_backend  # noqa: E402
from tests.draws import (  # noqa: E402
    SIDES,
    draw_config,
    draw_dense_config,
    draw_params,
    draw_tokens,
    forward,
    split,
)  # fmt: skip
from tests.measure import relative_error  # noqa: E402
from tests.peers import lifted  # noqa: E402

pytestmark = pytest.mark.peers

CASES = range(72)
TOLERANCE = 1e-10
BACKENDS = ("numpy", "numba")


@functools.cache
def case(seed):
    """A model, a batch, and their logits: every sixth model is dense, padding takes turns, some start late."""
    rng = np.random.default_rng([2401, seed])
    config = draw_dense_config(rng) if seed % 6 == 5 else draw_config(rng)
    params = draw_params(config, rng, stacked=bool(seed % 2))
    tokens, mask = draw_tokens(rng, config, side=SIDES[seed % 4])
    positions = None
    if mask is None and seed % 8 == 4:
        positions = np.broadcast_to(1000 + np.arange(tokens.shape[1]), tokens.shape)
    with lifted.lifted():
        truth = lifted.logits(lifted.build(config, params), tokens, mask, positions)
    return config, params, tokens, mask, positions, truth


def error(logits, truth, mask):
    """What stands at padding is not compared."""
    seen = slice(None) if mask is None else mask
    return relative_error(logits[seen], truth[seen])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", CASES)
def test_prefill_equals_transformers(seed, backend, errors):
    config, params, tokens, mask, positions, truth = case(seed)
    logits, _ = forward(make_backend(backend), config, params, tokens, mask=mask, positions=positions)
    assert logits.dtype == np.float64
    errors.append(error(logits, truth, mask))
    assert errors[-1] <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", CASES)
def test_chunks_and_decoding_through_the_cache_equal_transformers_without_one(seed, backend, errors):
    config, params, tokens, mask, positions, truth = case(seed)
    ops = make_backend(backend)
    B, T = tokens.shape
    cache = mixtral.new_cache(ops, config, params, B, T if positions is None else 1000 + T)
    parts = [
        forward(
            ops, config, params, tokens[:, cut], cache=cache,
            mask=None if mask is None else mask[:, cut], positions=None if positions is None else positions[:, cut],
        )[0]
        for cut in split(np.random.default_rng([2310, seed]), T)
    ]  # fmt: skip
    errors.append(error(np.concatenate(parts, axis=1), truth, mask))
    assert errors[-1] <= TOLERANCE


def test_the_cases_cover_what_matters():
    configs, batches = zip(*((case(seed)[0], case(seed)[2:4]) for seed in CASES), strict=True)
    sparse = [c for c in configs if not c.dense]
    assert len(configs) - len(sparse) >= 10
    assert {c.num_experts for c in sparse} >= {1, 2, 8, 16}
    assert any(c.num_experts_per_token == 1 < c.num_experts for c in sparse)
    assert any(c.num_experts_per_token == c.num_experts > 2 for c in sparse)
    assert any(c.num_experts_per_token > 8 for c in sparse)
    assert any(c.num_heads == c.num_kv_heads > 1 for c in configs)
    assert any(c.num_heads > c.num_kv_heads == 1 for c in configs)
    assert any(c.head_dim * c.num_heads != c.hidden_size for c in configs)
    assert any(c.tie_embeddings for c in configs)
    shorter = [c.sliding_window is not None and c.sliding_window < tokens.shape[1] for c, (tokens, _) in
               zip(configs, batches, strict=True)]  # fmt: skip
    assert sum(shorter) >= 10
    assert any(c.sliding_window == 1 for c in configs)
    assert any(tokens.shape[1] == 1 for tokens, _ in batches)
    assert sum(mask is not None and not mask[:, 0].all() for _, mask in batches) >= 10
    assert sum(mask is not None and not mask[:, -1].all() for _, mask in batches) >= 10


def test_without_the_lift_their_float64_is_float32_inside():
    config, params, tokens, mask, positions, truth = case(0)
    assert 1e-9 < error(lifted.logits(lifted.build(config, params), tokens, mask, positions), truth, mask) < 1e-3


def test_a_cast_to_float32_cannot_hide():
    with lifted.lifted():
        x = torch.ones(2)
        assert x.float().dtype == x.to(torch.float32).dtype == torch.softmax(x, 0, dtype=torch.float32).dtype == x.dtype
        with pytest.raises(AssertionError, match="computed in float32"):
            x.type("torch.FloatTensor")
    assert torch.ones(1).dtype == torch.float32
