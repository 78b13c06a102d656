"""transformers' Mixtral and Mistral against the golden kit, through the adapter that users read as an example."""

import itertools
from fnmatch import fnmatchcase

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from minimoe.golden import verify
from minimoe.golden.adapters import NotOffered, load
from minimoe.golden.calls import CALLS
from minimoe.golden.examples.transformers_adapter import DEVIATIONS, TransformersAdapter
from tests.peers.kit import CASES, select

pytestmark = pytest.mark.peers

CONFIGURATIONS = [
    ("float64", "eager", "eager"),  # torch's grouped products refuse float64
    ("float64", "sdpa", "eager"),
    *itertools.product(("float32", "hf_bfloat16"), ("eager", "sdpa"), ("eager", "grouped_mm")),
    ("float16", "eager", "eager"),
]


@pytest.fixture(scope="module", params=CONFIGURATIONS, ids="-".join)
def checked(request):
    """One configuration of the adapter, and {case id: (case, result)} of all cases that it offers."""
    adapter, found = TransformersAdapter(*request.param), {}
    for case in select(adapter.profile):
        try:
            found[case.id] = case, verify.compare(case, adapter.run(case), adapter.profile)
        except NotOffered:
            continue
    ratios = [t.ratio for _, r in found.values() for t in r.tensors if t.status == "pass"]
    print(f"\n{' '.join(request.param)}: {len(found)} cases, largest error ÷ bound of those that fit {max(ratios):.2f}")
    return adapter, found


def test_all_fits_but_the_documented_deviations_and_those_deviate(checked):
    adapter, found = checked
    expected = {id for id in found if any(fnmatchcase(id, pattern) for pattern in adapter.deviations)}
    failed = {id: str(result.first_failure) for id, (_, result) in found.items() if result.status == "fail"}
    assert {id: says for id, says in failed.items() if id not in expected} == {}
    assert expected - set(failed) == set()


def test_no_output_is_left_over_and_none_that_is_required_missing(checked):
    _, found = checked
    odd = {
        (t.name, t.status) for _, r in found.values() for t in r.tensors if t.status in ("extra", "missing", "shape")
    }
    assert odd == set()


def test_with_the_golden_experts_imposed_ties_are_no_matter(checked):
    adapter, found = checked
    for id, (case, result) in found.items():
        if "ties" in id and case.call != "sampling":
            assert {decision.kind for decision in result.decisions} == {"tie"}
            verify.force_routing(case, result, lambda ids, case=case: adapter.run(case, ids), adapter.profile)
            assert result.forced.status == "pass", id


def test_experts_are_chosen_otherwise_only_in_exact_ties_near_ties_and_where_weights_vanish(checked):
    adapter, found = checked
    kinds = {(decision.kind, id) for id, (_, result) in found.items() for decision in result.decisions}
    assert {kind for kind, _ in kinds} <= {"tie", "near tie", "don't care"}
    # Softmax before top-k: probabilities that are e^-200 of the largest are all zero in float32, and tie.
    assert (("don't care", "gating/gap-200") in kinds) == (adapter.profile != "float64")
    assert not any(kind == "near tie" for kind, _ in kinds) or adapter.profile in ("hf_bfloat16", "float16")


def test_every_deviation_names_cases_that_there_are():
    ids = [case.id for case in CASES]
    for deviation in DEVIATIONS:
        assert all(any(fnmatchcase(id, pattern) for id in ids) for pattern in deviation.cases), deviation


def test_every_call_but_the_cache_is_offered():
    adapter, offered, reasons = TransformersAdapter("float32"), set(), {}
    for case in select("float32"):
        try:
            adapter.run(case)
            offered.add(case.call)
        except NotOffered as reason:
            reasons[case.id] = str(reason)
    assert set(CALLS) - offered == {"kv_cache"}
    assert all(reasons.values())
    others = {id for id in reasons if not id.startswith("kv_cache/")}
    assert others == {case.id for case in CASES if _has_no_counterpart(case)}


def _has_no_counterpart(case):
    """Random numbers from outside, other balance losses, padding that is not routed, and all that is Grok-1's."""
    drawn = case.settings.get("temperature", 0) > 0
    form = case.settings.get("form", "concatenated") != "concatenated"
    return (
        drawn or form or "grok" in case.tags or case.id in ("gating/padding", "training/per-layer", "training/switch")
    )


def test_grouped_experts_are_offered():
    for profile in ("float32", "hf_bfloat16"):
        adapter, offered = TransformersAdapter(profile, "sdpa", "grouped_mm"), set()
        for case in select(profile):
            try:
                adapter.run(case)
                offered.add(case.call)
            except NotOffered:
                continue
        assert {"experts", "block", "model"} <= offered


NAMES = [("Float64", "float64"), ("Float32", "float32"), ("BFloat16", "hf_bfloat16")]


@pytest.mark.parametrize(("name", "profile"), NAMES)
def test_it_is_named_on_the_command_line(name, profile):
    assert load(f"minimoe.golden.examples.transformers_adapter:{name}").profile == profile
