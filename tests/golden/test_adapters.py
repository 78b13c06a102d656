"""Adapters: how cases reach an implementation, and how what it returns is read."""

import signal
import time

import ml_dtypes
import numpy as np
import pytest

from minimoe.arrays import cupy_module
from minimoe.golden import adapters, report, verify
from minimoe.golden.adapters import Adapter, AdapterError, NotOffered, OurBackend, load, outputs_of

CASES = {case.id: case for case in verify.read_kit(report.VECTORS)[1]}
FIRST = {case.call: case for case in reversed(CASES.values())}


def cuda_or_skip():
    try:
        cupy_module()
    except ValueError as error:
        pytest.skip(str(error))


class Recording(Adapter):
    forces_routing = True

    def __init__(self):
        self.seen = []

    def _keep(self, name, inputs, settings, folder):
        self.seen.append((name, inputs, settings, folder))
        return {}

    def rmsnorm(self, inputs, settings, folder):
        return self._keep("rmsnorm", inputs, settings, folder)

    def gating_backward(self, inputs, settings, folder):
        return self._keep("gating_backward", inputs, settings, folder)

    def gating(self, inputs, settings, folder):
        return self._keep("gating", inputs, settings, folder)

    def model(self, inputs, settings, folder):
        return self._keep("model", inputs, settings, folder)


# ---- dispatch


def test_a_case_reaches_the_method_of_its_call_and_dots_are_underscores():
    adapter = Recording()
    for call in ("rmsnorm", "gating.backward", "model"):
        adapter.run(FIRST[call])
    assert [name for name, *_ in adapter.seen] == ["rmsnorm", "gating_backward", "model"]
    _, inputs, settings, folder = adapter.seen[0]
    assert inputs.keys() == FIRST["rmsnorm"].inputs.keys() and settings == FIRST["rmsnorm"].settings and folder is None
    assert (adapter.seen[2][3] / "config.json").exists()


def test_inputs_are_copies_that_a_method_may_change():
    adapter, case = Recording(), FIRST["rmsnorm"]
    adapter.run(case)
    adapter.seen[0][1]["x"][...] = 0
    adapter.seen[0][2]["eps"] = 0
    adapter.run(case)
    assert adapter.seen[1][1]["x"].any() and adapter.seen[1][2]["eps"] > 0


def test_a_call_without_a_method_is_not_offered():
    with pytest.raises(NotOffered, match="Recording has no method attention_backward"):
        Recording().run(FIRST["attention.backward"])


def test_cases_of_grok_1_are_offered_by_those_who_say_so():
    adapter, case = Recording(), CASES["gating/shares"]
    with pytest.raises(NotOffered, match=r"Recording does not do what Grok-1 does otherwise \(grok is False\)"):
        adapter.run(case)
    adapter.grok = True
    adapter.run(case)
    assert adapter.seen[0][2] == {"k": 2, "renormalise": False}


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("rms_norm", "rmsnorm"), ("gating_backwards", "gating_backward"), ("Experts", "experts")],
)
def test_a_method_that_is_nearly_a_call_is_refused_when_the_class_is_made(typo, meant):
    with pytest.raises(AdapterError, match=f"Typo.{typo}: there is no call of this name; '{meant}' is meant"):
        type("Typo", (Adapter,), {typo: lambda self, inputs, settings, folder: None})


def test_helpers_of_other_names_and_private_ones_are_let_be():
    type("Fine", (Adapter,), {"load_model": lambda self: None, "_rms_norm": lambda self: None, "width": 3})


def test_routing_is_imposed_as_an_input_where_the_call_takes_one():
    adapter, ids = Recording(), np.array([[1, 0]])
    adapter.run(FIRST["gating"], ids)
    np.testing.assert_array_equal(adapter.seen[0][1]["ids"], ids)
    with pytest.raises(NotOffered, match="rmsnorm takes no routing"):
        adapter.run(FIRST["rmsnorm"], ids)


def test_routing_is_not_imposed_on_an_adapter_that_does_not_say_that_it_obeys():
    class Free(Recording):
        forces_routing = False

    with pytest.raises(NotOffered, match="does not force routing"):
        Free().run(FIRST["gating"], np.array([[1, 0]]))


# ---- what comes back

PLAIN, RESIDUAL = CASES["rmsnorm/plain"], CASES["rmsnorm/residual"]


def test_one_array_is_the_required_output():
    assert list(outputs_of(PLAIN, np.ones(3))) == ["y"]
    assert list(outputs_of(RESIDUAL, np.ones(3))) == ["y"]


def test_a_tuple_is_in_the_order_of_the_required_outputs_or_of_all():
    found = outputs_of(CASES["gating/top-2"], (np.zeros(1), np.ones(2, int), np.full(3, 2.0)))
    assert {name: x.tolist() for name, x in found.items()} == {"logits": [0], "ids": [1, 1], "weights": [2, 2, 2]}
    both = outputs_of(RESIDUAL, [np.zeros(1), np.ones(2)])
    assert {name: x.tolist() for name, x in both.items()} == {"h": [0], "y": [1, 1]}


def test_a_dict_is_taken_by_its_names_and_a_python_number_is_an_array():
    assert outputs_of(FIRST["cross_entropy"], {"loss": 0.5, "odd": [1, 2]})["odd"].tolist() == [1, 2]


def test_a_nested_list_is_one_array():
    assert outputs_of(PLAIN, [[1.0, 2.0], [3.0, 4.0]])["y"].shape == (2, 2)


def test_tensors_of_other_libraries_are_read_and_bfloat16_is_widened():
    class Tensor:
        """What a tensor of torch is, as far as it matters."""

        dtype, requires_grad = "torch.bfloat16", True

        def detach(self):
            self.requires_grad = False
            return self

        def cpu(self):
            return self

        def float(self):
            assert not self.requires_grad
            return np.ones(2, np.float32)

    assert outputs_of(PLAIN, Tensor())["y"].tolist() == [1, 1]
    assert outputs_of(PLAIN, np.ones(2, ml_dtypes.bfloat16))["y"].dtype == np.float32


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            None,
            "gating returned nothing; it should return the 3 arrays logits, ids, weights, in this order or in a dict",
        ),
        (np.ones(2), "gating returned one array; it should"),
        ((np.ones(2), np.ones(2)), "gating returned 2 arrays; it should"),
        ({"logits": "garbage"}, "output 'logits' is no array of numbers: str"),
        ({"logits": object()}, "output 'logits' is no array of numbers: object"),
        ({"logits": [[1.0], [1.0, 2.0]]}, "output 'logits' is no array: list"),
    ],
)
def test_what_is_no_output_is_named(result, message):
    with pytest.raises(AdapterError, match=message):
        outputs_of(CASES["gating/top-2"], result)


# ---- our own backends


@pytest.mark.parametrize("profile", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["numpy", "numba", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_our_backends_pass_the_kit(backend, profile):
    if backend == "cuda":
        cuda_or_skip()
    found = report.check_adapter(OurBackend(backend, profile))
    assert {result.id: verify.describe(result) for result in found.results if result.status != "pass"} == {}
    assert len(found.results) == sum(profile in case.profiles for case in CASES.values()) > 100


def test_our_backends_compute_in_the_profile_that_they_say():
    case = CASES["rmsnorm/digits"]
    assert OurBackend("numpy", "float64").run(case)["y"].dtype == np.float64
    assert OurBackend("numpy", "float32").run(case)["y"].dtype == np.float32
    stored = OurBackend("numpy", "bfloat16").run(CASES["kv_cache/empty"])["k_cache"]
    assert stored.dtype == np.float32


def test_a_profile_that_our_backends_do_not_have_is_refused():
    with pytest.raises(AdapterError, match="no profile 'hf_bfloat16'; they have float64, float32, bfloat16"):
        OurBackend("numpy", "hf_bfloat16")
    with pytest.raises(AdapterError, match="there is no profile 'float8'"):
        OurBackend("numpy", "float8")


@pytest.mark.parametrize("id", ["gating/top-2", "block/main", "model/main"])
def test_our_backends_route_as_they_are_told(id):
    case = CASES[id]
    other = (case.golden_ids + 1) % 4
    found = OurBackend("numpy").run(case, other)
    ids = [x for name, x in found.items() if name.endswith("ids")]
    np.testing.assert_array_equal(np.stack(ids).reshape(other.shape), other)


# ---- deviations


class Deviating(Adapter):
    """Its norm has no eps, which it says."""

    @property
    def deviations(self):
        return {"rmsnorm/*": "there is no eps"}

    def rmsnorm(self, inputs, settings, folder):
        x = inputs["x"]
        return {"y": x / np.sqrt((x**2).mean(axis=1, keepdims=True)) * inputs["weight"]}

    def linear(self, inputs, settings, folder):
        return {"y": inputs["x"] @ inputs["w"].T}


def test_deviations_are_no_failures_and_are_listed():
    found = report.check_adapter(Deviating(), only=["rmsnorm/plain", "rmsnorm/eps-inside", "linear/wide"])
    assert [result.status for result in found.results] == ["deviates", "deviates", "pass"]
    assert found.exit_status == 0 and report.likely(found) == []
    text = found.text()
    assert "deviates: rmsnorm/plain, rmsnorm/eps-inside: there is no eps" in text
    assert "everything chosen fits but the deviations" in text


def test_a_deviation_that_is_none_is_a_failure():
    found = report.check_adapter(Deviating(), only=["linear"], expected=["linear/wide"])
    assert found.exit_status == 1
    [failed] = found.failures
    assert failed[1].id == "linear/wide" and "was expected to fail" in verify.describe(failed[1])
    assert report.likely(found) == [] and "next: strike what passes from the deviations" in found.text()


def test_a_deviation_that_is_not_offered_is_not_offered():
    found = report.check_adapter(Deviating(), only=["gating/top-2"], expected=["gating/top-2"])
    assert [result.status for result in found.results] == ["not offered"]


def test_an_expected_failure_that_no_case_has_is_refused():
    with pytest.raises(verify.KitError, match="no case matches 'gatin/x'"):
        report.check_adapter(Deviating(), expected=["gatin/x"])


# ---- adapters that hang


class Hanging(Deviating):
    """Its norm never ends."""

    deviations = {}  # noqa: RUF012

    def rmsnorm(self, inputs, settings, folder):
        while True:
            time.sleep(0.01)


def test_a_case_that_hangs_is_ended_and_the_others_are_checked():
    before = signal.getsignal(signal.SIGALRM)
    found = report.check_adapter(Hanging(), only=["rmsnorm/plain", "linear/wide"], timeout=0.2)
    assert {r.id: r.problem for r in found.results} == {
        "rmsnorm/plain": "TimeoutError: gave no answer within 0.2 seconds", "linear/wide": "",
    }  # fmt: skip
    assert [r.status for r in found.results] == ["fail", "pass"]
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


# ---- loading

SOURCE = """
from dataclasses import dataclass
from minimoe.golden.adapters import Adapter

@dataclass
class Mine(Adapter):
    profile: str = "float64"

def make():
    return Mine("float32")

made = Mine("bfloat16")
nothing = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "a_file.py").write_text(SOURCE)
    (tmp_path / "a_module_of_mine.py").write_text(SOURCE)
    (tmp_path / "imports_what_is_missing.py").write_text("import there_is_no_such_thing\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("where", ["a_file.py", "./a_file.py", "a_module_of_mine"])
def test_an_adapter_is_loaded_from_a_class_a_function_or_an_instance(here, where):
    assert load(f"{where}:Mine").profile == "float64" and not isinstance(load(f"{where}:Mine"), type)
    assert load(f"{where}:make").profile == "float32"
    assert load(f"{where}:made").profile == "bfloat16"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a_file.py", "given as module:Name or path/to/file.py:Name"),
        ("no_file.py:Mine", "no_file.py: there is no such file"),
        ("no_module_of_mine:Mine", "there is no module 'no_module_of_mine' here"),
        ("a_file.py:Mina", "a_file.py has no 'Mina'; did you mean 'Mine'"),
        ("a_file.py:nothing", "has no method `run`; derive it from"),
    ],
)
def test_what_cannot_be_loaded_is_named(here, spec, message):
    with pytest.raises(AdapterError, match=message):
        load(spec)


def test_an_import_that_fails_inside_the_adapters_module_is_shown_as_it_is(here):
    with pytest.raises(ModuleNotFoundError, match="there_is_no_such_thing"):
        load("imports_what_is_missing:Mine")


def test_loading_leaves_the_path_as_it_was(here):
    before = list(adapters.sys.path)
    load("a_module_of_mine:Mine")
    assert adapters.sys.path == before
