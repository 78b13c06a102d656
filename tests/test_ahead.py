"""What is compiled ahead is what generating needs, and a second process that fails harms nothing."""

import subprocess
import sys

import numpy as np
import pytest

import minimoe
from minimoe import compiled_step
from minimoe.cli import ahead

# Run in a fresh process, where nothing has been compiled or read from the cache before.
SHORT_PROMPT = """
import numpy as np
import minimoe
from minimoe.cli import ahead
from minimoe.ops.attention.numba_cpu import few as attention
from minimoe.ops.experts.numba_cpu import few, many
ahead._decode_a_step("bfloat16")
assert not many.signatures
ahead._read_a_prompt("bfloat16")
before, attended = list(few.signatures), list(attention.signatures)
minimoe.load("tiny", backend="numba", dtype="bfloat16").generate_ids(np.zeros((1, 4), np.int64), max_new_tokens=1)
assert before and list(few.signatures) == before, few.signatures
assert attended and list(attention.signatures) == attended, attention.signatures
"""


@pytest.fixture(scope="module")
def tiny():
    return minimoe.load("tiny", backend="numba")


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_generating_compiles_nothing_more(kind):
    ahead._decode_a_step(kind)
    steps = compiled_step._compiled.cache_info().currsize
    assert steps
    minimoe.load("tiny", backend="numba", dtype=kind).generate_ids(np.zeros((1, 4), np.int64), max_new_tokens=3)
    assert compiled_step._compiled.cache_info().currsize == steps


def test_a_short_prompt_takes_what_was_compiled_for_it():
    subprocess.run([sys.executable, "-c", SHORT_PROMPT], check=True)


@pytest.mark.parametrize("kind", ["float32", "float64", "bfloat16", "int8"])
def test_the_second_process_does_its_part(kind, tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong file')")
    monkeypatch.chdir(tmp_path)
    other = ahead._start(kind)
    assert other is not None and other.wait(ahead.PATIENCE) == 0


@pytest.mark.parametrize("code", ["raise SystemExit(1)", "import time; time.sleep(600)"], ids=["fails", "hangs"])
def test_a_second_process_that_fails_is_done_without(code, tiny, monkeypatch):
    monkeypatch.setattr(ahead, "PROGRAM", [sys.executable, "-c", code])
    monkeypatch.setattr(ahead, "PATIENCE", 0.1)
    ahead.compile_ahead(tiny)


def test_a_second_process_that_cannot_be_started_is_done_without(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "PROGRAM", [str(tmp_path / "missing")])
    assert ahead._start("float32") is None
    ahead.compile_ahead(tiny)


def test_the_second_process_ends_when_this_one_is_interrupted(tiny, monkeypatch):
    started, start = [], ahead._start

    def remembered(kind):
        started.append(start(kind))
        return started[-1]

    def interrupted(kind):
        raise KeyboardInterrupt

    monkeypatch.setattr(ahead, "PROGRAM", [sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(ahead, "_start", remembered)
    monkeypatch.setattr(ahead, "_read_a_prompt", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ahead.compile_ahead(tiny)
    assert started[0].returncode != 0
