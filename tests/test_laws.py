"""What holds for any implementation: there are many ways to the same logits, and all of them lead there.

In float64 every way gives the plain forward to 1e-12, with free routing. In float32 and bfloat16 the routing is forced
to that of float64, and every way must be as close to the float64 result as the plain forward of the reference is:
error <= 2 × the reference's + 8 u √n, pooled over the draws, n the longest reduction. As the reference may be lucky
with the draw that magnifies roundings most (one by 60 u and more), by another library of matrix products than its own,
its error is no less than what moves the float64 logits when each weight is rounded once more. So two ways are never
further apart than rounding errors explain. The plain forward is itself one of the ways, which makes the same test
the parity of the backends on the whole model.
"""

import functools

import numpy as np
import pytest

from minimoe import mixtral
from minimoe.arrays import BFLOAT16
from minimoe.backends import make_backend
from minimoe.params import FeedForwardParams, leaves, map_leaves
from minimoe.shapes import Routing
from tests.draws import SIDES, draw_any_config, draw_dense_config, draw_params, draw_tokens, forward, split
from tests.measure import assert_close, relative_error

SEEDS = range(24)
WINDOWED = range(100, 120)
TOLERANCE = 1e-12
U = np.finfo(np.float32).eps / 2


@pytest.fixture(params=["numpy", "numba"])
def ops(request):
    return make_backend(request.param)


class Case:
    """A model and a batch, the logits (B, T, V) of the plain forward of the reference in float64, and its choices.

    Seeds from 100 on have a window of 2 to 7, and four tokens more than fill it.
    """

    def __init__(self, seed, dtype=np.float64):
        self.rng = rng = np.random.default_rng([6, seed])
        draw = draw_dense_config if seed % 6 == 5 else draw_any_config
        W = int(rng.integers(2, 8))
        self.config = draw(rng, sliding_window=W) if seed in WINDOWED else draw(rng)
        self.params = draw_params(self.config, rng, dtype, stacked=bool(seed % 2))
        self.tokens, self.mask = draw_tokens(
            rng, self.config, T=W + 5 if seed in WINDOWED else None, side=SIDES[seed // 2 % 4]
        )
        wide = map_leaves(self.params, lambda w: w.astype(np.float64))
        self.truth, routing = forward(make_backend("numpy"), self.config, wide, self.tokens, mask=self.mask)
        self.ids = None if routing is None else routing.ids.reshape(self.config.num_layers, *self.tokens.shape, -1)

    def error(self, logits):
        seen = slice(None) if self.mask is None else self.mask
        return relative_error(logits[seen], self.truth[seen])

    def moved(self):
        """How far the float64 logits move when every weight moves by u, up or down: the most of four draws."""
        routing, worst = None if self.ids is None else Routing(flat(self.ids)), 0.0
        for draw in range(4):
            rng = np.random.default_rng([7, draw])
            params = map_leaves(
                self.params, lambda w, rng=rng: w.astype(np.float64) * (1 + U * rng.choice([-1, 1], w.shape))
            )
            logits = forward(make_backend("numpy"), self.config, params, self.tokens, mask=self.mask, routing=routing)[
                0
            ]
            worst = max(worst, self.error(logits))
        return worst

    def n(self):
        c = self.config
        return max(c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim, self.tokens.shape[1])


@functools.cache
def case(seed, dtype=np.float64):
    return Case(seed, dtype)


@functools.cache
def moved(c):
    return c.moved()


def call(ops, c, rows=slice(None), cut=slice(None), ids=None, params=None, **given):
    """Run the rows and columns of a case that are asked for; `ids` (L, B, T, k) are the forced choices of all of it."""
    routing = None if ids is None else Routing(flat(ids[:, rows, cut]))
    mask = None if c.mask is None else c.mask[rows, cut]
    params = c.params if params is None else params
    return forward(ops, c.config, params, c.tokens[rows, cut], mask=mask, routing=routing, **given)[0]


def flat(ids):
    L, B, T, k = ids.shape
    return ids.reshape(L, B * T, k)


def cached(ops, c, ids, cuts):
    B, T = c.tokens.shape
    cache = mixtral.new_cache(ops, c.config, c.params, B, T)
    return np.concatenate([call(ops, c, cut=cut, ids=ids, cache=cache) for cut in cuts], axis=1)


# ---- the ways: each takes the forced choices, or None


def plain(ops, c, ids):
    return call(ops, c, ids=ids)


def prefill(ops, c, ids):
    return cached(ops, c, ids, [slice(None)])


def chunks(ops, c, ids):
    return cached(ops, c, ids, split(np.random.default_rng(c.tokens.sum()), c.tokens.shape[1]))


def token_by_token(ops, c, ids):
    return cached(ops, c, ids, [slice(t, t + 1) for t in range(c.tokens.shape[1])])


def one_by_one(ops, c, ids):
    return np.concatenate([call(ops, c, rows=slice(b, b + 1), ids=ids) for b in range(len(c.tokens))])


def padding_removed(ops, c, ids):
    """Every sequence alone, and only its own tokens."""
    out = np.zeros_like(c.truth)
    for b, row in enumerate(c.tokens):
        seen = np.ones(len(row), bool) if c.mask is None else c.mask[b]
        routing = None if ids is None else Routing(ids[:, b, seen])
        out[b, seen] = forward(ops, c.config, c.params, row[None, seen], routing=routing)[0][0]
    return out


def padding_added(ops, c, ids):
    """Two columns more on the left, three on the right."""
    width = [(0, 0), (2, 3)]
    tokens = np.pad(c.tokens, width, constant_values=-1)
    mask = np.pad(np.ones(c.tokens.shape, bool) if c.mask is None else c.mask, width)
    routing = None if ids is None else Routing(flat(np.pad(ids, [(0, 0), *width, (0, 0)], constant_values=-1)))
    return forward(ops, c.config, c.params, tokens, mask=mask, routing=routing)[0][:, 2:-3]


def experts_permuted(ops, c, ids):
    """Experts and rows of the gate in another order, the same in all layers."""
    order = np.random.default_rng(0).permutation(c.config.num_experts)
    params = map_leaves(c.params, lambda w: w)
    for layer in params.layers:
        f = layer.feed_forward
        gate = None if f.gate is None else f.gate[order]
        layer.feed_forward = FeedForwardParams(gate, *([w[e] for e in order] for w in (f.w1, f.w2, f.w3)))
    ids = None if ids is None else np.where(ids >= 0, np.argsort(order)[ids], -1)
    return call(ops, c, ids=ids, params=params)


def positions_shifted(ops, c, ids):
    """Only differences of positions count."""
    seen = np.ones(c.tokens.shape, bool) if c.mask is None else c.mask
    positions = np.where(seen, 40 + np.cumsum(seen, axis=1), -1)
    return call(ops, c, ids=ids, positions=positions)


def batch_repeated(ops, c, ids):
    """The batch twice over: more tokens per expert, other shapes for every product."""
    tokens, mask = np.tile(c.tokens, (2, 1)), None if c.mask is None else np.tile(c.mask, (2, 1))
    routing = None if ids is None else Routing(flat(np.tile(ids, (1, 2, 1, 1))))
    return forward(ops, c.config, c.params, tokens, mask=mask, routing=routing)[0][len(c.tokens) :]


def choices_forced(ops, c, ids):
    """The gate's own choices, imposed."""
    return call(ops, c, ids=c.ids if ids is None else ids)


def wrap_before(ops, c, ids):
    """W - 1 tokens, which leave one slot empty, then one at a time; the third of them overwrites the second slot."""
    return _after(ops, c, ids, c.config.sliding_window - 1)


def wrap_at(ops, c, ids):
    return _after(ops, c, ids, c.config.sliding_window)


def wrap_beyond(ops, c, ids):
    return _after(ops, c, ids, c.config.sliding_window + 1)


def wrap_within_chunks(ops, c, ids):
    """Chunks of W + 1: each is longer than the cache, whose every slot it overwrites."""
    W, T = c.config.sliding_window, c.tokens.shape[1]
    return cached(ops, c, ids, [slice(t, t + W + 1) for t in range(0, T, W + 1)])


def _after(ops, c, ids, first):
    return cached(ops, c, ids, [slice(0, first), *(slice(t, t + 1) for t in range(first, c.tokens.shape[1]))])


WAYS = [
    plain, prefill, chunks, token_by_token, one_by_one, padding_removed, padding_added, experts_permuted,
    positions_shifted, batch_repeated, choices_forced,
]  # fmt: skip
WRAPS = [wrap_before, wrap_at, wrap_beyond, wrap_within_chunks]
EVERY = [*((way, SEEDS) for way in WAYS), *((way, WINDOWED) for way in WRAPS)]


@pytest.fixture(params=EVERY, ids=lambda pair: pair[0].__name__)
def way_and_seeds(request):
    return request.param


def test_in_float64_every_way_leads_to_the_same_logits(way_and_seeds, ops):
    way, seeds = way_and_seeds
    errors = {seed: case(seed).error(way(ops, case(seed), None)) for seed in seeds}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= TOLERANCE, f"seed {worst}"


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=["float32", "bfloat16"])
def test_every_way_is_as_close_to_float64_as_the_reference(way_and_seeds, ops, dtype):
    way, seeds = way_and_seeds
    cases = [case(seed, dtype) for seed in seeds]
    reference = max(max(c.error(plain(make_backend("numpy"), c, c.ids)), moved(c)) for c in cases)
    worst = max(c.error(way(ops, c, c.ids)) for c in cases)
    assert worst <= 2 * reference + 8 * U * max(c.n() for c in cases) ** 0.5
    assert reference <= (1e-4 if dtype == np.float32 else 0.2)  # or the bound would mean nothing


def test_the_cases_cover_what_matters():
    every = [case(seed) for seed in SEEDS]
    assert any(c.config.dense for c in every) and any(c.config.tie_embeddings for c in every)
    assert any(c.mask is not None and not c.mask[:, 0].all() for c in every)
    assert any(c.mask is not None and not c.mask[:, -1].all() for c in every)
    assert any(c.tokens.shape[1] == 1 for c in every) and any(len(c.tokens) > 1 for c in every)
    slack = [c.tokens.shape[1] - (c.config.sliding_window or 1000) for c in every]
    assert min(slack) < -900 and sum(tokens > 0 for tokens in slack) >= 3  # without a window, and longer than it


@pytest.mark.parametrize("seed", SEEDS)
def test_last_only_is_the_last_unmasked_column(seed, ops):
    c = case(seed)
    B, T = c.tokens.shape
    mask = np.ones((B, T), bool) if c.mask is None else c.mask
    last = T - 1 - mask[:, ::-1].argmax(axis=1)
    found = call(ops, c, last_only=True)
    assert found.shape == (B, 1, c.config.vocab_size)
    assert_close(found[:, 0], c.truth[np.arange(B), last], TOLERANCE)


@pytest.mark.parametrize("seed", SEEDS)
def test_all_ways_choose_the_same_experts(seed, ops):
    c = case(seed)
    if c.config.dense:
        pytest.skip("no choice")
    _, routing = forward(ops, c.config, c.params, c.tokens, mask=c.mask)
    np.testing.assert_array_equal(routing.ids, flat(c.ids))
    assert np.all((routing.ids >= 0) == (True if c.mask is None else c.mask.reshape(1, -1, 1)))


@pytest.mark.parametrize("seed", SEEDS)
def test_forced_choices_and_weights_are_taken_as_they_are(seed, ops):
    """The gate's own are the identity; only the first choice, with weight 1, is the model with k = 1.

    Where weights are not renormalised the weight 1 is not the gate's own with k = 1, and is forced there too.
    """
    c = case(seed)
    if c.config.dense:
        pytest.skip("no choice")
    free, routing = forward(ops, c.config, c.params, c.tokens, mask=c.mask)
    for forced in (Routing(routing.ids), Routing(routing.ids, routing.weights)):
        logits, echo = forward(ops, c.config, c.params, c.tokens, mask=c.mask, routing=forced)
        np.testing.assert_array_equal(echo.ids, routing.ids)
        assert_close(echo.weights, routing.weights, TOLERANCE)
        assert c.error(logits) <= TOLERANCE
    only = np.zeros_like(routing.weights)
    only[..., 0] = 1
    logits, _ = forward(ops, c.config, c.params, c.tokens, mask=c.mask, routing=Routing(routing.ids, only))
    single = c.config.replace(num_experts_per_token=1)
    first = Routing(routing.ids[..., :1], None if c.config.renormalise else only[..., :1])
    truth, _ = forward(make_backend("numpy"), single, c.params, c.tokens, mask=c.mask, routing=first)
    seen = slice(None) if c.mask is None else c.mask
    assert_close(logits[seen], truth[seen], TOLERANCE)
    if c.config.num_experts_per_token > 1:
        assert relative_error(logits[seen], free[seen]) > 1e-3  # the weights do matter


@pytest.mark.parametrize("seed", SEEDS)
def test_a_disabled_expert_is_never_chosen_and_the_next_best_is(seed, ops):
    c = case(seed)
    E, k, L = c.config.num_experts, c.config.num_experts_per_token, c.config.num_layers
    if k == E:
        pytest.skip("all experts are needed")
    rng = np.random.default_rng(seed)
    off = {(i, int(e)) for i in range(L) for e in rng.choice(E, rng.integers(1, E - k + 1), replace=False)}
    logits, routing = forward(ops, c.config, c.params, c.tokens, mask=c.mask, disabled_experts=off)
    expected = routing.logits.copy()
    for layer, e in off:
        expected[layer, :, e] = -np.inf
        assert not (routing.ids[layer] == e).any()
    expected = np.argsort(-expected, axis=-1)[..., :k]
    seen = slice(None) if c.mask is None else c.mask.reshape(-1)
    np.testing.assert_array_equal(routing.ids[:, seen], expected[:, seen])
    again = forward(ops, c.config, c.params, c.tokens, mask=c.mask, routing=Routing(routing.ids))[0]
    seen = slice(None) if c.mask is None else c.mask
    assert_close(logits[seen], again[seen], TOLERANCE)


@pytest.mark.parametrize("seed", SEEDS)
def test_positions_with_gaps_count_as_distance(seed, ops):
    """A gap longer than the window hides all that was before it, in one call or through the cache."""
    c = case(seed)
    B, T = c.tokens.shape
    tokens = np.abs(c.tokens) % c.config.vocab_size
    positions = np.cumsum(np.random.default_rng(seed).integers(1, 5, (B, T)), axis=1)
    whole, _ = forward(ops, c.config, c.params, tokens, positions=positions)
    cache = mixtral.new_cache(ops, c.config, c.params, B, int(positions.max()) + 1)
    parts = [
        forward(ops, c.config, c.params, tokens[:, cut], positions=positions[:, cut], cache=cache)[0]
        for cut in split(np.random.default_rng(seed), T)
    ]
    assert_close(np.concatenate(parts, axis=1), whole, TOLERANCE)
    W = c.config.sliding_window
    if W is not None and T > 1:
        apart = positions + np.where(np.arange(T) < T // 2, 0, W)
        behind, _ = forward(ops, c.config, c.params, tokens, positions=apart)
        alone, _ = forward(ops, c.config, c.params, tokens[:, T // 2 :], positions=apart[:, T // 2 :])
        assert_close(behind[:, T // 2 :], alone, TOLERANCE)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_token_changes_nothing_before_it_nor_beyond_the_reach_of_the_windows(seed, ops):
    c = case(seed)
    T, V = c.tokens.shape[1], c.config.vocab_size
    t = T // 2
    tokens = np.abs(c.tokens) % V
    changed = tokens.copy()
    changed[:, t] = (changed[:, t] + 1) % V
    one, other = (forward(ops, c.config, c.params, x)[0] for x in (tokens, changed))
    assert_close(one[:, :t], other[:, :t], TOLERANCE)
    assert relative_error(one[:, t], other[:, t]) > 1e-3
    if c.config.sliding_window is not None:
        reach = t + c.config.num_layers * (c.config.sliding_window - 1) + 1
        assert_close(one[:, reach:], other[:, reach:], TOLERANCE)


# ---- training


def gradients(ops, c, tokens=None, mask=None, params=None, ids=None, **changes):
    """The losses, and all gradients by name."""
    config = c.config.replace(**changes)
    inputs = mixtral.check_inputs(c.tokens if tokens is None else tokens, config.vocab_size, mask)
    routing = None if ids is None else Routing(flat(ids))
    choose = mixtral.choices(ops, config, inputs.tokens.size, routing, ())
    params = c.params if params is None else params
    losses, grads, _ = mixtral.loss_and_grads(ops, config, params, inputs, choose=choose)
    return losses, dict(leaves(grads))


class TrainingCase(Case):
    """A model and a batch without padding, their losses and gradients by the reference in float64.

    The window is at least 2, and tokens are drawn again while a gradient is zero but for rounding (the gate's is where
    k = 1 and the experts' shares happen to be equal).
    """

    def __init__(self, seed, dtype=np.float64):
        rng = np.random.default_rng([60, seed])
        draw = draw_dense_config if seed % 6 == 5 else draw_any_config
        form = ["concatenated", "per_layer", "switch"][seed % 3]
        self.config = draw(rng, sliding_window=[None, int(rng.integers(2, 8))][seed % 2], balance_form=form)
        self.params = draw_params(self.config, rng, dtype)
        wide = map_leaves(self.params, lambda w: w.astype(np.float64))
        numpy = make_backend("numpy")
        sizes = [0.0]
        while min(sizes) < 1e-9 * max(sizes) or not sizes[1:]:
            self.tokens, self.mask = draw_tokens(rng, self.config, T=int(rng.integers(3, 14)))
            _, routing = forward(numpy, self.config, wide, self.tokens)
            self.ids = None if routing is None else routing.ids.reshape(self.config.num_layers, *self.tokens.shape, -1)
            self.losses, self.truth = gradients(numpy, self, params=wide)
            sizes = [float(np.abs(g).max()) for g in self.truth.values() if g.any()]

    def n(self):
        return max(super().n(), self.tokens.size, self.config.vocab_size)


@functools.cache
def training_case(seed, dtype=np.float64):
    return TrainingCase(seed, dtype)


def assert_same(found, c):
    (losses, grads), truth = found, c.truth
    assert_close([losses.total, losses.cross_entropy, losses.balance],
                 [c.losses.total, c.losses.cross_entropy, c.losses.balance], TOLERANCE)  # fmt: skip
    assert list(grads) == list(truth)
    for name in truth:
        assert relative_error(grads[name], truth[name]) <= 1e-11, name


@pytest.mark.parametrize("seed", SEEDS)
def test_padding_changes_neither_loss_nor_gradients(seed, ops):
    c = training_case(seed)
    width = [(0, 0), (1, 2)]
    tokens, mask = np.pad(c.tokens, width, constant_values=-1), np.pad(np.ones(c.tokens.shape, bool), width)
    assert_same(gradients(ops, c, tokens, mask), c)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_batch_repeated_changes_neither_loss_nor_gradients(seed, ops):
    c = training_case(seed)
    assert_same(gradients(ops, c, np.tile(c.tokens, (3, 1))), c)


@pytest.mark.parametrize("seed", SEEDS)
def test_forcing_the_gates_own_choices_changes_neither_loss_nor_gradients(seed, ops):
    c = training_case(seed)
    assert_same(gradients(ops, c, ids=c.ids), c)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_gradient_of_a_batch_is_the_mean_of_its_sequences(seed, ops):
    """Without the balance loss, which is not a mean over sequences."""
    c = training_case(seed)
    losses, grads = gradients(ops, c, balance_coefficient=0.0)
    rows = [gradients(ops, c, row[None], balance_coefficient=0.0) for row in c.tokens]
    assert_close(losses.cross_entropy, np.mean([one.cross_entropy for one, _ in rows]), TOLERANCE)
    for name, grad in grads.items():
        mean = np.mean([row[name] for _, row in rows], axis=0)
        if c.config.num_experts_per_token == 1 and c.config.renormalise and name.endswith("gate"):
            assert not grad.any() and not mean.any()
        else:
            assert relative_error(grad, mean) <= 1e-11, name


def test_float32_gradients_are_as_close_to_float64_as_the_references(ops):
    """Pooled over the draws and the layers, for each kind of parameter."""
    cases = [training_case(seed, np.float32) for seed in SEEDS]

    def errors(backend):
        worst = {}
        for c in cases:
            losses, grads = gradients(backend, c, ids=c.ids)
            found = {"loss": relative_error(losses.total, c.losses.total)}
            for name, truth in c.truth.items():
                assert grads[name].dtype == np.float32
                kind = name.rpartition(".")[2]
                found[kind] = max(found.get(kind, 0.0), relative_error(grads[name], truth))
            worst = {kind: max(worst.get(kind, 0.0), found.get(kind, 0.0)) for kind in worst | found}
        return worst

    reference, found = errors(make_backend("numpy")), errors(ops)
    slack = 8 * np.finfo(np.float32).eps / 2 * max(c.n() for c in cases) ** 0.5
    for kind, error in found.items():
        assert error <= 2 * reference[kind] + slack, kind
        assert reference[kind] < 1e-2, kind  # or the bound would mean nothing
