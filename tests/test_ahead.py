"""What is compiled ahead is what generating needs, and a second process that fails harms nothing."""

import sys

import numpy as np
import pytest

import minimoe
from minimoe import compiled_step
from minimoe.cli import ahead
from minimoe.ops.experts import numba_cpu as experts


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_generating_compiles_nothing_more(kind):
    ahead._compile_step(kind)
    steps = list(compiled_step._step.signatures)
    assert steps
    minimoe.load("tiny", backend="numba", dtype=kind).generate_ids(np.zeros((1, 4), np.int64), max_new_tokens=3)
    assert list(compiled_step._step.signatures) == steps


def test_the_other_process_finds_the_experts_done(monkeypatch):
    monkeypatch.setattr(sys, "executable", "true")  # does nothing
    ahead.compile_ahead(minimoe.load("tiny", backend="numba"))
    few = list(experts.few.signatures)
    assert few
    ahead._compile_step("bfloat16")
    assert list(experts.few.signatures) == few


def test_a_second_process_that_fails_is_done_without(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    ahead.compile_ahead(minimoe.load("tiny", backend="numba"))


def test_the_second_process_is_ended_when_this_one_is_interrupted(monkeypatch):
    started = []
    popen = ahead.subprocess.Popen

    def slow(command, **options):
        started.append(popen([sys.executable, "-c", "import time; time.sleep(600)"], **options))
        return started[-1]

    def interrupted(kind):
        raise KeyboardInterrupt

    monkeypatch.setattr(ahead.subprocess, "Popen", slow)
    monkeypatch.setattr(ahead, "_small", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ahead.compile_ahead(minimoe.load("tiny", backend="numba"))
    assert started[0].wait(10) != 0
