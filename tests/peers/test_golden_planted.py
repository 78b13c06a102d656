"""Mistakes planted in transformers' own modules are found by the golden kit, and named."""

from fnmatch import fnmatchcase

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from minimoe.golden import diagnose, verify
from minimoe.golden.adapters import NotOffered
from minimoe.golden.examples.transformers_adapter import TransformersAdapter
from minimoe.golden.mutants import MUTANTS
from tests.peers.kit import select
from tests.peers.planted import PLANTED

pytestmark = pytest.mark.peers

PROFILE = "float32"
# The smallest case that shows each mistake, and its first output that is wrong.
SHOWN = {
    "norm-weight-missing": ("rmsnorm/plain", "y"),
    "eps-outside-the-root": ("rmsnorm/eps-inside", "y"),
    "mean-subtracted": ("rmsnorm/plain", "y"),
    "rope-interleaved": ("rope/half-split", "y"),
    "theta-1e4": ("rope/theta-1e6", "cos"),
    "positions-restarted": ("model.chunks/no-window", "logits"),
    "kv-heads-tiled": ("attention/grouped", "probs"),
    "attention-scale-missing": ("attention/multi-head", "probs"),
    "window-one-wider": ("attention/window-slides", "probs"),
    "window-one-narrower": ("attention/window-full", "probs"),
    "k-v-exchanged": ("block/main", "attention.k_rotated"),
    "gate-without-renormalising": ("gating/top-2", "weights"),
    "gate-chooses-the-smallest": ("gating/top-2", "ids"),
    "gate-slots-in-order-of-ids": ("gating/top-2", "ids"),
    "gate-ids-sorted-without-weights": ("gating/top-2", "ids"),
    "silu-on-w3": ("experts/main", "out"),
    "w2-not-transposed": ("experts/square", "out"),
    "gelu-instead-of-silu": ("experts/main", "out"),
    "gate-weights-on-the-input": ("experts/main", "out"),
    "jitter-left-on": ("model/repeat-a", "layers.0.ffn_norm"),
    "experts-residual-forgotten": ("block/main", "out"),
    "norms-exchanged": ("block/main", "attention_norm"),
    "embeddings-tied": ("model/main", "logits"),
    "padding-attended-in-order": ("block/padding", "attention.probs"),
    "balance-softmax-twice": ("balance_loss/concatenated", "loss"),
    "balance-per-layer-instead-of-concatenated": ("balance_loss/concatenated-crossed", "loss"),
}


@pytest.fixture(scope="module", autouse=True)
def _mutants_computed_once():
    """What the catalogue's mistakes output is the same for every candidate."""
    with pytest.MonkeyPatch.context() as patch:
        shared = diagnose.Planted()
        patch.setattr(diagnose, "Planted", lambda: shared)
        yield


def check():
    """All cases that transformers answers and does not deviate in by intention: (case, result, outputs)."""
    adapter, entries = TransformersAdapter(PROFILE), []
    for case in select(PROFILE):
        if not any(fnmatchcase(case.id, pattern) for pattern in adapter.deviations):
            try:
                outputs = adapter.run(case)
            except NotOffered:
                continue
            entries.append((case, verify.compare(case, outputs, PROFILE), outputs))
    return entries


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found_and_named_first(name, monkeypatch):
    PLANTED[name](monkeypatch)
    entries = check()
    failed = {result.id: result.first_failure.name for _, result, _ in entries if result.status == "fail"}
    id, output = SHOWN[name]
    assert failed.get(id) == output
    first, *_ = diagnose.diagnose(entries, PROFILE)
    assert name in first.names, first
    assert len(first.names) <= 2 and first.confidence != "symptom"


def test_two_planted_mistakes_are_both_named(monkeypatch):
    for name in ("norm-weight-missing", "gate-without-renormalising"):
        PLANTED[name](monkeypatch)
    found = {name for finding in diagnose.diagnose(check(), PROFILE) for name in finding.names}
    assert {"norm-weight-missing", "gate-without-renormalising"} <= found


def test_nothing_is_diagnosed_where_nothing_is_planted():
    assert diagnose.diagnose(check(), PROFILE) == []


def test_every_planted_mistake_is_in_the_catalogue():
    assert set(PLANTED) == set(SHOWN) <= {mutant.name for mutant in MUTANTS}
    assert len(PLANTED) >= 10
