import weakref

import numpy as np
import pytest

from minimoe import mixtral, params, trace
from minimoe.arrays import BFLOAT16
from minimoe.backends import make_backend
from minimoe.checkpoint import CheckpointError, save_tensors
from minimoe.config import ModelConfig
from minimoe.params import stack_experts
from minimoe.shapes import Routing
from tests import naive_model
from tests.draws import draw_config, draw_dense_config, draw_params, draw_tokens, forward
from tests.measure import assert_close

SEEDS = range(6)


@pytest.fixture(params=["numpy", "numba"])
def ops(request):
    return make_backend(request.param)


def draw(seed, **fixed):
    rng = np.random.default_rng([7, seed])
    config = draw_dense_config(rng, **fixed) if seed % 3 == 2 else draw_config(rng, **fixed)
    return rng, config, draw_params(config, rng, stacked=bool(seed % 2))


def record(ops, config, weights, tokens, mask=None, **options):
    return trace.record(ops, config, weights, mixtral.check_inputs(tokens, config.vocab_size, mask), **options)


def test_names_stand_in_execution_order_as_designed(ops):
    layer = (
        "attention_norm attention.q attention.k attention.v attention.q_rotated attention.k_rotated attention.scores "
        "attention.probs attention.context attention.out attention_residual ffn_norm gating.logits gating.ids "
        "gating.weights experts.hidden experts.slots experts.out out"
    ).split()
    _, config, weights = draw(0, num_layers=2)
    expected = ["tok_embeddings", *(f"layers.{i}.{n}" for i in range(2) for n in layer), "norm", "logits"]
    assert list(record(ops, config, weights, [[1, 2, 3]])) == expected == trace.names(config)


def test_a_dense_model_has_the_same_names_but_those_of_the_gate(ops):
    _, config, weights = draw(2, num_layers=1)
    assert config.dense
    found = record(ops, config, weights, [[1, 2, 3]])
    sparse = trace.names(config.replace(dense=False))
    assert list(found) == trace.names(config) == [name for name in sparse if ".gating." not in name]
    assert found.routing is None


@pytest.mark.parametrize("seed", SEEDS)
def test_every_value_equals_the_naive_model(seed, ops):
    rng, config, weights = draw(seed)
    tokens, _ = draw_tokens(rng, config, B=1)
    T = tokens.shape[1]
    found, truth = record(ops, config, weights, tokens), naive_model.forward(config, weights, tokens[0])
    assert set(found) == set(truth)
    for name, wanted in truth.items():
        # (1, H, T, S) and (1, T, V) carry the batch, which is one; what else there is has one row per token
        assert found[name].shape in (wanted.shape, (1, *wanted.shape)), name
        assert found[name].shape[0] == (
            1 if name.endswith(("scores", "probs", "logits")) and ".gating" not in name else T
        )
        assert_close(found[name].reshape(wanted.shape), wanted, 1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_and_routing_are_those_of_a_plain_forward_bit_for_bit(seed, ops):
    rng, config, weights = draw(seed)
    tokens, mask = draw_tokens(rng, config, side="left")
    found = record(ops, config, weights, tokens, mask)
    logits, routing = forward(ops, config, weights, tokens, mask=mask)
    np.testing.assert_array_equal(found["logits"], logits)
    if routing is not None:
        for field in ("ids", "weights", "logits"):
            np.testing.assert_array_equal(getattr(found.routing, field), getattr(routing, field))
            stacked = [found[f"layers.{i}.gating.{field}"] for i in range(config.num_layers)]
            np.testing.assert_array_equal(stacked, getattr(routing, field))


def test_the_parts_add_up_with_padding_too(ops):
    for seed in SEEDS:
        rng, config, weights = draw(seed)
        tokens, mask = draw_tokens(rng, config, B=3, T=9, side="both")
        found = record(ops, config, weights, tokens, mask)
        x, seen = found["tok_embeddings"], mask.reshape(-1)
        for i in range(config.num_layers):
            part = {name.removeprefix(f"layers.{i}."): value for name, value in found.items()}
            assert_close(part["attention_residual"], x + part["attention.out"])
            x = part["out"]
            assert_close(x, part["attention_residual"] + part["experts.out"])
            assert_close(part["attention.probs"].sum(axis=-1), np.broadcast_to(mask[:, None], (3, config.num_heads, 9)))
            assert np.all((part["attention.probs"] == 0) == np.isneginf(part["attention.scores"]))
            assert not part["attention.context"][~seen].any()
            assert not part["experts.slots"][~seen].any() and not part["experts.hidden"][~seen].any()
            if not config.dense:
                assert_close(part["gating.weights"].sum(axis=-1), seen)
                assert np.all((part["gating.ids"] == -1) == ~seen[:, None])
                combined = (part["gating.weights"][:, :, None] * part["experts.slots"]).sum(axis=1)
                assert_close(part["experts.out"], combined)


def test_a_name_that_is_not_there_is_an_error_that_shows_how_names_look():
    _, config, weights = draw(0)
    found = record(make_backend("numpy"), config, weights, [[1]])
    with pytest.raises(KeyError, match=r"no 'layers\.9\.out' in this trace; names are like tok_embeddings, layers\.0"):
        found["layers.9.out"]
    assert "layers.9.out" not in found and len(found) == len(list(found))


def test_what_is_recorded_are_copies(ops):
    """A cache changes in place, buffers may be reused; weights alone are kept as they are."""
    _rng, config, weights = draw(0)
    calls = []
    recorder = trace.Recorder(weights, calls.append)
    cache = mixtral.new_cache(ops, config, weights, 1, 8)
    forward(recorder.wrap(ops), config, weights, [[1, 2]], cache=cache)
    forward(recorder.wrap(ops), config, weights, [[3]], cache=cache)
    held = {id(leaf) for _, leaf in params.leaves(weights)}
    mine = {id(cache.positions)} | {id(array) for layer in cache.layers for array in (layer.k, layer.v)}

    def arrays(value):
        if isinstance(value, list | tuple):
            return [array for item in value for array in arrays(item)]
        return [value] if isinstance(value, np.ndarray) else []

    for call in calls:
        for array in arrays([*call.inputs.values(), call.output]):
            assert id(array) not in mine and (id(array) in held or array.flags.owndata)
    writes = [call for call in calls if call.function == "write_positions"]
    assert [call.inputs["cache_positions"].max() for call in writes] == [-1, 1, 1]  # one for the step, one to keep


def test_the_weights_that_are_known_by_address_stay_alive(monkeypatch):
    """The one expert of a dense model is a view, made when asked for: were it gone, its address could be another's."""
    _, _config, weights = draw(2)
    seen = []

    def leaves(tree):
        for name, leaf in params.leaves(tree):
            seen.append(weakref.ref(leaf))
            yield name, leaf

    monkeypatch.setattr(trace, "leaves", leaves)
    recorder = trace.Recorder(stack_experts(weights), print)
    assert recorder and all(leaf() is not None for leaf in seen)


def test_a_bfloat16_model_is_traced_in_float32(ops):
    rng, config, _ = draw(0)
    weights = draw_params(config, rng, BFLOAT16)
    found = record(ops, config, weights, [[1, 2, 3]])
    for name, value in found.items():
        assert value.dtype == (np.int64 if name.endswith("gating.ids") else np.float32), name


def test_a_trace_shows_itself_in_one_line_and_compares_by_identity():
    _, config, weights = draw(0)
    inputs = mixtral.check_inputs([[1, 2, 3]], config.vocab_size)
    first, second = (trace.record(make_backend("numpy"), config, weights, inputs) for _ in range(2))
    assert len(repr(first)) < 200 and "arrays" in repr(first)
    assert first == first and first != second and len({first, second}) == 2


@pytest.mark.parametrize("seed", SEEDS)
def test_only_the_names_that_are_asked_for_are_kept(seed, ops):
    rng, config, weights = draw(seed)
    tokens, mask = draw_tokens(rng, config, side="right")
    whole = record(ops, config, weights, tokens, mask)
    part = record(ops, config, weights, tokens, mask, only=["layers.*.experts.*", "logits"])
    assert list(part) == [name for name in whole if ".experts." in name or name == "logits"]
    for name, value in part.items():
        np.testing.assert_array_equal(value, whole[name])
    if not config.dense:
        np.testing.assert_array_equal(part.routing.ids, whole.routing.ids)
    with pytest.raises(KeyError, match="no 'norm' in this trace"):
        part["norm"]


def test_a_pattern_that_matches_nothing_is_an_error():
    _, config, weights = draw(0)
    with pytest.raises(
        trace.TraceError, match=r"no name of this trace matches 'layers\.\*\.gate'; names are like tok_emb"
    ):
        record(make_backend("numpy"), config, weights, [[1]], only="layers.*.gate")


def test_a_trace_that_would_not_fit_says_how_large_it_is_before_anything_is_computed(monkeypatch):
    _, config, weights = draw(0)
    monkeypatch.setattr(trace, "free_memory", lambda: 1000)
    monkeypatch.setattr(mixtral, "forward", None)
    with pytest.raises(
        trace.TraceError, match=r"would take \d\.\d GB and 0\.0 GB are free: choose names, .*attention\.scores"
    ):
        record(make_backend("numpy"), config, weights, np.ones((1, 2000), int))


@pytest.mark.parametrize("seed", range(3))
def test_a_trace_comes_back_from_its_file_as_it_was(seed, tmp_path):
    rng, config, weights = draw(seed)
    tokens, mask = draw_tokens(rng, config, side="left")
    found = record(make_backend("numpy"), config, weights, tokens, mask, only=["*.out", "*.ids"] if seed == 1 else "*")
    found.save(tmp_path / "trace.safetensors")
    again = trace.Trace.load(tmp_path / "trace.safetensors")
    assert again.config == config and list(again) == list(found) and again.stored == found.stored == "float64"
    for name in found:
        np.testing.assert_array_equal(again[name], found[name])
        assert again[name].dtype == found[name].dtype
    np.testing.assert_array_equal(again.tokens, found.tokens)
    np.testing.assert_array_equal(again.mask, mask)
    assert (again.routing is None) == config.dense
    if not config.dense:
        for field in ("ids", "weights", "logits"):
            np.testing.assert_array_equal(getattr(again.routing, field), getattr(found.routing, field))
    assert again.summary() == found.summary()


def test_a_file_that_holds_no_trace_is_refused(tmp_path):
    save_tensors(tmp_path / "other.safetensors", {"x": np.zeros(3)})
    with pytest.raises(trace.TraceError, match=r"other\.safetensors: holds no trace"):
        trace.Trace.load(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        trace.Trace.load(tmp_path / "none.safetensors")


def test_the_cost_of_a_pass_counts_the_keys_that_are_seen_and_the_experts_that_are_used(ops):
    config = ModelConfig(
        vocab_size=11, hidden_size=6, intermediate_size=5, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=2,
        num_experts=7, num_experts_per_token=2, sliding_window=3,
    )  # fmt: skip
    weights = draw_params(config, np.random.default_rng(1), np.float32)
    mask = np.array([[True] * 5, [False, True, True, True, True]])
    found = record(ops, config, weights, np.ones((2, 5), int), mask)
    costs = {step.name: found.cost(step) for step in found.steps}
    seen = sum([1, 2, 3, 3, 3]) + sum([1, 2, 3, 3])
    assert costs["layers.0.attention"].flops == seen * 4 * (4 * 2 + 4)
    used = len(set(found.routing.ids[1].reshape(-1).tolist()) - {-1})
    assert costs["layers.1.experts"].flops == 10 * 2 * (6 * 6 * 5 + 5 * 5 + 2 * 6)
    read = 4 * (10 * 6 + 10 * 2) + 8 * 10 * 2 + used * 3 * 6 * 5 * 4
    assert costs["layers.1.experts"].bytes == read + 4 * 10 * 6
    lines = found.summary().splitlines()
    assert len(lines) == 1 + len(found.steps) and "10×2×5, 10×2×6, 10×6" in lines[-3]


def test_the_routing_is_a_table_of_decisions():
    ids, logits = np.array([[[2, 0], [-1, -1]]]), np.array([[[1.0, -3.0, 2.0], [0.0, 0.0, 0.0]]])
    weights = np.array([[[0.75, 0.25], [0.0, 0.0]]])
    table = Routing(ids, weights, logits).table()
    assert table.dtype.names == ("layer", "token", "slot", "expert", "weight", "logit", "margin")
    assert table.tolist() == [(0, 0, 0, 2, 0.75, 2.0, 4.0), (0, 0, 1, 0, 0.25, 1.0, 4.0)]
