"""The decoder: gradients against finite differences, and what it refuses. Its laws stand in test_laws.py."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from minimoe import mixtral
from minimoe.backends import make_backend
from minimoe.config import ModelConfig
from minimoe.mixtral import CacheError, CacheFullError, TokenError
from minimoe.params import leaves, named, random, shapes, stack_experts
from minimoe.shapes import Routing
from tests.draws import draw_params, draw_tokens, forward, regroup
from tests.measure import assert_close, assert_slopes

CONFIG = ModelConfig(
    vocab_size=13, hidden_size=7, intermediate_size=6, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
    num_experts=4, num_experts_per_token=2, rope_theta=100.0, balance_coefficient=0.5,
)  # fmt: skip
DENSE = {"dense": True, "num_experts": 1, "num_experts_per_token": 1}


@pytest.fixture(params=["numpy", "numba"])
def ops(request):
    return make_backend(request.param)


# ---- gradients are slopes


@pytest.mark.parametrize(
    ("changes", "side"),
    [
        ({"balance_form": "concatenated"}, "none"),
        ({"balance_form": "per_layer"}, "left"),
        ({"balance_form": "switch"}, "right"),
        ({"num_experts_per_token": 1}, "none"),
        ({"num_experts_per_token": 4}, "both"),
        ({"num_experts": 1, "num_experts_per_token": 1}, "none"),
        (DENSE, "none"),
        (DENSE | {"tie_embeddings": True}, "both"),
        ({"tie_embeddings": True}, "none"),
        ({"router_jitter": 0.3}, "none"),
        ({"router_jitter": 0.3, "num_experts_per_token": 1, "balance_form": "switch"}, "right"),
        ({"sliding_window": 3}, "left"),
        ({"num_heads": 2}, "none"),
        ({"num_kv_heads": 1}, "none"),
        ({"balance_coefficient": 0.0}, "none"),
        ({"activation": "gelu_tanh"}, "none"),
        ({"renormalise": False}, "left"),
        ({"renormalise": False, "num_experts_per_token": 1}, "none"),
        ({"attention_scale": 0.7, "attention_cap": 0.9}, "right"),
        ({"embedding_multiplier": 3.0, "output_multiplier": 0.4, "tie_embeddings": True}, "none"),
        ({"post_norms": True}, "both"),
        (DENSE | {"post_norms": True, "activation": "gelu_tanh"}, "none"),
    ],
    ids=str,
)
def test_gradients_are_the_slopes_of_the_loss(changes, side, ops):
    """Along every leaf of the tree, with the routing held fixed: it is piecewise constant, and has no gradient."""
    rng = np.random.default_rng(0)
    config = CONFIG.replace(**changes)
    params = draw_params(config, rng)
    tokens, mask = draw_tokens(rng, config, B=2, T=7, side=side)
    inputs = mixtral.check_inputs(tokens, config.vocab_size, mask)
    _, routing = forward(ops, config, params, tokens, mask=mask)
    choose = mixtral.choices(ops, config, tokens.size, None if routing is None else Routing(routing.ids), ())

    def run(params):
        return mixtral.loss_and_grads(ops, config, params, inputs, choose=choose, jitter=np.random.default_rng(5))

    names, arrays = zip(*leaves(params), strict=True)
    losses, grads, _ = run(params)
    assert losses.total == losses.cross_entropy + config.balance_coefficient * losses.balance
    assert (losses.balance == 0) == config.dense
    found = dict(leaves(grads))
    assert tuple(found) == names

    def loss(*arrays):
        return run(regroup(config, dict(zip(names, arrays, strict=True))))[0].total

    # A norm right after a product bends sharply where the product is short; differences see that over 1e-4.
    assert_slopes(loss, list(arrays), list(found.values()), step=1e-5 if config.post_norms else 1e-4)


def test_gradients_have_the_names_and_shapes_of_the_parameters(ops):
    for config in (CONFIG, CONFIG.replace(**DENSE), CONFIG.replace(tie_embeddings=True)):
        inputs = mixtral.check_inputs([[1, 2, 3]], config.vocab_size)
        _, grads, _ = mixtral.loss_and_grads(ops, config, stack_experts(random(config, 0)), inputs)
        assert {name: (g.shape, g.dtype) for name, g in named(grads)} == {
            name: (shape, np.float32) for name, shape in shapes(config).items()
        }


def test_jitter_is_noise_on_what_gate_and_experts_read(ops):
    """Only in training, only where the config asks for it; the same generator draws the same."""
    config = CONFIG.replace(router_jitter=0.2)
    params = draw_params(config, np.random.default_rng(0))
    inputs = mixtral.check_inputs([[1, 2, 3, 4]], config.vocab_size)

    def loss(config, seed):
        rng = None if seed is None else np.random.default_rng(seed)
        return mixtral.loss_and_grads(ops, config, params, inputs, jitter=rng)[0].total

    quiet = loss(config, None)
    assert loss(config, 1) == loss(config, 1) != loss(config, 2)
    assert quiet not in (loss(config, 1), loss(config, 2))
    assert loss(CONFIG, 1) == loss(CONFIG, None) == quiet


def test_a_target_counts_where_it_and_its_predecessor_are_unmasked():
    mask = np.array([[True, True, True, True], [False, True, True, False], [True, False, True, True]])
    tokens = np.arange(12).reshape(3, 4)
    targets = mixtral.next_tokens(mixtral.check_inputs(tokens, 12, mask)).reshape(3, 4)
    np.testing.assert_array_equal(targets, [[1, 2, 3, -1], [-1, 6, -1, -1], [-1, -1, 11, -1]])


def test_nothing_to_predict_is_no_loss_and_no_gradient(ops):
    config = CONFIG.replace(balance_coefficient=0.0)
    inputs = mixtral.check_inputs([[3]], config.vocab_size)
    losses, grads, _ = mixtral.loss_and_grads(ops, config, draw_params(config, np.random.default_rng(0)), inputs)
    assert losses.total == 0
    assert not any(g.any() for _, g in named(grads))


def test_a_wholly_masked_batch_is_no_loss_and_no_gradient(ops):
    mask = np.zeros((2, 3), bool)
    inputs = mixtral.check_inputs(np.ones((2, 3), int), CONFIG.vocab_size, mask)
    losses, grads, _ = mixtral.loss_and_grads(ops, CONFIG, draw_params(CONFIG, np.random.default_rng(0)), inputs)
    assert (losses.total, losses.cross_entropy, losses.balance) == (0, 0, 0)
    assert all(np.isfinite(g).all() and not g.any() for _, g in named(grads))


# ---- tokens, masks, positions


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, -1]], r"token id -1 is outside \[0, 13\)"),
        ([[1, 13]], r"token id 13 is outside \[0, 13\)"),
        ([[2**40]], r"token id 1099511627776 is outside \[0, 13\)"),
        (np.array([[2**63 + 1]], np.uint64), r"token id 9223372036854775809 is outside \[0, 13\)"),
        ([[1.0, 2.0]], "token ids must be integers, not float64"),
        ([[0.5]], "token ids must be integers, not float64"),
        ([[float("nan")]], "token ids must be integers, not float64"),
        ([[True, False]], "token ids must be integers, not bool"),
        ([["1", "2"]], "token ids must be integers, not <U1"),
        ("text", "token ids must be integers, not <U4"),
        ([[None]], "token ids must be integers, not object"),
        ([[2**70]], "token ids must be integers, not object"),
        ([], r"token ids must be integers, not float64 \(an empty list has no type: use \[\[bos\]\]\)"),
        ([[]], "token ids must be integers, not float64"),
        (np.zeros((1, 0), int), r"tokens must have shape \(T,\) or \(B, T\) with at least one token, not \(1, 0\)"),
        (np.zeros((0, 3), int), r"with at least one token, not \(0, 3\)"),
        (np.zeros((1, 2, 3), int), r"with at least one token, not \(1, 2, 3\)"),
        (5, r"with at least one token, not \(\)"),
        ([[1, 2], [3]], r"tokens must form a rectangle \(B, T\): pad the sequences and pass a mask"),
    ],
    ids=str,
)
def test_tokens_that_no_text_gives_are_refused(tokens, message):
    with pytest.raises(TokenError, match=message):
        mixtral.check_inputs(tokens, 13)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int64, np.uint64])
def test_all_integer_types_are_taken(dtype):
    inputs = mixtral.check_inputs(np.array([[0, 12]], dtype), 13)
    assert inputs.tokens.dtype == np.int64 and inputs.tokens.tolist() == [[0, 12]]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((2, 2), bool), r"mask must be boolean of shape \(2, 3\), not bool of shape \(2, 2\)"),
        (np.ones(3, bool), r"mask must be boolean of shape \(2, 3\), not bool of shape \(3,\)"),
        (np.ones((2, 3), int), r"mask must be boolean of shape \(2, 3\), not int64 of shape \(2, 3\)"),
        (np.ones((2, 3)), r"mask must be boolean of shape \(2, 3\), not float64"),
        (True, r"mask must be boolean of shape \(2, 3\), not bool of shape \(\)"),
    ],
    ids=str,
)
def test_a_mask_must_be_boolean_and_fit(mask, message):
    with pytest.raises(TokenError, match=message):
        mixtral.check_inputs(np.ones((2, 3), int), 13, mask)


def test_masked_entries_may_hold_anything_and_are_replaced():
    mask = np.array([[False, True, True, False]])
    inputs = mixtral.check_inputs([[-1, 4, 5, 99]], 13, mask)
    assert inputs.tokens.tolist() == [[0, 4, 5, 0]]
    assert inputs.positions.tolist() == [[-1, 0, 1, -1]]
    with pytest.raises(TokenError, match="token id 99 is outside"):
        mixtral.check_inputs([[-1, 4, 5, 99]], 13, np.array([[False, True, True, True]]))


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[0, 0, 1]], "positions of sequence 0 must rise strictly from 0 or later, not"),
        ([[2, 1, 0]], "must rise strictly"),
        ([[-1, 0, 1]], r"must rise strictly from 0 or later, not \[-1, 0, 1\]"),
        ([[0.0, 1.0, 2.0]], r"positions must be integers of shape \(1, 3\), not float64"),
        ([[False, True, True]], "positions must be integers"),
        ([[0, 1]], r"positions must be integers of shape \(1, 3\), not int64 of shape \(1, 2\)"),
        ([0, 1, 2], r"not int64 of shape \(3,\)"),
    ],
    ids=str,
)
def test_positions_must_rise_and_fit(positions, message):
    with pytest.raises(TokenError, match=message):
        mixtral.check_inputs([[1, 2, 3]], 13, positions=positions)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.uint32, np.uint64])
def test_positions_may_be_of_any_integer_type(dtype):
    mask = np.array([[False, True, True]])
    inputs = mixtral.check_inputs([[1, 2, 3]], 13, mask, positions=np.array([[0, 2, 7]], dtype))
    assert inputs.positions.dtype == np.int64 and inputs.positions.tolist() == [[-1, 2, 7]]


def test_positions_at_padding_are_ignored():
    mask = np.array([[False, True, True]])
    inputs = mixtral.check_inputs([[1, 2, 3]], 13, mask, positions=[[9, 3, 4]])
    assert inputs.positions.tolist() == [[-1, 3, 4]]


def test_positions_may_not_fall_behind_the_cache():
    ops, params = make_backend("numpy"), random(CONFIG, 0)
    cache = mixtral.new_cache(ops, CONFIG, params, 1, 8)
    forward(ops, CONFIG, params, [[1, 2, 3]], cache=cache)
    with pytest.raises(TokenError, match=r"must rise strictly from 3 or later, not \[2\]"):
        forward(ops, CONFIG, params, [[1]], cache=cache, positions=[[2]])
    forward(ops, CONFIG, params, [[1]], cache=cache, positions=[[5]])
    assert cache.lengths.tolist() == [6]


# ---- the cache


@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "8"])
def test_a_cache_needs_positive_sizes(value):
    ops, params = make_backend("numpy"), random(CONFIG, 0)
    with pytest.raises(ValueError, match="max_length must be an integer of at least 1, not "):
        mixtral.new_cache(ops, CONFIG, params, 1, value)
    with pytest.raises(ValueError, match="batch must be an integer of at least 1, not "):
        mixtral.new_cache(ops, CONFIG, params, value, 8)


@pytest.mark.parametrize(("window", "max_length", "slots"), [(None, 9, 9), (4, 9, 4), (20, 9, 9)])
def test_a_cache_rolls_where_the_window_is_shorter_than_the_text(window, max_length, slots):
    config = CONFIG.replace(sliding_window=window)
    cache = mixtral.new_cache(make_backend("numpy"), config, random(config, 0), 3, max_length)
    assert len(cache.layers) == 2
    assert all(layer.k.shape == layer.v.shape == (3, slots, 2, 4) for layer in cache.layers)
    assert cache.nbytes == 3 * slots * config.kv_bytes_per_token(itemsize=4)
    assert cache.max_length == max_length and not cache.lengths.any() and (cache.positions == -1).all()


REFUSED = [
    (
        {"tokens": [[1] * 4]},
        CacheFullError,
        "position 8 does not fit the cache: it was made for max_length = 8 tokens",
    ),
    ({"tokens": [[1]], "positions": [[8]]}, CacheFullError, "position 8 does not fit the cache"),
    ({"tokens": [[1], [2]]}, CacheError, "the cache holds 1 sequences, tokens have 2"),
    ({"tokens": [[-1]]}, TokenError, "token id -1"),
    ({"tokens": [[1, 2]], "positions": [[7, 6]]}, TokenError, "must rise strictly"),
    ({"tokens": [[1]], "routing": Routing(np.zeros((2, 1, 1), int))}, ValueError, "routing ids must have shape"),
    ({"tokens": [[1]], "disabled_experts": [(0, 9)]}, ValueError, "no expert 9 in layer 0"),
]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("given", "error", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_refused_call_leaves_the_cache_as_it_was(given, error, message, window, ops):
    """Rolling or not, the limit is max_length; what fits is taken afterwards."""
    config = CONFIG.replace(sliding_window=window)
    params = draw_params(config, np.random.default_rng(0))
    cache = mixtral.new_cache(ops, config, params, 1, 8)
    start = np.array([[1, 2, 3, 4, 5]])
    forward(ops, config, params, start, cache=cache)
    before = copy.deepcopy(cache)
    with pytest.raises(error, match=message):
        forward(ops, config, params, cache=cache, **given)
    assert cache.lengths.tolist() == [5]
    np.testing.assert_array_equal(cache.positions, before.positions)
    for layer, old in zip(cache.layers, before.layers, strict=True):
        np.testing.assert_array_equal(layer.k, old.k)
        np.testing.assert_array_equal(layer.v, old.v)
    rest, _ = forward(ops, config, params, [[6, 7, 8]], cache=cache)
    whole, _ = forward(ops, config, params, [[1, 2, 3, 4, 5, 6, 7, 8]])
    assert_close(rest, whole[:, 5:])


def test_a_prompt_longer_than_the_cache_is_refused_but_not_one_longer_than_its_slots(ops):
    config = CONFIG.replace(sliding_window=3)
    params = random(config, 0)
    forward(ops, config, params, [[1] * 8], cache=mixtral.new_cache(ops, config, params, 1, 8))
    with pytest.raises(CacheFullError, match="position 8 does not fit the cache: it was made for max_length = 8"):
        forward(ops, config, params, [[1] * 9], cache=mixtral.new_cache(ops, config, params, 1, 8))


def test_padding_takes_no_room_in_the_cache(ops):
    params = random(CONFIG, 0)
    cache = mixtral.new_cache(ops, CONFIG, params, 2, 3)
    mask = np.array([[False, False, True, True], [True, True, True, False]])
    forward(ops, CONFIG, params, np.ones((2, 4), int), mask=mask, cache=cache)
    assert cache.lengths.tolist() == [2, 3]
    np.testing.assert_array_equal(np.sort(cache.positions, axis=1), [[-1, 0, 1], [0, 1, 2]])
    with pytest.raises(CacheFullError):
        forward(ops, CONFIG, params, [[1], [1]], cache=cache)
    forward(ops, CONFIG, params, [[1], [1]], cache=cache, mask=np.array([[True], [False]]))
    assert cache.lengths.tolist() == [3, 3]


# ---- forced routing


def ids(*experts):
    """The same choice for both layers and three tokens."""
    return np.broadcast_to(experts, (2, 3, len(experts))).copy()


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (lambda: Routing(ids(0, 1)[:1]), r"routing ids must have shape \(L, N, k\) = \(2, 3, 2\), not \(1, 3, 2\)"),
        (lambda: Routing(ids(0, 1)[:, :2]), r"routing ids must have shape \(L, N, k\) = \(2, 3, 2\), not \(2, 2, 2\)"),
        (lambda: Routing(ids(0)), r"routing ids must have shape \(L, N, k\) = \(2, 3, 2\), not \(2, 3, 1\)"),
        (lambda: Routing(ids(0, 1)[0]), r"routing ids must have shape \(L, N, k\), not \(3, 2\)"),
        (lambda: Routing(ids(0, 4)), r"routing ids must be integers in \[0, 4\), or -1 for a token that is not routed"),
        (lambda: Routing(ids(0, -2)), r"routing ids must be integers in \[0, 4\)"),
        (lambda: Routing(ids(0.0, 1.0)), r"routing ids must be integers in \[0, 4\)"),
        (lambda: Routing(ids(False, True)), r"routing ids must be integers in \[0, 4\)"),
        (lambda: Routing(ids(2, 2)), "routing ids name an expert twice for one token"),
        (lambda: Routing(ids(2, -1)), r"must give a token all its k experts, or none \(-1 in every slot\)"),
        (lambda: Routing(ids(0, 1), np.ones((2, 3, 1))), r"routing weights \(2, 3, 1\) must have the shape of ids"),
    ],
)  # fmt: skip
def test_routing_that_cannot_be_imposed_is_refused(routing, message):
    with pytest.raises(ValueError, match=message):
        forward(make_backend("numpy"), CONFIG, random(CONFIG, 0), [[1, 2, 3]], routing=routing())


def test_a_token_may_be_left_unrouted(ops):
    """Its experts then add nothing."""
    config = CONFIG.replace(num_layers=1)
    params = draw_params(config, np.random.default_rng(0))
    routing = Routing(np.array([[[0, 1], [-1, -1], [2, 3]]]))
    logits, found = forward(ops, config, params, [[1, 2, 3]], routing=routing)
    np.testing.assert_array_equal(found.ids, routing.ids)
    assert not found.weights[0, 1].any()
    params.layers[0].feed_forward.w2[:] = 0
    without, _ = forward(ops, config, params, [[1, 2, 3]])
    assert_close(logits[0, 1], without[0, 1])
    assert np.abs(logits[0, 0] - without[0, 0]).max() > 1e-3


@pytest.mark.parametrize(
    ("disabled", "message"),
    [
        ([(0, 4)], r"disabled_experts: no expert 4 in layer 0 \(L = 2, E = 4\)"),
        ([(2, 0)], r"disabled_experts: no expert 0 in layer 2 \(L = 2, E = 4\)"),
        ([(0, -1)], "disabled_experts: no expert -1 in layer 0"),
        ([(-1, 0)], "disabled_experts: no expert 0 in layer -1"),
        ([(1, 0), (1, 1), (1, 3)], "disabled_experts leaves 1 experts in layer 1, fewer than k = 2"),
        ([(0, e) for e in range(4)], "disabled_experts leaves 0 experts in layer 0, fewer than k = 2"),
    ],
)
def test_experts_that_cannot_be_disabled_are_named(disabled, message):
    with pytest.raises(ValueError, match=message):
        forward(make_backend("numpy"), CONFIG, random(CONFIG, 0), [[1, 2, 3]], disabled_experts=disabled)


def test_forced_and_disabled_experts_exclude_each_other():
    with pytest.raises(ValueError, match="routing and disabled_experts exclude each other"):
        forward(make_backend("numpy"), CONFIG, random(CONFIG, 0), [[1, 2, 3]],
                routing=Routing(ids(0, 1)), disabled_experts=[(0, 3)])  # fmt: skip


def test_a_dense_model_has_no_router():
    config = CONFIG.replace(**DENSE)
    params = random(config, 0)
    with pytest.raises(ValueError, match="a dense model has no router: routing cannot be forced"):
        forward(make_backend("numpy"), config, params, [[1, 2, 3]], routing=Routing(ids(0)))
    with pytest.raises(ValueError, match="a dense model has no router: no expert can be disabled"):
        forward(make_backend("numpy"), config, params, [[1, 2, 3]], disabled_experts=[(0, 0)])


def test_margins_are_the_distance_to_the_best_expert_not_chosen(ops):
    params = draw_params(CONFIG, np.random.default_rng(0))
    _, routing = forward(ops, CONFIG, params, [[1, 2, 3]])
    for layer in range(2):
        for n in range(3):
            z, chosen = routing.logits[layer, n], routing.ids[layer, n]
            assert routing.margins[layer, n] == min(z[chosen]) - max(np.delete(z, chosen)) >= 0
    every = CONFIG.replace(num_experts_per_token=4)
    assert np.isinf(forward(ops, every, params, [[1, 2, 3]])[1].margins).all()
    with pytest.raises(ValueError, match="margins need the router logits"):
        _ = Routing(ids(0, 1)).margins


def test_errors_are_value_errors_of_one_line():
    assert issubclass(TokenError, ValueError) and issubclass(CacheFullError, ValueError)
    for tokens in ([[-1]], [[1], [2, 3]], [], [[0.5]]):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            mixtral.check_inputs(tokens, 13)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"sliding_window": 3}, {"num_layers": 3}, {"num_layers": 1}, {"num_kv_heads": 1}])
def test_a_cache_of_another_model_is_refused(change):
    ops, other = make_backend("numpy"), CONFIG.replace(**change)
    cache = mixtral.new_cache(ops, other, random(other, 0), 1, 8)
    with pytest.raises(CacheError, match="this cache was made for another model"):
        forward(ops, CONFIG, random(CONFIG, 0), [[1, 2]], cache=cache)


def test_a_step_that_fails_half_way_leaves_the_positions_as_they_were():
    """Ctrl-C in a notebook: what is written of the keys is overwritten by the next try."""
    ops, params = make_backend("numpy"), random(CONFIG, 0)
    cache = mixtral.new_cache(ops, CONFIG, params, 1, 8)
    forward(ops, CONFIG, params, [[1, 2]], cache=cache)

    def interrupted(*_):
        raise KeyboardInterrupt

    broken = dataclasses.replace(ops, gating=SimpleNamespace(**{**vars(ops.gating), "forward": interrupted}))
    with pytest.raises(KeyboardInterrupt):
        forward(broken, CONFIG, params, [[3]], cache=cache)
    assert cache.positions[0, :4].tolist() == [0, 1, -1, -1]
    again, _ = forward(ops, CONFIG, params, [[4, 5]], cache=cache)
    whole, _ = forward(ops, CONFIG, params, [[1, 2, 4, 5]])
    np.testing.assert_allclose(again, whole[:, 2:], rtol=1e-4, atol=1e-5)


def test_a_cache_whose_keys_were_overwritten_by_a_chunk_that_failed_is_refused():
    """A chunk's keys are written layer by layer, over keys that the next try would need."""
    ops, config = make_backend("numpy"), CONFIG.replace(sliding_window=4)
    params = draw_params(config, np.random.default_rng(0))
    cache = mixtral.new_cache(ops, config, params, 1, 20)
    forward(ops, config, params, [[1, 2, 3, 4]], cache=cache)
    calls = []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ops.gating.forward(*given)

    broken = dataclasses.replace(ops, gating=SimpleNamespace(**{**vars(ops.gating), "forward": interrupted}))
    with pytest.raises(KeyboardInterrupt):
        forward(broken, config, params, [[5, 6, 7]], cache=cache)
    with pytest.raises(CacheError, match="interrupted after it had overwritten keys"):
        forward(ops, config, params, [[5, 6, 7]], cache=cache)


@pytest.mark.parametrize("disabled", [(0, 3), [(0.5, 3)], [(0, 1, 2)], ["ab"]])
def test_disabled_experts_that_are_no_pairs_are_named(disabled):
    with pytest.raises(ValueError, match="disabled_experts must be \\(layer, expert\\) pairs"):
        mixtral.choices(make_backend("numpy"), CONFIG, 1, None, disabled)


def test_routing_must_be_a_routing_with_finite_weights():
    ops, ids = (
        make_backend("numpy"),
        np.zeros((2, 1, CONFIG.num_experts_per_token), int) + np.arange(CONFIG.num_experts_per_token),
    )
    with pytest.raises(ValueError, match=r"routing must be a minimoe\.Routing"):
        mixtral.choices(ops, CONFIG, 1, ids, ())
    with pytest.raises(ValueError, match="routing weights must be finite"):
        mixtral.choices(ops, CONFIG, 1, Routing(ids, np.full(ids.shape, np.nan)), ())
    with pytest.raises(ValueError, match="must have the shape of ids"):
        Routing(ids, [[[0.5]]])
    with pytest.raises(ValueError, match=r"must be \(L, N, E\)"):
        Routing(ids, logits=np.zeros((2, 2, 4)))


def test_margins_are_those_of_routed_tokens():
    logits = np.array([[[3.0, 1.0, 2.5], [0.0, 0.0, 9.0]]])
    margins = Routing([[[0, 2], [-1, -1]]], logits=logits).margins
    assert margins[0, 0] == 1.5 and np.isnan(margins[0, 1])


@pytest.mark.parametrize("tied", [False, True])
def test_fresh_logits_are_of_order_one(tied):
    config = CONFIG.replace(hidden_size=64, vocab_size=200, tie_embeddings=tied)
    logits, _ = forward(make_backend("numpy"), config, random(config, 0), np.arange(100)[None])
    assert 0.5 < logits.std() < 2
