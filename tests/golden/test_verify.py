"""The verifier: what is right passes, whatever its memory looks like, and what is wrong is named where it begins."""

import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from minimoe import schedule
from minimoe.config import ModelConfig
from minimoe.golden import verify
from minimoe.golden.adapters import OurBackend
from minimoe.golden.cases import MODELS
from minimoe.golden.report import VECTORS
from minimoe.golden.verify import KitError, cause, compare
from tests.golden import kits


@pytest.fixture
def gate(tmp_path):
    """A gate of three tokens; its outputs, to be spoilt."""
    case = kits.write(tmp_path, [kits.gating([[3.0, 2, 1, 0], [0.0, 1, 2, 3], [5.0, 4, 4.5, 0]])])["gating/drawn"]
    return case, dict(case.truth)


@pytest.fixture
def drawn(tmp_path):
    """A function that writes a drawn model case and returns it with its outputs as copies."""

    def make(**settings):
        case = kits.write(tmp_path, [kits.model(**settings)])["model/drawn"]
        return case, {name: x.copy() for name, x in case.truth.items()}

    return make


def status(case, outputs, name, profile="float32"):
    return next(t for t in compare(case, outputs, profile).tensors if t.name == name)


# ---- arrays


WAYS = {
    "float32": lambda x: x.astype(np.float32),
    "Fortran order": np.asfortranarray,
    "other byte order": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "strided": lambda x: np.repeat(x, 2, axis=0)[::2],
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "lists": lambda x: x.tolist(),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_right_passes_however_it_lies_in_memory(gate, way):
    case, outputs = gate
    outputs = {name: WAYS[way](x) if way != "float32" or x.dtype.kind == "f" else x for name, x in outputs.items()}
    result = compare(case, outputs)
    assert result.status == "pass" and len(result.tensors) == 3 and not result.decisions


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.longdouble, ml_dtypes.bfloat16], ids=lambda t: t.__name__)
def test_any_float_type_is_read(gate, dtype):
    case, outputs = gate
    assert status(case, outputs | {"logits": outputs["logits"].astype(dtype)}, "logits").status == "pass"


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64])
def test_any_integer_type_is_read(gate, dtype):
    case, outputs = gate
    assert status(case, outputs | {"ids": outputs["ids"].astype(dtype)}, "ids").status == "pass"


def test_an_unsigned_number_never_wraps_to_the_mark_of_unrouted_tokens(tmp_path):
    entry, inputs, truth = kits.gating([[3.0, 2, 1, 0]])
    truth["ids"] = np.array([[-1, -1]])
    case = kits.write(tmp_path, [(entry, inputs, truth)])["gating/drawn"]
    assert status(case, truth | {"ids": np.full((1, 2), 2**64 - 1, np.uint64)}, "ids").status == "fail"


def test_one_number_may_be_an_array_of_one(tmp_path):
    loss = np.array(2.5)
    entry = kits.entry("cross_entropy/one", "cross_entropy", "op", {"loss": ("", loss)})
    [case] = kits.write(tmp_path, [(entry, {}, {"loss": loss})]).values()
    for same in (2.5, np.float32(2.5), np.array([2.5])):
        assert compare(case, {"loss": same}).status == "pass"
    assert compare(case, {"loss": np.array([[2.5]])}).tensors[0].status == "shape"
    assert compare(case, {"loss": 3.0}).tensors[0].first.where == "the number"


HOSTILE = {
    "object": (np.array([[None] * 4] * 3), "dtype"),
    "text": (np.array([["a"] * 4] * 3), "dtype"),
    "complex": (np.zeros((3, 4), complex), "dtype"),
    "integers for floats": (np.zeros((3, 4), int), "dtype"),
    "bfloat16 in disguise": (np.zeros((3, 4), "V2"), "dtype"),
    "ragged": ([[1.0], [1.0, 2.0]], "dtype"),
    "nothing": (None, "dtype"),
    "transposed": (np.zeros((4, 3)), "shape"),
    "too long": (np.zeros((3, 5)), "shape"),
    "flat": (np.zeros(12), "shape"),
    "huge": (np.broadcast_to(np.float32(0), (1 << 20, 1 << 20)), "shape"),
    "NaN": (np.full((3, 4), np.nan), "nan"),
    "Inf": (np.full((3, 4), np.inf), "nan"),
    "zeros": (np.zeros((3, 4)), "fail"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_wrong_array_is_named_and_the_others_are_still_checked(gate, kind):
    case, outputs = gate
    array, expected = HOSTILE[kind]
    result = compare(case, outputs | {"logits": array})
    assert [t.status for t in result.tensors] == [expected, "pass", "pass"] and result.status == "fail"
    assert result.first_failure.name == "logits" and result.first_failure.says


def test_floats_that_hold_integers_are_no_ids(gate):
    case, outputs = gate
    assert "integers are wanted" in status(case, outputs | {"ids": outputs["ids"].astype(float)}, "ids").says


def test_outputs_that_are_no_dict_are_a_problem_of_the_case(gate):
    result = compare(gate[0], [1, 2])
    assert result.status == "fail" and result.problem == "the outputs are list, not a dict of arrays by name"


def test_missing_and_unknown_outputs_are_named_with_what_may_be_meant(gate):
    case, outputs = gate
    outputs["weight"] = outputs.pop("weights")
    missing, extra = compare(case, outputs).tensors[2:]
    assert (missing.name, missing.status, missing.says) == ("weights", "missing", "not given; is 'weight' meant?")
    assert (extra.name, extra.status, extra.says) == ("weight", "extra", "no output of this case; is 'weights' meant?")


def test_an_unknown_output_alone_is_only_a_warning(gate):
    assert compare(gate[0], gate[1] | {"more": 1.0}).status == "pass"


def test_the_bound_is_relative_to_the_largest_truth_and_error_is_told_in_bounds(gate):
    case, outputs = gate
    for factor, expected in ((0.9, "pass"), (1.1, "fail")):
        logits = outputs["logits"].copy()
        logits[1, 2] += factor * kits.BOUND * 5
        found = status(case, outputs | {"logits": logits}, "logits")
        assert found.status == expected and found.ratio == pytest.approx(factor, rel=1e-6)


def test_the_first_and_the_worst_wrong_number_are_located_in_words(gate):
    case, outputs = gate
    logits = outputs["logits"].copy()
    logits[1, 2] += 1
    logits[2, 0] -= 3
    found = status(case, outputs | {"logits": logits}, "logits")
    assert (found.first.where, found.first.value, found.first.truth) == ("token 1, expert 2", 3.0, 2.0)
    assert (found.worst.index, found.worst.value, found.error, found.wrong) == ((2, 0), 2.0, 3.0, 2)


def test_a_hidden_score_may_be_a_large_negative_number_and_nothing_else(drawn):
    case, outputs = drawn()
    name = "layers.0.attention.scores"
    hidden = np.isneginf(outputs[name])
    for value, expected in ((-1e9, "pass"), (np.finfo(np.float32).min, "pass"), (-100.0, "fail"), (np.nan, "nan")):
        scores = np.where(hidden, value, outputs[name])
        assert status(case, outputs | {name: scores}, name).status == expected, value
    assert status(case, outputs | {name: np.full_like(scores, -np.inf)}, name).status == "nan"


def test_where_the_truth_is_nan_nothing_is_compared(tmp_path):
    truth = np.array([np.nan, 1.0])
    entry = kits.entry("rmsnorm/hole", "rmsnorm", "op", {"y": ("N", truth)})
    [case] = kits.write(tmp_path, [(entry, {}, {"y": truth})]).values()
    for value in (0.0, np.nan, np.inf):
        assert compare(case, {"y": np.array([value, 1.0])}).status == "pass"
    assert compare(case, {"y": np.array([0.0, 2.0])}).status == "fail"


def test_a_profile_without_bounds_is_refused(gate):
    with pytest.raises(KitError, match="no bounds for profile 'float16'; it has float32, coarse"):
        compare(*gate, "float16")


# ---- routing


GAP = 0.4 * 2 * 5 * kits.BOUND  # of twice the bound on the logits below, 0.4


def gate_case(folder, logits, **settings):
    case = kits.write(folder, [kits.gating(logits, **settings)])["gating/drawn"]
    return case, {name: x.copy() for name, x in case.truth.items()}


def choose(outputs, token, experts):
    """Let a token go to other experts, with the weights that follow from the logits."""
    outputs["ids"][token] = experts
    chosen = outputs["logits"][token, experts]
    outputs["weights"][token] = np.exp(chosen) / np.exp(chosen).sum()
    return outputs


LOGITS = [[5.0, 3, 3 - GAP, 0], [0.0, 1, 2, 5]]


def test_a_near_tie_is_no_error_and_the_weights_follow_it(tmp_path):
    case, outputs = gate_case(tmp_path, LOGITS)
    result = compare(case, choose(outputs, 0, [0, 2]))
    assert result.status == "pass" and result.routing == {"near tie": 1}
    assert (result.decisions[0].golden, result.decisions[0].chosen) == (1, 2)
    assert result.decisions[0].margin == pytest.approx(0.4, rel=1e-3)


def test_beyond_the_bound_it_is_a_wrong_expert_with_its_margin(tmp_path):
    case, outputs = gate_case(tmp_path, [[5.0, 3, 3 - 3 * GAP, 0], LOGITS[1]])
    result = compare(case, choose(outputs, 0, [0, 2]))
    assert result.first_failure.name == "ids" and result.routing == {"wrong expert": 1}
    assert result.decisions[0].margin == pytest.approx(1.2, rel=1e-3)
    assert result.first_failure.first.where == "token 0, slot 1"
    assert [t.status for t in result.tensors] == ["pass", "fail", "pass"], "its weights fit the experts that it chose"


def test_weights_that_are_shares_of_all_experts_follow_a_near_tie_too(tmp_path):
    def shares(logits, ids):
        e = np.exp(logits)
        return np.take_along_axis(e / e.sum(axis=1, keepdims=True), ids, axis=1)

    drawn = kits.gating(LOGITS)
    entry, _, truth = drawn
    truth["weights"] = shares(truth["logits"], truth["ids"])
    entry["outputs"][1]["routing"] = {
        "logits": "logits", "weights": "weights", "forced": False, "margin": GAP, "renormalised": False
    }  # fmt: skip
    case = kits.write(tmp_path, [drawn])["gating/drawn"]
    outputs = {name: x.copy() for name, x in case.truth.items()}
    outputs["ids"][0] = [0, 2]
    outputs["weights"] = shares(outputs["logits"], outputs["ids"])
    assert compare(case, outputs).status == "pass"
    assert compare(case, choose(outputs, 0, [0, 2])).first_failure.name == "weights"


def test_weights_that_do_not_fit_the_experts_chosen_are_wrong(tmp_path):
    case, outputs = gate_case(tmp_path, LOGITS)
    outputs = choose(outputs, 0, [0, 2])
    outputs["weights"][0] = [0.5, 0.5]
    result = compare(case, outputs)
    assert result.first_failure.name == "weights" and result.routing == {"near tie": 1, "numeric": 2}


def test_experts_sorted_by_id_are_out_of_order_not_wrong(tmp_path):
    case, outputs = gate_case(tmp_path, LOGITS)
    result = compare(case, choose(outputs, 1, [2, 3]))
    assert result.routing == {"order": 2} and result.first_failure.name == "ids"


def test_near_ties_may_also_be_swapped(tmp_path):
    case, outputs = gate_case(tmp_path, [[5.0, 5 - GAP, 1, 0]])
    assert compare(case, choose(outputs, 0, [1, 0])).status == "pass"


def test_an_exact_tie_goes_to_the_lower_id(tmp_path):
    case, outputs = gate_case(tmp_path, [[5.0, 3, 3, 0]])
    result = compare(case, choose(outputs, 0, [0, 2]))
    assert result.status == "fail" and result.routing == {"tie": 1}


def test_an_exact_tie_that_roundings_break_is_a_near_tie(tmp_path):
    case, outputs = gate_case(tmp_path, [[5.0, 3, 3, 0]])
    outputs["logits"][0, 2] += 0.5 * GAP
    assert compare(case, choose(outputs, 0, [0, 2])).routing == {"near tie": 1}


def test_an_expert_whose_weight_vanishes_does_not_matter(tmp_path):
    case, outputs = gate_case(tmp_path, [[200.0, 3, 2, 0]])
    result = compare(case, choose(outputs, 0, [0, 3]))
    assert result.status == "pass" and result.routing == {"don't care": 1}


@pytest.mark.parametrize("ids", [[0, 0], [0, 7], [0, -1], [2**40, 1]], ids=str)
def test_ids_that_cannot_be_are_wrong(tmp_path, ids):
    case, outputs = gate_case(tmp_path, LOGITS)
    outputs["ids"][0] = ids
    result = compare(case, outputs)
    assert result.first_failure.name == "ids" and "wrong expert" in result.routing


def test_where_the_routing_is_imposed_a_near_tie_is_no_excuse(tmp_path):
    case, outputs = gate_case(tmp_path, LOGITS, forced=True)
    assert compare(case, choose(outputs, 0, [0, 2])).routing == {"wrong expert": 1}


def flip(outputs, layer, token):
    """Exchange the second and the third choice."""
    at = f"layers.{layer}.gating."
    first, _, third = np.argsort(-outputs[at + "logits"][token])[:3]
    outputs[at + "ids"][token] = [first, third]
    chosen = np.exp(outputs[at + "logits"][token, [first, third]])
    outputs[at + "weights"][token] = chosen / chosen.sum()


def spoil(outputs, name, token):
    """Put something else into a token's row (its queries' rows, of scores)."""
    B, T = 2, 5
    x = outputs[name]
    rows = x[token // T, ..., token % T, :] if x.ndim == 4 else x.reshape(B * T, *x.shape[1:])[token] if x.shape[
        0] != B else x[token // T, token % T]  # fmt: skip
    rows[np.isfinite(rows)] += 1


AFTER_A_FLIP = {  # of token 6, the second of the second sequence, in layer 0: may the row of a token differ?
    ("layers.0.gating.logits", 6): False, ("layers.0.experts.hidden", 6): True, ("layers.0.experts.slots", 6): True,
    ("layers.0.experts.out", 6): True, ("layers.0.out", 6): True, ("layers.0.out", 7): False,
    ("layers.1.attention.q", 6): True, ("layers.1.attention.q", 7): False, ("layers.1.attention.k_rotated", 7): False,
    ("layers.1.attention.scores", 7): True, ("layers.1.attention.context", 9): True,
    ("layers.1.attention.context", 5): False, ("layers.1.attention.context", 4): False,
    ("layers.1.gating.logits", 8): True, ("layers.1.gating.logits", 3): False, ("logits", 9): True,
    ("logits", 5): False, ("norm", 2): False,
}  # fmt: skip


@pytest.mark.parametrize(("name", "token"), AFTER_A_FLIP)
def test_after_a_near_tie_only_what_follows_from_it_is_left_out(drawn, name, token):
    case, outputs = drawn(near=[(0, 6)])
    flip(outputs, 0, 6)
    assert compare(case, outputs).status == "pass"
    spoil(outputs, name, token)
    assert status(case, outputs, name).failed is not AFTER_A_FLIP[name, token]


def test_a_flip_in_the_last_layer_stays_with_its_token(drawn):
    case, outputs = drawn(near=[(1, 6)])
    flip(outputs, 1, 6)
    spoil(outputs, "logits", 6)
    assert compare(case, outputs).status == "pass"
    spoil(outputs, "logits", 7)
    assert compare(case, outputs).first_failure.name == "logits"


def test_what_is_left_out_is_said(drawn):
    case, outputs = drawn(near=[(0, 6)])
    flip(outputs, 0, 6)
    result = compare(case, outputs)
    assert result.notes == ["1 of 10 tokens follow other experts, and are left out from there on"]
    hidden = next(t for t in result.tensors if t.name == "layers.0.experts.hidden")
    assert (hidden.compared, hidden.size) == (9 * 14, 10 * 14)


def test_slots_are_held_against_their_own_expert(drawn):
    case, outputs = drawn()
    for name in ("gating.ids", "gating.weights", "experts.hidden", "experts.slots"):
        outputs[f"layers.0.{name}"][:, :] = outputs[f"layers.0.{name}"][:, ::-1].copy()
    result = compare(case, outputs)
    assert [t.name for t in result.tensors if t.failed] == ["layers.0.gating.ids"]
    assert result.routing == {"order": 20}


def without_routing(outputs, *layers):
    """What a candidate gives that keeps to itself which experts these layers took."""
    hidden = tuple(f"layers.{layer}.{name}" for layer in layers or (0, 1) for name in ("gating", "experts"))
    return {name: x for name, x in outputs.items() if not name.startswith(hidden)}


def test_without_ids_what_may_follow_from_a_near_tie_need_not_fit(drawn):
    """Token 3 is in the first sequence of five; in layer 1 attention mixes no more."""
    case, outputs = drawn(near=[(1, 3)])
    outputs["logits"][0, 3] += 1
    result = compare(case, without_routing(outputs))
    assert (result.status, result.doubted) == ("pass", ["logits"])
    assert result.notes == [
        "logits may follow from near ties in layers.1.gating.ids: give these outputs, to see which experts won"
    ]
    for token in (2, 4):
        assert compare(case, without_routing(outputs | {"logits": _moved(outputs["logits"], token)})).status == "fail"
    assert compare(case, outputs).status == "fail"  # the routing is given, and golden


def test_in_later_layers_a_near_tie_may_reach_the_tokens_after_it(drawn):
    case, outputs = drawn(near=[(0, 3)])
    for token, status in ((2, "fail"), (3, "pass"), (4, "pass"), (5, "fail")):
        moved = outputs | {"logits": _moved(outputs["logits"], token)}
        assert compare(case, without_routing(moved)).status == status, token
        assert compare(case, without_routing(moved, 1)).status == "fail"  # layer 0 is given


def _moved(logits, token):
    """The logits of two sequences of five tokens with one row wrong."""
    moved = logits.copy()
    moved.reshape(10, -1)[token] += 1
    return moved


def test_routing_that_may_follow_from_a_near_tie_before_it_need_not_fit(drawn):
    case, outputs = drawn(near=[(0, 3)])
    flip(outputs, 1, 4)
    assert compare(case, without_routing(outputs, 0)).status == "pass"
    flip(outputs, 1, 5)
    assert compare(case, without_routing(outputs, 0)).status == "fail"


def test_if_a_near_tie_may_have_changed_everything_all_must_fit(drawn):
    case, outputs = drawn(near=[(0, 0), (0, 5)])
    assert compare(case, without_routing(outputs)).status == "pass"
    outputs["logits"][0, 3] += 1
    result = compare(case, without_routing(outputs))
    assert result.status == "fail" and result.doubted == []
    assert result.notes[0].startswith("near ties are in layers.0.gating.ids: give these outputs")


def test_near_ties_of_padding_excuse_nothing(drawn):
    mask = np.ones((2, 5), bool)
    mask[1, 0] = False
    case, outputs = drawn(near=[(0, 5)], mask=mask)
    assert compare(case, without_routing(outputs | {"logits": _moved(outputs["logits"], 7)})).status == "fail"


def test_exact_ties_are_no_near_ties(drawn):
    for lead, status in ((1.9, "pass"), (0.0, "fail"), (2.1, "fail")):
        case, outputs = drawn(near=[(1, 3)], lead=lead)
        outputs["logits"][0, 3] += 1
        assert compare(case, without_routing(outputs)).status == status, lead


def test_the_routing_of_padding_is_not_compared(drawn):
    mask = np.ones((2, 5), bool)
    mask[1, 0] = False
    case, outputs = drawn(mask=mask)
    outputs["layers.0.gating.ids"][5] = -1
    assert compare(case, outputs).status == "pass"
    outputs["layers.0.gating.ids"][6] = -1
    assert compare(case, outputs).routing == {"wrong expert": 2}


# ---- where a mistake begins


def test_a_step_whose_inputs_fit_is_the_cause_and_later_ones_may_follow(drawn):
    case, outputs = drawn()
    for name in ("layers.0.attention.context", "layers.0.attention.out", "logits"):
        outputs[name] += 1
    assert compare(case, outputs).cause == (
        "its inputs (layers.0.attention.probs, layers.0.attention.v) fit, so this step is wrong; so is logits; "
        "1 later one may follow from it"
    )


def test_what_is_not_given_may_be_the_cause(drawn):
    case, outputs = drawn()
    del outputs["layers.0.attention.probs"], outputs["layers.0.attention.scores"]
    outputs["layers.0.attention.context"] += 1
    assert (
        compare(case, outputs).cause
        == "here, or in layers.0.attention.probs, layers.0.attention.scores, which are not given"
    )


def test_the_first_step_of_an_op_reads_the_cases_inputs(gate):
    case, outputs = gate
    outputs["logits"] = outputs["logits"] + 1
    assert compare(case, outputs).cause == "it is computed from the case's inputs, so this step is wrong"


def test_what_each_step_reads_is_what_the_schedule_says(drawn):
    """The table of the stand-alone verifier has no other source than the model's schedule."""
    config = ModelConfig(vocab_size=9, hidden_size=6, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=2,
                         intermediate_size=7, num_experts=4, num_experts_per_token=2)  # fmt: skip
    case, _ = drawn()
    for step in schedule.schedule(config)[1:]:
        reads = {read for name in step.writes for read in cause._reads(case, name)}
        assert reads - set(step.writes) == set(step.reads) - {"tokens"}, step.name
    grok = next(case for case in verify.read_kit(VECTORS)[1] if case.id == "model/grok")
    for step in schedule.schedule(MODELS["grok"].config)[1:]:
        reads = {read for name in step.writes for read in cause._reads(grok, name)}
        assert reads - set(step.writes) == set(step.reads) - {"tokens"}, step.name


def test_the_report_tells_of_near_ties_and_of_what_they_leave_out(drawn):
    case, outputs = drawn(near=[(1, 6)])
    flip(outputs, 1, 6)
    text = verify.Report("KIT", "float32", verify.check([case], lambda case: outputs, "float32"), 1).text()
    left = 14 + 12 + 6 + 6 + 6 + 9  # hidden, slots, experts.out, out, norm and logits of one token
    assert f"routing: near tie (1) in passing cases: no errors; {left} numbers that follow" in text


def test_forced_routing_tells_a_wrong_choice_from_what_follows(drawn):
    case, outputs = drawn()
    right = {name: x.copy() for name, x in outputs.items()}
    flip(outputs, 0, 6)
    outputs["logits"][1] += 1
    seen = []

    def run(ids):
        seen.append(ids)
        return right

    result = compare(case, outputs)
    assert result.routing == {"wrong expert": 1}
    verify.force_routing(case, result, run, "float32")
    np.testing.assert_array_equal(seen[0], np.stack([right[f"layers.{i}.gating.ids"] for i in range(2)]))
    assert result.status == "fail" and result.forced.status == "pass"
    assert result.notes[-1] == "with the golden experts imposed everything fits: only the choice differs"


def test_forced_routing_compares_what_a_near_tie_left_out(drawn):
    case, outputs = drawn(near=[(0, 6)])
    flip(outputs, 0, 6)
    result = compare(case, outputs)
    assert result.status == "pass"
    verify.force_routing(case, result, lambda ids: case.truth | {"logits": case.truth["logits"] + 1}, "float32")
    assert result.status == "fail" and result.notes[-1] == "with the golden experts imposed logits is still wrong"


def test_a_forced_run_that_fails_is_a_note(drawn):
    case, outputs = drawn()
    flip(outputs, 0, 6)
    result = compare(case, outputs)
    verify.force_routing(case, result, lambda ids: 1 / 0, "float32")
    assert result.notes[-1] == "could not be run with the golden experts: ZeroDivisionError: division by zero"


def test_without_other_experts_nothing_is_run_again(gate):
    result = compare(*gate)
    verify.force_routing(gate[0], result, lambda ids: pytest.fail("run"), "float32")
    assert result.forced is None


# ---- files


def put(folder, outputs, id="gating/drawn", end=".npz", **metadata):
    path = Path(folder) / f"{id}{end}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if end == ".npz":
        np.savez(path, **outputs, **metadata)
    else:
        save_file(
            {n: np.ascontiguousarray(x) for n, x in outputs.items()}, path, {n: str(v) for n, v in metadata.items()}
        )
    return path


@pytest.mark.parametrize("end", [".npz", ".safetensors"])
def test_outputs_are_read_from_either_kind_of_file(gate, tmp_path, end):
    put(tmp_path / "out", gate[1], end=end, minimoe_golden=1)
    found = verify.read_outputs(tmp_path / "out", gate[0])
    assert set(found) == {"logits", "ids", "weights"} and compare(gate[0], found).status == "pass"


def spoilt_files(path, outputs):
    whole = put(path.parent / "whole", outputs, end=path.suffix).read_bytes()
    big = {"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    yield from (whole[: len(whole) // 2], whole[:5], b"", b"garbage" * 99, b"\xff" * 8, b"[1]", b"{}" * 20)
    for header in (big, {"x": {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]}}, {"x": 3}, [], {"x": {}},
                   {"x": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}):  # fmt: skip
        text = json.dumps(header).encode()
        yield len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize("end", [".npz", ".safetensors"])
def test_a_broken_file_is_named(gate, tmp_path, end):
    path = tmp_path / "out" / f"gating/drawn{end}"
    path.parent.mkdir(parents=True)
    kind = "a whole .npz file" if end == ".npz" else "a whole safetensors file"
    for data in spoilt_files(path, gate[1]):
        path.write_bytes(data)
        with pytest.raises(KitError, match=f"drawn{end}: not {kind}") as caught:
            verify.read_outputs(tmp_path / "out", gate[0])
        assert "\n" not in str(caught.value)


def test_pickled_objects_are_not_loaded(gate, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os._exit, (3,)

    put(tmp_path, gate[1] | {"logits": np.array([Bomb()], object)})
    with pytest.raises(KitError, match=r"not a whole \.npz file"):
        verify.read_outputs(tmp_path, gate[0])


@pytest.mark.parametrize("end", [".npz", ".safetensors"])
def test_outputs_for_another_version_are_refused(gate, tmp_path, end):
    put(tmp_path, gate[1], end=end, minimoe_golden=2)
    with pytest.raises(KitError, match="made for kit version 2; this kit has version 1"):
        verify.read_outputs(tmp_path, gate[0])


def test_two_files_of_one_case_are_refused(gate, tmp_path):
    put(tmp_path, gate[1])
    put(tmp_path, gate[1], end=".safetensors")
    with pytest.raises(KitError, match=r"both there: which one counts\?"):
        verify.read_outputs(tmp_path, gate[0])


def test_what_is_no_regular_file_is_not_opened(gate, tmp_path):
    (tmp_path / "gating").mkdir()
    os.mkfifo(tmp_path / "gating/drawn.npz")
    with pytest.raises(KitError, match="not a regular file"):
        verify.read_outputs(tmp_path, gate[0])


def test_a_file_that_is_too_large_is_not_read(gate, tmp_path, monkeypatch):
    path = put(tmp_path, gate[1], end=".safetensors")
    os.truncate(path, verify.files.MAX_BYTES + 1)
    with pytest.raises(KitError, match="bytes; more than"):
        verify.read_outputs(tmp_path, gate[0])
    path.unlink()
    np.savez_compressed(path.with_suffix(".npz"), x=np.zeros(1 << 16))
    monkeypatch.setattr(verify.files, "MAX_BYTES", 1 << 16)
    with pytest.raises(KitError, match="bytes unpacked; more than"):
        verify.read_outputs(tmp_path, gate[0])


BAD_MANIFESTS = {
    "no JSON": ("{", "not JSON"),
    "no object": ("[]", "kit version None"),
    "other version": ('{"version": 2, "cases": []}', "kit version 2; this verifier reads version 1"),
    "no cases": ('{"version": 1}', "not as manifest.schema.json says: KeyError('cases')"),
    "half a case": ('{"version": 1, "cases": [{"id": "a"}]}', "not as manifest.schema.json says"),
    "a way out": ('{"version": 1, "cases": [{"id": "../../etc/x"}]}', "'../../etc/x' leads out of the kit"),
    "an absolute way out": ('{"version": 1, "cases": [{"id": "/etc/x"}]}', "'/etc/x' leads out of the kit"),
}


@pytest.mark.parametrize("kind", BAD_MANIFESTS)
def test_a_kit_that_cannot_be_read_is_named(tmp_path, kind):
    text, message = BAD_MANIFESTS[kind]
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(KitError) as caught:
        verify.read_kit(tmp_path)
    assert message in str(caught.value)


def test_a_folder_that_is_no_kit_is_named(tmp_path):
    with pytest.raises(KitError, match=r"not a golden kit: there is no manifest\.json in it"):
        verify.read_kit(tmp_path)


# ---- the report


@pytest.fixture(scope="module")
def own():
    """The bundled kit's cases of float32, and what our NumPy backend makes of them."""
    adapter, cases = OurBackend("numpy"), verify.select(verify.read_kit(VECTORS)[1], "float32")
    return cases, {case.id: adapter.run(case) for case in cases}


def report(own, change=lambda case, outputs: outputs, **settings):
    cases, outputs = own
    entries = verify.check(cases, lambda case: change(case, dict(outputs[case.id])), "float32")
    return verify.Report("KIT", "float32", entries, len(cases), **settings)


def test_our_own_backend_fits(own):
    start = time.perf_counter()
    found = report(own)
    assert [r.id for r in found.results if r.status != "pass"] == [] and found.exit_status == 0
    assert max(r.ratio for r in found.results) < 1
    assert time.perf_counter() - start < 2
    assert found.text().endswith("everything fits")


def test_the_report_is_one_screen_even_when_everything_fails(own):
    found = report(own, lambda case, outputs: {name: x + 1 for name, x in outputs.items()}, problem="was killed",
                   warnings=[f"warning {i} " + "x" * 500 for i in range(9)])  # fmt: skip
    assert {r.status for r in found.results} == {"fail"} and found.exit_status == 1
    lines = found.text([f"line {i}" for i in range(6)]).splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 175
    assert lines[-1].startswith("next: mend embedding first: --only 'embedding*' checks it alone")


def test_failures_are_told_from_the_smallest_part_up(own):
    def change(case, outputs):
        wrong = case.level == "model" or case.call == "gating"
        return {name: x + 0.1 if wrong and x.dtype.kind == "f" else x for name, x in outputs.items()}

    found = report((own[0][::-1], own[1]), change)  # a kit may have its cases in any order
    assert [c.level for c, _, _ in found.failures] == sorted([c.level for c, _, _ in found.failures], reverse=True)
    assert found.failures[0][1].call == "gating" and "next: mend gating first" in found.text()


def test_where_the_ops_fit_the_way_they_are_put_together_is_wrong(own):
    found = report(own, lambda case, o: o if case.level == "op" else {n: x + 1 for n, x in o.items()})
    assert found.text().endswith("the ops given pass, so look at how they are put together")


def test_outputs_of_another_profile_are_recognised(own):
    adapter = OurBackend("numpy", "bfloat16")
    found = report(
        own, lambda case, o: adapter.run(case) if case.call == "experts" and "bfloat16" in case.profiles else o
    )
    assert found.failures and {r.call for _, r, _ in found.failures} == {"experts"}
    assert "fits profile bfloat16: if it computes that way, --profile bfloat16" in found.text()


def test_a_call_without_any_outputs_is_not_offered_and_one_case_is_missing(own):
    found = report(own, lambda case, o: None if case.call == "adamw" or case.id == own[0][0].id else o)
    assert {r.status for r in found.results if r.call == "adamw"} == {"not offered"}
    assert [r.id for r in found.results if r.status == "missing"] == [own[0][0].id]
    assert found.exit_status == 1
    found.allow_missing = True
    assert found.exit_status == 0


def test_what_an_adapter_raises_is_its_cases_problem(own):
    def change(case, outputs):
        if case.call == "rope":
            raise SystemExit("bye\nbye")
        return outputs

    found = report(own, change)
    assert {r.problem for r in found.results if r.status == "fail"} == {"SystemExit: bye bye"}
    assert {r.call for r in found.results if r.status == "fail"} == {"rope"}


def test_json_holds_everything_and_is_json(own):
    def change(case, outputs):
        return {name: x * np.nan if case.call == "rmsnorm" else x for name, x in outputs.items()}

    data = json.loads(report(own, change).as_json(), parse_constant=lambda name: pytest.fail(name))
    assert data["counts"]["fail"] == sum(case.call == "rmsnorm" for case in own[0]) and data["exit_status"] == 1
    case = next(c for c in data["cases"] if c["call"] == "rmsnorm")
    assert case["status"] == "fail" and case["tensors"][0]["first"]["value"] == "nan"


def test_junit_has_one_test_per_case_and_no_character_that_xml_forbids(own, tmp_path):
    def change(case, outputs):
        if case.call == "rope":
            raise ValueError("\x1b[31m\x00 <&> \ud800 ü")
        return None if case.call == "adamw" else outputs

    found = report(own, change, problem="\x07")
    found.write_junit(tmp_path / "junit.xml")
    suite = ET.parse(tmp_path / "junit.xml").getroot()
    assert len(suite.findall("testcase")) == len(own[0]) + 1
    bad = suite.findall("testcase/failure")
    assert len(bad) == int(suite.get("failures")) == sum(r.call in ("rope", "adamw") for r in found.results)
    assert any(e.get("message") == "ValueError: ?[31m? <&> ? ü" for e in bad)


def test_patterns_choose_cases_by_id_or_by_call(own):
    cases, _ = own
    chosen = verify.select(cases, "float32", ["gating*"])
    assert {case.call for case in chosen} == {"gating", "gating.backward"}
    assert [case.id for case in verify.select(cases, "float32", [cases[3].id])] == [cases[3].id]
    with pytest.raises(KitError, match="no case matches 'gatting'; is 'gating' meant"):
        verify.select(cases, "float32", ["gatting"])
    with pytest.raises(KitError, match="no case has bounds for profile 'int8'; there are bfloat16, "):
        verify.select(cases, "int8")


def test_the_inference_subset_holds_no_gradients(own):
    calls = {case.call for case in verify.select(own[0], "float32", inference=True)}
    assert "model" in calls and "training" not in calls and not any(call.endswith("backward") for call in calls)


def test_without_grok_nothing_is_left_that_only_grok_1_does(own):
    chosen = verify.select(own[0], "float32", mixtral=True)
    assert len(chosen) == sum("float32" in case.profiles and "grok" not in case.tags for case in own[0]) > 150


# ---- on its own


@pytest.fixture
def copied(own, tmp_path):
    """The verifier copied out; outputs on disk; a function that runs it where this package cannot be imported."""
    shutil.copytree(Path(verify.__file__).parent, tmp_path / "holding")
    for id, outputs in own[1].items():
        put(tmp_path / "out", outputs, id)
    poison = tmp_path / "poison"
    for name in ("minimoe", "safetensors", "ml_dtypes", "numba"):
        poison.mkdir(exist_ok=True)
        (poison / f"{name}.py").write_text("raise SystemExit('imported')")

    def run(*arguments):
        command = [sys.executable, str(tmp_path / "holding"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=run.environment)

    run.environment = {"PYTHONPATH": str(poison)}
    return run


def test_the_copied_folder_needs_nothing_but_numpy(copied, tmp_path):
    done = copied(VECTORS, "out", "--junit", "junit.xml")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("everything fits\n")
    assert ET.parse(tmp_path / "junit.xml").getroot().get("failures") == "0"
    assert json.loads(copied(VECTORS, "out", "--json").stdout)["exit_status"] == 0


def test_expected_failures_are_told_from_failures(copied, own, tmp_path):
    """From a file of patterns with reasons; one that passes is a failure."""
    put(tmp_path / "out", {"y": 2 * own[1]["rmsnorm/plain"]["y"]}, "rmsnorm/plain")
    (tmp_path / "known.txt").write_text("rmsnorm/plain  # twice the norm\n\n# a remark\n")
    assert copied(VECTORS, "out", "--only", "rmsnorm").returncode == 1
    done = copied(VECTORS, "out", "--only", "rmsnorm", "--expect-failure", "known.txt", "--junit", "junit.xml")
    assert (done.returncode, done.stderr) == (0, "") and "deviates: rmsnorm/plain: twice the norm" in done.stdout
    suite = ET.parse(tmp_path / "junit.xml").getroot()
    assert [e.get("message") for e in suite.findall("testcase/skipped")] == ["expected to fail: twice the norm"]
    done = copied(VECTORS, "out", "--only", "rmsnorm", "--expect-failure", "rmsnorm/*")
    assert done.returncode == 1 and "rmsnorm/eps-inside: passes, but was expected to fail" in done.stdout


def test_a_terminal_that_knows_ascii_only_gets_a_report(copied, monkeypatch):
    monkeypatch.setitem(copied.environment, "PYTHONIOENCODING", "ascii")
    done = copied(VECTORS, "out", "--only", "gating")
    assert (done.returncode, done.stderr) == (0, "") and "error ? bound" in done.stdout


def test_one_op_alone_can_be_checked(copied, own, tmp_path):
    shutil.rmtree(tmp_path / "out")
    for id, outputs in own[1].items():
        if id.startswith("gating/"):
            put(tmp_path / "out", outputs, id)
    assert copied(VECTORS, "out", "--only", "gating").returncode == 0
    assert copied(VECTORS, "out").returncode == 1
    done = copied(VECTORS, "out", "--allow-missing")
    assert done.returncode == 0 and "everything given fits; not given: embedding" in done.stdout


def test_bad_files_do_not_keep_the_others_from_being_checked(copied, tmp_path):
    (tmp_path / "out/gating/square.npz").write_bytes(b"half")
    put(tmp_path / "out", {}, "gating/sqare")
    done = copied(VECTORS, "out")
    assert done.returncode == 1
    assert "gating/square: out/gating/square.npz: not a whole .npz file" in done.stdout
    assert "warning: out/gating/sqare.npz: no case has this name; is 'gating/square' meant?" in done.stdout
    assert "cases pass of embedding" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "nowhere: not a golden kit"),
        ([VECTORS, "nowhere"], "nowhere: there is no such folder of outputs"),
        ([VECTORS, "holding"], "holding: holds no outputs of embedding/"),
        ([VECTORS, "out", "--only", "x*"], "matches 'x*'"),
        ([VECTORS, "out", "--junit", "no/x.xml"], "no/x.xml"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(copied, arguments, message):
    done = copied(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and message in done.stderr
