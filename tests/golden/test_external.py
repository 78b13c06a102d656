"""Programs of any language: what they write is checked, however they end, and nothing of them is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from minimoe.golden import external, verify
from minimoe.golden.report import VECTORS
from minimoe.golden.verify import KitError
from tests.golden import kits

GOOD = """
import json, sys, numpy as np, os
from safetensors.numpy import load_file
inputs, outputs, *only = sys.argv[1:]
for entry in json.load(open(inputs + "/manifest.json"))["cases"]:
    if only and entry["id"] != only[0]:
        continue
    x = load_file(f"{inputs}/cases/{entry['id']}.safetensors")["inputs/x"]
    os.makedirs(os.path.dirname(f"{outputs}/{entry['id']}"), exist_ok=True)
    np.savez(f"{outputs}/{entry['id']}.npz", y=2 * x)
"""


@pytest.fixture
def kit(tmp_path):
    """A kit of three cases that ask for twice the input."""
    cases = []
    for i in range(3):
        x = np.arange(4, dtype=np.float32) + i
        entry = kits.entry(f"linear/{i}", "linear", "op", {"y": ("I", 2.0 * x)})
        cases.append((entry, {"x": x}, {"y": 2.0 * x.astype(np.float64)}))
    kits.write(tmp_path / "kit", cases)
    return tmp_path / "kit"


@pytest.fixture
def run(kit, tmp_path, monkeypatch):
    """Run a Python program on the kit; afterwards no scratch folder may be left."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))

    def call(source, *words, **settings):
        program = tmp_path / "program.py"
        program.write_text(source)
        command = [sys.executable, str(program), *(words or ("{inputs}", "{outputs}"))]
        return external.check_program(command, kit, **settings)

    yield call
    assert list(scratch.iterdir()) == []


def statuses(report):
    return [result.status for result in report.results]


def gone(pid):
    """Whether a process has ended (an ended one that nobody has waited for yet counts)."""
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]
    except FileNotFoundError:
        return True


def wait_for(condition):
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    "words", [("{inputs}", "{outputs}"), ("{inputs}", "{outputs}", "{case}")], ids=["once", "each"]
)
def test_a_right_program_passes(run, words):
    report = run(GOOD, *words)
    assert statuses(report) == ["pass"] * 3 and report.exit_status == 0 and report.problem == ""


def test_only_the_chosen_cases_are_asked_for(run, tmp_path):
    report = run(GOOD.replace("x = load", f"open({str(tmp_path / 'asked')!r}, 'a').write(entry['id'])\n    x = load"),
                 only=["linear/1"])  # fmt: skip
    assert statuses(report) == ["pass"] and (tmp_path / "asked").read_text() == "linear/1"


def test_the_inputs_hold_no_truth(kit, tmp_path):
    manifest, cases = verify.read_kit(kit)
    external.write_inputs(kit, manifest, cases[:2], tmp_path / "inputs")
    files = sorted((tmp_path / "inputs/cases").rglob("*.safetensors"))
    assert [f.stem for f in files] == ["0", "1"]
    assert [list(verify.read_tensors(f)) for f in files] == [["inputs/x"]] * 2
    assert [case.id for case in verify.read_kit(tmp_path / "inputs")[1]] == ["linear/0", "linear/1"]


def test_the_inputs_of_the_bundled_kit_hold_its_models(tmp_path):
    manifest, cases = verify.read_kit(VECTORS)
    external.write_inputs(VECTORS, manifest, cases, tmp_path / "inputs")
    for case in verify.read_kit(tmp_path / "inputs")[1]:
        assert case.truth == {} and case.inputs
        assert case.model_folder is None or (case.model_folder / "config.json").is_file()


def test_a_wrong_answer_is_a_failure(run):
    report = run(GOOD.replace("2 * x", "2 * x + (x[0] == 1)"))
    assert statuses(report) == ["pass", "fail", "pass"] and report.exit_status == 1


def test_what_a_program_wrote_before_it_failed_is_checked(run):
    report = run(GOOD + "    print('the last line', file=sys.stderr); sys.exit(3)\n")
    assert statuses(report) == ["pass", "missing", "missing"] and report.exit_status == 1
    assert report.problem.endswith("ended with exit status 3; its last words: the last line")


def test_a_program_that_fails_after_all_is_written_is_still_a_failure(run):
    report = run(GOOD + "sys.exit(1)")
    assert statuses(report) == ["pass"] * 3 and report.exit_status == 1


def test_one_case_that_fails_leaves_the_others(run):
    report = run(
        GOOD.replace("x = load", "x = 1 / (entry['id'] != 'linear/1')\n    x = load"), "{inputs}", "{outputs}", "{case}"
    )
    assert statuses(report) == ["pass", "fail", "pass"]
    assert report.results[1].problem.endswith("ZeroDivisionError: division by zero")
    assert report.problem == ""


def test_half_a_file_and_a_crash_are_both_named(run):
    source = GOOD + "    open(f\"{outputs}/{entry['id']}.npz\", 'wb').write(b'PK half')\n    os.abort()\n"
    result = run(source, "{inputs}", "{outputs}", "{case}", only=["linear/0"]).results[0]
    assert "was killed by SIGABRT" in result.problem and "linear/0.npz: not a whole .npz file" in result.problem


def test_a_program_that_writes_nothing_is_told_where_to_begin(run):
    report = run("")
    assert statuses(report) == ["not offered"] * 3 and report.exit_status == 1
    assert "nothing was given; begin with one op: linear/0.npz" in report.text()


def test_a_file_of_no_case_is_named_without_the_scratch_folder(run):
    report = run(GOOD + "np.savez(outputs + '/linear/O.npz', y=x)")
    assert report.warnings == ["linear/O.npz: no case has this name; is 'linear/2' meant?"] or (
        report.warnings[0].startswith("linear/O.npz: no case has this name; is 'linear/")
    )


def test_garbage_on_both_streams_neither_blocks_nor_reaches_the_report(run):
    source = (
        GOOD
        + "for s in (sys.stdout, sys.stderr): s.buffer.write(b'\\x1b[31m\\x00\\xff junk\\n' * 200_000)\nsys.exit(7)"
    )
    report = run(source)
    assert statuses(report) == ["pass"] * 3
    assert len(report.problem) < 300 and report.problem.isprintable()
    assert "ended with exit status 7; its last words: " in report.problem and report.problem.endswith("junk")


def test_a_program_that_hangs_is_stopped_and_what_it_wrote_is_checked(run):
    start = time.monotonic()
    report = run(GOOD + "import time; time.sleep(60)", timeout=1.5)
    assert time.monotonic() - start < 10
    assert statuses(report) == ["pass"] * 3 and report.problem.endswith("was stopped after 1.5 s")


def test_a_program_that_ignores_being_asked_is_ended(run, monkeypatch):
    monkeypatch.setattr(external, "GRACE", 0.2)
    start = time.monotonic()
    report = run("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)", timeout=0.7)
    assert time.monotonic() - start < 10
    assert report.problem.endswith("was stopped after 0.7 s")


def test_what_a_program_leaves_running_ends_with_it(run, tmp_path):
    source = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
"""
    start = time.monotonic()
    run(source)
    assert time.monotonic() - start < 10
    assert wait_for(lambda: gone(int((tmp_path / "pid").read_text())))


def test_nothing_else_is_ended(run):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        run("import time; time.sleep(60)", timeout=0.3)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_ctrl_c_ends_the_program_and_leaves_no_folder(kit, tmp_path):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "slow.py").write_text(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    )
    command = [sys.executable, "-m", "minimoe", "golden", "run", "--kit", str(kit), "--", sys.executable,
               str(tmp_path / "slow.py"), "{outputs}"]  # fmt: skip
    process = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path / "tmp")}, stderr=subprocess.PIPE)
    assert wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) or process.wait(10)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and b"Traceback" not in stderr
    assert wait_for(lambda: gone(int((tmp_path / "pid").read_text())))
    assert list((tmp_path / "tmp").glob("minimoe-golden-*")) == []


def test_a_program_reads_nothing_from_the_terminal_and_no_shell_reads_its_words(run, tmp_path):
    source = f"import sys, json; json.dump([sys.stdin.read(), sys.argv[3:]], open({str(tmp_path / 'seen')!r}, 'w'))"
    (tmp_path / "typed").write_text("what the user types meanwhile")
    terminal = os.dup(0)
    try:
        with (tmp_path / "typed").open() as typed:
            os.dup2(typed.fileno(), 0)
            run(source, "{inputs}", "{outputs}", "$HOME; rm *", "{x} {}")
    finally:
        os.dup2(terminal, 0)
        os.close(terminal)
    assert json.loads((tmp_path / "seen").read_text()) == ["", ["$HOME; rm *", "{x} {}"]]


@pytest.mark.parametrize("name", ["./no-such-program", "/etc", "plain"])
def test_a_program_that_cannot_be_started_is_one_line(kit, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").write_text("no program")
    word = f"./{name}" if name == "plain" else name
    with pytest.raises(external.ProgramError, match=r"cannot be started: (No such file|Permission denied)"):
        external.check_program([word, "{outputs}"], kit)


def test_a_command_without_a_place_for_outputs_is_refused(kit):
    for command in ([], ["./mine", "{inputs}"]):
        with pytest.raises(external.ProgramError, match="must say where outputs go"):
            external.check_program(command, kit)


# ---- export


def test_an_exported_kit_is_whole_and_verifies_on_its_own(tmp_path):
    external.export(tmp_path / "kit", VECTORS)
    assert len(verify.read_kit(tmp_path / "kit")[1]) == len(verify.read_kit(VECTORS)[1])
    done = subprocess.run([sys.executable, tmp_path / "kit/verify", "--help"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0 and done.stdout.startswith("usage: verify")
    assert not list((tmp_path / "kit").rglob("*.pyc"))


def test_an_export_replaces_an_older_one_only_if_forced(kit, tmp_path):
    external.export(tmp_path / "to", kit)
    (tmp_path / "to/cases/old.safetensors").touch()
    with pytest.raises(KitError, match="holds a golden kit already; --force replaces it"):
        external.export(tmp_path / "to", kit)
    external.export(tmp_path / "to", kit, force=True)
    assert not (tmp_path / "to/cases/old.safetensors").exists()


def test_an_export_never_replaces_what_is_no_kit(kit, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    with pytest.raises(KitError, match="is not empty, and no golden kit"):
        external.export(tmp_path / "mine", kit, force=True)
    external.export(tmp_path / "to", kit)
    (tmp_path / "to/thesis.txt").touch()
    with pytest.raises(KitError, match=r"holds 'thesis\.txt', which is no part of a golden kit"):
        external.export(tmp_path / "to", kit, force=True)


def test_a_kit_that_is_none_is_not_exported(tmp_path):
    with pytest.raises(KitError, match="not a golden kit"):
        external.export(tmp_path / "to", tmp_path)
