"""The catalogue of mistakes: each changes what it says and nothing else, and the golden vectors catch it."""

import importlib
import re

import numpy as np
import pytest

from minimoe import layers, mixtral
from minimoe.golden import calls, diagnose, make, verify
from minimoe.golden.mutants import MUTANTS, mutant, planting, table
from minimoe.golden.mutants.planting import Edit, edited_calls
from minimoe.ops.gating import reference as gating
from minimoe.params import map_leaves, named
from tests.measure import assert_close

CASES = verify.read_kit(make.FOLDER)[1]
BY_ID = {case.id: case for case in CASES}
BY_NAME = {found.name: found for found in MUTANTS}
EDITED = [found for found in MUTANTS if found.edits]
# What the kit promises to know, in the words of the field.
PROMISED = """
gate-without-renormalising gate-softmax-twice gate-softmax-before-top-k balance-softmax-twice
balance-per-layer-instead-of-concatenated balance-concatenated-instead-of-per-layer balance-summed-over-layers
balance-ignores-the-mask rope-interleaved theta-1e4 rope-opposite-direction window-one-wider window-one-narrower
cache-slot-off-by-one chunk-written-before-it-is-attended w1-w3-exchanged w2-not-transposed kv-heads-tiled
eps-outside-the-root norm-weight-missing norm-weight-plus-one mean-subtracted norm-rounded-before-its-weight
attention-scale-missing attention-scale-1/C attention-scale-of-hidden-size residual-from-the-normed-states
residual-from-the-block-input gate-weights-on-the-input gate-weights-ignored-mean gate-weights-ignored-sum
gate-slots-in-order-of-ids positions-restarted jitter-left-on embeddings-tied gate-chooses-the-smallest
gate-ties-to-the-higher-id sees-the-next-token does-not-see-itself causal-mask-missing empty-keys-attended
padding-attended-in-order padding-routed float16-overflow-in-attention gelu-instead-of-silu silu-on-w3 capacity-1.0
top-1-only gate-sigmoid targets-not-shifted cross-entropy-over-padding router-untrained-by-its-weights
balance-gradient-lost norm-gradient-without-projection silu-slope-wrong kv-gradient-of-one-head
adam-decay-in-the-gradient adam-bias-uncorrected adam-eps-inside-the-root top-p-excludes-the-crossing-token
greedy-ties-to-the-highest-id attention-residual-forgotten gate-reads-the-unnormed-states ffn-norm-skipped
norm-after-instead-of-before attention-cap-missing attention-cap-clips attention-cap-after-the-mask
attention-cap-on-the-probabilities attention-cap-before-the-scale attention-scale-ignored gelu-exact-instead-of-tanh
silu-instead-of-gelu gate-renormalised post-norms-missing post-norms-of-the-sums post-norms-exchanged
embedding-multiplier-missing output-multiplier-missing output-multiplier-inverted
""".split()


def profile_of(found):
    return (found.profiles or ("float32",))[0]


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n], equal_nan=True) for n in one)


# ---- the catalogue


def test_what_is_promised_is_there():
    assert set(PROMISED) <= set(BY_NAME)
    assert len(BY_NAME) == len(MUTANTS) >= 100


def test_every_mistake_says_what_is_wrong_and_what_to_do_in_a_line():
    for found in MUTANTS:
        assert re.fullmatch(r"[a-zA-Z0-9./-]+", found.name)
        assert found.planted in ("op", "params", "config", "block", "random")
        for text in (found.says, found.remedy):
            assert 5 < len(text) <= 120, (found.name, text)
            assert "\n" not in text


def test_the_table_lists_all():
    rows = table()
    assert [row["name"] for row in rows] == [found.name for found in MUTANTS]
    assert all(re.search(r"minimoe/.*\.py:\d+$", row["where"]) for row in rows)


@pytest.mark.parametrize("found", EDITED, ids=lambda found: found.name)
def test_where_is_the_line_that_is_edited(found):
    path, line = found.where
    first = found.edits[0].right.strip("\n").splitlines()[0].strip()
    assert first in path.read_text().splitlines()[line - 1]


@pytest.mark.parametrize("found", [found for found in MUTANTS if not found.edits], ids=lambda found: found.name)
def test_where_shows_a_definition(found):
    path, line = found.where
    assert re.match(r"\s*(def|class|@)", path.read_text().splitlines()[line - 1])


# ---- planting


def test_an_edit_that_finds_no_line_is_an_error():
    with pytest.raises(LookupError, match="must hold once"):
        edited_calls((Edit("layers", "no such line", ""),))
    with pytest.raises(LookupError, match="must hold once"):
        edited_calls((Edit("layers", "return", ""),))


def test_planting_changes_nothing_for_others():
    functions, case = (layers.forward, mixtral.forward, gating.forward), BY_ID["model/main"]
    before = _right(case)
    wrong = BY_NAME["attention-residual-forgotten"].run(case)
    BY_NAME["gate-sigmoid"].run(case)
    assert functions == (layers.forward, mixtral.forward, gating.forward)
    after = _right(case)
    np.testing.assert_array_equal(after["logits"], before["logits"])
    assert_close(after["logits"], case.truth["logits"], 1e-13)  # made on another processor, it may be
    assert np.abs(wrong["logits"] - after["logits"]).max() > 0.1


def _right(case):
    """What the unchanged code gives for a case of the whole model."""
    model = mutant.load(case.model_folder, np.dtype(np.float64))
    inputs = calls.cast(case.call, case.inputs, np.float64, np.float64)
    return calls.run(case.call, mutant._numpy(), inputs, case.settings, model)


def test_copied_modules_without_an_edit_compute_the_same():
    """A comment in the first of them makes copies of all."""
    copies = edited_calls((Edit("inputs", "def next_tokens", "# a comment\ndef next_tokens"),))
    assert copies is not calls
    for name in ("model/main", "model.chunks/mixed", "model.generate/greedy", "training/padding", "block/main"):
        case = BY_ID[name]
        model = mutant.load(case.model_folder, np.dtype(np.float64))
        asked = case.call, mutant._numpy(), calls.cast(case.call, case.inputs, np.float64, np.float64), case.settings
        assert same(calls.run(*asked, model), copies.run(*asked, model)), name


def test_copies_share_the_classes_of_the_originals():
    copies = edited_calls((Edit("layers", "def route", "# a comment\ndef route"),))
    assert copies.layers is not layers
    assert copies.layers.Batch is layers.Batch
    assert copies.mixtral.layers is copies.layers


def test_a_mistake_runs_twice_the_same_unless_it_is_random():
    case = BY_ID["block/main"]
    for found in MUTANTS:
        if case.call in found.calls and (one := found.run(case)) is not None:
            assert same(one, found.run(case)) is (found.planted != "random"), found.name


def test_a_mistake_that_does_not_apply_gives_nothing():
    assert BY_NAME["eps-outside-the-root"].run(BY_ID["rope/far"]) is None
    assert BY_NAME["theta-1e4"].run(BY_ID["rope/theta-1e4"]) is None  # it is 1e4 already
    assert BY_NAME["embeddings-tied"].run(BY_ID["model/every-expert"]) is None  # they are tied
    assert BY_NAME["w1-w3-exchanged"].run(BY_ID["training/concatenated"]) is None  # no gradient is defined for it


@pytest.mark.parametrize("found", MUTANTS, ids=lambda found: found.name)
def test_no_mistake_stumbles_over_a_case(found):
    """The diagnosis takes an error for a mistake that does not fit; here it would hide an edit that is broken."""
    for call in found.calls:
        for case in [case for case in CASES if case.call == call][:6]:
            outputs = found.run(case)
            assert outputs is None or {o.name for o in case.outputs if o.required} <= set(outputs), case.id


# ---- gradients of mistakes in the forward

FORWARD = [
    found
    for found in MUTANTS
    if "training" in found.calls
    and any(edit.function != "backward" for edit in found.edits)
    and found.planted != "random"
]
# Mistakes of the gradient itself or of the step, and roundings, which have no slope.
NOT_DIFFERENTIATED = {
    "tied-gradient-of-one-use", "norms-decayed", "silu-slope-wrong", "gelu-slope-without-the-cubic",
    "embedding-gradient-overwritten",
    "gradient-unclipped", *(found.name for found in MUTANTS if found.name.startswith("adam-")),
    "gate-logits-in-bfloat16", "norm-statistics-in-float16", "norm-rounded-before-its-weight",
    "cross-entropy-overflows", "attention-softmax-overflows", "float16-overflow-in-attention", "gate-softmax-overflows",
    "norm-weight-before-the-cast",
}  # fmt: skip


@pytest.mark.parametrize("found", [f for f in FORWARD if f.name not in NOT_DIFFERENTIATED], ids=lambda f: f.name)
def test_a_wrong_forward_has_its_own_gradient(found):
    """What a framework that differentiates by itself would compute: finite differences of the wrong loss."""
    mixtral = ("training/concatenated", "training/padding", "training/tied", "training/dense")
    for name in ("training/grok",) if found.tag else mixtral:
        case = BY_ID[name]
        wrong = found.run(case)
        if wrong is None:
            continue
        model = mutant.load(case.model_folder, np.dtype(np.float64))
        rng = np.random.default_rng(0)
        way = map_leaves(model.params, lambda w, rng=rng: rng.standard_normal(np.shape(w)))
        steps = dict(named(way))
        slope = sum((wrong[f"grads.{key}"] * step).sum() for key, step in steps.items())

        def loss(h, found=found, case=case, model=model, steps=steps):
            moved = calls.GoldenModel(model.config, _moved(model, steps, h))
            inputs = calls.cast(case.call, case.inputs, np.float64, np.float64)
            asked = mutant.Asked(inputs, dict(case.settings), moved)
            return float(mutant.compute([found], case.call, asked)["loss"])

        h = 1e-5
        differences = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
        scale = max(np.sqrt(sum((wrong[f"grads.{key}"] ** 2).sum() for key in steps)), 1e-3)
        assert abs(differences - slope) < 1e-6 * scale, name


def _moved(model, steps, h):
    from minimoe.params import from_named, stack_experts

    return stack_experts(from_named(model.config, {key: w + h * steps[key] for key, w in named(model.params)}))


# ---- the vectors


@pytest.mark.parametrize("found", MUTANTS, ids=lambda found: found.name)
def test_every_mistake_leaves_the_bounds_of_some_case_unless_it_is_harmless(found):
    assert bool(diagnose.tells_apart(found).get(profile_of(found))) is not bool(found.harmless)


def test_two_are_harmless():
    assert [f.name for f in MUTANTS if f.harmless] == ["norm-weight-before-the-cast", "gate-softmax-before-top-k"]
    rare = BY_NAME["gate-softmax-before-top-k"].run(case := BY_ID["gating/gap-200"])
    assert (rare["ids"] != case.truth["ids"]).any()


def test_op_mistakes_are_caught_by_an_op_case():
    """So that an implementation can be mended one op at a time."""
    for found in MUTANTS:
        if found.planted == "op" and not found.harmless:
            ids = diagnose.tells_apart(found).get(profile_of(found), ())
            assert any(BY_ID[id].level == "op" for id in ids), found.name


def test_in_float32_no_two_mistakes_have_the_same_outputs():
    assert diagnose.twins("float32") == []


def test_what_16_bits_cannot_tell_apart_is_reported_as_a_set():
    sets = diagnose.twins("hf_bfloat16")
    assert ("gelu-instead-of-silu", "gelu-tanh-instead-of-silu") in sets
    assert all(len(found) > 1 for found in sets)


def test_every_edited_module_is_copied_with_what_uses_it():
    for found in EDITED:
        for edit in found.edits:
            importlib.import_module(f"minimoe.{edit.module}")
            assert edit.module in planting.DECODER or edit.module.startswith("ops."), found.name
