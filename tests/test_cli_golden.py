"""`minimoe golden`: what each subcommand prints, its exit status, and one line for every mistake of its user."""

import json
import sys
import types
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from minimoe import cli
from minimoe.golden import report, verify
from minimoe.golden.adapters import OurBackend

ADAPTER = """
from minimoe.golden.adapters import Adapter

class Mine(Adapter):
    def linear(self, inputs, settings, folder):
        print("garbage")
        return {"y": inputs["x"] @ inputs["w"].T + SHIFT}

    def rope(self, inputs, settings, folder):
        raise RuntimeError("no angles today")
"""
PROGRAM = """
import json, os, sys
import numpy as np
from safetensors.numpy import load_file
inputs, outputs = sys.argv[1:]
for case in json.load(open(inputs + "/manifest.json"))["cases"]:
    t = load_file(f"{inputs}/cases/{case['id']}.safetensors")
    os.makedirs(f"{outputs}/linear", exist_ok=True)
    np.savez(f"{outputs}/{case['id']}.npz", y=t["inputs/x"] @ t["inputs/w"].T)
"""


@pytest.fixture
def golden(tmp_path, capsys, monkeypatch):
    """Run `minimoe golden …` in a folder of its own; return status, stdout and stderr."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            status = cli.main(["golden", *map(str, arguments)])
        except SystemExit as stopped:
            status = stopped.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def outputs(tmp_path):
    """A folder of right outputs of `linear` and `gating`; a function that spoils one of them."""
    _, cases = verify.read_kit(report.VECTORS)
    adapter = OurBackend("numpy")
    for case in verify.select(cases, "float32", ["linear", "gating"]):
        path = tmp_path / "out" / f"{case.id}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **adapter.run(case))

    def spoil(id, **arrays):
        path = tmp_path / "out" / f"{id}.npz"
        with np.load(path) as file:
            np.savez(path, **(dict(file) | arrays))

    return spoil


@pytest.fixture
def finding(monkeypatch):
    """A catalogue of mistakes that knows one; what it was asked."""
    asked = []
    stub = types.ModuleType("minimoe.golden.diagnose")
    stub.diagnose = lambda entries, profile: (
        asked.append((entries, profile)) or ["w1 and w3 exchanged\nsee experts.py:9"]
    )
    monkeypatch.setitem(sys.modules, "minimoe.golden.diagnose", stub)
    monkeypatch.setattr("minimoe.golden.diagnose", stub, raising=False)
    return asked


def test_list_shows_every_call_and_says_what_it_computes(golden):
    status, out, err = golden("list")
    assert (status, err) == (0, "")
    assert all(case.call in out for case in verify.read_kit(report.VECTORS)[1])
    assert "top-k of x · gateᵀ" in out and "hf_bfloat16" in out


def test_list_shows_what_the_cases_of_a_pattern_are_for(golden):
    cases = [case for case in verify.read_kit(report.VECTORS)[1] if case.call == "gating"]
    _, out, _ = golden("list", "--only", "gating")
    assert all(f"{case.id}\n    {case.why}\n" in out for case in cases) and out.count("\n    ") == len(cases)
    _, out, _ = golden("list", "--only", "gating", "--json")
    assert [entry["id"] for entry in json.loads(out)] == [case.id for case in cases]


def test_export_then_check_one_op(golden, outputs):
    status, out, _ = golden("export", "kit")
    assert status == 0 and "python kit/verify kit OUTPUTS --only 'rmsnorm*'" in out
    assert Path("kit/verify/__main__.py").is_file() and Path("kit/manifest.json").is_file()
    status, out, err = golden("check", "kit", "out", "--only", "linear", "--only", "gating")
    assert (status, err) == (0, "") and out.endswith("everything chosen fits\n")
    assert golden("export", "kit")[0] == 2 and golden("export", "kit", "--force")[0] == 0


def test_check_names_the_first_wrong_number_and_the_likely_mistake(golden, outputs, finding):
    _, cases = verify.read_kit(report.VECTORS)
    case = next(case for case in cases if case.call == "linear")
    outputs(case.id, y=case.truth["y"] + (np.arange(case.truth["y"].shape[1]) == 1))
    status, out, _ = golden("check", report.VECTORS, "out", "--only", "linear")
    assert status == 1
    assert f"{case.id}: y: " in out and "the first at token 0, output 1: " in out
    assert "likely mistake\n  w1 and w3 exchanged\n  see experts.py:9\n" in out
    [(entries, profile)] = finding
    assert {c.id for c, r, _ in entries if r.status == "fail"} == {case.id} and profile == "float32"
    assert len(entries) > 1, "what passes is evidence, too"
    assert "\x1b" not in out


def test_check_in_json_and_junit(golden, outputs, finding):
    outputs("gating/top-1", ids=np.zeros((1, 1)))
    status, out, err = golden("check", report.VECTORS, "out", "--only", "gating", "--json", "--junit", "j.xml")
    data = json.loads(out)
    assert (status, data["exit_status"], data["counts"]["fail"], err) == (1, 1, 1, "")
    assert data["likely"] == ["w1 and w3 exchanged", "see experts.py:9"]
    assert ET.parse("j.xml").getroot().get("failures") == "1"


def test_colours_are_for_terminals(golden, outputs, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, out, _ = golden("check", report.VECTORS, "out", "--only", "linear")
    assert "\x1b[32mlinear" in out


def test_a_missing_case_is_a_failure_unless_allowed(golden, outputs):
    Path("out/gating/top-1.npz").unlink()
    assert golden("check", report.VECTORS, "out", "--only", "gating")[0] == 1
    assert golden("check", report.VECTORS, "out", "--allow-missing")[0] == 0


def test_our_own_backend_can_be_checked(golden):
    status, out, _ = golden("check", "--backend", "numpy", "--only", "experts*", "--profile", "bfloat16")
    assert status == 0 and "profile bfloat16" in out and out.endswith("everything chosen fits\n")


@pytest.mark.parametrize(("shift", "expected"), [("0", 0), ("1", 1)])
def test_an_adapter_can_be_checked_and_prints_nothing_into_the_report(golden, finding, shift, expected):
    Path("mine.py").write_text(ADAPTER.replace("SHIFT", shift))
    status, out, err = golden("check", "--adapter", "mine.py:Mine", "--only", "linear", "--json")
    assert status == expected and json.loads(out)["profile"] == "float32"
    assert "garbage" in err


def test_an_adapter_that_raises_fails_there_and_is_not_asked_for_what_it_does_not_offer(golden, finding):
    Path("mine.py").write_text(ADAPTER.replace("SHIFT", "0"))
    status, out, _ = golden("check", "--adapter", "mine.py:Mine", "--json")
    data = json.loads(out)
    assert status == 1
    assert {c["status"] for c in data["cases"] if c["call"] == "linear"} == {"pass"}
    assert {c["problem"] for c in data["cases"] if c["call"] == "rope"} == {"RuntimeError: no angles today"}
    assert {c["status"] for c in data["cases"] if c["call"] == "model"} == {"not offered"}


def test_run_starts_a_program_with_its_own_flags(golden):
    Path("mine.py").write_text(PROGRAM)
    program = ["--", sys.executable, "-B", "mine.py", "{inputs}", "{outputs}"]
    status, out, _ = golden("run", "--only", "linear", "--timeout", "60", *program)
    assert status == 0 and out.endswith("everything chosen fits\n")


def test_run_names_how_a_program_ended(golden):
    Path("mine.py").write_text(PROGRAM + "sys.exit('out of ideas')")
    status, out, _ = golden("run", "--only", "linear", "--", sys.executable, "mine.py", "{inputs}", "{outputs}")
    assert status == 1 and "ended with exit status 1; its last words: out of ideas" in out


MISTAKES = {
    "no subcommand": ([], "SUBCOMMAND"),
    "no kit": (["check", "nowhere", "out"], "nowhere: not a golden kit"),
    "nothing to check": (["check"], "give one of OUTPUTS, --adapter and --backend"),
    "two things to check": (["check", "kit", "out", "--backend", "numpy"], "give one of OUTPUTS"),
    "no outputs": (["check", report.VECTORS, "nowhere"], "nowhere: there is no such folder of outputs"),
    "empty outputs": (["check", report.VECTORS, "."], "holds no outputs of embedding/"),
    "no such profile": (["check", "--backend", "numpy", "--profile", "int8"], "'int8'"),
    "no such case": (["check", "--backend", "numpy", "--only", "gatting"], "is 'gating' meant"),
    "no such backend": (["check", "--backend", "abacus"], "unknown backend 'abacus'"),
    "no such adapter": (["check", "--adapter", "mine.py:Mine"], "mine.py: there is no such file"),
    "no program": (["run"], "the command must say where outputs go"),
    "program that is not there": (["run", "--", "./mine", "{outputs}"], "./mine: cannot be started: No such file"),
    "no time": (["run", "--timeout", "0", "--", "true", "{outputs}"], "--timeout must be more than 0 seconds, not 0"),
    "not a time": (["run", "--timeout", "nan", "--", "true", "{outputs}"], "--timeout must be more than 0 seconds"),
    "export over something": (["export", "."], "is not empty, and no golden kit"),
    "report into nowhere": (["check", "--backend", "numpy", "--only", "linear", "--junit", "no/x.xml"], "no/x.xml: "),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(golden, kind):
    arguments, message = MISTAKES[kind]
    Path("something").touch()
    status, out, err = golden(*arguments)
    assert (status, out) == (2, "") and err.startswith("minimoe: error: ") and err.count("\n") == 1
    assert message in err
