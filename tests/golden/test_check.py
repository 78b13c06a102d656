"""`minimoe.check`: what a student sees in a notebook."""

import numpy as np
import pytest

import minimoe
from minimoe.backends import make_backend
from minimoe.golden import calls, report, verify
from minimoe.golden.adapters import OurBackend

CASES = {case.id: case for case in verify.read_kit(report.VECTORS)[1]}
OPS = make_backend("numpy")


def rmsnorm(x, weight, eps, residual=None):
    h = x if residual is None else x + residual
    return h / np.sqrt((h * h).mean(-1, keepdims=True) + eps) * weight


def ids_of(call):
    return [case.id for case in CASES.values() if case.call == call]


# ---- right and wrong


def test_a_right_function_passes_every_case_and_the_result_is_true(capsys):
    found = minimoe.check("rmsnorm", rmsnorm)
    assert found and [result.id for result in found.results] == ids_of("rmsnorm")
    out = capsys.readouterr().out
    assert out.startswith(f"rmsnorm: {len(found.results)} of {len(found.results)} cases pass")
    assert out.count("  pass  ") == len(found.results) and "error ÷ bound" in out and "FAIL" not in out


def test_a_wrong_function_is_false_and_nothing_is_raised(capsys):
    found = minimoe.check("rmsnorm", lambda x, weight, eps, residual=None: rmsnorm(x, weight, 0.0, residual))
    assert not found and 0 < len(found.failures) < len(found.results)
    out = capsys.readouterr().out
    assert "FAIL  eps-inside" in out
    details = out[out.index(f"\n{found.failures[0].id}: ") :]
    assert "the first at token" in details and "bounds off" in details and "its inputs: x (" in details
    assert CASES[found.failures[0].id].why in details
    assert "eps" in details[details.index("likely mistake") :]


def test_outputs_may_be_float64_a_dict_or_a_tuple():
    def as_dict(x, weight, eps, residual=None):
        return {"y": rmsnorm(x.astype(float), weight, eps, residual)}

    assert minimoe.check("rmsnorm", as_dict)
    case = CASES["gating/top-2"]
    truth = case.truth
    assert minimoe.check("gating/top-2", lambda x, gate, k: (truth["logits"], truth["ids"], truth["weights"]))


def test_inputs_are_copies_so_a_function_may_change_them():
    def in_place(x, weight, eps, residual=None):
        y = rmsnorm(x, weight, eps, residual)
        x[...] = 0
        weight[...] = 0
        return y

    assert minimoe.check("rmsnorm", in_place)
    assert minimoe.check("rmsnorm", rmsnorm)

    def embedding(tokens, table):
        x = table[tokens]
        tokens[...] = 0
        return x

    assert minimoe.check("embedding", embedding)


def test_inputs_are_float32_and_in_profile_float64_float64():
    seen = []

    def linear(x, w):
        seen.append(x.dtype)
        return x @ w.T

    assert minimoe.check("linear", linear) and minimoe.check("linear", linear, profile="float64")
    assert seen == [np.float32] * (len(seen) // 2) + [np.float64] * (len(seen) // 2)


# ---- handing over


def test_arguments_are_given_by_name_whatever_their_order():
    assert minimoe.check("rmsnorm", lambda eps, residual=None, *, weight, x: rmsnorm(x, weight, eps, residual))
    assert minimoe.check("rmsnorm", lambda weight, **rest: rmsnorm(weight=weight, **rest))
    assert minimoe.check("rmsnorm", lambda x, weight, residual, eps, verbose=False: rmsnorm(x, weight, eps, residual))


def test_parameters_of_other_names_are_given_by_position_inputs_before_settings():
    found = minimoe.check("rmsnorm", lambda states, scale, epsilon: rmsnorm(states, scale, epsilon))
    assert found and list(found.skipped) == ["rmsnorm/residual"]
    assert minimoe.check("rmsnorm", lambda states, scale, other, epsilon: rmsnorm(states, scale, epsilon, other))
    assert minimoe.check("linear", lambda *given: given[0] @ given[1].T)


def test_a_case_with_an_input_that_the_function_does_not_take_is_skipped(capsys):
    found = minimoe.check("rmsnorm", lambda x, weight, eps: rmsnorm(x, weight, eps))
    assert found and found.skipped == {"rmsnorm/residual": "your function takes no residual"}
    assert "skip  residual" in capsys.readouterr().out and "1 skipped" in repr(found)


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def gating(x, gate, active, ids, k):
    logits = x @ gate.T
    if ids is None:
        ids = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    ids = ids if active is None else np.where(active[:, None], ids, -1)
    return logits, ids, np.where(ids >= 0, softmax(np.take_along_axis(logits, np.maximum(ids, 0), axis=1)), 0)


def test_cases_of_grok_1_are_skipped_by_a_function_without_their_settings():
    by_name = minimoe.check("gating", gating)
    by_place = minimoe.check(
        "gating", lambda states, matrix, real, imposed, n: gating(states, matrix, real, imposed, n)
    )
    assert by_name and by_place
    assert set(by_name.skipped) == set(by_place.skipped) == {name for name in ids_of("gating") if "shares" in name}
    assert by_name.skipped["gating/shares"] == "your function takes no renormalise"
    assert by_place.skipped["gating/shares"] == "your function has no place for renormalise"


def test_cases_of_grok_1_reach_a_function_with_their_settings():
    def attention(q, k, v, q_pos, k_pos, window, scale=None, cap=None):
        seen.add((scale, cap))
        return OPS.attention.forward(q, k, v, q_pos, k_pos, window, scale, cap)[0]

    seen = set()
    assert minimoe.check("attention", attention)
    assert {(None, None), (0.75, None), (None, 2.5), (1.25, 3.0)} <= seen
    unnamed = minimoe.check("attention", lambda *given: attention(*given))
    assert unnamed and unnamed.skipped["attention/cap"] == "your function does not name cap"


def test_nothing_but_skipped_cases_is_no_success():
    found = minimoe.check("rmsnorm/residual", lambda x, weight, eps: x)
    assert found.skipped and not found


@pytest.mark.parametrize("function", [lambda weight, x, epsilon: x, lambda a: a, lambda a, b, c, d, e: a])
def test_parameters_that_are_not_the_calls_are_refused(function):
    with pytest.raises(ValueError, match="neither named nor ordered as those of rmsnorm: x, weight, residual, eps"):
        minimoe.check("rmsnorm", function)


def test_a_function_without_an_input_that_every_case_has_is_refused():
    with pytest.raises(ValueError, match="takes no weight and no eps; rmsnorm has x, weight, residual, eps"):
        minimoe.check("rmsnorm", lambda x: x)


def test_a_block_gets_parameters_config_and_folder_when_it_asks():
    seen = []

    def block(x, layer, params, config, folder):
        seen.append((params["tok_embeddings"].shape[1] == config.hidden_size, (folder / "config.json").exists()))
        return np.zeros_like(x)

    minimoe.check("block", block)
    assert seen and all(map(all, seen))


def test_an_adapter_is_taken_as_it_is():
    assert minimoe.check("model", OurBackend("numpy"))
    assert minimoe.check("gating_backward", OurBackend("numpy"))


# ---- mistakes of other kinds


def test_an_exception_is_shown_shortly_with_its_line_and_the_shapes(capsys):
    def gating(x, gate, k):
        return x @ gate

    found = minimoe.check("gating/top-2", gating)
    assert not found
    out = capsys.readouterr().out
    assert "ValueError: matmul" in out and "return x @ gate" in out and "Traceback" not in out
    assert "its inputs: x (7, 9), gate (5, 9), k = 2" in out


def test_a_result_that_is_no_output_is_named(capsys):
    assert not minimoe.check("gating/top-2", lambda x, gate, k: None)
    assert "your function returns nothing yet; it should return logits, ids, weights" in capsys.readouterr().out


def test_an_exception_in_one_case_does_not_end_the_others():
    def sometimes(x, weight, eps, residual=None):
        if residual is not None:
            raise KeyError("not yet")
        return rmsnorm(x, weight, eps)

    found = minimoe.check("rmsnorm", sometimes)
    assert [result.id for result in found.failures] == ["rmsnorm/residual"]
    assert "KeyError: 'not yet'" in found.failures[0].problem


def test_calls_that_do_not_exist_are_refused_with_a_suggestion():
    with pytest.raises(ValueError, match=r"no call 'gatin'; is 'gating' meant\? The calls: embedding, "):
        minimoe.check("gatin", rmsnorm)
    with pytest.raises(ValueError, match="'gating/top-3'; is 'gating/top-2' meant"):
        minimoe.check("gating/top-3", rmsnorm)


# ---- the result


def test_the_result_shows_itself_in_one_line_and_in_html():
    right, wrong = minimoe.check("rmsnorm/plain", rmsnorm), minimoe.check("rmsnorm/plain", lambda x, weight, eps: x)
    assert repr(right) == "rmsnorm/plain: 1 of 1 cases pass" and repr(wrong) == "rmsnorm/plain: 0 of 1 cases pass"
    assert "✓ rmsnorm/plain: 1 of 1" in right._repr_html_() and "✗" in wrong._repr_html_()


@pytest.mark.parametrize("call", [name for name, call in calls.CALLS.items() if call.level == "op"])
def test_our_own_ops_pass_through_it(call):
    def ours(**given):
        return calls.run(call, OurBackend("numpy").ops, {n: given[n] for n in inputs & set(given)}, settings(given))

    def settings(given):
        return {name: value for name, value in given.items() if name not in inputs}

    inputs = {tensor.name for tensor in calls.CALLS[call].inputs}
    assert minimoe.check(call, ours)


def test_a_function_that_is_not_written_yet_takes_one_line_not_one_per_case(capsys):
    assert not minimoe.check("rmsnorm", lambda x, weight, eps, residual=None: None)
    out = capsys.readouterr().out
    assert out.count("FAIL") == 1 and "FAIL  every case: your function returns nothing yet; it should return y" in out
