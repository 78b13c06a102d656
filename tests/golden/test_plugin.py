"""The pytest plugin, run as a user runs it: in a folder of their own, in a process of its own."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ADAPTER = """
import numpy as np
from minimoe.golden.adapters import Adapter

class Mine(Adapter):
    def embedding(self, inputs, settings, folder):
        return inputs["table"][inputs["tokens"]]

    def linear(self, inputs, settings, folder):
        return inputs["x"] @ inputs["w"].T, 1, 2

    def rmsnorm(self, inputs, settings, folder):
        h = inputs["x"] + inputs.get("residual", 0)
        return h / np.sqrt((h * h).mean(-1, keepdims=True)) * inputs["weight"]

    def gating(self, inputs, settings, folder):
        return helper()

def helper():
    raise RuntimeError("boom")

class Deviating(Mine):
    deviations = {"rmsnorm/[per]*": "eps is not for us", "model/*": "not offered anyway"}

class Reversed(Adapter):
    forces_routing = True

    def gating(self, inputs, settings, folder):
        logits = inputs["x"] @ inputs["gate"].T
        ids = inputs.get("ids", np.argsort(logits, axis=1)[:, :settings["k"]])
        chosen = np.take_along_axis(logits, np.maximum(ids, 0), axis=1)
        with np.errstate(all="ignore"):
            e = np.exp(chosen - chosen.max(axis=1, keepdims=True))
            return logits, ids, e / e.sum(axis=1, keepdims=True)
"""
BROKEN = "import there_is_no_such_thing\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "mine.py").write_text(ADAPTER)
    (folder / "broken.py").write_text(BROKEN)
    (folder / "test_of_theirs.py").write_text("def test_theirs():\n    pass\n")
    (folder / "known.txt").write_text("# what we know\nrmsnorm/[pe]*   # no eps\n\ngating*\n")
    return folder


@pytest.fixture(scope="module")
def pytest_in(folder):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1",
        "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "160",
    }  # fmt: skip
    environment.pop("PYTEST_ADDOPTS", None)

    def run(*arguments, plugin="minimoe.golden.plugin"):
        command = [sys.executable, "-m", "pytest", *(["-p", plugin] if plugin else []), *arguments]
        found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        return found.returncode, found.stdout + found.stderr

    return run


def outcomes(output):
    """{test: outcome} of a run with -v, and the number of each outcome."""
    lines = re.findall(r"^(golden::\S+|\S+::test_\w+) (PASSED|FAILED|SKIPPED|XFAIL)", output, re.MULTILINE)
    return dict(lines)


@pytest.fixture(scope="module")
def whole(pytest_in):
    return pytest_in("--minimoe-adapter", "mine.py:Mine", "-v", "-rs", "-p", "no:cacheprovider")


# ---- collecting


def test_there_is_a_test_for_each_case_and_none_of_the_folder(whole):
    from minimoe.golden import report, verify

    cases = [case.id for case in verify.read_kit(report.VECTORS)[1] if "float32" in case.profiles]
    assert list(outcomes(whole[1])) == [f"golden::{id}" for id in cases]
    assert f"collected {len(cases)} items" in whole[1]
    assert f"minimoe golden kit: {len(cases)} cases, mine.py:Mine in profile float32" in whole[1]


def test_with_a_path_its_tests_are_collected_too(pytest_in):
    status, output = pytest_in("--minimoe-adapter", "mine:Mine", ".", "--minimoe-include", "embedding", "-v")
    assert status == 0, output
    assert set(outcomes(output)) == {
        "test_of_theirs.py::test_theirs", "golden::embedding/gather", "golden::embedding/square",
    }  # fmt: skip


def test_a_test_can_be_named_and_k_and_exclude_select(pytest_in):
    arguments = ("--minimoe-adapter", "mine:Mine", "-v")
    assert set(outcomes(pytest_in(*arguments, "golden::rmsnorm/plain")[1])) == {"golden::rmsnorm/plain"}
    assert set(outcomes(pytest_in(*arguments, "-k", "gather")[1])) == {"golden::embedding/gather"}
    chosen = outcomes(pytest_in(*arguments, "--minimoe-include", "rms*", "--minimoe-exclude", "rms*/*[!n]")[1])
    assert set(chosen) == {"golden::rmsnorm/plain", "golden::rmsnorm.backward/plain"}


def test_xdist_runs_them_too(pytest_in):
    pytest.importorskip("xdist")
    arguments = (
        "--minimoe-adapter",
        "mine:Mine",
        "-v",
        "--minimoe-include",
        "embedding",
        "-p",
        "xdist.plugin",
        "-n",
        "1",
    )
    status, output = pytest_in(*arguments)
    assert status == 0, output
    assert "2 passed" in output


# ---- outcomes


def test_right_ones_pass_wrong_ones_fail_and_what_is_not_offered_is_skipped(whole):
    status, output = whole
    found = outcomes(output)
    assert status == 1
    assert found["golden::embedding/gather"] == "PASSED"
    assert found["golden::rmsnorm/plain"] == found["golden::linear/wide"] == found["golden::gating/top-2"] == "FAILED"
    assert found["golden::model/main"] == "SKIPPED"
    assert "Mine has no method attention_backward" in output


def section(output, title):
    """What is printed about one failure."""
    return re.search(rf"^_+ case {re.escape(title)} _+\n(.*?)(?=^___|^===)", output, re.MULTILINE | re.DOTALL)[1]


def test_a_failure_shows_the_tensor_the_distance_and_the_likely_mistake_and_no_traceback(whole):
    text = section(whole[1], "rmsnorm/eps-inside")
    assert text.startswith("y: ") and "bounds off" in text and "the first at token 0, channel 0" in text
    assert "eps" in text[text.index("likely mistake:") :]
    assert "Error" not in text and '.py", line' not in text and "def " not in text


def test_all_failures_together_name_the_mistake_at_the_end(whole):
    assert "eps-forgotten" in whole[1][whole[1].index("golden kit: likely mistake") :]


def test_an_adapter_that_raises_shows_its_own_traceback_and_none_of_ours(whole):
    text = section(whole[1], "gating/top-2")
    assert "mine.py" in text and "def helper" in text and "RuntimeError: boom" in text
    assert "minimoe/golden" not in text and "_pytest" not in text


def test_an_adapter_that_returns_something_else_is_told_what(whole):
    assert section(whole[1], "linear/wide").strip() == "linear returned 3 arrays; it should return y"


def test_wrong_routing_is_classed_and_tried_again_with_the_golden_experts(pytest_in):
    _, output = pytest_in("--minimoe-adapter", "mine:Reversed", "--minimoe-include", "gating/top-2")
    assert "wrong expert" in output and "with the golden experts imposed everything fits" in output


# ---- expected failures


def test_expected_failures_do_not_fail_the_run(pytest_in):
    arguments = ("--minimoe-adapter", "mine:Mine", "--minimoe-include", "gating", "--minimoe-include", "rmsnorm/[pe]*")
    status, output = pytest_in(*arguments, "--minimoe-expect-failure", "known.txt", "-rx")
    assert status == 0, output
    assert "XFAIL golden::rmsnorm/plain - no eps" in output and "XFAIL golden::rmsnorm/eps-inside" in output
    assert "likely mistake" not in output


def test_an_expected_failure_that_passes_is_an_error(pytest_in):
    arguments = ("--minimoe-adapter", "mine:Mine", "--minimoe-include", "embedding")
    status, output = pytest_in(*arguments, "--minimoe-expect-failure", "embedding/gather")
    assert status == 1 and "[XPASS(strict)]" in output and "1 failed, 1 passed" in output


def test_an_adapters_own_deviations_are_expected(pytest_in):
    status, output = pytest_in("--minimoe-adapter", "mine:Deviating", "--minimoe-include", "rmsnorm/[per]*", "-rx")
    assert status == 0, output
    assert "XFAIL golden::rmsnorm/plain - eps is not for us" in output


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minimoe-adapter", "mine.py:Mina"], "mine.py has no 'Mina'; did you mean 'Mine'?"),
        (["--minimoe-adapter", "broken:Mine"], "No module named 'there_is_no_such_thing'"),
        (["--minimoe-adapter", "mine:Mine", "--minimoe-include", "gatin"], "'gatin'; is 'gating' meant?"),
        (["--minimoe-adapter", "mine:Mine", "--minimoe-exclude", "nothing*"], "matches 'nothing*'"),
        (["--minimoe-adapter", "mine:Mine", "--minimoe-expect-failure", "gone.txt"], "matches 'gone.txt'"),
        (["--minimoe-adapter", "mine:Mine", "--minimoe-profile", "float8"], "no case has bounds for profile 'float8'"),
        (["--minimoe-adapter", "mine:Mine", "--minimoe-kit", "nowhere"], "nowhere: not a golden kit"),
        (["--minimoe-profile", "float32"], "--minimoe-profile needs --minimoe-adapter"),
    ],
)  # fmt: skip
def test_bad_flags_are_one_message(pytest_in, arguments, message):
    status, output = pytest_in(*arguments)
    assert status == pytest.ExitCode.USAGE_ERROR and message in output


# ---- leaving others alone


def test_without_the_flag_nothing_is_collected_changed_or_imported(pytest_in, folder):
    (folder / "conftest.py").write_text(
        "import sys\n\ndef pytest_sessionfinish():\n"
        "    heavy = {'numpy', 'numba', 'minimoe.model', 'minimoe.golden.calls'}\n"
        "    print('imported:', sorted(heavy & set(sys.modules)))\n"
    )
    try:
        status, output = pytest_in("-v", "-s")
    finally:
        (folder / "conftest.py").unlink()
    assert status == 0 and "1 passed" in output and "golden::" not in output
    assert "imported: []" in output


def test_the_plugin_is_registered():
    entry_points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert entry_points["pytest11"] == {"minimoe": "minimoe.golden.plugin"}
