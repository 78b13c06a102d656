import math

import numpy as np
import pytest

from tests.measure import assert_close, assert_slopes, dialects

FORMS = ("concatenated", "per_layer", "switch")


@pytest.fixture(params=dialects("balance_loss"), ids=lambda m: m.__name__.rpartition(".")[2])
def balance_loss(request):
    return request.param


def naive_of_rows(rows):
    """E · Σ_slot Σ_e f[slot, e] · P̄[e] over a list of (logits, ids) of single tokens."""
    E, slots = len(rows[0][0]), len(rows[0][1])
    loss = 0.0
    for e in range(E):
        mean_prob = sum(math.exp(logits[e]) / sum(math.exp(z) for z in logits) for logits, _ in rows) / len(rows)
        for slot in range(slots):
            loss += E * mean_prob * sum(ids[slot] == e for _, ids in rows) / len(rows)
    return loss


def naive(logits, ids, active, form):
    L, N, _ = logits.shape
    slots = 1 if form == "switch" else ids.shape[2]
    layers = [
        [(logits[layer, n], ids[layer, n, :slots]) for n in range(N) if active is None or active[n]]
        for layer in range(L)
    ]
    if form == "concatenated":
        return naive_of_rows([row for rows in layers for row in rows])
    return sum(naive_of_rows(rows) for rows in layers) / L


def draw(L, N, E, k, masked):
    rng = np.random.default_rng(N)
    logits = 2 * rng.normal(size=(L, N, E))
    active = (np.arange(N) % 3 != 1) if masked else None
    ids = np.argsort(-logits, axis=-1)[..., :k]
    if masked:
        ids[:, ~active] = -1
    return logits, ids, active


CASES = pytest.mark.parametrize(
    ("L", "N", "E", "k"), [(1, 1, 1, 1), (1, 1, 4, 2), (3, 7, 4, 2), (2, 9, 3, 3), (2, 301, 5, 1)]
)


@CASES
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_equals_naive_loops_and_backward_is_the_slope(balance_loss, L, N, E, k, masked, form):
    logits, ids, active = draw(L, N, E, k, masked)
    assert_close(balance_loss.forward(logits, ids, active, form), naive(logits, ids, active, form))
    dlogits = balance_loss.backward(0.7, logits, ids, active, form)
    assert_slopes(lambda x: 0.7 * balance_loss.forward(x, ids, active, form), [logits], [dlogits])


@pytest.mark.parametrize(("form", "balanced"), [("concatenated", 2), ("per_layer", 2), ("switch", 1)])
def test_exact_balance_gives_k_or_one(balance_loss, form, balanced):
    # four tokens, four experts: each is first choice once and second choice once; the probabilities do not matter
    ids = np.tile([[0, 1], [1, 2], [2, 3], [3, 0]], (3, 1, 1))
    logits = np.random.default_rng(0).normal(size=(3, 4, 4))
    assert_close(balance_loss.forward(logits, ids, None, form), float(balanced))


@pytest.mark.parametrize(("form", "collapsed"), [("concatenated", 8), ("per_layer", 8), ("switch", 8)])
def test_one_expert_for_all_gives_E(balance_loss, form, collapsed):
    logits = np.tile([50.0] + [-50.0] * 7, (2, 5, 1))
    assert_close(balance_loss.forward(logits, np.zeros((2, 5, 1), int), None, form), float(collapsed))


def test_layers_cancel_out_in_the_concatenated_form_only(balance_loss):
    # layer 0 sends every token to expert 0, layer 1 to expert 1: balanced in sum, collapsed in each
    logits = np.stack([np.tile([50.0, -50.0], (5, 1)), np.tile([-50.0, 50.0], (5, 1))])
    ids = np.stack([np.zeros((5, 1), int), np.ones((5, 1), int)])
    assert_close(balance_loss.forward(logits, ids, None, "concatenated"), 1.0)
    assert_close(balance_loss.forward(logits, ids, None, "per_layer"), 2.0)


@pytest.mark.parametrize("form", FORMS)
def test_padding_changes_nothing(balance_loss, form):
    logits, ids, _ = draw(2, 9, 4, 2, False)
    expected = balance_loss.forward(logits, ids, None, form)
    padded = np.concatenate([logits, 9 * logits[:, :4]], axis=1), np.concatenate([ids, ids[:, :4]], axis=1)
    active = np.arange(13) < 9
    assert_close(balance_loss.forward(*padded, active, form), expected)
    dlogits = balance_loss.backward(1.0, *padded, active, form)
    assert not dlogits[:, 9:].any()
    assert_close(dlogits[:, :9], balance_loss.backward(1.0, logits, ids, None, form))


@pytest.mark.parametrize("form", FORMS)
def test_no_active_token_gives_zero(balance_loss, form):
    logits, ids, _ = draw(2, 3, 4, 2, False)
    none = np.zeros(3, bool)
    assert balance_loss.forward(logits, ids, none, form) == 0.0
    assert not balance_loss.backward(1.0, logits, ids, none, form).any()


def test_large_logits_do_not_overflow(balance_loss):
    logits = np.array([[[1e4, -1e4]]], np.float32)
    assert_close(balance_loss.forward(logits, np.zeros((1, 1, 1), int), None, "switch"), 2.0, 1e-6)


def test_an_unknown_form_is_refused(balance_loss):
    logits, ids, _ = draw(1, 2, 3, 1, False)
    with pytest.raises(ValueError, match="'global'"):
        balance_loss.forward(logits, ids, None, "global")
    with pytest.raises(ValueError, match="'global'"):
        balance_loss.backward(1.0, logits, ids, None, "global")


@pytest.mark.peers
@pytest.mark.parametrize("masked", [False, True])
def test_the_concatenated_form_is_that_of_transformers(balance_loss, masked):
    torch = pytest.importorskip("torch")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = 2 * np.random.default_rng(0).normal(size=(3, 8, 4))
    ids = np.argsort(-logits, axis=-1)[..., :2]
    active = np.array([0, 1, 1, 1, 0, 0, 1, 1], bool) if masked else None  # two sequences of four tokens
    mask = torch.tensor(active.reshape(2, 4).astype(np.int64)) if masked else None
    theirs = mixtral.load_balancing_loss_func(tuple(torch.tensor(layer) for layer in logits), 4, 2, mask)
    assert_close(balance_loss.forward(logits, ids, active, "concatenated"), float(theirs), 1e-6)
