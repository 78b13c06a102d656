"""Threads of the CPU column: how many there are, and which library starts them.

$MINIMOE_NUM_THREADS, or `--threads` on the command line, says how many threads our loops and matrix products may use;
without it, as many as there are cores. Results do not depend on it: our loops and products add in a fixed order. The
numba column uses no BLAS, so no other library's threads take cores from them.
"""

from __future__ import annotations

import importlib
import os
import sys
from functools import cache

VARIABLE = "MINIMOE_NUM_THREADS"


class ThreadsError(ValueError):
    """A number of threads that cannot be had."""


def before_numba() -> None:
    """Start Numba with as many threads as $MINIMOE_NUM_THREADS says, in whatever thread the model will run.

    Numba reads its own variable once, when it is imported. What a user has set there stays.
    """
    if (number := os.environ.get(VARIABLE, "")).isdecimal() and int(number) > 0 and "numba" not in sys.modules:
        os.environ.setdefault("NUMBA_NUM_THREADS", number)


def check() -> None:
    """Hold this thread to $MINIMOE_NUM_THREADS, where it is set.

    Raises
    ------
    ThreadsError
        If it is no number, or more than Numba was started with.
    """
    if not (given := os.environ.get(VARIABLE, "")):
        return
    if not given.isdecimal():
        raise ThreadsError(f"{VARIABLE} must be a whole number of at least 1, not {given!r}")
    use(int(given), VARIABLE)


def use(number: int, name: str = "number of threads") -> None:
    """Hold the loops and products that the calling thread starts to so many threads.

    Raises
    ------
    ThreadsError
        If it is not between 1 and what Numba was started with; `name` is what the message calls it.
    """
    import numba

    if not 1 <= number <= most():
        raise ThreadsError(f"{name} must be between 1 and {most()} (the cores, or NUMBA_NUM_THREADS), not {number}")
    numba.set_num_threads(number)


def most() -> int:
    """Threads that there can be: what Numba was started with."""
    import numba

    return int(numba.config.NUMBA_NUM_THREADS)


@cache
def layer() -> str:
    """Return the library that will start threads: "tbb", "omp" or "workqueue", the first that can be loaded.

    The last one needs about 100 µs for each parallel loop, where the others need some µs, and two Python threads must
    not enter it at once. It is what is left where neither TBB nor OpenMP (libgomp.so.1) is installed.
    """
    import numba

    asked = numba.config.THREADING_LAYER
    order = [asked] if asked in ("tbb", "omp", "workqueue") else numba.config.THREADING_LAYER_PRIORITY
    for name in order:
        try:
            importlib.import_module(f"numba.np.ufunc.{'workqueue' if name == 'workqueue' else name + 'pool'}")
        except ImportError:
            continue
        return str(name)
    return "none"
