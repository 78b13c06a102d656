"""How many threads run our loops, and what is said where that cannot be."""

import os
import subprocess
import sys
import threading
import warnings

import numba
import pytest

from minimoe import threads
from minimoe.backends import SLOW_THREADS, make_backend
from minimoe.cli import main


def in_a_new_process(source, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in ("NUMBA_NUM_THREADS", threads.VARIABLE)}
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=kept | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def before():
    number = numba.get_num_threads()
    yield number
    numba.set_num_threads(number)


def test_the_variable_holds_in_every_thread():
    source = """
import minimoe, threading, numba
minimoe.random(minimoe.preset("tiny"), backend="numba")
print(numba.get_num_threads())
other = threading.Thread(target=lambda: print(numba.get_num_threads()))
other.start()
other.join()
"""
    assert in_a_new_process(source, MINIMOE_NUM_THREADS="3") == ["3", "3"]


def test_what_numba_was_told_is_the_most_there_can_be():
    source = """
import minimoe, numba
try:
    minimoe.random(minimoe.preset("tiny"), backend="numba")
except ValueError as error:
    print(error)
"""
    said = in_a_new_process(source, MINIMOE_NUM_THREADS="3", NUMBA_NUM_THREADS="2")
    assert " ".join(said) == (
        "MINIMOE_NUM_THREADS must be between 1 and 2 (the cores, or NUMBA_NUM_THREADS), not 3"
    )  # fmt: skip


def test_numba_that_is_there_already_is_held_back():
    source = "import numba, minimoe; minimoe.random(minimoe.preset('tiny')); print(numba.get_num_threads())"
    assert in_a_new_process(source, MINIMOE_NUM_THREADS="1") == ["1"]


@pytest.mark.parametrize("value", ["many", "-1", "1.5", " "])
def test_what_is_no_number_is_refused(value, monkeypatch):
    monkeypatch.setenv(threads.VARIABLE, value)
    threads.before_numba()  # at import nothing is said
    with pytest.raises(threads.ThreadsError, match="must be a whole number of at least 1"):
        make_backend("numba")
    make_backend("numpy")


def test_zero_threads_are_refused(monkeypatch):
    monkeypatch.setenv(threads.VARIABLE, "0")
    with pytest.raises(threads.ThreadsError, match="must be between 1 and"):
        make_backend("numba")


def test_the_flag_holds_for_a_command(before, capsys):
    assert main(["generate", "--threads", "1", "--max-new-tokens", "1", "a"]) == 0
    assert numba.get_num_threads() == 1
    assert main(["generate", "--threads", "0", "--max-new-tokens", "1", "a"]) == 2
    assert "--threads must be between 1 and" in capsys.readouterr().err


def test_the_layer_named_is_the_one_that_numba_takes():
    source = """
import minimoe, numba, numpy as np
from minimoe import threads
minimoe.random(minimoe.preset("tiny"), backend="numba").forward(np.arange(64))
print(threads.layer(), numba.threading_layer())
"""
    named, taken = in_a_new_process(source)
    assert named == taken
    assert in_a_new_process(source, NUMBA_THREADING_LAYER="workqueue") == ["workqueue", "workqueue"]


def test_slow_threads_are_said_to_be_slow(monkeypatch):
    monkeypatch.setattr(threads, "layer", lambda: "workqueue")
    with pytest.warns(RuntimeWarning, match="install OpenMP"):
        make_backend("numba")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_backend("numpy")
    assert "libgomp1" in SLOW_THREADS


def test_holding_one_thread_leaves_others_alone(before):
    if before < 2:
        pytest.skip("needs two cores")
    found = []
    other = threading.Thread(target=lambda: (threads.use(1), found.append(numba.get_num_threads())))
    other.start()
    other.join()
    assert found == [1] and numba.get_num_threads() == before
