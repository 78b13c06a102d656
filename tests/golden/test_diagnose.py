"""The diagnosis names the mistake that was planted, keeps silent where there is none, and says what it cannot know."""

import numpy as np
import pytest

from minimoe.backends import make_backend
from minimoe.golden import calls, diagnose, make, matching, verify
from minimoe.golden.mutants import MUTANTS, mutant
from minimoe.golden.mutants.mutant import load, run
from minimoe.golden.report import likely
from minimoe.golden.verify import Report

CASES = verify.read_kit(make.FOLDER)[1]
BY_ID = {case.id: case for case in CASES}
BY_NAME = {found.name: found for found in MUTANTS}
FAST = make_backend("numba")
KNOWABLE = [found for found in MUTANTS if found.planted != "random" and not found.harmless]
NAMED = [found for found in KNOWABLE if not found.profiles]
_right, _passed = {}, {}
SHARED = matching.Planted()


@pytest.fixture(autouse=True)
def _mistakes_are_computed_once(monkeypatch):
    """What a mistake outputs for a case is the same in every test."""
    monkeypatch.setattr(diagnose, "Planted", lambda: SHARED)


def right(case, dtype=np.float32):
    """What our own numba backend gives, in float32."""
    key = case.id, dtype
    if key not in _right:
        model = None if case.model_folder is None else load(case.model_folder, np.dtype(dtype))
        inputs = calls.cast(case.call, case.inputs, dtype, dtype)
        _right[key] = calls.run(case.call, FAST, inputs, case.settings, model)
    return _right[key]


def candidate(names, profile="float32", cases=CASES):
    """The results of an implementation in float32 with these mistakes, which runs other code than the catalogue."""
    planted, found = [BY_NAME[name] for name in names], []
    for case in cases:
        if profile in case.profiles:
            outputs = run(planted, case, FAST, np.float32)
            found.append(passed(case, profile) if outputs is None else entry(case, outputs, profile))
    return found


def entry(case, outputs, profile="float32"):
    return case, verify.compare(case, outputs, profile), outputs


def passed(case, profile):
    """The entry of a case that no mistake touches."""
    if (case.id, profile) not in _passed:
        _passed[case.id, profile] = entry(case, right(case), profile)
    return _passed[case.id, profile]


def changed(change, cases):
    """The results of an implementation whose required outputs are changed."""
    found = []
    for case in cases:
        required = {output.name for output in case.outputs if output.required}
        outputs = {
            name: change(x) if name in required and x.dtype.kind == "f" else x for name, x in right(case).items()
        }
        found.append(entry(case, outputs))
    return found


def of(*patterns):
    return [case for case in CASES if case.id in patterns or case.call in patterns]


def few(found):
    """All cases of ops, and of the others some that the mistake is seen in and some of other kinds: a quick kit."""
    seen = [id for id in diagnose.tells_apart(found).get("float32", ()) if BY_ID[id].level != "op"]
    others = ("block/main", "block/square", "model/repeat-a", "model.chunks/mixed", "training/padding")
    return [case for case in CASES if case.level == "op" or case.id in (*seen[:: 1 + len(seen) // 4], *others)]


# ---- naming


@pytest.mark.parametrize("found", NAMED, ids=lambda found: found.name)
def test_every_mistake_is_named_first(found):
    results = candidate([found.name], cases=few(found))
    failing = [result.id for _, result, _ in results if result.status == "fail"]
    first = diagnose.diagnose(results)[0]
    assert first.names == (found.name,)
    assert len(first.explained) >= 0.8 * len(failing)


@pytest.mark.parametrize("found", [f for f in KNOWABLE if f.profiles], ids=lambda found: found.name)
def test_mistakes_of_a_profile_are_named_in_it(found):
    """Their outputs, with noise of the size of the bounds."""
    profile, rng, results = found.profiles[0], np.random.default_rng(0), []
    for case in CASES:
        if profile in case.profiles and case.level == "op":
            outputs = noisy(case, found.run(case) or right(case, np.float64), profile, rng)
            results.append(entry(case, outputs, profile))
    assert diagnose.diagnose(results, profile)[0].names == (found.name,)


def noisy(case, outputs, profile, rng, bounds=0.5):
    """Outputs with noise of so many bounds."""
    found = dict(outputs)
    for output in case.outputs:
        if output.kind == "float" and output.name in outputs and np.isfinite(x := outputs[output.name]).any():
            relative, absolute = output.bounds[profile]
            size = bounds * (relative * np.abs(x[np.isfinite(x)]).max() + absolute)
            found[output.name] = x + size * rng.uniform(-1, 1, np.shape(x))
    return found


IN_16_BITS = """
rope-interleaved attention-scale-missing gate-without-renormalising attention-residual-forgotten kv-heads-tiled
cache-slot-off-by-one
""".split()


@pytest.mark.parametrize("name", IN_16_BITS)
def test_in_16_bits_it_is_named_too(name):
    found, profile, rng, results = BY_NAME[name], "hf_bfloat16", np.random.default_rng(1), []
    for case in few(found):
        if profile in case.profiles:
            outputs = noisy(case, found.run(case) or right(case, np.float64), profile, rng)
            results.append(entry(case, outputs, profile))
    assert name in diagnose.diagnose(results, profile)[0].names


def test_outputs_that_nobody_wrote_are_told_from_mistakes():
    """Some mistakes make one gradient 0, and would match."""
    results = [entry(case, {o.name: np.zeros(o.shape, np.float32 if o.kind == "float" else np.int64)
                            for o in case.outputs if o.required})
               for case in CASES if case.level == "op" and "float32" in case.profiles]  # fmt: skip
    first = diagnose.diagnose(results)[0]
    assert (first.names, first.confidence) == (("all-zero",), "symptom")
    failing = sum(result.status == "fail" for _, result, _ in results)
    assert len(first.explained) > 0.8 * failing and first.failing == failing


def test_jitter_is_named_by_its_symptom():
    results = candidate(["jitter-left-on"], cases=of("model", "block/main"))
    first = diagnose.diagnose(results)[0]
    assert first.names == ("jitter-left-on",)


def test_two_answers_to_one_question_need_a_failure():
    """Both within the bounds, on either side of the truth: roundings that change from run to run."""
    results = []
    for case, sign in zip(of("model/repeat-a", "model/repeat-b"), (1, -1), strict=True):
        [output] = [output for output in case.outputs if output.name == "logits"]
        truth = case.truth["logits"]
        bound = output.bounds["float32"][0] * np.abs(truth).max() + output.bounds["float32"][1]
        results.append(entry(case, {"logits": truth + sign * 0.9 * bound}))
    assert [result.status for _, result, _ in results] == ["pass", "pass"]
    assert diagnose.diagnose(results) == []


def test_what_stands_at_padding_does_not_matter():
    rng, results = np.random.default_rng(4), []
    for case, _, outputs in candidate(["attention-scale-missing"], cases=of("model/padding-left", "block/padding")):
        [name] = [output.name for output in case.outputs if output.required]
        real = np.where(np.isnan(case.truth[name]), rng.standard_normal(case.truth[name].shape), outputs[name])
        results.append(entry(case, {name: real}))
    assert diagnose.diagnose(results)[0].names == ("attention-scale-missing",)


def test_what_outputs_cannot_tell_apart_is_one_finding():
    """w1 and w3 exchanged when loading, or silu on the wrong side: of the forward alone nobody can know."""
    inference = [case for case in CASES if "inference" in case.tags and case.call in ("experts", "block", "model")]
    first = diagnose.diagnose(candidate(["silu-on-w3"], cases=inference))[0]
    assert set(first.names) == {"silu-on-w3", "w1-w3-exchanged"}
    text = str(first)
    assert "one of 2" in text
    assert all(BY_NAME[name].says in text for name in first.names)


def test_passing_ops_speak_against_a_mistake_in_them():
    """With the op right and the model wrong, the config was misread."""
    cases = of("rope", "block", "model")
    results = [r for r in candidate(["theta-1e4"], cases=cases) if r[0].level != "op"]
    results += [r for r in candidate([], cases=cases) if r[0].level == "op"]
    first = diagnose.diagnose(results)[0]
    assert first.names == ("theta-1e4",)
    results = [r for r in candidate(["rope-interleaved"], cases=of("block", "model")) if r[0].level != "op"]
    assert diagnose.diagnose(results)[0].names == ("rope-interleaved",)


PAIRS = np.random.default_rng(7).permutation([f.name for f in NAMED if f.planted == "op"])[:24].reshape(12, 2).tolist()


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_two_mistakes_at_once_are_both_named(pair):
    """Where each alone explains a failing case of an op."""
    ops = [case for case in CASES if case.level == "op"]
    results = candidate(pair, cases=[*ops, *of("block/main", "training/padding", "model/main")])
    findings = diagnose.diagnose(results)
    alone = [
        {r.id for c, r, _ in candidate([name], cases=ops) if r.status == "fail"} for name in pair
    ]  # cases that a mistake makes fail by itself
    named = [name for finding in findings for name in finding.names]
    failing = {r.id for _, r, _ in results if r.status == "fail"}
    for name, mine, others in zip(pair, alone, alone[::-1], strict=True):
        assert mine <= failing
        assert name in named or not mine - others


def test_two_mistakes_explain_a_model_together():
    pair = ["attention-scale-missing", "gate-sigmoid"]
    findings = diagnose.diagnose(candidate(pair, cases=of("attention", "gating", "block/main", "model/main")))
    assert {findings[0].names[0], findings[1].names[0]} == set(pair)
    assert set(findings[1].together) == {"block/main", "model/main"}
    assert "2 more together" in str(findings[1])


# ---- keeping silent


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_correct_implementation_gets_no_diagnosis(dtype):
    results = []
    for case in CASES:
        outputs = right(case, dtype)
        results.append(entry(case, outputs))
    assert {result.status for _, result, _ in results} == {"pass"}
    assert diagnose.diagnose(results) == []


@pytest.mark.parametrize("bounds", [5, 100])
def test_noise_is_no_known_mistake(bounds):
    """Random errors of a few bounds, in every case: nothing may be named but a symptom."""
    rng, results = np.random.default_rng(2), []
    for case in CASES:
        outputs = noisy(case, right(case), "float32", rng, bounds)
        results.append(entry(case, outputs))
    findings = [f for f in diagnose.diagnose(results) if f.confidence != "symptom"]
    assert [f.names for f in findings] in ([], [("jitter-left-on",)])  # the repeated pair does differ


def test_missing_and_unreadable_outputs_are_no_trouble():
    results = candidate(["attention-scale-missing"], cases=of("attention"))
    case = BY_ID["gating/top-2"]
    for outputs in ({}, {"logits": "text", "ids": None}, {"logits": np.zeros((2, 2)), "ids": np.zeros(3)}):
        results.append(entry(case, outputs))
    assert diagnose.diagnose(results)[0].names == ("attention-scale-missing",)


# ---- symptoms


@pytest.mark.parametrize(
    ("change", "name", "word"),
    [
        (lambda x: 3 * x, "scaled-by-3", "3 times"),
        (lambda x: -x, "scaled-by--1", "-1 times"),
        (lambda x: x[::-1], "permuted", "permuted along N"),
        (lambda x: np.roll(x, 1, axis=0), "permuted", "off by one, index i holds what belongs to i - 1"),
        (lambda x: np.swapaxes(x, 0, 1).copy(), "transposed", "transposed"),
        (lambda x: x + np.where(np.arange(x.size).reshape(x.shape) == 1, np.nan, 0), "not-a-number", "NaN"),
        (lambda x: x * np.float32(1 + 2.0**-11), "looks-like-16-bits", "within the bounds"),
    ],
)
def test_what_no_mistake_explains_has_a_symptom(change, name, word):
    findings = diagnose.diagnose(changed(change, of("linear/wide")))
    assert [(f.names, f.confidence) for f in findings] == [((name,), "symptom")]
    assert word in str(findings[0])


def test_symptoms_are_gathered_over_cases():
    [finding] = diagnose.diagnose(changed(lambda x: 0.25 * x, of("linear", "embedding")))
    assert finding.names == ("scaled-by-0.25",)
    assert len(finding.explained) == finding.failing == len(of("linear", "embedding"))


# ---- the finding


def test_a_finding_gives_file_and_line_of_the_right_way():
    [finding] = diagnose.diagnose(candidate(["attention-scale-missing"], cases=of("attention")))
    path, line = finding.where[0]
    assert "** -0.5" in path.read_text().splitlines()[line - 1]
    assert finding.lines()[0].startswith("certain: attention-scale-missing, explains")
    assert f"minimoe/ops/attention/reference.py:{line}" in str(finding)


def test_the_report_shows_it():
    results = candidate(["attention-scale-missing"], cases=of("attention"))
    lines = likely(Report("kit", "float32", results, len(results)))
    assert any("attention-scale-missing" in line for line in lines)


def test_a_large_model_is_not_run(monkeypatch):
    """Ops are still diagnosed."""
    results = candidate(["gate-sigmoid"], cases=of("gating", "block/main", "model/main"))
    monkeypatch.setattr(matching, "LARGEST", 10)
    monkeypatch.setattr(diagnose, "Planted", matching.Planted)

    def refuse(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(mutant, "load", refuse)
    finding = diagnose.diagnose(results)[0]
    assert finding.names == ("gate-sigmoid",)
    assert all(id.startswith("gating") for id in finding.explained)


def test_a_totally_wrong_candidate_takes_few_runs_of_models(monkeypatch):
    """Of every mistake only some model cases are tried, not all of them."""
    count = [0]
    compute = matching.run

    def counted(planted, case):
        count[0] += case.level != "op"
        return compute(planted, case)

    monkeypatch.setattr(matching, "run", counted)
    monkeypatch.setattr(diagnose, "Planted", matching.Planted)
    rng, results = np.random.default_rng(3), []
    for case in CASES:
        outputs = {n: rng.standard_normal(x.shape) if x.dtype.kind == "f" else x for n, x in case.truth.items()}
        results.append(entry(case, outputs))
    assert all(f.confidence == "symptom" or f.names == ("jitter-left-on",) for f in diagnose.diagnose(results))
    assert count[0] < 8 * len(MUTANTS)
