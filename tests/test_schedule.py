import numpy as np
import pytest

from minimoe import mixtral, params, schedule, trace
from minimoe.backends import make_backend
from tests.draws import draw_any_config, draw_dense_config, draw_params, draw_tokens, forward

SEEDS = range(12)


def draw(seed):
    rng = np.random.default_rng([8, seed])
    config = draw_dense_config(rng) if seed % 4 == 3 else draw_any_config(rng)
    return rng, config, draw_params(config, rng)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_schedule_is_what_a_model_calls(seed):
    rng, config, weights = draw(seed)
    calls = []
    recorder = trace.Recorder(weights, calls.append)
    forward(recorder.wrap(make_backend("numpy")), config, weights, *draw_tokens(rng, config)[:1])
    assert [(c.room, c.function) for c in calls] == [(s.room, s.function) for s in schedule.schedule(config)]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_step_reads_what_an_earlier_one_wrote(seed):
    """And every intermediate is written once; all but the inner ones of attention and experts are read."""
    _, config, weights = draw(seed)
    known, read, weights_read = {"tokens"}, set(), set()
    for step in schedule.schedule(config):
        assert known.issuperset(step.reads) and known.isdisjoint(step.writes)
        known.update(step.writes)
        read.update(step.reads)
        weights_read.update(step.weights)
    inner = ("scores", "probs", "hidden", "slots", "gating.logits")
    unread = {n for n in known - read if not n.endswith(inner)}
    assert unread <= {"logits", "tokens", *(f"layers.{i}.out" for i in range(config.num_layers))}
    assert weights_read == {name for name, _ in params.leaves(weights)}


@pytest.mark.parametrize("seed", SEEDS)
def test_shapes_are_those_of_a_trace(seed):
    rng, config, weights = draw(seed)
    tokens, _ = draw_tokens(rng, config)
    inputs = mixtral.check_inputs(tokens, config.vocab_size)
    found = trace.record(make_backend("numpy"), config, weights, inputs)
    assert {name: value.shape for name, value in found.items()} == {
        name: schedule.shape(config, name, *tokens.shape) for name in schedule.names(config)
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_the_matrix_products_are_those_that_the_config_counts(seed):
    """What is beyond them: norms, rotations, softmax, activation, combine, multipliers; each counted below."""
    _, config, _ = draw(seed)
    c = config.replace(sliding_window=None)
    costs = {
        step.name: schedule.cost(c, step, 1, 1, visible=1, experts=c.num_experts_per_token)
        for step in schedule.schedule(c)
    }
    L, D, H, k, F = c.num_layers, c.hidden_size, c.num_heads, c.num_experts_per_token, c.intermediate_size
    norms = (5 * (2 * L + 1) - 1) * D + 3 * (2 * L + 1) + (2 * L * (4 * D + 3) if c.post_norms else 0)
    gates = 0 if c.dense else L * (3 * k if c.renormalise else 2 * c.num_experts + k)
    scores, act = (4 if c.attention_cap is None else 7) * H, 5 if c.activation == "silu" else 10
    multiplied = D * (c.embedding_multiplier != 1) + c.vocab_size * (c.output_multiplier != 1)
    beyond = norms + L * (3 * (H + c.num_kv_heads) * c.head_dim + scores + k * (act * F + 2 * D)) + gates + multiplied
    total = sum((cost.flops for cost in costs.values()), 0)
    assert total == c.flops_per_token(1) + beyond


@pytest.mark.parametrize("seed", SEEDS)
def test_a_decoding_step_reads_every_active_weight_once(seed):
    """Bytes of all steps, less those of the intermediates, are the active parameters' (of a table: one row)."""
    _, config, _ = draw(seed)
    config = config.replace(tie_embeddings=False)
    steps = schedule.schedule(config)
    moved = {
        stored: sum(
            schedule.cost(
                config, step, 1, 1, visible=1, experts=config.num_experts_per_token, stored=stored
            ).bytes
            for step in steps
        )
        for stored in (2, 4)
    }  # fmt: skip
    rows = config.num_active_parameters() - (config.vocab_size - 1) * config.hidden_size
    assert moved[4] - moved[2] == 2 * rows
